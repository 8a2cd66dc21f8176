// A text field with a list of suggestions, by the keyboard or by pointing (the combobox pattern of WAI-ARIA).

import { element } from "./dom.js";

export function combo(input, list, { suggest, label, choose, enter }) {
  let options = [];
  let active = -1;

  const close = () => {
    list.hidden = true;
    active = -1;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  };

  const point = (next) => {
    if (!options.length) return;
    active = (next + options.length) % options.length;
    [...list.children].forEach((row, place) => row.setAttribute("aria-selected", String(place === active)));
    input.setAttribute("aria-activedescendant", list.children[active].id);
    list.children[active].scrollIntoView({ block: "nearest" });
  };

  const take = (option) => {
    close();
    choose(option);
  };

  const show = async () => {
    let found;
    try {
      found = await suggest(input.value.trim());
    } catch {
      return;
    }
    if (document.activeElement !== input) return;
    options = found;
    active = -1;
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

  input.addEventListener("input", show);
  input.addEventListener("focus", show);
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (list.hidden) show();
      else point(active + (event.key === "ArrowDown" ? 1 : active < 0 ? 0 : -1));
    } else if (event.key === "Enter") {
      event.preventDefault();
      if (active >= 0) take(options[active]);
      else if (enter) {
        close();
        enter(input.value.trim());
      } else if (options.length && !list.hidden) take(options[0]);
    } else if (event.key === "Escape") close();
  });
}
