// The context of the request: a field for each column that a model declares, sent with every request.

import { byId, element, later, showRefusal } from "./dom.js";
import { active, state, subscribe, summary, update } from "./store.js";

const EMPTY = "unknown";
const INCOMPLETE = { timestamp: "Not sent: expected a date and a time.", numeric: "Not sent: expected a number." };
let shown = []; // the columns that have fields

const sendLater = later(300, () => update({ context: read() }));

export function attach() {
  byId("forget").addEventListener("click", clear);
  subscribe(["models", "letters", "context"], draw);
}

// The columns that the active models declare, each once, with the letters of those models.
function columns() {
  const found = new Map();
  for (const letter of active()) {
    for (const field of summary(letter)?.context ?? []) {
      if (field.column === summary(letter).text) continue; // has a field of its own
      if (!found.has(field.column)) found.set(field.column, { ...field, letters: [] });
      found.get(field.column).letters.push(letter);
    }
  }
  return [...found.values()];
}

// Replaces the fields if the columns changed. Values that no field can hold are dropped from the context.
function draw() {
  const fields = columns();
  if (JSON.stringify(fields) !== JSON.stringify(shown)) {
    shown = fields;
    byId("context-fields").replaceChildren(...fields.map((field, at) => drawField(field, `context-${at}`)));
    byId("context").hidden = !fields.length;
  }
  shown.forEach(({ column }, at) => {
    const text = state.context[column] ?? "";
    if (inputAt(at).value.trim() !== text) inputAt(at).value = text;
  });
  byId("forget").hidden = !Object.keys(state.context).length;
  const context = read();
  if (JSON.stringify(context) !== JSON.stringify(state.context)) update({ context });
}

const inputAt = (at) => byId(`context-${at}`);

// The text of the fields that are filled in, by column.
function read() {
  const filled = shown.map(({ column }, at) => [column, inputAt(at).value.trim()]).filter(([, text]) => text);
  return Object.fromEntries(filled);
}

function clear() {
  shown.forEach((_, at) => { inputAt(at).value = ""; }); // incomplete values, too
  update({ context: {} });
  inputAt(0).focus();
}

function drawField(field, id) {
  const properties = { id, "aria-describedby": `${id}-refused`, autocomplete: "off", spellcheck: "false" };
  const only = active().length > 1 && field.letters.length === 1 ? ` · ${state.letters[field.letters[0]]} only` : "";
  const unit = field.kind === "timestamp" ? " (UTC)" : "";
  let input;
  let button = null;
  if (field.kind === "categorical" && field.values) {
    const nothing = field.default ? `${field.default} (default)` : EMPTY;
    input = element("select", properties, element("option", { value: "" }, nothing), field.values.map((value) => element("option", {}, value)));
  } else if (field.kind === "timestamp") {
    input = element("input", { ...properties, type: "datetime-local" });
    const now = () => { input.value = new Date().toISOString().slice(0, 16); sendLater(); };
    button = element("button", { type: "button", onclick: now, "aria-label": `Now, for ${field.column}` }, "Now");
  } else if (field.kind === "numeric") {
    input = element("input", { ...properties, type: "number", step: "any", placeholder: EMPTY });
  } else {
    input = element("input", { ...properties, type: "text", maxlength: 2000, placeholder: example(field) });
  }
  const message = element("p", { id: `${id}-refused`, class: "refused", role: "alert", "data-field": `context/${field.column}`, hidden: true });
  input.addEventListener("input", sendLater);
  // An incomplete value counts as unknown while it is typed, and is reported when the field is left.
  input.addEventListener("blur", () => { if (input.validity.badInput) showRefusal(input, message, INCOMPLETE[field.kind]); });
  const label = element("label", { for: id }, field.column, unit, only);
  return element("div", { class: "field" }, label, button ? element("div", { class: "row" }, input, button) : input, message);
}

function example({ kind, values, separator }) {
  if (values?.length > 1) return `${values[0]}${separator} ${values[1]} …`;
  if (kind === "dense") return "numbers separated by commas";
  return separator ? `values separated by ${separator}` : EMPTY;
}
