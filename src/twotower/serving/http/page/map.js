// The catalog as points in a plane, with the history and the recommendations marked.

import { byId, element, svg } from "./dom.js";
import { readable } from "./items.js";

const GROUPS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#e08f45", "#8a8fe0"];
const LARGEST_ZOOM = 14;

export class CatalogMap {
  constructor(canvas, { add }) {
    this.canvas = canvas;
    this.add = add;
    this.data = null;
    this.marks = { history: [], a: [], b: [] };
    this.lit = null;
    this.view = { x: 0, y: 0, zoom: 1 };
    this.colour = "popularity";
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.listen();
  }

  show(data) {
    this.data = data;
    this.view = { x: 0, y: 0, zoom: 1 };
    byId("map-wait").hidden = true;
    this.draw();
  }

  wait(text) {
    this.data = null;
    byId("map-wait").textContent = text;
    byId("map-wait").hidden = false;
    this.draw();
  }

  // marks: {history: [{item, title, place}], a: [...], b: [...]}; place is null for an item that is not on the map.
  mark(marks) {
    this.marks = marks;
    const count = (list) => list.filter((one) => one.place).length;
    const parts = [`${count(marks.history)} items of the history`, `${count(marks.a)} recommendations`];
    if (marks.b.length) parts.push(`${count(marks.b)} recommendations of the second model`);
    this.canvas.setAttribute("aria-label", `Map of ${this.data?.num_items ?? 0} items. Marked: ${parts.join(", ")}.`);
    this.draw();
  }

  light(item) {
    this.lit = item;
    this.draw();
  }

  colours() {
    const data = this.data;
    if (!data) return [];
    const style = getComputedStyle(document.documentElement);
    const named = (name) => style.getPropertyValue(name);
    if (this.colour === "popularity") {
      this.legend = ["head", "mid", "tail"].map((part) => [part, resolved(named(`--${part}`))]);
      const of = new Map(this.legend);
      return data.parts.map((part) => of.get(part));
    }
    const values = data.groups[this.colour];
    const counts = new Map();
    for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
    const largest = [...counts.keys()].filter((value) => value !== null).sort((a, b) => counts.get(b) - counts.get(a)).slice(0, GROUPS.length);
    const other = resolved(named("--quiet"));
    this.legend = largest.map((value, at) => [value, GROUPS[at]]);
    const others = [...counts.keys()].some((value) => value !== null && !largest.includes(value));
    const rest = [others ? "other" : "", counts.has(null) ? "unknown" : ""].filter(Boolean).join(" or ");
    if (rest) this.legend.push([rest, other]);
    const of = new Map(this.legend);
    return values.map((value) => of.get(value) ?? other);
  }

  draw() {
    const { canvas } = this;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    const ratio = devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.clearRect(0, 0, width, height);
    if (!this.data || !width) return;
    const style = getComputedStyle(document.documentElement);
    const [panel, a, b, ink] = ["--panel", "--a", "--b", "--history"].map((name) => resolved(style.getPropertyValue(name)));
    const colours = this.colours();
    const radius = Math.min(1.5 * Math.sqrt(this.view.zoom), 4) * (this.data.items.length > 2500 ? 1 : 1.4);
    pen.globalAlpha = 0.5;
    this.data.x.forEach((x, at) => {
      const [left, top] = this.onScreen(x, this.data.y[at]);
      if (left < -5 || top < -5 || left > width + 5 || top > height + 5) return;
      pen.fillStyle = colours[at];
      pen.beginPath();
      pen.arc(left, top, radius, 0, 7);
      pen.fill();
    });
    pen.globalAlpha = 1;
    for (const one of this.marks.history) this.drawMark(pen, one, ink, panel, "ring");
    for (const one of this.marks.a) this.drawMark(pen, one, a, panel, "disc");
    for (const one of this.marks.b) this.drawMark(pen, one, b, panel, "diamond"); // smaller and on top: both are visible
    const lit = [...this.marks.a, ...this.marks.b, ...this.marks.history].find((one) => one.item === this.lit);
    if (lit?.place) this.drawName(pen, lit, ink, panel, width);
  }

  drawMark(pen, one, colour, edge, form) {
    if (!one.place) return;
    const [x, y] = this.onScreen(...one.place);
    const size = one.item === this.lit ? 9 : { ring: 4.2, disc: 6.5, diamond: 4.2 }[form];
    pen.beginPath();
    if (form === "diamond") {
      pen.moveTo(x, y - size - 1);
      pen.lineTo(x + size + 1, y);
      pen.lineTo(x, y + size + 1);
      pen.lineTo(x - size - 1, y);
      pen.closePath();
    } else pen.arc(x, y, size, 0, 7);
    if (form === "ring") {
      pen.lineWidth = 3.6;
      pen.strokeStyle = edge;
      pen.stroke();
      pen.lineWidth = 1.8;
      pen.strokeStyle = colour;
      pen.stroke();
      return;
    }
    pen.fillStyle = colour;
    pen.fill();
    pen.lineWidth = 1.6;
    pen.strokeStyle = edge;
    pen.stroke();
  }

  drawName(pen, one, ink, panel, width) {
    const [x, y] = this.onScreen(...one.place);
    pen.font = "600 13px system-ui, sans-serif";
    const text = readable(one);
    const wide = pen.measureText(text).width;
    const left = Math.min(Math.max(x - wide / 2, 8), width - wide - 8);
    const top = y < 34 ? y + 26 : y - 16;
    pen.fillStyle = ink;
    pen.beginPath();
    pen.roundRect(left - 7, top - 14, wide + 14, 20, 6);
    pen.fill();
    pen.fillStyle = panel;
    pen.fillText(text, left, top);
  }

  scale() {
    return 0.47 * Math.min(this.canvas.clientWidth, this.canvas.clientHeight) * this.view.zoom;
  }

  onScreen(x, y) {
    return [this.canvas.clientWidth / 2 + (x - this.view.x) * this.scale(), this.canvas.clientHeight / 2 - (y - this.view.y) * this.scale()];
  }

  zoom(factor, at = null) {
    const before = this.scale();
    this.view.zoom = Math.min(Math.max(this.view.zoom * factor, 1), LARGEST_ZOOM);
    if (at) {
      const change = 1 / before - 1 / this.scale();
      this.view.x += (at[0] - this.canvas.clientWidth / 2) * change;
      this.view.y -= (at[1] - this.canvas.clientHeight / 2) * change;
    }
    this.keepInside();
  }

  move(right, up) {
    this.view.x += right / this.scale();
    this.view.y += up / this.scale();
    this.keepInside();
  }

  keepInside() {
    const edge = 1 - 1 / this.view.zoom;
    this.view.x = Math.min(Math.max(this.view.x, -edge), edge);
    this.view.y = Math.min(Math.max(this.view.y, -edge), edge);
    this.draw();
  }

  // The item within 13 pixels of a point; marked items win over others that are a little closer.
  nearest(x, y) {
    let [best, found] = [13 ** 2, null];
    const offer = (item, title, place, bonus) => {
      if (!place) return;
      const [left, top] = this.onScreen(...place);
      const distance = (left - x) ** 2 + (top - y) ** 2 - bonus;
      if (distance < best) [best, found] = [distance, { item, title, left, top }];
    };
    this.data?.items.forEach((item, at) => offer(String(item), this.data.titles[at], [this.data.x[at], this.data.y[at]], 0));
    for (const one of [...this.marks.history, ...this.marks.a, ...this.marks.b]) offer(one.item, one.title, one.place, 40);
    return found;
  }

  listen() {
    const { canvas } = this;
    const tip = byId("tip");
    let from = null;
    let dragged = false;
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    canvas.addEventListener("pointerdown", (event) => {
      from = at(event);
      dragged = false;
    });
    canvas.addEventListener("pointermove", (event) => {
      const [x, y] = at(event);
      if (from && event.buttons) {
        if (Math.hypot(x - from[0], y - from[1]) > 4) dragged = true;
        if (dragged) {
          this.move(from[0] - x, y - from[1]);
          from = [x, y];
        }
      }
      const found = this.nearest(x, y);
      tip.hidden = !found;
      if (!found) return;
      tip.textContent = readable(found);
      tip.style.left = `${Math.min(found.left + 10, canvas.clientWidth * 0.6)}px`;
      tip.style.top = `${Math.max(found.top - 36, 4)}px`;
    });
    canvas.addEventListener("pointerleave", () => {
      tip.hidden = true;
      from = null;
    });
    canvas.addEventListener("click", (event) => {
      const found = dragged ? null : this.nearest(...at(event));
      if (found) this.add(found.item);
    });
    canvas.addEventListener(
      "wheel",
      (event) => {
        if (!event.ctrlKey && this.view.zoom === 1 && event.deltaY > 0) return; // scrolls the page
        event.preventDefault();
        this.zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2, at(event));
      },
      { passive: false },
    );
    canvas.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: [-40, 0], ArrowRight: [40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] };
      if (moves[event.key]) this.move(...moves[event.key]);
      else if (event.key === "+" || event.key === "=") this.zoom(1.3);
      else if (event.key === "-") this.zoom(1 / 1.3);
      else return;
      event.preventDefault();
    });
    byId("closer").addEventListener("click", () => this.zoom(1.5));
    byId("farther").addEventListener("click", () => this.zoom(1 / 1.5));
    byId("whole").addEventListener("click", () => this.zoom(0));
  }

  drawLegend(place, names) {
    const form = (kind) => {
      const made = svg("svg", { width: 14, height: 14, viewBox: "0 0 14 14", "aria-hidden": "true" });
      if (kind === "diamond") made.append(svg("path", { d: "M7 1 13 7 7 13 1 7Z", fill: "var(--b)" }));
      else if (kind === "ring") made.append(svg("circle", { cx: 7, cy: 7, r: 4.2, fill: "none", stroke: "var(--history)", "stroke-width": 2 }));
      else made.append(svg("circle", { cx: 7, cy: 7, r: kind === "disc" ? 5.5 : 3.2, fill: kind === "disc" ? "var(--a)" : kind }));
      return made;
    };
    this.colours();
    const rows = [["ring", "history"], ["disc", names[0]], ...(names[1] ? [["diamond", names[1]]] : []), ...(this.legend ?? []).map(([name, colour]) => [colour, name])];
    place.replaceChildren(...rows.map(([kind, name]) => element("li", {}, form(kind), name)));
  }
}

// A colour in a form that the canvas accepts; it does not support light-dark().
function resolved(value) {
  const probe = document.createElement("i");
  probe.style.color = value;
  document.body.append(probe);
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}
