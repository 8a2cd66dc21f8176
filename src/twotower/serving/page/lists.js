// One model's recommendations: how popular they are together, and each with what pulled it up.

import { element, median, nameOf, readable, still, whole } from "./dom.js";

const PARTS = ["head", "mid", "tail"];

export function meter(item, most) {
  const bar = element("b");
  bar.style.width = `${(100 * Math.log1p(item.interactions)) / Math.log1p(most || 1)}%`;
  const said = `${whole.format(item.interactions)} interactions in training, ${item.part} of the catalog`;
  return element("span", { class: `meter ${item.part}`, title: said }, element("i", { "aria-hidden": "true" }, bar), whole.format(item.interactions));
}

export function summary(items) {
  const counts = items.map((item) => item.interactions);
  const shares = element("div", { class: "shares", "aria-hidden": "true" });
  const said = [];
  for (const part of PARTS) {
    const number = items.filter((item) => item.part === part).length;
    const bar = element("span", { class: part });
    bar.style.width = `${(100 * number) / (items.length || 1)}%`;
    shares.append(bar);
    said.push(`${number} ${part}`);
  }
  const text = element("span", {}, "half have more than ", element("strong", { class: "median" }, whole.format(Math.round(median(counts)))), ` interactions · ${said.join(" · ")}`);
  const title = "head, mid and tail: a third of all training interactions each, from few popular items to many rare ones";
  return element("div", { class: "summary", title }, text, shares);
}

// Draws a list into `place`, moving the rows that stay from where they were.
export function draw(place, { model, letter, items, nothing, most, shared, open, toggle, point }) {
  const before = new Map([...place.querySelectorAll(".results > li")].map((row) => [row.dataset.item, row.getBoundingClientRect().top]));
  const rows = items.map((item) => row(item, { most, letter, shared, open, toggle, point }));
  place.replaceChildren(
    element("h3", {}, element("span", { class: "dot", "aria-hidden": "true" }), model),
    items.length ? summary(items) : "",
    items.length
      ? element("ol", { class: "results", "aria-label": `Recommendations of ${model}` }, rows)
      : element("p", { class: "nothing" }, nothing),
  );
  if (still()) return;
  for (const one of rows) {
    const old = before.get(one.dataset.item);
    const now = one.getBoundingClientRect().top;
    if (old === undefined) {
      if (before.size) one.animate([{ opacity: 0 }, { opacity: 1 }], { duration: 260 });
    } else if (old !== now) one.animate([{ transform: `translateY(${old - now}px)` }, { transform: "none" }], { duration: 260, easing: "ease-out" });
  }
}

function row(item, { most, letter, shared, open, toggle, point }) {
  const expanded = open === String(item.item);
  const id = `more-${letter}-${item.rank}`;
  const head = element(
    "button",
    { type: "button", class: "item", "aria-expanded": String(expanded), "aria-controls": id, onclick: () => toggle(item) },
    element("span", { class: "rank" }, `${item.rank}`),
    element("span", { class: "line" }, element("span", { class: "name" }, readable(item)), meter(item, most)),
    element("span", { class: "why" }, reason(item.explanation)),
  );
  const made = element("li", { class: shared?.has(String(item.item)) ? "shared" : "" }, head);
  made.dataset.item = String(item.item);
  for (const event of ["pointerenter", "focusin"]) made.addEventListener(event, () => point(item));
  for (const event of ["pointerleave", "focusout"]) made.addEventListener(event, () => point(null));
  const more = element("div", { class: "more", id, hidden: !expanded });
  if (expanded) more.append(details(item));
  made.append(more);
  return made;
}

// The items of the history that did most for an item, and popularity's part in it.
export function reason(found) {
  if (!found) return " ";
  const pulls = [...new Set(found.history.filter((one) => one.contribution > 0).map(readable))].slice(0, 2); // met twice, said once
  const said = pulls.length ? ["because of ", element("em", {}, pulls.join(" and "))] : ["nothing in the history alone stands out"];
  const share = popularityShare(found);
  return element("span", {}, said, share === null ? "" : ` · ${share}`);
}

function popularityShare(found) {
  if (found.popularity_share === null || found.popularity_share === undefined) return null;
  const percent = Math.round(100 * found.popularity_share);
  if (percent < 0) return "in spite of being rare";
  return percent > 100 ? "all popularity" : `${percent}% popularity`;
}

function details(item) {
  const parts = [];
  if (item.columns) {
    const shown = Object.entries(item.columns).filter(([, value]) => value !== null && value !== nameOf(item));
    parts.push(element("dl", {}, shown.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, Array.isArray(value) ? value.join(", ") : String(value))))));
  }
  if (item.explanation) {
    const pulls = item.explanation.history.filter((one) => one.contribution !== 0);
    const chosen = pulls.length > 9 ? [...pulls.slice(0, 6), ...pulls.slice(-3)] : pulls;
    const largest = Math.max(...chosen.map((one) => Math.abs(one.contribution)), 1e-9);
    parts.push(
      element("p", { class: "quiet" }, "What each item of the history adds to the logit, and takes away:"),
      element("ol", { class: "pulls" }, chosen.map((one) => pull(one, largest))),
    );
  }
  return element("div", {}, parts);
}

function pull(one, largest) {
  const bar = element("i", { class: one.contribution < 0 ? "down" : "" });
  const width = (50 * Math.abs(one.contribution)) / largest;
  bar.style.width = `${width}%`;
  bar.style.left = one.contribution < 0 ? `${50 - width}%` : "50%";
  const value = `${one.contribution < 0 ? "−" : "+"}${Math.abs(one.contribution).toFixed(2)}`;
  return element("li", {}, element("span", { class: "name", title: readable(one) }, readable(one)), element("span", { class: "bar", "aria-hidden": "true" }, bar), element("span", { class: "value" }, value));
}
