// What is answered at the dial's setting, by each model, and why.

import { remember } from "./address.js";
import { abandon, get, obsolete, post } from "./api.js";
import { marks, map } from "./atlas.js";
import { allowContext, refusedContext } from "./context.js";
import { SETTINGS, drawCurve, medianOf, saidOf } from "./curve.js";
import { byId, element, later, readable, releases } from "./dom.js";
import { draw } from "./lists.js";
import { swapped } from "./models.js";
import { active, asked, channel, complain, question, state, summaryOf } from "./state.js";
import { drawHistory } from "./who.js";

// Who asks or how has changed: everything is asked anew.
export function changed() {
  drawHistory();
  remember();
  state.open = {};
  state.curves = {};
  refresh();
  curves();
}

let rounds = 0;

export async function refresh() {
  complain(null);
  allowContext();
  const round = ++rounds;
  const slow = setTimeout(() => byId("lists").setAttribute("aria-busy", "true"), 400); // what is shown is of an earlier question
  await Promise.all(active().map(answer));
  clearTimeout(slow);
  if (round === rounds) byId("lists").removeAttribute("aria-busy");
  spoken();
  explainLater();
  marks();
}

async function answer(letter) {
  const body = asked(letter);
  if (!body) abandon(channel("recommend", letter));
  try {
    const found = body ? await post("recommend", body, channel("recommend", letter)) : { items: [] };
    const known = new Map((state.found[letter] ?? []).map((item) => [item.item, item.columns]));
    state.refused[letter] = false;
    state.found[letter] = found.items.map((item) => ({ ...item, columns: known.get(item.item) }));
    if (found.version && found.version !== summaryOf(state.letters[letter])?.version) swapped();
  } catch (error) {
    if (obsolete(error)) return;
    state.found[letter] = [];
    state.refused[letter] = true;
    if (!refusedContext(error.errors)) complain(active().length > 1 ? `${state.letters[letter]}: ${error.message}` : error.message);
  }
  drawList(letter);
  if (active().length > 1) drawList(letter === "a" ? "b" : "a");
  drawDial();
}

const released = releases(byId("lists"));

async function drawList(letter) {
  await released();
  const place = byId(`list-${letter}`);
  if (!place) return;
  if (!question(letter)) {
    place.replaceChildren(element("p", { class: "nothing" }, "Pick a user, or add a title or two that somebody might like."));
    return;
  }
  const [own, other] = [state.found[letter] ?? [], state.found[letter === "a" ? "b" : "a"] ?? []];
  const shared = active().length > 1 ? new Set(other.map((item) => String(item.item))) : null;
  const held = document.activeElement?.closest(`#list-${letter} li`)?.dataset.item; // drawn anew, it would lose the focus
  draw(place, {
    model: state.letters[letter],
    letter,
    items: own,
    nothing: state.refused[letter] ? "The service has refused this question; what is wrong with it is said above." : "Nothing is left to recommend with these settings.",
    most: summaryOf(state.letters[letter])?.most_interactions,
    shared,
    open: state.open[letter],
    toggle: (item) => toggle(letter, item),
    point: (item) => point(letter, item),
  });
  if (held !== undefined) place.querySelector(`li[data-item="${CSS.escape(held)}"] button`)?.focus({ preventScroll: true });
  const common = byId("common");
  common.hidden = !shared || !own.length || !other.length;
  if (!common.hidden) common.textContent = `${own.filter((item) => shared.has(String(item.item))).length} of ${own.length} in both lists, marked at the left edge.`;
}

async function toggle(letter, item) {
  const opening = state.open[letter] !== String(item.item);
  state.open[letter] = opening ? String(item.item) : null;
  drawList(letter);
  if (!opening || item.columns) return;
  const model = state.letters[letter];
  const { columns } = await get(`items/${encodeURIComponent(item.item)}`, { model }).catch(() => ({ columns: {} }));
  const now = state.letters[letter] === model && state.found[letter]?.find((one) => one.item === item.item);
  if (!now) return;
  now.columns = columns;
  drawList(letter);
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
  const who = question(letter);
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

export async function curves() {
  await Promise.all(active().map(async (letter) => {
    if (!question(letter)) {
      SETTINGS.forEach((dial) => abandon(channel(`curve${dial}`, letter)));
      return;
    }
    try {
      const lists = await Promise.all(SETTINGS.map((dial) => post("recommend", asked(letter, dial), channel(`curve${dial}`, letter))));
      state.curves[letter] = lists.map((found) => medianOf(found.items));
      drawDial();
    } catch {
      // Without the curve the dial still works; what is wrong is said beside the list.
    }
  }));
}

export function drawDial() {
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
