// The responses of the models: recommendations, their explanations, and the curve above the dial.

import { abort, aborted, get, post } from "./api.js";
import { later } from "./dom.js";
import { medianInteractions } from "./items.js";
import { REQUEST, active, offerFor, queryFor, refuse, state, subscribe, summary, update, updateList } from "./store.js";

export const SETTINGS = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]; // of the dial, at which the curve is measured
const MOST_EXPLAINED = 20;
let rounds = 0;

export function attach() {
  subscribe(REQUEST, () => update({ open: {}, curves: {} }));
  subscribe([...REQUEST, "dial"], recommendAll);
  subscribe([...REQUEST, "models"], measureCurves);
}

export async function loadModels() {
  update({ models: (await get("models")).models });
}

// Called when a response comes from a model version that is not the listed one.
const reloadModels = later(50, () => loadModels().catch((error) => refuse(null, error.message)));

const request = (letter, dial) => {
  const query = queryFor(letter);
  if (!query) return null;
  const filter = state.filter ? { filter: state.filter } : {};
  return { ...query, model: state.letters[letter], k: state.k, exclude_seen: state.excludeSeen, popularity: dial, ...filter, ...offerFor(letter) };
};

async function recommendAll() {
  update({ refusals: [] });
  const round = ++rounds;
  const slow = setTimeout(() => update({ busy: true }), 400);
  await Promise.all(["a", "b"].map(recommend));
  clearTimeout(slow);
  if (round !== rounds) return; // a later request is running
  update({ busy: false });
  explainAll();
}

async function recommend(letter) {
  const channel = `recommend-${letter}`;
  const body = request(letter, state.dial);
  if (!body) {
    abort(channel);
    updateList(letter, { found: [], explanations: null });
    return;
  }
  try {
    const { items, version } = await post("recommend", body, channel);
    updateList(letter, { found: items, explanations: null });
    if (version && version !== summary(letter)?.version) reloadModels();
  } catch (error) {
    if (aborted(error)) return;
    updateList(letter, { found: null, explanations: null });
    for (const { field, text } of refusalsIn(error)) refuse(field, text, state.letters[letter]);
  }
}

// The fields that a refusal concerns: by JSON pointer, or else by the name that its text begins with.
function refusalsIn({ errors, message }) {
  if (errors.length) return errors.map(({ pointer, detail }) => ({ field: fieldAt(pointer), text: sentence(detail) }));
  const [, field] = /^(query_id|text|history|filter|group|time)\b/.exec(message) ?? [null, null];
  return [{ field, text: sentence(message) }];
}

function fieldAt(pointer) {
  return pointer.slice(2).split("/").map((part) => decodeURIComponent(part).replaceAll("~1", "/").replaceAll("~0", "~")).join("/");
}

// The text without the name of the field, because it is shown next to that field.
function sentence(text) {
  const rest = text.replace(/^(context: column .*?: (?=expected )|(query_id|text|history|filter|group|time): )/, "");
  return rest.charAt(0).toUpperCase() + rest.slice(1);
}

const explainAll = later(60, () => active().forEach(explain));

async function explain(letter) {
  const query = queryFor(letter);
  const list = state.found[letter];
  if (!query || !list?.length) return;
  if (query.text && summary(letter).texts_are_queries) return; // there is no history item to name
  const items = list.slice(0, MOST_EXPLAINED).map((item) => item.item);
  try {
    const found = await post("explain", { ...query, model: state.letters[letter], items, popularity: state.dial }, `explain-${letter}`);
    if (state.found[letter] !== list) return;
    updateList(letter, { explanations: new Map(items.map((item, at) => [item, found.items[at]])) });
  } catch (error) {
    if (!aborted(error)) refuse(null, error.message, state.letters[letter]);
  }
}

function measureCurves() {
  active().forEach(measureCurve);
}

async function measureCurve(letter) {
  const channels = SETTINGS.map((dial) => `curve-${dial}-${letter}`);
  if (!queryFor(letter)) {
    channels.forEach(abort);
    return;
  }
  try {
    const lists = await Promise.all(SETTINGS.map((dial, at) => post("recommend", request(letter, dial), channels[at])));
    updateList(letter, { curves: lists.map((found) => medianInteractions(found.items)) });
  } catch {
    // The dial works without its curve. A refusal is shown with the list.
  }
}
