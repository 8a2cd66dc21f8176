// Above the dial: how popular the list would be at each of its settings.

import { median, svg, whole } from "./dom.js";

export const SETTINGS = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2];

// lines: [{letter, medians: [one for each of SETTINGS]}], now: {a: items, b: items} at the dial.
export function drawCurve(place, lines, dial, now) {
  const width = place.clientWidth || 300;
  const height = place.clientHeight || 58;
  const edge = 8; // half of the thumb: the curve is above the track
  const every = [...lines.flatMap((line) => line.medians), ...Object.values(now).map((items) => medianOf(items))];
  // A logarithmic scale, of a factor of four at least: what hardly changes should look so.
  const [low, high] = [Math.log1p(Math.min(...every, Infinity)), Math.log1p(Math.max(...every, 0))];
  const spread = Math.max(high - low, Math.log(4));
  const x = (setting) => edge + ((width - 2 * edge) * setting) / 2;
  const y = (count) => height - 9 - (height - 30) * (0.5 + (Math.log1p(count) - (low + high) / 2) / spread);
  place.setAttribute("viewBox", `0 0 ${width} ${height}`);
  place.replaceChildren(svg("line", { x1: x(dial), x2: x(dial), y1: 4, y2: height }));
  for (const line of lines) {
    const path = line.medians.map((count, at) => `${at ? "L" : "M"}${x(SETTINGS[at]).toFixed(1)} ${y(count).toFixed(1)}`).join("");
    place.append(svg("path", { d: path, class: line.letter }));
  }
  for (const [letter, items] of Object.entries(now)) {
    const count = medianOf(items);
    place.append(svg("circle", { cx: x(dial), cy: y(count), r: 5, class: letter }));
  }
  // Above everything that is drawn: the highest curve is 21 from the top.
  const text = svg("text", { x: dial > 1.4 ? x(dial) - 8 : x(dial) + 8, y: 11, "text-anchor": dial > 1.4 ? "end" : "start" });
  Object.entries(now).forEach(([letter, items], at) => {
    const count = svg("tspan", { class: letter });
    count.textContent = whole.format(Math.round(medianOf(items)));
    text.append(at ? " and " : "", count);
  });
  text.prepend("median ");
  if (Object.keys(now).length) place.append(text);
  text.append(" interactions");
}

export const medianOf = (items) => median(items.map((item) => item.interactions));

export function saidOf(dial) {
  if (dial === 1) return "1.00, as trained";
  return `${dial.toFixed(2)}, ${dial < 1 ? "towards discovery" : "towards the popular"}`;
}
