// What the page knows: the models, who asks and how, and what was answered.

import { byId } from "./dom.js";

export const LONGEST = 5000; // items of a history that the service takes

export const state = {
  models: [],
  letters: { a: null, b: null }, // names of the models compared
  query: null,
  history: [], // oldest first
  edited: false,
  all: false,
  dial: 1,
  k: 10,
  seen: true,
  filter: "",
  found: {}, // letter -> items
  curves: {}, // letter -> medians
  open: {}, // letter -> item whose details are shown
  mapped: null, // the model whose map is drawn, and its version
};

export const summaryOf = (name) => state.models.find((model) => model.name === name);
export const active = () => ["a", "b"].filter((letter) => state.letters[letter]);
export const channel = (kind, letter) => `${kind}-${letter}`;

export function question() {
  const history = state.edited || state.query === null ? state.history.map((item) => item.item) : null;
  if (state.query === null && !history.length) return null;
  return { ...(state.query === null ? {} : { query_id: state.query }), ...(history ? { history } : {}) };
}

export function asked(letter, dial = state.dial) {
  const who = question();
  if (!who) return null;
  return { ...who, model: state.letters[letter], k: state.k, exclude_seen: state.seen, popularity: dial, ...(state.filter ? { filter: state.filter } : {}) };
}

export function complain(text) {
  const place = byId("problem");
  place.hidden = !text;
  place.textContent = text ?? "";
}
