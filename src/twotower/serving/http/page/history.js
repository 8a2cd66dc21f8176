// Actions that change who is asking: a known user or a new one, and the items of the history.

import { abort, aborted, get } from "./api.js";
import { LONGEST_HISTORY, refuse, state, update } from "./store.js";

let actions = 0; // counts the reader's actions, because answers may arrive in a different order
let since = 0; // the action that began the current history
let choosing = Promise.resolve(); // settles when the chosen user is shown or refused

function show(action, query, history, edited) {
  since = action;
  update({ query, history, edited, all: false });
}

// Runs a choice of a user. Items that are added while it runs are added to that user's history.
function choose(find) {
  choosing = find(++actions).catch((error) => { if (!aborted(error)) refuse(null, error.message); });
  return choosing;
}

async function showUser(action, id, edited = null) {
  try {
    const { items } = await get("page/history", { query_id: id, model: state.letters.a }, "history");
    show(action, id, edited ?? items, edited !== null);
  } catch (error) {
    if (error.status !== 404) throw error;
    if (edited) show(action, null, edited, true);
    refuse("query_id", `This model has no user “${id}”.`);
  }
}

export async function chooseUser(id) {
  if (id) await choose((action) => showUser(action, id));
}

export async function chooseRandomUser() {
  await choose(async (action) => {
    const { queries } = await get("page/queries", { model: state.letters.a, k: 1 }, "history");
    if (queries.length) await showUser(action, String(queries[0]));
    else refuse("query_id", "This model has no list of users. Add items to build a history.");
  });
}

// Shows a user by id, by the ids of a history, or both; `ids` is null for the user's own history.
export async function restoreUser(id, ids) {
  await choose(async (action) => {
    const requests = (ids ?? []).map((item) => itemOf(item).catch(() => null));
    const items = (await Promise.all(requests)).filter(Boolean);
    if (action !== actions) return; // the reader has acted since
    if (id) await showUser(action, id, ids && items);
    else show(action, null, items, true);
  });
}

// Adds an item to the user that was chosen last, even if that user's history arrives after the item.
export async function addItem(id) {
  const action = ++actions;
  try {
    const item = await itemOf(id);
    await choosing;
    if (action < since || state.history.some((other) => other.item === item.item)) return;
    update({ history: [...state.history, item].slice(-LONGEST_HISTORY), edited: true });
  } catch (error) {
    refuse("history", error.message);
  }
}

export function removeItem(id) {
  actions += 1;
  update({ history: state.history.filter((item) => item.item !== id), edited: true });
}

export function startEmpty() {
  abort("history");
  show(++actions, null, [], false);
}

const itemOf = (id) => get(`items/${encodeURIComponent(id)}`, { model: state.letters.a });
