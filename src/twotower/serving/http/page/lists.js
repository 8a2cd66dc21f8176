// The lists of recommendations: how popular they are, and each item with the reasons for it.

import { get } from "./api.js";
import { byId, element, later, reducedMotion, releases } from "./dom.js";
import { integer, medianInteractions, meter, readable } from "./items.js";
import { active, queryFor, state, subscribe, summary, update, updateList } from "./store.js";

const PARTS = ["head", "mid", "tail"];
const PULLS = 2; // maximum number of history items that a row names
const [FIRST, LAST] = [6, 3]; // how many of the largest and of the smallest contributions an expanded row shows
let released = null;

export function attach() {
  released = releases(byId("lists"));
  subscribe(["letters"], drawPlaces);
  subscribe(["found"], drawTitle);
  subscribe(["found"], drawShared);
  subscribe(["found"], later(400, announce));
  subscribe(["found", "explanations", "open"], () => active().forEach(drawList));
  subscribe(["busy"], () => byId("lists").toggleAttribute("aria-busy", state.busy));
}

function drawPlaces() {
  byId("lists").replaceChildren(...active().map((letter) => element("div", { class: `list ${letter}`, id: `list-${letter}` })));
  byId("lists").classList.toggle("two", active().length > 1);
}

// Names in the title the user or the query that the lists are for.
function drawTitle() {
  const { query, history, edited, text } = state;
  const items = `${integer.format(history.length)} ${history.length === 1 ? "item" : "items"}`;
  const whose = [];
  if (text) whose.push(" for ", element("bdi", {}, `“${text}”`));
  if (query !== null) whose.push(summary("a")?.texts_are_queries ? " for the query " : " for user ", element("bdi", {}, query), edited ? " with an edited history" : "");
  else if (history.length) whose.push(` for a new user with ${items}`);
  else if (!text && active().some(queryFor)) whose.push(" for a new user in this context");
  byId("results-title").replaceChildren("Recommendations", ...whose);
}

async function drawList(letter) {
  await released();
  const place = byId(`list-${letter}`);
  if (!place) return;
  if (!queryFor(letter)) {
    const searches = summary(letter)?.text ? "Search, or choose a query from the data." : null;
    place.replaceChildren(element("p", { class: "nothing" }, searches ?? "Choose a user, or add an item or two that a new user might like."));
    return;
  }
  if (state.found[letter] === undefined) return; // not answered yet
  const focused = document.activeElement?.closest(`#list-${letter} li`)?.dataset.item; // its row is replaced
  drawRows(place, letter, sharedItems());
  if (focused !== undefined) place.querySelector(`li[data-item="${CSS.escape(focused)}"] button`)?.focus({ preventScroll: true });
}

function sharedItems() {
  if (active().length < 2) return new Set();
  const second = new Set((state.found.b ?? []).map((item) => item.item));
  return new Set((state.found.a ?? []).map((item) => item.item).filter((id) => second.has(id)));
}

function drawShared() {
  const [a, b] = [state.found.a ?? [], state.found.b ?? []];
  byId("common").hidden = active().length < 2 || !a.length || !b.length;
  byId("common").textContent = `${sharedItems().size} of ${a.length} items are in both lists, marked at the left edge.`;
}

// Draws the rows; those that stay slide from their old place.
function drawRows(place, letter, shared) {
  const before = new Map([...place.querySelectorAll(".results > li")].map((one) => [one.dataset.item, one.getBoundingClientRect().top]));
  const model = state.letters[letter];
  const items = state.found[letter] ?? [];
  const rows = items.map((item) => row(letter, item, shared));
  place.replaceChildren(
    element("h3", {}, element("span", { class: "dot", "aria-hidden": "true" }), element("span", { class: "name", title: model }, model)),
    ...(items.length
      ? [popularity(items), element("ol", { class: "results", "aria-label": `Recommendations of ${model}` }, rows)]
      : [element("p", { class: "nothing" }, state.found[letter] === null ? "The request failed. The message in red says why." : "No item is left to recommend with these settings.")]),
  );
  if (reducedMotion()) return;
  for (const one of rows) {
    const old = before.get(one.dataset.item);
    const now = one.getBoundingClientRect().top;
    if (old === undefined) {
      if (before.size) one.animate([{ opacity: 0 }, { opacity: 1 }], { duration: 260 });
    } else if (old !== now) one.animate([{ transform: `translateY(${old - now}px)` }, { transform: "none" }], { duration: 260, easing: "ease-out" });
  }
}

// Shows how popular a list is: its median, and its shares of head, mid and tail.
function popularity(items) {
  const counts = PARTS.map((part) => [part, items.filter((item) => item.part === part).length]);
  const bars = counts.map(([part, count]) => {
    const bar = element("span", { class: part });
    bar.style.width = `${(100 * count) / items.length}%`;
    return bar;
  });
  const median = element("strong", { class: "median" }, integer.format(Math.round(medianInteractions(items))));
  const text = element("span", {}, "median ", median, ` interactions · ${counts.map(([part, count]) => `${count}\u00a0${part}`).join(" · ")}`);
  return element("div", { class: "summary" }, text, element("div", { class: "shares", "aria-hidden": "true" }, bars));
}

function row(letter, item, shared) {
  const explanation = state.explanations[letter]?.get(item.item);
  const open = state.open[letter]?.item === item.item ? state.open[letter] : null;
  const id = `more-${letter}-${item.rank}`;
  const head = element(
    "button",
    { type: "button", class: "item", "aria-expanded": String(open !== null), "aria-controls": id, onclick: () => toggle(letter, item.item) },
    element("span", { class: "rank" }, `${item.rank}`),
    element("span", { class: "line" }, element("span", { class: "name" }, readable(item)), meter(item, summary(letter)?.most_interactions)),
    element("span", { class: "why" }, reason(explanation)),
  );
  const more = element("div", { class: "more", id, hidden: !open }, open ? details(item, open.columns, explanation) : "");
  const made = element("li", { class: shared.has(item.item) ? "shared" : "" }, head, more);
  made.dataset.item = item.item;
  for (const event of ["pointerenter", "focusin"]) made.addEventListener(event, () => update({ pointed: { letter, item: item.item } }));
  for (const event of ["pointerleave", "focusout"]) made.addEventListener(event, () => update({ pointed: null }));
  return made;
}

// Expands or collapses a row; the item's columns are requested when it is expanded.
async function toggle(letter, item) {
  const opening = state.open[letter]?.item !== item;
  updateList(letter, { open: opening ? { item, columns: null } : null });
  if (!opening) return;
  const model = state.letters[letter];
  const { columns } = await get(`items/${encodeURIComponent(item)}`, { model }).catch(() => ({ columns: {} }));
  if (state.letters[letter] === model && state.open[letter]?.item === item) updateList(letter, { open: { item, columns } });
}

// Names the items of the history that raised an item most, and the share of popularity in its score.
function reason(explanation) {
  if (!explanation) return " ";
  const names = [...new Set(explanation.history.filter((one) => one.contribution > 0).map(readable))].slice(0, PULLS);
  const why = names.length ? ["because of ", element("em", {}, names.join(" and "))] : ["no single item of the history stands out"];
  const share = popularityShare(explanation.popularity_share);
  return element("span", {}, why, share === null ? "" : ` · ${share}`);
}

function popularityShare(share) {
  if (share === null || share === undefined) return null;
  const percent = Math.round(100 * share);
  if (percent < 0) return "despite being rare";
  return percent > 100 ? "popularity alone" : `${percent}% popularity`;
}

function details(item, columns, explanation) {
  const parts = [];
  if (columns) {
    const shown = Object.entries(columns).filter(([, value]) => value !== null && value !== item.title);
    parts.push(element("dl", {}, shown.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, Array.isArray(value) ? value.join(", ") : String(value))))));
  }
  const pulls = (explanation?.history ?? []).filter((one) => Math.abs(one.contribution) >= 0.005); // smaller ones would be shown as 0.00
  if (pulls.length) {
    const chosen = pulls.length > FIRST + LAST ? [...pulls.slice(0, FIRST), ...pulls.slice(-LAST)] : pulls;
    const largest = Math.max(...chosen.map((one) => Math.abs(one.contribution)));
    parts.push(
      element("p", { class: "quiet" }, "How much each item of the history raises (+) or lowers (−) the logit:"),
      element("ol", { class: "pulls" }, chosen.map((one) => pull(one, largest))),
    );
  }
  return parts;
}

function pull(one, largest) {
  const bar = element("i", { class: one.contribution < 0 ? "down" : "" });
  const width = (50 * Math.abs(one.contribution)) / largest;
  bar.style.width = `${width}%`;
  bar.style.left = one.contribution < 0 ? `${50 - width}%` : "50%";
  const value = `${one.contribution < 0 ? "−" : "+"}${Math.abs(one.contribution).toFixed(2)}`;
  return element("li", {}, element("span", { class: "name", title: readable(one) }, readable(one)), element("span", { class: "bar", "aria-hidden": "true" }, bar), element("span", { class: "value" }, value));
}

// For screen readers.
function announce() {
  const lists = active().filter((letter) => state.found[letter]?.length).map((letter) => {
    const items = state.found[letter];
    return `${state.letters[letter]}: ${items.length} items, the first is ${readable(items[0])}, median ${Math.round(medianInteractions(items))} interactions`;
  });
  byId("announcement").textContent = lists.join(". ");
}
