"""Continued training on new data: effect of replay and learning rate, compared with training from scratch.

    python benchmarks/continuing.py --data ../shared/data/online-retail --seeds 0 1 2

Rows before a cut-off time are the past. The last past row of every query with enough rows is held out of all training,
to measure what the model retains. Rows after the cut-off are the new data, split by time.

parent    trained on the past
continued continued from the parent, with each --replay and each --rates factor of the learning rate
afresh    trained from scratch on the new data alone, with the same budget
retrained trained from scratch on all data, with the budget of the parent

Finished runs are saved in the results file and not repeated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

import twotower as tt
from twotower.data import Holdout, Interactions, Split
from twotower.data.loading.histories import take_ranges
from twotower.ranking.tower_ranker import TowerRanker
from twotower.run import Model
from twotower.serving.model_folder import library_versions
from twotower.system.filesystem import write_text

RESULTS = Path(__file__).parent / "results" / "continuing.json"
K = 20


def frame_of(data: Interactions) -> pl.DataFrame:
    """Convert interactions to a data frame."""
    return pl.DataFrame({
        "user_id": data.queries.decode(data.query_codes()),
        "item_id": data.items.decode(data.item_codes),
        "timestamp": np.asarray(data.timestamps),
    })  # fmt: skip


def parts(data: Interactions, cut: float, least: int) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Split into the past without the held-out rows, the held-out rows, and the new data."""
    assert data.timestamps is not None
    cutoff = int(np.quantile(np.asarray(data.timestamps), cut))
    frame = frame_of(data)
    past, new = frame.filter(pl.col("timestamp") < cutoff), frame.filter(pl.col("timestamp") >= cutoff)
    place = pl.int_range(pl.len()).over("user_id")
    last = (place == pl.len().over("user_id") - 1) & (pl.len().over("user_id") >= least)
    kept = past.filter(~last)
    # A target that is also in the query's history cannot be found, because seen items are excluded.
    held = past.filter(last).join(kept.select("user_id", "item_id").unique(), on=["user_id", "item_id"], how="anti")
    return kept, held, new


def old_test(model: Model, past: pl.DataFrame, held: pl.DataFrame) -> Holdout:
    """Build the holdout of the held-out rows in the codes of a model, without items and queries it does not know."""
    items, queries = model.artifact.items, model.artifact.queries
    rows = past.with_columns(
        code=pl.Series(queries.encode(past["user_id"])), item=pl.Series(items.encode(past["item_id"]))
    )
    rows = rows.filter((pl.col("code") >= 0) & (pl.col("item") >= 0)).sort("code", "timestamp", maintain_order=True)
    counts = np.bincount(rows["code"].to_numpy(), minlength=len(queries))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    asked = held.with_columns(
        code=pl.Series(queries.encode(held["user_id"])), item=pl.Series(items.encode(held["item_id"]))
    )
    asked = asked.filter((pl.col("code") >= 0) & (pl.col("item") >= 0)).sort("code")
    codes = asked["code"].to_numpy()
    place, starts = take_ranges(offsets[codes], offsets[codes + 1])
    return Holdout(
        "old", codes, starts, rows["item"].to_numpy()[place].astype(np.int32),
        np.arange(len(codes) + 1), asked["item"].to_numpy().astype(np.int32),
    )  # fmt: skip


def recall(model: Model, holdout: Holdout, of: int | None = None) -> dict[str, float]:
    """Measure Recall@K and NDCG@K averaged over `of` queries: queries that the model does not know count 0."""
    values = tt.evaluate(
        TowerRanker(model.artifact.towers, model.artifact.config.history_length, model.artifact.item_embeddings),
        holdout, train=model.split.train, ks=(K,), baselines=False,
    )["model"].values  # fmt: skip
    share = 1.0 if of is None else len(holdout) / of
    return {name: values[f"{name}@{K}"] * share for name in ("Recall", "NDCG")}


def run_seed(args: argparse.Namespace, data: Interactions, seed: int, done: dict[str, Any]) -> None:
    """Measure all variants of a seed that are not finished yet."""
    past, held, new = parts(data, args.cut, args.least)
    old, fresh = Interactions.from_frame(past), Interactions.from_frame(new)
    settings = [f"training.seed={seed}", "training.accelerator=cpu", "training.logger=none", *args.set]
    if args.config:
        base = tt.Config.load(args.config, [*settings, f"training.max_epochs={args.epochs}"])
    else:
        base = tt.Config.load(None, [*settings, f"training.max_epochs={args.epochs}"])
    folder = args.work / f"seed{seed}"

    def kept(name: str, make: Any) -> Any:
        key = f"seed {seed}, {name}"
        if key not in done:
            began = time.perf_counter()
            found = make()
            done[key] = {"seed": seed, "variant": name, **found, "seconds": round(time.perf_counter() - began, 1)}
            write_text(args.results, json.dumps({**about(args, data), "runs": done}, indent=1))
            print(key, done[key], flush=True)
        return done[key]

    split = tt.splits.by_time(old, validation=0.05, test=0.02)
    parent = tt.fit(split, base, directory=folder, progress=False)
    parent.save(folder / "model")
    count = len(old_test(parent, past, held))
    days = tt.continue_with(folder, fresh)
    new_items = np.ones(days.train.num_items, dtype=bool)
    new_items[days.item_map[days.item_map >= 0]] = False

    def measured(model: Model, test: Holdout | None) -> dict[str, Any]:
        found: dict[str, Any] = {"old": recall(model, old_test(model, past, held), count), "epochs": model.fit.epochs}
        if test is not None:
            found["new"] = recall(model, test)
            best = model.retriever.rank(test, K, True)
            found["new_items_in_lists"] = float(new_items[best[best >= 0]].mean())
        return found

    kept("parent", lambda: measured(parent, None))
    for rate in args.rates:
        for replay in args.replay:
            changes = {
                "replay": replay,
                "learning_rate": base.training.learning_rate * rate,
                "max_epochs": args.more,
            }
            config = base.model_copy(update={"training": base.training.model_copy(update=changes)})
            kept(
                f"continued, replay {replay:g}, rate {rate:g}",
                lambda config=config: measured(tt.fit(days, config, warm_start=folder, progress=False), days.test),
            )
    more = base.model_copy(update={"training": base.training.model_copy(update={"max_epochs": args.more})})
    kept("afresh", lambda: measured(tt.fit(alone(days), more, progress=False), days.test))
    kept("retrained", lambda: measured(tt.fit(plain(days), base, progress=False), days.test))


def plain(days: Split) -> Split:
    """Return the same rows and test queries as a split for training from scratch."""
    return Split(days.train, days.validation, days.test, days.account, days.name, days.settings, days.data)


def alone(days: Any) -> Split:
    """Return only the new rows, with the vocabularies of all data."""
    return Split(
        days.train.select(~days.learnt), days.validation, days.test, days.account, days.name, days.settings, days.data
    )


def about(args: argparse.Namespace, data: Interactions) -> dict[str, Any]:
    """Describe the arguments and versions of the measurement."""
    arguments = {name: value for name, value in vars(args).items() if name not in ("work", "results")}
    return {
        "benchmark": "continuing", "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()},
        "rows": len(data), "threads": torch.get_num_threads(), "versions": library_versions(), "k": K,
    }  # fmt: skip


def main() -> None:
    """Measure the runs that are not finished yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--queries", type=int, default=None, help="number of queries to sample; default: all")
    parser.add_argument("--cut", type=float, default=0.8, help="share of the rows that are the past")
    parser.add_argument("--least", type=int, default=5, help="minimum rows of a query for holding out its last one")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of the parent")
    parser.add_argument("--more", type=int, default=5, help="maximum epochs of continued training")
    parser.add_argument("--replay", type=float, nargs="+", default=[0.0, 1.0, 3.0])
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 0.3, 0.1])
    parser.add_argument("--config", default=None, help="a preset or a YAML file")
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    data = Interactions.read(args.data)
    if args.queries is not None:
        chosen = np.random.default_rng(0).permutation(data.num_queries)[: args.queries]
        data = Interactions.from_frame(frame_of(data.select(np.isin(data.query_codes(), chosen))))
    stored = json.loads(args.results.read_text())["runs"] if args.results.exists() else {}
    with tempfile.TemporaryDirectory() as work:
        args.work = Path(work)
        for seed in args.seeds:
            run_seed(args, data, seed, stored)


if __name__ == "__main__":
    main()
