// The search field, for models that read the text of a query.

import { byId, later } from "./dom.js";
import { startEmpty } from "./history.js";
import { active, state, subscribe, summary, update } from "./store.js";

export function attach() {
  byId("words").addEventListener("input", later(350, search));
  subscribe(["models", "letters", "text"], draw);
  subscribe(["query"], () => { if (state.query !== null && state.text && areQueries()) update({ text: "" }); });
}

const models = () => active().map(summary).filter(Boolean);
const areQueries = () => models().some((model) => model.texts_are_queries);

// Words replace a known query if the queries of the model are texts; otherwise they are sent together with the user shown.
function search() {
  const text = byId("words").value.trim();
  if (text && state.query !== null && areQueries()) startEmpty();
  update({ text });
}

function draw() {
  byId("words-field").hidden = !models().some((model) => model.text);
  byId("who-title").textContent = areQueries() ? "What to search for" : "Who is asking";
  byId("clear").textContent = areQueries() ? "Clear" : "New user";
  byId("query-label").textContent = areQueries() ? "Query in the data" : "User id";
  if (byId("words").value.trim() !== state.text) byId("words").value = state.text;
}
