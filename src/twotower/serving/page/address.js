// The address: what is looked at, so that it can be looked at again.

import { changed } from "./answers.js";
import { get } from "./api.js";
import { byId } from "./dom.js";
import { chooseModels } from "./models.js";
import { state } from "./state.js";
import { chooseQuery, surprise } from "./who.js";

// What is looked at stands in the address, behind the #: it can be sent to a colleague and is never sent to a server.
export function remember() {
  const kept = new URLSearchParams();
  if (state.query !== null) kept.set("user", state.query);
  if (state.edited || state.query === null) kept.set("history", state.history.slice(-60).map((item) => item.item).join(","));
  if (Object.keys(state.context).length) kept.set("context", JSON.stringify(state.context));
  if (state.dial !== 1) kept.set("dial", String(state.dial));
  if (state.letters.a !== state.models[0]?.name) kept.set("model", state.letters.a);
  if (state.letters.b) kept.set("beside", state.letters.b);
  history.replaceState(null, "", `#${kept}`);
}

export async function recall() {
  const kept = new URLSearchParams(location.hash.slice(1));
  const has = (name) => state.models.some((model) => model.name === name);
  if (has(kept.get("model"))) byId("model-a").value = kept.get("model");
  if (has(kept.get("beside"))) byId("model-b").value = kept.get("beside");
  const dial = Number(kept.get("dial") ?? 1);
  if (dial >= 0 && dial <= 2) state.dial = dial;
  byId("dial").value = String(state.dial);
  state.context = contextIn(kept.get("context"));
  chooseModels();
  if (kept.get("user")) await chooseQuery(kept.get("user"));
  const items = (kept.get("history") ?? "").split(",").filter(Boolean);
  if (items.length) {
    const found = await Promise.all(items.map((id) => get(`items/${encodeURIComponent(id)}`, { model: state.letters.a }).catch(() => null)));
    state.history = found.filter(Boolean);
    state.edited = true;
    changed();
  }
  if (state.query === null && !state.history.length && kept.get("history") === null) await surprise();
}

// Texts by column; an address may have been written by anybody.
function contextIn(text) {
  try {
    return Object.fromEntries(Object.entries(JSON.parse(text) ?? {}).filter(([, value]) => typeof value === "string"));
  } catch {
    return {};
  }
}
