// Which models are looked at, and their cards.

import { changed, curves } from "./answers.js";
import { get, obsolete } from "./api.js";
import { drawLegend, drawMap } from "./atlas.js";
import { card, largestBar } from "./card.js";
import { drawContext } from "./context.js";
import { byId, element, later } from "./dom.js";
import { active, channel, complain, state, summaryOf } from "./state.js";

async function drawCards() {
  try {
    const found = await Promise.all(active().map((letter) => get("page/card", { model: state.letters[letter] }, channel("card", letter))));
    const scale = Math.max(...found.map(largestBar), 1e-9);
    byId("cards").replaceChildren(...found.map((one, at) => card(one, active()[at], scale)));
  } catch (error) {
    if (!obsolete(error)) complain(error.message);
  }
}

export function chooseModels() {
  state.letters.a = byId("model-a").value;
  const second = byId("model-b").value;
  state.letters.b = second && second !== state.letters.a ? second : null;
  byId("lists").replaceChildren(...active().map((letter) => element("div", { class: `list ${letter}`, id: `list-${letter}` })));
  byId("lists").classList.toggle("two", active().length > 1);
  byId("columns").textContent = Object.keys(summaryOf(state.letters.a).columns).join(", ") || "their columns (this model has no item table)";
  byId("filter").disabled = !Object.keys(summaryOf(state.letters.a).columns).length;
  byId("filter").placeholder = example(summaryOf(state.letters.a).columns);
  state.found = {};
  drawContext();
  drawMap();
  drawLegend();
  drawCards();
  changed();
}

function example(columns) {
  const [name, type] = Object.entries(columns).find(([one, kind]) => /Int|Float/.test(kind) && !one.endsWith("id")) ?? Object.entries(columns)[0] ?? ["", ""];
  if (!name) return "";
  return /Int|Float/.test(type) ? `${name} > ${name === "year" ? 1990 : 10}` : `${name} = '…'`;
}

// A new model took over between two answers: what hangs on it is read again.
export const swapped = later(50, async () => {
  await loadModels();
  drawContext();
  drawMap();
  drawCards();
  curves();
});

export async function loadModels() {
  state.models = (await get("models")).models;
}
