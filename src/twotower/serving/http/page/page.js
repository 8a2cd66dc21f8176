// The page: its views, the theme, and the first requests.

import * as address from "./address.js";
import * as answers from "./answers.js";
import * as atlas from "./atlas.js";
import * as card from "./card.js";
import * as context from "./context.js";
import * as dial from "./dial.js";
import { byId } from "./dom.js";
import * as heldOut from "./heldout.js";
import * as lists from "./lists.js";
import * as refusals from "./refusals.js";
import * as settings from "./settings.js";
import { refuse, update } from "./store.js";
import * as who from "./who.js";
import * as words from "./words.js";

function attachTheme() {
  const root = document.documentElement;
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  const choose = (theme) => {
    if (theme) root.dataset.theme = theme;
    byId("theme").textContent = dark() ? "Light" : "Dark";
    update({ theme });
  };
  byId("theme").addEventListener("click", () => {
    const theme = dark() ? "light" : "dark";
    localStorage.setItem("twotower-theme", theme);
    choose(theme);
  });
  choose(localStorage.getItem("twotower-theme"));
}

async function start() {
  // The context first: it drops values that no field can hold before anything is requested.
  for (const view of [context, settings, words, who, lists, heldOut, dial, atlas, card, refusals, address, answers]) view.attach();
  attachTheme();
  try {
    await answers.loadModels();
  } catch (error) {
    refuse(null, error.message);
    return;
  }
  await address.restore();
}

start();
