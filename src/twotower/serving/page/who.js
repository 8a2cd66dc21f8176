// Who asks: a user of the data, or somebody new by the titles of a history.

import { changed } from "./answers.js";
import { abandon, get, obsolete } from "./api.js";
import { byId, element, readable, whole } from "./dom.js";
import { meter } from "./lists.js";
import { LONGEST, complain, state, summaryOf } from "./state.js";

const SHOWN = 60; // items of the history before "show all"
let acts = 0; // counts what the reader has done here: answers come in another order
let since = 0; // the act that this history began with
let choosing = Promise.resolve(); // settles when the user asked for is there, or is not to be had

function show(act, query, items, edited) {
  since = act;
  Object.assign(state, { query, history: items, edited, all: false });
  byId("query").value = query ?? "";
  changed();
}

// Somebody is asked for: `find` gives them. Titles added meanwhile are added to them.
function choose(find) {
  choosing = find(++acts).catch((error) => { if (!obsolete(error)) complain(error.message); });
  return choosing;
}

async function known(act, id, instead = null) {
  try {
    const { items } = await get("page/history", { query_id: id, model: state.letters.a }, "history");
    show(act, id, instead ?? items, instead !== null);
  } catch (error) {
    if (error.status !== 404) throw error;
    if (instead) show(act, null, instead, true);
    complain(`${error.message}: ${id}`);
  }
}

export async function chooseQuery(id) {
  if (id) await choose((act) => known(act, id));
}

export async function surprise() {
  await choose(async (act) => {
    const { queries } = await get("page/queries", { model: state.letters.a, k: 1 }, "history");
    if (queries.length) await known(act, String(queries[0]));
    else complain("This model knows no users; add titles to build a history.");
  });
}

// Whoever stood in the address; `ids` is their history where it is another than the known one, else null.
export async function recallWho(id, ids) {
  await choose(async (act) => {
    const asked = (ids ?? []).map((one) => get(`items/${encodeURIComponent(one)}`, { model: state.letters.a }).catch(() => null));
    const items = (await Promise.all(asked)).filter(Boolean);
    if (act !== acts) return; // the reader has done something since
    if (id) await known(act, id, ids && items);
    else show(act, null, items, true);
  });
}

// An item goes to whoever was chosen when it was added, also where they come later than it.
export async function add(id) {
  const act = ++acts;
  try {
    const item = await get(`items/${encodeURIComponent(id)}`, { model: state.letters.a });
    await choosing;
    if (act < since || state.history.some((one) => one.item === item.item)) return;
    state.history = [...state.history, item].slice(-LONGEST);
    state.edited = true;
    changed();
  } catch (error) {
    complain(error.message);
  }
}

function remove(id) {
  const rows = [...byId("history").children];
  const at = rows.findIndex((row) => row.dataset.item === String(id));
  acts += 1;
  state.history = state.history.filter((item) => item.item !== id);
  state.edited = true;
  changed();
  const left = byId("history").children;
  (left[Math.min(at, left.length - 1)]?.querySelector("button") ?? byId("history")).focus({ preventScroll: true });
}

export function startEmpty() {
  abandon("history");
  show(++acts, null, [], false);
  byId("title").focus();
}

export function drawHistory() {
  const latest = [...state.history].reverse();
  const shown = state.all ? latest : latest.slice(0, SHOWN);
  const most = summaryOf(state.letters.a)?.most_interactions;
  byId("history").replaceChildren(
    ...shown.map((item) => {
      const row = element(
        "li",
        {},
        element("span", { class: "name", title: readable(item) }, readable(item)),
        element("button", { type: "button", "aria-label": `Remove ${readable(item)}`, onclick: () => remove(item.item) }, "×"),
        meter(item, most),
      );
      row.dataset.item = String(item.item);
      return row;
    }),
  );
  byId("history-title").textContent = state.history.length ? `History (${whole.format(state.history.length)})` : "History";
  const length = summaryOf(state.letters.a)?.history_length ?? 0;
  const hints = [];
  if (!state.history.length) hints.push("Pick a user, or add titles: the recommendations follow at once.");
  else {
    hints.push("Latest first.");
    if (length && state.history.length > length) hints.push(`The model looks at the latest ${length}.`);
    if (state.edited && state.query !== null) hints.push(`Changed: no longer what user ${state.query} did.`);
  }
  byId("history-hint").textContent = hints.join(" ");
  byId("restore").hidden = !(state.edited && state.query !== null);
  byId("more").hidden = shown.length === latest.length;
  byId("more").textContent = `Show all ${whole.format(latest.length)}`;
}
