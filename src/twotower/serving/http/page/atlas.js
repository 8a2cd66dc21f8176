// The map of the first model's catalog, with the history and the lists marked.

import { aborted, get, post } from "./api.js";
import { byId, element, later } from "./dom.js";
import { addItem } from "./history.js";
import { CatalogMap } from "./map.js";
import { LONGEST_HISTORY, active, refuse, state, subscribe, summary } from "./store.js";

let map = null;
let shown = null; // model and version of the map shown or requested

export function attach() {
  map = new CatalogMap(byId("chart"), { add: addItem });
  byId("colour").addEventListener("change", () => { map.colour = byId("colour").value; redraw(); });
  subscribe(["models", "letters"], draw);
  subscribe(["models", "letters"], drawLegend);
  subscribe(["theme"], redraw);
  subscribe(["letters", "history", "found"], mark);
  subscribe(["pointed"], () => map.light(state.pointed?.item ?? null));
}

async function draw() {
  const model = state.letters.a;
  const key = model && `${model} ${summary("a").version}`;
  if (!model || shown === key) return;
  shown = key;
  map.wait("Drawing the map …");
  try {
    const found = await get("page/map", { model }, "map");
    const columns = Object.keys(found.groups);
    byId("colour").replaceChildren(...["popularity", ...columns].map((name) => element("option", {}, name)));
    map.colour = columns.includes(map.colour) ? map.colour : (columns.at(-1) ?? "popularity");
    byId("colour").value = map.colour;
    map.show(found);
    drawLegend();
    mark();
  } catch (error) {
    if (aborted(error)) return;
    shown = null;
    map.wait(error.message);
  }
}

function redraw() {
  map.draw();
  drawLegend();
}

function drawLegend() {
  if (state.letters.a) map.drawLegend(byId("legend"), active().map((letter) => state.letters[letter]));
}

const mark = later(30, async () => {
  if (!map.data) return;
  const history = state.history.slice(-(summary("a")?.history_length || LONGEST_HISTORY));
  const [a, b] = ["a", "b"].map((letter) => (active().includes(letter) ? (state.found[letter] ?? []) : []));
  const items = [...history, ...a, ...b];
  try {
    const { places } = await post("page/places", { model: state.letters.a, items: items.map((item) => item.item) }, "places");
    const marks = items.map((item, at) => ({ item: item.item, title: item.title, place: places[at] }));
    const [first, second] = [history.length, history.length + a.length];
    map.mark({ history: marks.slice(0, first), a: marks.slice(first, second), b: marks.slice(second) });
  } catch (error) {
    if (!aborted(error)) refuse(null, error.message);
  }
});
