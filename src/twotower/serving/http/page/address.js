// The part of the address behind the #: the user, the models and the settings. It can be sent to a colleague, and
// browsers never send it to a server.

import { byId } from "./dom.js";
import { chooseRandomUser, restoreUser } from "./history.js";
import { KS, REQUEST, state, subscribe, update } from "./store.js";

const LONGEST = 60; // maximum number of history items in the address
let restoring = false; // the address keeps its text until it has been read

export function attach() {
  byId("dial").addEventListener("change", write);
  addEventListener("hashchange", changed);
  subscribe(REQUEST, write);
}

function write() {
  if (restoring) return;
  const { letters, models, query } = state;
  const address = new URLSearchParams();
  if (query !== null) address.set("user", query);
  if (state.edited || query === null) address.set("history", state.history.slice(-LONGEST).map((item) => encodeURIComponent(item.item)).join(","));
  if (state.text) address.set("text", state.text);
  if (Object.keys(state.context).length) address.set("context", JSON.stringify(state.context));
  if (state.dial !== 1) address.set("dial", String(state.dial));
  if (letters.a !== models[0]?.name) address.set("model", letters.a);
  if (models.length > 1) address.set("beside", letters.b ?? "");
  if (state.k !== 10) address.set("k", String(state.k));
  if (!state.excludeSeen) address.set("seen", "shown");
  if (state.filter) address.set("filter", state.filter);
  if (state.group) address.set("group", state.group);
  if (state.time) address.set("time", state.time);
  history.replaceState(null, "", `#${address}`);
}

export async function restore() {
  const address = new URLSearchParams(location.hash.slice(1));
  restoring = true;
  try {
    update({
      letters: lettersIn(address),
      ...settingsIn(address),
      text: (address.get("text") ?? "").trim(),
      context: contextIn(address.get("context")),
      ...{ query: null, history: [], edited: false, all: false, found: {}, explanations: {} },
    });
    const ids = address.get("history")?.split(",").filter(Boolean).map(decoded) ?? null;
    if (address.get("user") || ids) await restoreUser(address.get("user"), ids);
    else if (!state.text) await chooseRandomUser();
  } finally {
    restoring = false;
    write();
  }
}

// The reader followed a link to a part of this page, or entered another address.
function changed() {
  if (document.getElementById(location.hash.slice(1))) write();
  else restore();
}

function lettersIn(address) {
  const known = (name) => (state.models.some((model) => model.name === name) ? name : null);
  const a = known(address.get("model")) ?? state.models[0].name;
  const b = known(address.get("beside") ?? state.models[1]?.name);
  return { a, b: b === a ? null : b };
}

function settingsIn(address) {
  const [dial, k] = [Number(address.get("dial") ?? 1), Number(address.get("k"))];
  return {
    dial: dial >= 0 && dial <= 2 ? dial : 1,
    k: KS.includes(k) ? k : 10,
    excludeSeen: address.get("seen") !== "shown",
    filter: (address.get("filter") ?? "").trim(),
    group: address.get("group") ?? "",
    time: address.get("time") ?? "",
  };
}

// Returns the context as texts by column, and ignores everything else: the address may come from anyone.
function contextIn(text) {
  try {
    return Object.fromEntries(Object.entries(JSON.parse(text) ?? {}).filter(([, value]) => typeof value === "string"));
  } catch {
    return {};
  }
}

function decoded(id) {
  try {
    return decodeURIComponent(id);
  } catch {
    return id;
  }
}
