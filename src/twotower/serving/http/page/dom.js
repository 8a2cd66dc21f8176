// Small helpers over the DOM and timers.

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

// Debounces: `work` runs `wait` milliseconds after the last call.
export function later(wait, work) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...given), wait);
  };
}

// Returns a function that resolves once no pointer is pressed on `place`: a row replaced in the middle of a click would
// miss the click.
export function releases(place) {
  let released = Promise.resolve();
  place.addEventListener("pointerdown", () => {
    released = new Promise((resolve) => {
      const done = () => setTimeout(resolve); // after the click event
      for (const end of ["pointerup", "pointercancel"]) addEventListener(end, done, { once: true });
    });
  });
  return () => released;
}

// Shows a message below a field and marks the field as invalid; null removes both.
export function showRefusal(input, message, text) {
  message.hidden = !text;
  message.textContent = text ?? "";
  if (text) input.setAttribute("aria-invalid", "true");
  else input.removeAttribute("aria-invalid");
}

export const reducedMotion = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
