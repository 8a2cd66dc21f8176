// The map of the first model's catalog, with the history and the lists marked.

import { get, obsolete, post } from "./api.js";
import { byId, element, later } from "./dom.js";
import { CatalogMap } from "./map.js";
import { LONGEST, active, complain, state, summaryOf } from "./state.js";
import { add } from "./who.js";

export const map = new CatalogMap(byId("chart"), { add: (item) => add(item) });

export async function drawMap() {
  const model = state.letters.a;
  const key = `${model} ${summaryOf(model).version}`;
  if (state.mapped === key) return;
  state.mapped = key;
  map.wait("Drawing the map …");
  try {
    const found = await get("page/map", { model }, "map");
    const kept = map.colour;
    const colours = ["popularity", ...Object.keys(found.groups)];
    byId("colour").replaceChildren(...colours.map((name) => element("option", {}, name)));
    map.colour = colours.includes(kept) && kept !== "popularity" ? kept : colours.at(-1);
    byId("colour").value = map.colour;
    map.show(found);
    drawLegend();
    marks();
  } catch (error) {
    if (obsolete(error)) return;
    state.mapped = null;
    map.wait(error.message);
  }
}

export const drawLegend = () => map.drawLegend(byId("legend"), active().map((letter) => state.letters[letter]));

export const marks = later(30, async () => {
  if (!map.data) return;
  const history = state.history.slice(-(summaryOf(state.letters.a)?.history_length || LONGEST));
  const lists = { history, a: state.found.a ?? [], b: active().includes("b") ? (state.found.b ?? []) : [] };
  const every = Object.values(lists).flat();
  try {
    const { places } = await post("page/places", { model: state.letters.a, items: every.map((item) => item.item) }, "places");
    const marked = every.map((item, at) => ({ item: item.item, title: item.title, place: places[at] }));
    const ends = [history.length, history.length + lists.a.length];
    map.mark({ history: marked.slice(0, ends[0]), a: marked.slice(ends[0], ends[1]), b: marked.slice(ends[1]) });
  } catch (error) {
    if (!obsolete(error)) complain(error.message);
  }
});
