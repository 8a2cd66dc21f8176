// The controls of a list: its model, its length, whether it leaves out the history, and the filter.

import { byId, element, later } from "./dom.js";
import { KS, active, state, subscribe, summary, update } from "./store.js";

export function attach() {
  byId("k").replaceChildren(...KS.map((k) => element("option", {}, k)));
  byId("model-a").addEventListener("change", chooseModels);
  byId("model-b").addEventListener("change", chooseModels);
  byId("k").addEventListener("change", () => update({ k: Number(byId("k").value) }));
  byId("exclude-seen").addEventListener("change", () => update({ excludeSeen: byId("exclude-seen").checked }));
  byId("filter").addEventListener("input", later(350, () => update({ filter: byId("filter").value.trim() })));
  byId("group").addEventListener("change", () => update({ group: byId("group").value }));
  byId("time").addEventListener("input", later(350, () => update({ time: byId("time").value })));
  subscribe(["models"], drawModels);
  subscribe(["models", "letters", "group", "time"], drawOffer);
  subscribe(["models", "letters"], drawChoice);
  subscribe(["k", "excludeSeen", "filter"], drawSettings);
}

function chooseModels() {
  const [a, b] = [byId("model-a").value, byId("model-b").value];
  update({ letters: { a, b: b && b !== a ? b : null }, found: {}, explanations: {} });
}

function drawModels() {
  const options = () => state.models.map((model) => element("option", {}, model.name));
  byId("model-a").replaceChildren(...options());
  byId("model-b").replaceChildren(element("option", { value: "" }, "nothing"), ...options());
  byId("compare").hidden = state.models.length < 2;
}

function drawChoice() {
  if (!state.letters.a) return;
  byId("model-a").value = state.letters.a;
  byId("model-b").value = state.letters.b ?? "";
  const columns = summary("a")?.columns ?? {};
  const names = Object.keys(columns);
  byId("columns").textContent = names.length ? `SQL condition on ${names.join(", ")}` : "needs a model with an item table";
  byId("filter").disabled = !names.length;
  byId("filter").placeholder = names.length ? example(columns) : "";
}

// The groups that the models know, each once. An unknown group is sent anyway, and the error is shown at the field.
function drawOffer() {
  const shown = active().map(summary).filter(Boolean);
  const groups = [...new Set(shown.flatMap((model) => model.groups).map(String))];
  byId("group-field").hidden = !groups.length;
  byId("time-field").hidden = !shown.some((model) => model.has_intervals);
  byId("group").replaceChildren(...groups.concat(state.group && !groups.includes(state.group) ? [state.group] : []).map((group) => element("option", {}, group)));
  byId("group").value = state.group || groups[0] || "";
  if (byId("time").value !== state.time) byId("time").value = state.time;
}

function example(columns) {
  const numeric = ([, type]) => /Int|Float/.test(type);
  const [name, type] = Object.entries(columns).find((column) => numeric(column) && !column[0].endsWith("id")) ?? Object.entries(columns)[0];
  return numeric([name, type]) ? `${name} > ${name === "year" ? 1990 : 10}` : `${name} = '…'`;
}

function drawSettings() {
  byId("k").value = String(state.k);
  byId("exclude-seen").checked = state.excludeSeen;
  if (byId("filter").value.trim() !== state.filter) byId("filter").value = state.filter;
  if (state.k !== 10 || !state.excludeSeen || state.filter) byId("settings").open = true;
}
