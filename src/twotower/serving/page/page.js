// The page: who asks, what is answered at the dial's setting, where it lies on the map, and the models' cards.

import { get, obsolete, post } from "./api.js";
import { card, largestBar } from "./card.js";
import { combo } from "./combo.js";
import { SETTINGS, drawCurve, medianOf, saidOf } from "./curve.js";
import { byId, element, later, nameOf, readable, whole } from "./dom.js";
import { draw, meter } from "./lists.js";
import { CatalogMap } from "./map.js";

const SHOWN = 60; // items of the history before "show all"
const LONGEST = 500;

const state = {
  models: [],
  letters: { a: null, b: null }, // names of the models compared
  query: null,
  history: [], // oldest first
  edited: false,
  all: false,
  dial: 1,
  k: 10,
  seen: true,
  filter: "",
  found: {}, // letter -> items
  curves: {}, // letter -> medians
  open: {}, // letter -> item whose details are shown
  mapped: null, // the model whose map is drawn, and its version
};

const map = new CatalogMap(byId("chart"), { add });
const summaryOf = (name) => state.models.find((model) => model.name === name);
const active = () => ["a", "b"].filter((letter) => state.letters[letter]);
const channel = (kind, letter) => `${kind}-${letter}`;

// ---- who asks ----

function question() {
  const history = state.edited || state.query === null ? state.history.map((item) => item.item) : null;
  if (state.query === null && !history.length) return null;
  return { ...(state.query === null ? {} : { query_id: state.query }), ...(history ? { history } : {}) };
}

async function chooseQuery(id) {
  if (!id) return;
  try {
    const { items } = await get("page/history", { query_id: id, model: state.letters.a }, "history");
    Object.assign(state, { query: id, history: items, edited: false, all: false });
    byId("query").value = id;
    changed();
  } catch (error) {
    if (!obsolete(error)) complain(`${error.message}: ${id}`);
  }
}

async function surprise() {
  try {
    const { queries } = await get("page/queries", { model: state.letters.a, k: 1 });
    if (queries.length) await chooseQuery(String(queries[0]));
    else complain("This model knows no users; add titles to build a history.");
  } catch (error) {
    if (!obsolete(error)) complain(error.message);
  }
}

async function add(id) {
  if (state.history.some((item) => String(item.item) === String(id))) return;
  try {
    const item = await get(`items/${encodeURIComponent(id)}`, { model: state.letters.a });
    state.history = [...state.history, item].slice(-LONGEST);
    state.edited = true;
    changed();
  } catch (error) {
    complain(error.message);
  }
}

function remove(id) {
  state.history = state.history.filter((item) => item.item !== id);
  state.edited = true;
  changed();
}

function startEmpty() {
  Object.assign(state, { query: null, history: [], edited: false, all: false });
  byId("query").value = "";
  changed();
  byId("title").focus();
}

function drawHistory() {
  const latest = [...state.history].reverse();
  const shown = state.all ? latest : latest.slice(0, SHOWN);
  const most = summaryOf(state.letters.a)?.most_interactions;
  byId("history").replaceChildren(
    ...shown.map((item) => {
      const row = element(
        "li",
        {},
        element("span", { class: "name", title: readable(item) }, readable(item)),
        element("button", { type: "button", "aria-label": `Remove ${readable(item)}`, onclick: () => remove(item.item) }, "×"),
        meter(item, most),
      );
      row.dataset.item = String(item.item);
      return row;
    }),
  );
  byId("history-title").textContent = state.history.length ? `History (${whole.format(state.history.length)})` : "History";
  const length = summaryOf(state.letters.a)?.history_length ?? 0;
  const hints = [];
  if (!state.history.length) hints.push("Pick a user, or add titles: the recommendations follow at once.");
  else {
    hints.push("Latest first.");
    if (length && state.history.length > length) hints.push(`The model looks at the latest ${length}.`);
    if (state.edited && state.query !== null) hints.push(`Changed: no longer what user ${state.query} did.`);
  }
  byId("history-hint").textContent = hints.join(" ");
  byId("restore").hidden = !(state.edited && state.query !== null);
  byId("more").hidden = shown.length === latest.length;
  byId("more").textContent = `Show all ${whole.format(latest.length)}`;
}

// ---- answers ----

function asked(letter, dial = state.dial) {
  const who = question();
  if (!who) return null;
  return { ...who, model: state.letters[letter], k: state.k, exclude_seen: state.seen, popularity: dial, ...(state.filter ? { filter: state.filter } : {}) };
}

// Who asks or how has changed: everything is asked anew.
function changed() {
  drawHistory();
  remember();
  state.open = {};
  state.curves = {};
  refresh();
  curves();
}

async function refresh() {
  complain(null);
  await Promise.all(active().map(answer));
  spoken();
  explainLater();
  marks();
}

async function answer(letter) {
  const body = asked(letter);
  try {
    const found = body ? await post("recommend", body, channel("recommend", letter)) : { items: [] };
    const known = new Map((state.found[letter] ?? []).map((item) => [item.item, item.columns]));
    state.found[letter] = found.items.map((item) => ({ ...item, columns: known.get(item.item) }));
    if (found.version && found.version !== summaryOf(state.letters[letter])?.version) swapped();
  } catch (error) {
    if (obsolete(error)) return;
    state.found[letter] = [];
    complain(active().length > 1 ? `${state.letters[letter]}: ${error.message}` : error.message);
  }
  drawList(letter);
  if (active().length > 1) drawList(letter === "a" ? "b" : "a");
  drawDial();
}

function drawList(letter) {
  const place = byId(`list-${letter}`);
  if (!place) return;
  if (!question()) {
    place.replaceChildren(element("p", { class: "nothing" }, "Pick a user, or add a title or two that somebody might like."));
    return;
  }
  const [own, other] = [state.found[letter] ?? [], state.found[letter === "a" ? "b" : "a"] ?? []];
  const shared = active().length > 1 ? new Set(other.map((item) => String(item.item))) : null;
  draw(place, {
    model: state.letters[letter],
    letter,
    items: own,
    most: summaryOf(state.letters[letter])?.most_interactions,
    shared,
    open: state.open[letter],
    toggle: (item) => toggle(letter, item),
    point: (item) => point(letter, item),
  });
  const common = byId("common");
  common.hidden = !shared || !own.length || !other.length;
  if (!common.hidden) common.textContent = `${own.filter((item) => shared.has(String(item.item))).length} of ${own.length} in both lists, marked at the left edge.`;
}

async function toggle(letter, item) {
  const opening = state.open[letter] !== String(item.item);
  state.open[letter] = opening ? String(item.item) : null;
  if (opening && !item.columns) {
    try {
      item.columns = (await get(`items/${encodeURIComponent(item.item)}`, { model: state.letters[letter] })).columns;
    } catch {
      item.columns = {};
    }
  }
  drawList(letter);
  byId(`list-${letter}`).querySelector(`li[data-item="${CSS.escape(String(item.item))}"] button`)?.focus({ preventScroll: true });
}

// The history items that pulled an item up, beside the list, and its place on the map.
function point(letter, item) {
  map.light(item?.item ?? null);
  const pulls = new Map((item?.explanation?.history ?? []).filter((one) => one.contribution > 0).slice(0, 3).map((one) => [String(one.item), one.contribution]));
  for (const row of byId("history").children) {
    const pull = pulls.get(row.dataset.item);
    row.className = pull === undefined ? "" : `pulled by-${letter}`;
    row.querySelector(".pull")?.remove();
    if (pull !== undefined) row.querySelector(".meter").append(element("span", { class: "pull" }, `+${pull.toFixed(2)}`));
  }
}

const explainLater = later(60, () => active().forEach(explain));

async function explain(letter) {
  const who = question();
  const items = (state.found[letter] ?? []).slice(0, 20);
  if (!who || !items.length) return;
  const body = { ...who, model: state.letters[letter], items: items.map((item) => item.item), popularity: state.dial };
  try {
    const found = await post("explain", body, channel("explain", letter));
    items.forEach((item, at) => { item.explanation = found.items[at]; });
    drawList(letter);
  } catch (error) {
    if (!obsolete(error)) complain(error.message);
  }
}

async function curves() {
  await Promise.all(active().map(async (letter) => {
    if (!question()) return;
    try {
      const lists = await Promise.all(SETTINGS.map((dial) => post("recommend", asked(letter, dial), channel(`curve${dial}`, letter))));
      state.curves[letter] = lists.map((found) => medianOf(found.items));
      drawDial();
    } catch {
      // Without the curve the dial still works; what is wrong is said beside the list.
    }
  }));
}

function drawDial() {
  const lines = active().filter((letter) => state.curves[letter]).map((letter) => ({ letter, medians: state.curves[letter] }));
  const now = Object.fromEntries(active().filter((letter) => state.found[letter]?.length).map((letter) => [letter, state.found[letter]]));
  drawCurve(byId("curve"), lines, state.dial, now);
  byId("dial-said").textContent = saidOf(state.dial);
  byId("dial").setAttribute("aria-valuetext", saidOf(state.dial));
}

const spoken = later(400, () => {
  const parts = active().filter((letter) => state.found[letter]?.length).map((letter) => {
    const items = state.found[letter];
    return `${state.letters[letter]}: ${items.length} items, first ${readable(items[0])}, half have more than ${Math.round(medianOf(items))} interactions`;
  });
  byId("spoken").textContent = parts.join(". ");
});

// ---- map ----

async function drawMap() {
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

const drawLegend = () => map.drawLegend(byId("legend"), active().map((letter) => state.letters[letter]));

const marks = later(30, async () => {
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

// ---- models ----

async function drawCards() {
  try {
    const found = await Promise.all(active().map((letter) => get("page/card", { model: state.letters[letter] }, channel("card", letter))));
    const scale = Math.max(...found.map(largestBar), 1e-9);
    byId("cards").replaceChildren(...found.map((one, at) => card(one, active()[at], scale)));
  } catch (error) {
    if (!obsolete(error)) complain(error.message);
  }
}

function chooseModels() {
  state.letters.a = byId("model-a").value;
  const second = byId("model-b").value;
  state.letters.b = second && second !== state.letters.a ? second : null;
  byId("lists").replaceChildren(...active().map((letter) => element("div", { class: `list ${letter}`, id: `list-${letter}` })));
  byId("lists").classList.toggle("two", active().length > 1);
  byId("columns").textContent = Object.keys(summaryOf(state.letters.a).columns).join(", ") || "(this model has no item table)";
  byId("filter").disabled = !Object.keys(summaryOf(state.letters.a).columns).length;
  byId("filter").placeholder = example(summaryOf(state.letters.a).columns);
  state.found = {};
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
const swapped = later(50, async () => {
  await loadModels();
  drawMap();
  drawCards();
  curves();
});

async function loadModels() {
  state.models = (await get("models")).models;
}

// ---- the rest of the page ----

function complain(text) {
  const place = byId("problem");
  place.hidden = !text;
  place.textContent = text ?? "";
}

// What is looked at stands in the address, behind the #: it can be sent to a colleague and is never sent to a server.
function remember() {
  const kept = new URLSearchParams();
  if (state.query !== null) kept.set("user", state.query);
  if (state.edited || state.query === null) kept.set("history", state.history.slice(-60).map((item) => item.item).join(","));
  if (state.dial !== 1) kept.set("dial", String(state.dial));
  if (state.letters.a !== state.models[0]?.name) kept.set("model", state.letters.a);
  if (state.letters.b) kept.set("beside", state.letters.b);
  history.replaceState(null, "", `#${kept}`);
}

async function recall() {
  const kept = new URLSearchParams(location.hash.slice(1));
  const has = (name) => state.models.some((model) => model.name === name);
  if (has(kept.get("model"))) byId("model-a").value = kept.get("model");
  if (has(kept.get("beside"))) byId("model-b").value = kept.get("beside");
  const dial = Number(kept.get("dial") ?? 1);
  if (dial >= 0 && dial <= 2) state.dial = dial;
  byId("dial").value = String(state.dial);
  chooseModels();
  if (kept.get("user")) await chooseQuery(kept.get("user"));
  const items = (kept.get("history") ?? "").split(",").filter(Boolean);
  if (items.length) {
    const found = await Promise.all(items.map((id) => get(`items/${encodeURIComponent(id)}`, { model: state.letters.a }).catch(() => null)));
    state.history = found.filter(Boolean);
    state.edited = true;
    changed();
  }
  if (state.query === null && !state.history.length && kept.get("history") === null) await surprise();
}

function theme() {
  const root = document.documentElement;
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  const kept = localStorage.getItem("twotower-theme");
  if (kept) root.dataset.theme = kept;
  const button = byId("theme");
  const say = () => { button.textContent = dark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    localStorage.setItem("twotower-theme", root.dataset.theme);
    say();
    map.draw();
    drawLegend();
  });
  say();
}

async function start() {
  theme();
  try {
    await loadModels();
  } catch (error) {
    complain(error.message);
    return;
  }
  byId("model-a").replaceChildren(...state.models.map((model) => element("option", {}, model.name)));
  byId("model-b").replaceChildren(element("option", { value: "" }, "nothing"), ...state.models.map((model) => element("option", {}, model.name)));
  byId("compare").hidden = state.models.length < 2;
  if (state.models.length > 1) byId("model-b").value = state.models[1].name;

  combo(byId("query"), byId("query-list"), {
    suggest: async (text) => (await get("page/queries", { text, k: 12, model: state.letters.a }, "queries")).queries,
    label: (id) => String(id),
    choose: (id) => chooseQuery(String(id)),
    enter: chooseQuery,
  });
  combo(byId("title"), byId("title-list"), {
    suggest: async (text) => (text ? (await get("items", { text, k: 12, model: state.letters.a }, "titles")).items : []),
    label: (item) => element("span", {}, readable(item), " ", element("span", { class: "quiet" }, whole.format(item.interactions))),
    choose: (item) => {
      byId("title").value = "";
      add(item.item);
    },
  });
  byId("surprise").addEventListener("click", surprise);
  byId("clear").addEventListener("click", startEmpty);
  byId("restore").addEventListener("click", () => chooseQuery(state.query));
  byId("more").addEventListener("click", () => { state.all = true; drawHistory(); });
  byId("dial").addEventListener("input", () => {
    state.dial = Number(byId("dial").value);
    drawDial();
    refresh();
  });
  byId("dial").addEventListener("change", remember);
  byId("k").addEventListener("change", () => { state.k = Number(byId("k").value); changed(); });
  byId("seen").addEventListener("change", () => { state.seen = byId("seen").checked; changed(); });
  byId("filter").addEventListener("input", later(350, () => { state.filter = byId("filter").value.trim(); changed(); }));
  byId("colour").addEventListener("change", () => { map.colour = byId("colour").value; map.draw(); drawLegend(); });
  for (const id of ["model-a", "model-b"]) byId(id).addEventListener("change", chooseModels);
  addEventListener("resize", later(100, drawDial));
  await recall();
}

start();
