// The held-out items of a known user, with the rank that each model gives them based on the earlier items.

import { aborted, get } from "./api.js";
import { byId, element } from "./dom.js";
import { integer, readable } from "./items.js";
import { active, offerFor, refuse, state, subscribe } from "./store.js";

let found = {}; // letter -> held-out items of the user shown

export function attach() {
  subscribe(["models", "letters", "query", "history", "group", "time"], request);
  subscribe(["k"], draw);
}

async function request() {
  found = {};
  draw();
  const { query } = state;
  if (query === null || state.edited) return;
  await Promise.all(active().map(async (letter) => {
    try {
      const answer = await get("page/held-out", { query_id: query, model: state.letters[letter], ...offerFor(letter) }, `held-out-${letter}`);
      if (state.query !== query || state.edited) return;
      found = { ...found, [letter]: answer };
      draw();
    } catch (error) {
      // The other model may not know this user; its list says so.
      if (!aborted(error) && error.status !== 404) refuse(null, error.message, state.letters[letter]);
    }
  }));
}

function draw() {
  const letters = active().filter((letter) => found[letter]?.items.length);
  byId("held-out").hidden = !letters.length;
  byId("held-out-lists").replaceChildren(...letters.map(list));
  byId("held-out-lists").classList.toggle("two", letters.length > 1);
}

function list(letter) {
  const { items, trained, last_rank: last } = found[letter];
  const hits = items.filter(isHit).length;
  const from = `${integer.format(trained)} ${trained === 1 ? "item" : "items"}`;
  return element(
    "div",
    { class: `list ${letter}` },
    element("h4", {}, element("span", { class: "dot", "aria-hidden": "true" }), element("span", { class: "name" }, state.letters[letter])),
    element("p", { class: "hint" }, `${hits} of ${items.length} among the first ${state.k}, based on the ${from} before them.`),
    element("ol", { class: "targets" }, items.map((item) => row(item, last))),
  );
}

const isHit = ({ rank }) => rank !== null && rank <= state.k;

function row(item, last) {
  const hit = isHit(item);
  const rank = item.rank === null ? `beyond rank ${integer.format(last)}` : `rank ${integer.format(item.rank)}`;
  return element(
    "li",
    { class: hit ? "hit" : "miss" },
    element("span", { class: "mark" }, hit ? "✓ hit" : "✗ miss"),
    element("span", { class: "name", title: readable(item) }, readable(item)),
    element("span", { class: "quiet" }, rank),
  );
}
