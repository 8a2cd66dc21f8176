// A text field with a list of suggestions, by the keyboard or by pointing (the combobox pattern of WAI-ARIA).

import { element } from "./dom.js";

// Keys mean the text as it stands: they wait for its suggestions where those to fewer letters are still shown.
export function combo(input, list, { suggest, label, choose, enter }) {
  let options = [];
  let active = -1;
  let asked = 0; // counts the questions: only the last one's answer is shown
  let answered = null; // settles when it is; null while the list is closed
  let waiting = 0; // keys that wait for it

  const close = () => {
    asked += 1;
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
    const question = ++asked;
    const answer = suggest(input.value.trim()).catch(() => []);
    answered = answer.then((found) => {
      if (question === asked) show(found);
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
    const question = asked;
    if (waiting) await answered; // what was pressed before the field was left counts
    if (question === asked) close();
  });
  input.addEventListener("keydown", async (event) => {
    const { key } = event;
    if (key === "Escape") close();
    if (!["ArrowDown", "ArrowUp", "Enter"].includes(key)) return;
    event.preventDefault();
    if (key !== "Enter" && !answered) ask();
    const question = asked;
    waiting += 1;
    await answered;
    waiting -= 1;
    if (question === asked) act(key);
  });
}
