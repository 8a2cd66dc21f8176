// The context of the request: a field for each column that a model declares, sent with every question.

import { changed } from "./answers.js";
import { byId, element, later } from "./dom.js";
import { active, state, summaryOf } from "./state.js";

const EMPTY = "unknown";
const UNFINISHED = { timestamp: "Not sent yet: expected a date and a time.", numeric: "Not sent: expected a number." };
let shown = []; // the fields that are there

// The columns that the models looked at declare, each once, and which of the models do.
function columns() {
  const found = new Map();
  for (const letter of active()) {
    for (const field of summaryOf(state.letters[letter])?.context ?? []) {
      if (!found.has(field.column)) found.set(field.column, { ...field, letters: [] });
      found.get(field.column).letters.push(letter);
    }
  }
  return [...found.values()];
}

// Makes the fields anew where a model with other columns is looked at; what was filled in stays, if it can.
export function drawContext() {
  const fields = columns();
  if (JSON.stringify(fields) === JSON.stringify(shown)) return;
  shown = fields;
  const ask = later(300, () => { read(); changed(); });
  byId("context-fields").replaceChildren(...fields.map((field, at) => made(field, `context-${at}`, ask)));
  byId("context").hidden = !fields.length;
  read();
}

export function emptyContext() {
  for (const { input } of places()) input.value = "";
  read();
  changed();
  byId("context-0").focus();
}

function made(field, id, ask) {
  const kept = state.context[field.column] ?? "";
  const properties = { id, "aria-describedby": `${id}-refused`, autocomplete: "off", spellcheck: "false" };
  const only = active().length > 1 && field.letters.length === 1 ? ` · ${state.letters[field.letters[0]]} only` : "";
  const unit = field.kind === "timestamp" ? " (UTC)" : "";
  let input;
  let beside = null;
  if (field.kind === "categorical" && field.values) {
    input = element("select", properties, element("option", { value: "" }, EMPTY), field.values.map((value) => element("option", {}, value)));
  } else if (field.kind === "timestamp") {
    input = element("input", { ...properties, type: "datetime-local" });
    const now = () => { input.value = new Date().toISOString().slice(0, 16); ask(); };
    beside = element("button", { type: "button", onclick: now, "aria-label": `Now, for ${field.column}` }, "Now");
  } else if (field.kind === "numeric") {
    input = element("input", { ...properties, type: "number", step: "any", placeholder: EMPTY });
  } else {
    input = element("input", { ...properties, type: "text", maxlength: 2000, placeholder: example(field) });
  }
  input.value = kept;
  const said = element("p", { id: `${id}-refused`, class: "refused", role: "alert", hidden: true });
  input.addEventListener("input", ask);
  // While it is being typed it is unknown; what is left unfinished is told.
  input.addEventListener("blur", () => { if (input.validity.badInput) refuse(input, said, UNFINISHED[field.kind]); });
  const label = element("label", { for: id }, field.column, unit, only);
  return element("div", { class: "field" }, label, beside ? element("div", { class: "row" }, input, beside) : input, said);
}

function example({ kind, values, separator }) {
  if (values?.length > 1) return `${values[0]}${separator} ${values[1]} …`;
  if (kind === "dense") return "numbers, a comma between them";
  return separator ? `several, with ${separator} between them` : EMPTY;
}

const places = () => shown.map((field, at) => ({ field, input: byId(`context-${at}`), said: byId(`context-${at}-refused`) }));

// What stands in the fields, as text: that is what is remembered.
function read() {
  state.context = {};
  for (const { field, input } of places()) if (input.value.trim()) state.context[field.column] = input.value.trim();
  byId("forget").hidden = !Object.keys(state.context).length;
}

function refuse(input, said, text) {
  said.hidden = !text;
  said.textContent = text ?? "";
  if (text) input.setAttribute("aria-invalid", "true");
  else input.removeAttribute("aria-invalid");
}

// Forgets what was said of earlier questions.
export function allowContext() {
  for (const { input, said } of places()) if (!input.validity.badInput) refuse(input, said, null);
}

// Says what the service refused beside the field it is about; false where it is about none of them.
export function refusedContext(errors) {
  const about = (column) => places().find(({ field }) => field.column === column);
  let found = false;
  for (const { pointer, detail } of errors ?? []) {
    const [, part, column] = pointer.slice(1).split("/").map((one) => decodeURIComponent(one).replaceAll("~1", "/").replaceAll("~0", "~"));
    const place = part === "context" ? about(column) : null;
    if (!place) continue;
    refuse(place.input, place.said, detail.replace(/^context: column .*?: (?=expected )/, "").replace(/^e/, "E"));
    found = true;
  }
  return found;
}
