// Errors in a request, each shown next to the field that it concerns, or above the lists if it concerns none.

import { byId, showRefusal } from "./dom.js";
import { active, state, subscribe } from "./store.js";

export function attach() {
  subscribe(["refusals"], draw);
}

function draw() {
  const messages = [...document.querySelectorAll("[data-field]")];
  for (const message of messages) {
    const input = document.querySelector(`[aria-describedby~="${message.id}"]`);
    if (input.validity.badInput) continue; // its own message stays until the input is complete
    const own = state.refusals.filter(({ field }) => field === message.dataset.field);
    showRefusal(input, message, textOf(own));
    if (own.length) message.closest("details")?.setAttribute("open", "");
  }
  const fields = messages.map((message) => message.dataset.field);
  const others = textOf(state.refusals.filter(({ field }) => !fields.includes(field)));
  byId("problem").hidden = !others;
  byId("problem").textContent = others;
}

// Each text once, with the name of the model that refused, unless both did.
function textOf(refusals) {
  const texts = new Map();
  for (const { text, model } of refusals) texts.set(text, [...(texts.get(text) ?? []), model]);
  const named = ([text, models]) => (models[0] && models.length < active().length ? `${models[0]}: ${text}` : text);
  return [...texts].map(named).join(" ");
}
