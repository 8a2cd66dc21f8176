// How items and numbers are written.

import { element } from "./dom.js";

export const integer = new Intl.NumberFormat("en");
const nameOf = (item) => item.title ?? `item ${item.item}`;

// "Lion King, The" -> "The Lion King": catalogs move the article to the end to sort by title.
export function readable(item) {
  const name = nameOf(item);
  const found = /^(.*), (The|A|An|Le|La|Les|Il|Der|Das|Die|El|L')( \(.*\))?$/.exec(name);
  if (!found) return name;
  const article = found[2].endsWith("'") ? found[2] : `${found[2]} `;
  return `${article}${found[1]}${found[3] ?? ""}`;
}

function median(values) {
  if (!values.length) return 0;
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

export const medianInteractions = (items) => median(items.map((item) => item.interactions));

// A bar of an item's training interactions on a logarithmic scale; `most` is the largest count in the catalog.
export function meter(item, most) {
  const bar = element("b");
  bar.style.width = `${(100 * Math.log1p(item.interactions)) / Math.log1p(most || 1)}%`;
  const title = `${integer.format(item.interactions)} interactions in training, in the ${item.part} of the catalog`;
  return element("span", { class: `meter ${item.part}`, title }, element("i", { "aria-hidden": "true" }, bar), integer.format(item.interactions));
}
