// The state of the page. Views subscribe to it and actions update it; nothing else connects them.

export const LONGEST_HISTORY = 5000; // maximum number of history items that the service accepts
export const KS = [5, 10, 20]; // lengths of a list

export const state = {
  models: [], // summaries of the models served
  letters: { a: null, b: null }, // names of the models whose lists are shown
  query: null, // id of a known user, as text
  history: [], // oldest first
  edited: false, // whether the history differs from the known user's
  all: false, // whether the whole history is shown
  text: "", // words to search for
  context: {}, // column -> text of its field
  dial: 1,
  k: 10,
  excludeSeen: true,
  filter: "",
  group: "", // group of the request; required by a model with groups
  time: "", // time of the request in UTC; empty for the present time
  // By letter:
  found: {}, // recommended items; null after a refusal
  explanations: {}, // item id -> explanation
  curves: {}, // median interactions at each setting of the dial
  open: {}, // {item, columns} of the expanded row
  busy: false, // whether the lists shown answer an earlier request
  pointed: null, // {letter, item}: the row under the pointer or with the focus
  refusals: [], // {field, text, model}: what the service refused; field is null if it concerns no field
  theme: null,
};

// The keys of the state that make up a request: a change of any of them changes the recommendations.
export const REQUEST = ["letters", "query", "history", "text", "context", "k", "excludeSeen", "filter", "group", "time"];

const subscribers = [];

// Calls `react` after each update of one of `keys`.
export function subscribe(keys, react) {
  subscribers.push([keys, react]);
}

export function update(changes) {
  Object.assign(state, changes);
  for (const [keys, react] of subscribers) if (keys.some((key) => key in changes)) react();
}

// Updates values that are stored by letter.
export function updateList(letter, changes) {
  update(Object.fromEntries(Object.entries(changes).map(([key, value]) => [key, { ...state[key], [letter]: value }])));
}

export function refuse(field, text, model = null) {
  update({ refusals: [...state.refusals, { field, text, model }] });
}

const summaryOf = (name) => state.models.find((model) => model.name === name);
export const summary = (letter) => summaryOf(state.letters[letter]);
export const active = () => ["a", "b"].filter((letter) => state.letters[letter]);

// The part of a request that says who is asking; null if it contains nothing that the model reads.
export function queryFor(letter) {
  if (!state.letters[letter]) return null;
  const history = state.edited || state.query === null ? state.history.map((item) => item.item) : null;
  const context = contextFor(letter);
  const text = state.text && summary(letter)?.text ? { text: state.text } : null;
  // The words are the whole query of a model whose queries are texts.
  if (text && summary(letter).texts_are_queries) return { ...text, ...(history?.length ? { history } : {}), ...(context ? { context } : {}) };
  if (state.query === null && !history.length && !context && !text) return null;
  return {
    ...text,
    ...(state.query === null ? {} : { query_id: state.query }),
    ...(history && (history.length || state.query !== null) ? { history } : {}),
    ...(context ? { context } : {}),
  };
}

// The group and the time of the request, if the model uses them.
export function offerFor(letter) {
  const { groups = [], has_intervals: timed = false } = summary(letter) ?? {};
  return { ...(groups.length ? { group: state.group || String(groups[0]) } : {}), ...(timed && state.time ? { time: state.time } : {}) };
}

// The context columns that the model declares, as values of their kind; null if none is filled in.
function contextFor(letter) {
  const values = {};
  for (const { column, kind, separator } of summary(letter)?.context ?? []) {
    const text = state.context[column];
    if (text === undefined) continue;
    const parts = separator ? text.split(separator).map((part) => part.trim()).filter(Boolean) : null;
    if (kind === "dense") values[column] = parts.map(Number);
    else if (parts) values[column] = parts;
    else values[column] = kind === "numeric" ? Number(text) : text;
  }
  return Object.keys(values).length ? values : null;
}
