// Elements and numbers as the rest of the page writes them.

export const byId = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

export function svg(tag, properties = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(properties)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export const whole = new Intl.NumberFormat("en");
export const nameOf = (item) => item.title ?? `item ${item.item}`;

// "Lion King, The" -> "The Lion King": how catalogs sort is not how people read.
export function readable(item) {
  const name = nameOf(item);
  const found = /^(.*), (The|A|An|Le|La|Les|Il|Der|Das|Die|El|L')( \(.*\))?$/.exec(name);
  if (!found) return name;
  const article = found[2].endsWith("'") ? found[2] : `${found[2]} `;
  return `${article}${found[1]}${found[3] ?? ""}`;
}

export function median(values) {
  if (!values.length) return 0;
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

export function later(wait, work) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...given), wait);
  };
}

// Gives a promise that settles when no button is down on an element: what is drawn anew under one misses its click.
export function releases(place) {
  let released = Promise.resolve();
  place.addEventListener("pointerdown", () => {
    released = new Promise((resolve) => {
      const done = () => setTimeout(resolve); // the click comes first
      for (const end of ["pointerup", "pointercancel"]) addEventListener(end, done, { once: true });
    });
  });
  return () => released;
}

export const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
