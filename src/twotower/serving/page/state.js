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
  context: {}, // column -> what stands in its field
  found: {}, // letter -> items
  refused: {}, // letter -> whether its last question was
  curves: {}, // letter -> medians
  open: {}, // letter -> item whose details are shown
  mapped: null, // the model whose map is drawn, and its version
};

export const summaryOf = (name) => state.models.find((model) => model.name === name);
export const active = () => ["a", "b"].filter((letter) => state.letters[letter]);
export const channel = (kind, letter) => `${kind}-${letter}`;

// The context as one model is asked with it: the columns that it declares, as values of their kind; null for none.
export function contextFor(letter) {
  const told = {};
  for (const { column, kind, separator } of summaryOf(state.letters[letter])?.context ?? []) {
    const text = state.context[column];
    if (text === undefined) continue;
    const several = separator ? text.split(separator).map((one) => one.trim()).filter(Boolean) : null;
    if (kind === "dense") told[column] = several.map(Number);
    else if (several) told[column] = several;
    else told[column] = kind === "numeric" ? Number(text) : text;
  }
  return Object.keys(told).length ? told : null;
}

// Who asks, in which context; null where nothing is known of them that this model looks at.
export function question(letter) {
  const history = state.edited || state.query === null ? state.history.map((item) => item.item) : null;
  const context = contextFor(letter);
  if (state.query === null && !history.length && !context) return null;
  return {
    ...(state.query === null ? {} : { query_id: state.query }),
    ...(history && (history.length || state.query !== null) ? { history } : {}),
    ...(context ? { context } : {}),
  };
}

export function asked(letter, dial = state.dial) {
  const who = question(letter);
  if (!who) return null;
  return { ...who, model: state.letters[letter], k: state.k, exclude_seen: state.seen, popularity: dial, ...(state.filter ? { filter: state.filter } : {}) };
}

export function complain(text) {
  const place = byId("problem");
  place.hidden = !text;
  place.textContent = text ?? "";
}
