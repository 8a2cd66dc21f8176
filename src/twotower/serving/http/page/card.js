// The model cards: data, training, metrics by slice, and the findings of an audit.

import { aborted, get } from "./api.js";
import { byId, element } from "./dom.js";
import { integer } from "./items.js";
import { active, refuse, state, subscribe } from "./store.js";

const PARTS = ["head", "mid", "tail"];
const BETTER = ["Recall", "NDCG", "MRR", "HR", "coverage"]; // higher is better: the best value is bold
const COLUMNS = [...BETTER, "popularity"];
const number = (value) => (Math.abs(value) >= 1 ? value.toFixed(2) : value.toFixed(4));

export function attach() {
  subscribe(["models", "letters"], draw);
}

async function draw() {
  try {
    const cards = await Promise.all(active().map((letter) => get("page/card", { model: state.letters[letter] }, `card-${letter}`)));
    const scale = Math.max(...cards.map(largestBar), 1e-9);
    byId("cards").replaceChildren(...cards.map((found, at) => card(found, active()[at], scale)));
  } catch (error) {
    if (!aborted(error)) refuse(null, error.message);
  }
}

// `scale` is the largest value of a bar, the same for cards side by side.
function card(found, letter, scale) {
  const { model, data, split, training } = found;
  const facts = [
    [integer.format(model.num_items), "items"],
    [integer.format(model.num_queries), "queries"],
    [model.objective.name, "objective"],
    [model.temperature.toFixed(3), "temperature"],
    [`${training.epochs ?? "?"} epochs`, training.seconds ? `in ${duration(training.seconds)}` : "of training"],
    [(found.created ?? "?").slice(0, 10), `twotower ${found.versions.twotower ?? "?"}`],
  ];
  const made = element(
    "article",
    { class: `list ${letter}`, "aria-label": `Card of ${found.name}` },
    element("h3", {}, element("span", { class: "dot", "aria-hidden": "true" }), element("span", { class: "name", title: found.name }, found.name)),
    element("div", { class: "facts" }, facts.map(([value, name]) => element("div", {}, element("b", {}, value), element("span", {}, name)))),
  );
  if (found.metrics?.rows?.length) made.append(...metrics(found.metrics, scale));
  else made.append(element("p", { class: "quiet" }, "No evaluation is saved with this model."));
  made.append(audit(found.audit));
  made.append(account("Data", [["source", data.source], ["fingerprint", data.fingerprint?.slice(0, 16)]], data.account));
  made.append(account("Split", [["name", split.name], ...Object.entries(split.settings ?? {})], split.account));
  made.append(settings(model));
  return made;
}

function metrics(found, scale) {
  const k = Math.min(...found.protocol.ks);
  const own = found.rows.map((row) => row.values);
  const names = COLUMNS.map((name) => `${name}@${k}`).filter((name) => typeof own[0][name] === "number");
  const best = Object.fromEntries(names.map((name) => [name, Math.max(...own.map((values) => values[name] ?? -Infinity))]));
  const rows = found.rows.map((row) =>
    element("tr", {}, element("th", { scope: "row" }, row.name), names.map((name) => element("td", { class: row.values[name] === best[name] && own.length > 1 && BETTER.includes(name.split("@")[0]) ? "number best" : "number" }, cell(row.values[name])))),
  );
  const protocol = found.protocol;
  const summary = `${integer.format(found.num_targets)} targets of ${integer.format(found.num_queries)} queries (${found.holdout}), ${protocol.catalog} catalog of ${integer.format(found.num_items)} items${protocol.exact ? ", exact" : ", approximate"}.`;
  const parts = [
    element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Metrics" }, element("table", {}, element("caption", {}, "Metrics"), element("thead", {}, element("tr", {}, element("td", {}), names.map((name) => element("th", { scope: "col", class: "number" }, name)))), element("tbody", {}, rows))),
    element("p", { class: "hint" }, summary),
  ];
  const shown = slicedBy(found);
  if (shown) parts.push(bySlice(found, shown, scale));
  const others = Object.keys(found.rows[0].slices ?? {}).filter((name) => !PARTS.includes(name));
  if (shown && others.length) parts.push(moreSlices(found, others, shown));
  if (found.notes?.length) parts.push(notes(found.notes));
  return parts;
}

function slicedBy(found) {
  const k = Math.min(...found.protocol.ks);
  return ["NDCG", "Recall"].map((name) => `${name}@${k}`).find((name) => found.rows[0].slices?.head?.[name] !== undefined);
}

function largestBar(found) {
  if (!found.metrics?.rows?.length) return 0;
  const metric = slicedBy(found.metrics);
  return Math.max(...found.metrics.rows.flatMap((row) => PARTS.map((part) => row.slices?.[part]?.[metric] ?? 0)));
}

function bySlice(found, metric, most) {
  const charts = PARTS.filter((part) => found.rows[0].slices?.[part]).map((part) => {
    const bars = found.rows.map((row, at) => {
      const value = row.slices?.[part]?.[metric];
      const bar = element("i");
      bar.style.width = `${(100 * (value ?? 0)) / most}%`;
      return element("div", { class: at === 0 ? "own" : "" }, element("span", {}, row.name), bar, element("span", {}, cell(value)));
    });
    const size = found.slice_sizes?.[part];
    return element("div", { class: "bars" }, element("b", {}, part), element("span", { class: "quiet" }, size?.items !== undefined && size?.items !== null ? `${integer.format(size.items)} items` : ""), bars);
  });
  return element("div", {}, element("p", {}, element("b", {}, `${metric} by popularity of the target`)), element("div", { class: "slices" }, charts));
}

function moreSlices(found, names, metric) {
  const head = element("tr", {}, element("th", {}, "slice"), found.rows.map((row) => element("th", { scope: "col", class: "number" }, row.name)));
  const rows = names.map((name) => element("tr", {}, element("th", { scope: "row" }, name), found.rows.map((row) => element("td", { class: "number" }, cell(row.slices?.[name]?.[metric])))));
  return element("details", {}, element("summary", {}, `${metric} in ${names.length} more slices`), element("div", { class: "scroll" }, element("table", {}, element("thead", {}, head), element("tbody", {}, rows))));
}

const notes = (list) => element("ul", { class: "bullets hint" }, list.map((note) => element("li", {}, note)));
const cell = (value) => (typeof value === "number" ? number(value) : "–");

function audit(found) {
  if (!found) {
    return element("p", { class: "hint" }, "No audit is saved with this model. To add one: ", element("code", {}, "twotower audit DIR --json > DIR/audit.json"));
  }
  const rows = (found.objectives ?? []).map((one) => element("tr", {}, element("th", { scope: "row" }, one.name), element("td", {}, one.verdict ?? "–")));
  return element(
    "div",
    {},
    element("p", {}, element("b", {}, "Audit: gradient compared with the full softmax")),
    element("ul", { class: "bullets" }, (found.conclusion ?? []).map((text) => element("li", {}, text))),
    rows.length ? element("table", {}, element("tbody", {}, rows)) : "",
  );
}

function account(title, facts, lines) {
  const rows = [
    ...facts.filter(([, value]) => value !== null && value !== undefined).map(([name, value]) => element("tr", {}, element("th", { scope: "row" }, name), element("td", { colspan: 2 }, String(value)))),
    ...(lines ?? []).map((line) => element("tr", {}, element("th", { scope: "row" }, line.label), element("td", { class: "number" }, typeof line.count === "number" ? integer.format(line.count) : ""), element("td", {}, line.note ?? ""))),
  ];
  return element("details", { open: title === "Data" }, element("summary", {}, `${title}: rows read and removed`), element("div", { class: "scroll" }, element("table", {}, element("tbody", {}, rows))));
}

function settings(model) {
  const rows = ["objective", "query_tower", "item_tower"].flatMap((part) =>
    Object.entries(model[part]).map(([name, value]) => element("tr", {}, element("th", { scope: "row" }, `${part}.${name}`), element("td", {}, typeof value === "object" ? JSON.stringify(value) : String(value)))),
  );
  return element("details", {}, element("summary", {}, "Configuration"), element("div", { class: "scroll" }, element("table", {}, element("tbody", {}, rows))));
}

function duration(seconds) {
  if (seconds < 120) return `${Math.round(seconds)} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}
