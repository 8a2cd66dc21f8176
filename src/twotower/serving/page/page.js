// The page begins here: what its controls do.

import { addressChanged, recall, remember } from "./address.js";
import { changed, drawDial, refresh } from "./answers.js";
import { get } from "./api.js";
import { drawLegend, map } from "./atlas.js";
import { combo } from "./combo.js";
import { emptyContext } from "./context.js";
import { byId, element, later, readable, whole } from "./dom.js";
import { chooseModels, loadModels } from "./models.js";
import { complain, state } from "./state.js";
import { add, chooseQuery, drawHistory, startEmpty, surprise } from "./who.js";

function theme() {
  const root = document.documentElement;
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  const kept = localStorage.getItem("twotower-theme");
  if (kept) root.dataset.theme = kept;
  const button = byId("theme");
  const say = () => { button.textContent = dark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    localStorage.setItem("twotower-theme", root.dataset.theme);
    say();
    map.draw();
    drawLegend();
  });
  say();
}

async function start() {
  theme();
  try {
    await loadModels();
  } catch (error) {
    complain(error.message);
    return;
  }
  byId("model-a").replaceChildren(...state.models.map((model) => element("option", {}, model.name)));
  byId("model-b").replaceChildren(element("option", { value: "" }, "nothing"), ...state.models.map((model) => element("option", {}, model.name)));
  byId("compare").hidden = state.models.length < 2;

  combo(byId("query"), byId("query-list"), {
    suggest: async (text) => (await get("page/queries", { text, k: 12, model: state.letters.a }, "queries")).queries,
    label: (id) => String(id),
    choose: (id) => chooseQuery(String(id)),
    enter: chooseQuery,
  });
  combo(byId("title"), byId("title-list"), {
    suggest: async (text) => (text ? (await get("items", { text, k: 12, model: state.letters.a }, "titles")).items : []),
    label: (item) => [element("bdi", {}, readable(item)), element("span", { class: "quiet", title: "interactions in training" }, whole.format(item.interactions))],
    choose: (item) => {
      byId("title").value = "";
      add(item.item);
    },
  });
  byId("surprise").addEventListener("click", surprise);
  byId("clear").addEventListener("click", startEmpty);
  byId("restore").addEventListener("click", () => chooseQuery(state.query));
  byId("more").addEventListener("click", () => { state.all = true; drawHistory(); });
  byId("dial").addEventListener("input", () => {
    state.dial = Number(byId("dial").value);
    drawDial();
    refresh();
  });
  byId("dial").addEventListener("change", remember);
  byId("k").addEventListener("change", () => { state.k = Number(byId("k").value); changed(); });
  byId("seen").addEventListener("change", () => { state.seen = byId("seen").checked; changed(); });
  byId("forget").addEventListener("click", emptyContext);
  byId("filter").addEventListener("input", later(350, () => { state.filter = byId("filter").value.trim(); changed(); }));
  byId("colour").addEventListener("change", () => { map.colour = byId("colour").value; map.draw(); drawLegend(); });
  for (const id of ["model-a", "model-b"]) byId(id).addEventListener("change", chooseModels);
  addEventListener("resize", later(100, drawDial));
  addEventListener("hashchange", addressChanged);
  await recall();
}

start();
