// The address: what is looked at, so that it can be looked at again.

import { byId } from "./dom.js";
import { chooseModels } from "./models.js";
import { state } from "./state.js";
import { recallWho, surprise } from "./who.js";

let recalling = false; // until it is looked at, the address keeps what it says

// What is looked at stands in the address, behind the #: it can be sent to a colleague and is never sent to a server.
export function remember() {
  if (recalling) return;
  const kept = new URLSearchParams();
  if (state.query !== null) kept.set("user", state.query);
  if (state.edited || state.query === null) kept.set("history", state.history.slice(-60).map((item) => item.item).join(","));
  if (Object.keys(state.context).length) kept.set("context", JSON.stringify(state.context));
  if (state.dial !== 1) kept.set("dial", String(state.dial));
  if (state.letters.a !== state.models[0]?.name) kept.set("model", state.letters.a);
  if (state.models.length > 1) kept.set("beside", state.letters.b ?? "");
  if (state.k !== 10) kept.set("k", String(state.k));
  if (!state.seen) kept.set("seen", "shown");
  if (state.filter) kept.set("filter", state.filter);
  history.replaceState(null, "", `#${kept}`);
}

export async function recall() {
  const kept = new URLSearchParams(location.hash.slice(1));
  const has = (name) => state.models.some((model) => model.name === name);
  byId("model-a").value = has(kept.get("model")) ? kept.get("model") : state.models[0].name;
  const beside = kept.get("beside") ?? state.models[1]?.name;
  byId("model-b").value = has(beside) ? beside : "";
  const dial = Number(kept.get("dial") ?? 1);
  state.dial = dial >= 0 && dial <= 2 ? dial : 1;
  byId("dial").value = String(state.dial);
  recallSettings(kept);
  state.context = contextIn(kept.get("context"));
  recalling = true;
  try {
    Object.assign(state, { query: null, history: [], edited: false, all: false });
    chooseModels();
    const ids = kept.get("history")?.split(",").filter(Boolean) ?? null;
    if (kept.get("user") || ids) await recallWho(kept.get("user"), ids);
    else await surprise();
  } finally {
    recalling = false;
    remember();
  }
}

function recallSettings(kept) {
  byId("k").value = kept.get("k") ?? "10";
  if (!byId("k").value) byId("k").value = "10";
  Object.assign(state, { k: Number(byId("k").value), seen: kept.get("seen") !== "shown", filter: (kept.get("filter") ?? "").trim() });
  byId("seen").checked = state.seen;
  byId("filter").value = state.filter;
  if (state.k !== 10 || !state.seen || state.filter) document.querySelector(".settings").open = true;
}

// Another address was put in this one's place; or a part of the page was gone to, and what is looked at stays.
export function addressChanged() {
  if (document.getElementById(location.hash.slice(1))) remember();
  else recall();
}

// Texts by column; an address may have been written by anybody.
function contextIn(text) {
  try {
    return Object.fromEntries(Object.entries(JSON.parse(text) ?? {}).filter(([, value]) => typeof value === "string"));
  } catch {
    return {};
  }
}
