// Who asks: a user of the data, or somebody new by the titles of a history.

import { changed } from "./answers.js";
import { abandon, get, obsolete } from "./api.js";
import { byId, element, readable, whole } from "./dom.js";
import { meter } from "./lists.js";
import { LONGEST, complain, state, summaryOf } from "./state.js";

const SHOWN = 60; // items of the history before "show all"

export async function chooseQuery(id) {
  if (!id) return;
  try {
    const { items } = await get("page/history", { query_id: id, model: state.letters.a }, "history");
    Object.assign(state, { query: id, history: items, edited: false, all: false });
    byId("query").value = id;
    changed();
  } catch (error) {
    if (!obsolete(error)) complain(`${error.message}: ${id}`);
  }
}

export async function surprise() {
  try {
    const { queries } = await get("page/queries", { model: state.letters.a, k: 1 }, "history");
    if (queries.length) await chooseQuery(String(queries[0]));
    else complain("This model knows no users; add titles to build a history.");
  } catch (error) {
    if (!obsolete(error)) complain(error.message);
  }
}

export async function add(id) {
  try {
    const item = await get(`items/${encodeURIComponent(id)}`, { model: state.letters.a });
    if (state.history.some((one) => one.item === item.item)) return;
    state.history = [...state.history, item].slice(-LONGEST);
    state.edited = true;
    changed();
  } catch (error) {
    complain(error.message);
  }
}

function remove(id) {
  state.history = state.history.filter((item) => item.item !== id);
  state.edited = true;
  changed();
}

export function startEmpty() {
  abandon("history");
  Object.assign(state, { query: null, history: [], edited: false, all: false });
  byId("query").value = "";
  changed();
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
