// Who is asking: the field for a known user, the field for items, and the history.

import { get } from "./api.js";
import { combo } from "./combo.js";
import { byId, element } from "./dom.js";
import { addItem, chooseRandomUser, chooseUser, removeItem, startEmpty } from "./history.js";
import { integer, meter, readable } from "./items.js";
import { state, subscribe, summary, update } from "./store.js";

const SHOWN = 60; // number of history items shown until "Show all" is pressed
const PULLS = 3; // maximum number of history items marked for the row under the pointer

export function attach() {
  combo(byId("query"), byId("query-list"), {
    suggest: async (text) => (await get("page/queries", { text, k: 12, model: state.letters.a }, "queries")).queries.map(String),
    label: (id) => id,
    choose: chooseUser,
    enter: chooseUser,
  });
  combo(byId("title"), byId("title-list"), {
    suggest: async (text) => (text ? (await get("items", { text, k: 12, model: state.letters.a }, "titles")).items : []),
    label: (item) => [element("bdi", {}, readable(item)), element("span", { class: "quiet", title: "interactions in training" }, integer.format(item.interactions))],
    choose: (item) => {
      byId("title").value = "";
      addItem(item.item);
    },
  });
  byId("random").addEventListener("click", chooseRandomUser);
  byId("restore").addEventListener("click", () => chooseUser(state.query));
  byId("more").addEventListener("click", () => update({ all: true }));
  byId("clear").addEventListener("click", () => {
    startEmpty();
    byId("title").focus();
  });
  subscribe(["query"], () => { byId("query").value = state.query ?? ""; });
  subscribe(["models", "letters", "query", "history", "all"], draw);
  subscribe(["pointed", "explanations"], drawPulls);
}

function draw() {
  const { history } = state;
  const latest = [...history].reverse();
  const shown = state.all ? latest : latest.slice(0, SHOWN);
  byId("history").replaceChildren(...shown.map(row));
  byId("history-title").textContent = history.length ? `History (${integer.format(history.length)})` : "History";
  byId("history-hint").textContent = hint();
  byId("restore").hidden = !(state.edited && state.query !== null);
  byId("more").hidden = shown.length === latest.length;
  byId("more").textContent = `Show all ${integer.format(latest.length)}`;
  drawPulls();
}

function row(item) {
  const made = element(
    "li",
    {},
    element("span", { class: "name", title: readable(item) }, readable(item)),
    element("button", { type: "button", "aria-label": `Remove ${readable(item)}`, onclick: () => remove(item.item) }, "×"),
    meter(item, summary("a")?.most_interactions),
  );
  made.dataset.item = item.item;
  return made;
}

function hint() {
  if (!state.history.length && summary("a")?.texts_are_queries) return "Search with your own words, or choose a query from the data.";
  if (!state.history.length) return "Choose a user or add items. The recommendations update at once.";
  const hints = ["Latest first."];
  const length = summary("a")?.history_length ?? 0;
  if (length && state.history.length > length) hints.push(`The model reads the latest ${length}.`);
  if (state.edited && state.query !== null) hints.push(`Edited: differs from the history of user ${state.query}.`);
  return hints.join(" ");
}

// Removes an item, and moves the focus to the next row for users of the keyboard.
function remove(id) {
  const at = [...byId("history").children].findIndex((one) => one.dataset.item === id);
  removeItem(id);
  const left = byId("history").children;
  (left[Math.min(at, left.length - 1)]?.querySelector("button") ?? byId("history")).focus({ preventScroll: true });
}

// Marks the items of the history that raised the item under the pointer most.
function drawPulls() {
  const { letter, item } = state.pointed ?? {};
  const explained = state.explanations[letter]?.get(item)?.history ?? [];
  const pulls = new Map(explained.filter((one) => one.contribution > 0).slice(0, PULLS).map((one) => [one.item, one.contribution]));
  for (const one of byId("history").children) {
    const pull = pulls.get(one.dataset.item);
    one.className = pull === undefined ? "" : `pulled by-${letter}`;
    one.querySelector(".pull")?.remove();
    if (pull !== undefined) one.querySelector(".meter").append(element("span", { class: "pull" }, `+${pull.toFixed(2)}`));
  }
}
