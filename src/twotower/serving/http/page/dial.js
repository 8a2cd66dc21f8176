// The popularity dial, and above it a curve of how popular the list would be at each setting.

import { SETTINGS } from "./answers.js";
import { byId, later, svg } from "./dom.js";
import { integer, medianInteractions } from "./items.js";
import { active, state, subscribe, update } from "./store.js";

export function attach() {
  byId("dial").addEventListener("input", () => update({ dial: Number(byId("dial").value) }));
  addEventListener("resize", later(100, draw));
  subscribe(["letters", "dial", "found", "curves"], draw);
}

function draw() {
  byId("dial").value = String(state.dial);
  byId("dial").setAttribute("aria-valuetext", describe(state.dial));
  byId("dial-setting").textContent = describe(state.dial);
  const curves = active().filter((letter) => state.curves[letter]).map((letter) => [letter, state.curves[letter]]);
  const medians = active().filter((letter) => state.found[letter]?.length).map((letter) => [letter, medianInteractions(state.found[letter])]);
  drawCurve(byId("curve"), curves, medians, state.dial);
}

function describe(dial) {
  if (dial === 1) return "1.00, as trained";
  return `${dial.toFixed(2)}, ${dial < 1 ? "rarer items" : "more popular"}`;
}

// curves: [[letter, a median for each of SETTINGS]]; medians: [[letter, median of the list shown]].
function drawCurve(place, curves, medians, dial) {
  const width = place.clientWidth || 300;
  const height = place.clientHeight || 58;
  const edge = 8; // half of the thumb, so that the curve lies above the track
  const counts = [...curves.flatMap(([, line]) => line), ...medians.map(([, count]) => count)];
  // The logarithmic scale spans a factor of four or more, so that small changes look small.
  const [low, high] = [Math.log1p(Math.min(...counts, Infinity)), Math.log1p(Math.max(...counts, 0))];
  const spread = Math.max(high - low, Math.log(4));
  const x = (setting) => edge + ((width - 2 * edge) * setting) / 2;
  const y = (count) => height - 9 - (height - 30) * (0.5 + (Math.log1p(count) - (low + high) / 2) / spread);
  place.setAttribute("viewBox", `0 0 ${width} ${height}`);
  place.replaceChildren(svg("line", { x1: x(dial), x2: x(dial), y1: 4, y2: height }));
  for (const [letter, line] of curves) {
    const path = line.map((count, at) => `${at ? "L" : "M"}${x(SETTINGS[at]).toFixed(1)} ${y(count).toFixed(1)}`).join("");
    place.append(svg("path", { d: path, class: letter }));
  }
  for (const [letter, count] of medians) place.append(svg("circle", { cx: x(dial), cy: y(count), r: 5, class: letter }));
  if (!medians.length) return;
  // The text lies above the curves, which stay 21 pixels below the top.
  const text = svg("text", { y: 11 }, "median ");
  medians.forEach(([letter, count], at) => text.append(at ? " and " : "", svg("tspan", { class: letter }, integer.format(Math.round(count)))));
  text.append(" interactions");
  place.append(text);
  text.setAttribute("x", Math.min(x(dial) + 8, width - text.getComputedTextLength()));
}
