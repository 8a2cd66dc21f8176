// A text field with a list of suggestions, used by keyboard or pointer (the combobox pattern of WAI-ARIA).

import { element } from "./dom.js";

// Keys apply to the text in the field: while the list still shows suggestions for an earlier text, a key waits.
export function combo(input, list, { suggest, label, choose, enter }) {
  let options = [];
  let active = -1;
  let requests = 0; // counted, because only the suggestions of the last request are shown
  let answered = null; // settles when the suggestions are shown; null while the list is closed
  let waiting = 0; // number of keys that wait for the suggestions

  const close = () => {
    requests += 1;
    answered = null;
    options = [];
    active = -1;
    list.hidden = true;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  };

  const point = (next) => {
    active = (next + options.length) % options.length;
    [...list.children].forEach((row, place) => row.setAttribute("aria-selected", String(place === active)));
    input.setAttribute("aria-activedescendant", list.children[active].id);
    list.children[active].scrollIntoView({ block: "nearest" });
  };

  const take = (option) => {
    close();
    choose(option);
  };

  const show = (found) => {
    options = found;
    active = -1;
    input.removeAttribute("aria-activedescendant");
    list.replaceChildren(
      ...options.map((option, place) =>
        element(
          "li",
          { role: "option", id: `${list.id}-${place}`, "aria-selected": "false", onpointerdown: (event) => event.preventDefault(), onclick: () => take(option) },
          label(option),
        ),
      ),
    );
    list.hidden = !options.length;
    input.setAttribute("aria-expanded", String(options.length > 0));
  };

  const ask = () => {
    const request = ++requests;
    const suggestions = suggest(input.value.trim()).catch(() => []);
    answered = suggestions.then((found) => {
      if (request === requests) show(found);
    });
  };

  const act = (key) => {
    if (key === "Enter") {
      if (active >= 0) take(options[active]);
      else if (enter) {
        close();
        enter(input.value.trim());
      } else if (options.length) take(options[0]);
    } else if (options.length) point(active + (key === "ArrowDown" ? 1 : active < 0 ? 0 : -1));
  };

  input.addEventListener("input", ask);
  input.addEventListener("focus", ask);
  input.addEventListener("blur", async () => {
    const request = requests;
    if (waiting) await answered; // keys pressed before the field was left still count
    if (request === requests) close();
  });
  input.addEventListener("keydown", async (event) => {
    const { key } = event;
    if (key === "Escape") close();
    if (!["ArrowDown", "ArrowUp", "Enter"].includes(key)) return;
    event.preventDefault();
    if (key !== "Enter" && !answered) ask();
    const request = requests;
    waiting += 1;
    await answered;
    waiting -= 1;
    if (request === requests) act(key);
  });
}
