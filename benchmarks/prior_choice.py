"""How the strength of the recent prior is chosen on the validation queries, and what it gives on the test queries.

    python benchmarks/prior_choice.py --data ../shared/data

From each data set with times, pieces of consecutive rows are taken: all rows, the newer, the middle and the older half.
A model is trained on each piece with the shipped defaults and a split by time, without a recent prior. Then the prior
is chosen by each of these rules, and the NDCG@10 of the test queries is measured:

none                   no recent prior
best                   the strength with the best metric on the validation queries
shipped                the best strength, but the newest rows alone if they are within one standard error of it

"mean ratio" is the geometric mean over pieces of the test NDCG@10 relative to "best". Finished pieces are in
results/prior_choice.json and are not measured again.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import polars as pl
import torch
from defaults import PARTS, complete_journey_file

import twotower as tt
from twotower.config.run import Config
from twotower.data import Interactions, by_time
from twotower.run import recent_prior
from twotower.run.recent_prior import choose_recent_prior, prior_of
from twotower.run.validation import Validator, simplest
from twotower.serving.model_folder import library_versions
from twotower.system.filesystem import write_text

RESULTS = Path(__file__).parent / "results" / "prior_choice.json"
#: The part of the rows, in order of time, that a piece has.
PIECES = {"all": (0.0, 1.0), "newer half": (0.5, 1.0), "middle half": (0.25, 0.75), "older half": (0.0, 0.5)}
METRIC = "NDCG@10"


def _ml_1m(data: Path) -> pl.DataFrame:
    parts = (f"temporal_{part}_positives.parquet" for part in PARTS)
    return pl.concat([pl.read_parquet(data / "ml-1m" / part, glob=False) for part in parts])


#: Rows, and the names of the query, item and time columns.
SETS: dict[str, tuple[Callable[[Path], pl.DataFrame], tuple[str, str, str]]] = {
    "online-retail": (
        lambda data: pl.read_parquet(data / "online-retail/interactions.parquet", glob=False),
        ("customer_id", "stock_code", "invoice_date"),
    ),
    "ml-100k": (
        lambda data: pl.read_csv(data / "ml-100k/ml-100k.inter", separator="\t", glob=False),
        ("user_id:token", "item_id:token", "timestamp:float"),
    ),
    "movietweetings": (
        lambda data: pl.read_csv(data / "movietweetings/interactions.csv", glob=False),
        ("user_id", "movie_id", "timestamp"),
    ),
    "complete-journey": (
        lambda _: pl.read_parquet(complete_journey_file(), glob=False),
        ("household_id", "product_id", "transaction_timestamp"),
    ),
    "ml-1m": (_ml_1m, ("user_id", "movie_id", "timestamp")),
}


def _best(measured: dict[Any, Any]) -> Any:
    return max(measured, key=lambda pair: measured[pair].mean())


def measure(rows: pl.DataFrame, seed: int) -> dict[str, Any]:
    """Train one model, and measure it with the prior of each rule."""
    split = by_time(Interactions.from_frame(rows), 0.05, 0.1)
    config = Config.load(None, [f"training.seed={seed}", "training.recent_prior=false"])
    model = tt.fit(split, config, progress=False)
    towers, settings, counts = model.artifact.towers, model.artifact.config, split.train.item_counts()
    assert split.validation.query_times is not None and split.test.query_times is not None
    starts = [int(np.min(times)) for times in (split.validation.query_times, split.test.query_times)]
    validation, test = (Validator(holdout, settings, split.train) for holdout in (split.validation, split.test))
    found: dict[str, Any] = {"validation queries": len(split.validation), "test queries": len(split.test)}
    for name, rule in {"none": None, "best": _best, "shipped": simplest}.items():
        prior = None
        if rule is not None:
            with patch.object(recent_prior, "simplest", rule):
                prior = choose_recent_prior(towers, split.train, validation.measured, METRIC, now=starts[0])
        if prior is not None:
            towers.set_recent(prior_of(split.data, counts, now=starts[1], **prior.settings()))
        found[name] = {
            "chosen": None if prior is None else prior.settings(),
            "validation": (validation(towers) if prior is None else prior.after)[METRIC],
            "test": test(towers)[METRIC],
        }
        towers.set_recent(None)
    return found


def mean_ratios(results: dict[str, Any]) -> dict[str, float]:
    """Return the geometric mean of the test metric relative to the rule "best", over pieces, for each other rule."""
    pieces = [piece for name, pieces in results.items() if name in SETS for piece in pieces.values()]
    return {
        rule: round(float(np.exp(np.mean([np.log(one[rule]["test"] / one["best"]["test"]) for one in pieces]))), 4)
        for rule in ("none", "shipped")
    }


def main() -> None:
    """Measure the pieces that are not finished, and print each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for name in options.only:
        read, columns = SETS[name]
        table = read(options.data).select(**dict(zip(("query", "item", "timestamp"), columns, strict=True)))
        table = table.sort("timestamp", maintain_order=True)
        for piece, (start, stop) in PIECES.items():
            if piece in results.get(name, {}):
                continue
            rows = table[int(start * len(table)) : int(stop * len(table))]
            results.setdefault(name, {})[piece] = found = measure(rows, options.seed)
            results |= {
                "mean ratio": mean_ratios(results),
                "threads": torch.get_num_threads(),
                "seed": options.seed,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": library_versions(),
            }
            write_text(RESULTS, json.dumps(results, indent=1))
            print(f"{name}, {piece}: {json.dumps(found)}", flush=True)
    print(json.dumps(mean_ratios(results)))


if __name__ == "__main__":
    main()
