"""Recall@20 and NDCG@20 of id towers on Gowalla with the split of LightGCN, compared with published results.

    python benchmarks/gowalla.py --data ../shared/data/gowalla --epochs 12 --popularity 1 1.2 1.4     # choose
    python benchmarks/gowalla.py --data ../shared/data/gowalla --epochs 12 --popularity 1.2 --final   # measure

The published split has a training and a test part. Here the training part is divided into train.txt and valid.txt:
settings are selected by training on the first and measuring on the second, without using the test part. With --final
the selected settings are trained on both, like the published models, and the last weights are measured on the test.

For every test user, all 40,981 items are ranked except those of its training part. Recall@20 is hits divided by the
number of the user's test items, NDCG@20 has binary gain, and both are averaged over users, as in the published
evaluation.

The model is one vector for each user and item with cosine similarity and a fixed temperature, trained on whole users
with the full softmax (whole_users.py). Options: propagation over the graph during training (--layers), and a share of
log item popularity in the score (--prior). --start svd initializes with the truncated singular value decomposition of
the training matrix, each entry divided by the square roots of its row and column sums. --start FILE initializes with
the tables of another run (last.*.safetensors in its folder): with --final, a run selected on the validation continues
with the validation rows added.

--popularity measures at these settings b of the popularity dial; 1 is the model as trained. The validation allows
several settings and reports the one with the highest NDCG@20; the test allows only one.

--rows instead trains the same model with `tt.fit` on sampled candidates (expected-count, rows in random order). Every
finished run is written to the results file immediately and not repeated; an interrupted one is resumed from its last
epoch (--runs).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors.torch import load_file, save_file
from whole_users import ByUsers, Settings, add_settings, parsed, settings_of

import twotower as tt
from twotower.data import Holdout, Interactions, Split
from twotower.data.splits.from_files import from_parts
from twotower.evaluation import evaluate_all
from twotower.ranking import EASE, ItemKNN, Popularity
from twotower.serving.model_folder import library_versions
from twotower.system.filesystem import write_text

RESULTS = Path(__file__).parent / "results" / "gowalla.json"
PUBLISHED = {
    "LightGCN": {"Recall@20": 0.1830, "NDCG@20": 0.1554},
    "UltraGCN": {"Recall@20": 0.1862, "NDCG@20": 0.1580},
    "SimpleX": {"Recall@20": 0.1872, "NDCG@20": 0.1557},
    "EASE": {"Recall@20": 0.1765, "NDCG@20": 0.1467},
}
ROWS = [
    "query_tower.id_embedding=true",
    "query_tower.history=null",
    "query_tower.hidden=[]",
    "query_tower.dropout=0",
    "objective.sources=[{in_batch: {}}, {uniform: {size: 1024}}]",
    "training.batch_size=2048",
    "training.metric=NDCG@20",
    "training.patience=3",
]


def read(root: Path) -> tuple[Split, Split]:
    """Split into train with validation, or train plus validation with test. The items of a user are in random order."""
    parts: dict[str, Interactions] = {}
    for name in ("train", "valid", "test"):
        rows = Interactions.read(root / f"{name}.txt", part=True)
        parts[name] = Interactions.from_frame(frame(rows).sample(fraction=1.0, shuffle=True, seed=0))
    both = pl.concat([frame(parts["train"]), frame(parts["valid"])]).sample(fraction=1.0, shuffle=True, seed=0)
    return (
        from_parts(parts["train"], parts["valid"], parts["test"]),
        from_parts(Interactions.from_frame(both), None, parts["test"]),
    )


def frame(rows: Interactions) -> pl.DataFrame:
    """Convert interactions to a table of ids."""
    return pl.DataFrame(
        {"user_id": rows.queries.decode(rows.query_codes()), "item_id": rows.items.decode(rows.item_codes)}
    )


def measured(rankers: dict[str, Any], holdout: Holdout, train: Interactions) -> dict[str, dict[str, float]]:
    """Measure the metrics of rankers, by name."""
    rows = evaluate_all(rankers, holdout, train=train, ks=(10, 20)).rows
    # Undefined metrics, such as diversity without features, are NaN, which JSON cannot represent.
    return {row.name: {name: value for name, value in row.values.items() if not math.isnan(value)} for row in rows}


def at_dials(training: ByUsers, dials: list[float], asked: Holdout, train: Interactions) -> dict[str, Any]:
    """Return all metrics at the dial with the highest NDCG@20, and Recall@20 and NDCG@20 at every dial."""
    found = measured({f"{dial:g}": training.ranked(dial) for dial in dials}, asked, train)
    best = max(found, key=lambda name: found[name]["NDCG@20"])
    each = {name: {k: round(row[k], 4) for k in ("Recall@20", "NDCG@20")} for name, row in found.items()}
    return {"popularity": float(best), "by_popularity": each, **found[best]}


def by_users(
    split: Split, settings: Settings, dials: list[float], asked: Holdout, directory: Path | None, every: int
) -> dict[str, Any]:
    """Train on whole users; measure at the end, and every few epochs if the holdout is the validation."""
    training = ByUsers(split.train, settings)
    kept = None if directory is None else directory / "last.json"
    story: dict[str, Any] = {"epoch": 0, "seconds": 0.0, "curve": []}
    if kept is not None and kept.exists():
        story = json.loads(kept.read_text())
        training.restore(load_file(kept.with_suffix(f".{story['epoch']}.safetensors")))
    for number in range(story["epoch"], settings.epochs):
        started = time.process_time()
        loss = training.epoch(number)
        story |= {"epoch": number + 1, "seconds": round(story["seconds"] + time.process_time() - started, 1)}
        if number + 1 == settings.epochs or (asked.name == "validation" and (number + 1) % every == 0):
            found = at_dials(training, dials, asked, split.train)
            story["curve"].append({"epoch": number + 1, "loss": round(loss, 4), **found})
            print(number + 1, round(loss, 4), found["by_popularity"], flush=True)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_file(training.state(), kept.with_suffix(f".{number + 1}.safetensors"))
            write_text(kept, json.dumps(story))
            kept.with_suffix(f".{number}.safetensors").unlink(missing_ok=True)
    return {
        "metrics": {k: v for k, v in story["curve"][-1].items() if "@" in k or "popularity" in k},
        "curve": story["curve"],
        "cpu_seconds": story["seconds"],
        "settings": asdict(settings),
    }


def by_rows(split: Split, overrides: list[str], asked: Holdout, directory: Path | None) -> dict[str, Any]:
    """Train with `tt.fit`."""
    resume = directory is not None and (directory / "checkpoints" / "last.ckpt").exists()
    model = tt.fit(split, tt.Config.load(None, overrides), directory=directory, resume=resume, progress=False)
    return {
        "metrics": measured({"model": model.retriever}, asked, split.train)["model"],
        "curve": model.fit.history,
        "cpu_seconds": round(model.fit.cpu_seconds, 1),
        "settings": model.artifact.config.model_dump(mode="json"),
    }


def kept_runs(path: Path) -> list[dict[str, Any]]:
    """Read the finished runs."""
    runs: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return runs


def record(path: Path, entry: dict[str, Any]) -> None:
    """Add a run to the file, which is read again because another process may have written in between."""
    stamp = {
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
    }
    others = [old for old in kept_runs(path) if old["key"] != entry["key"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps([*others, {**entry, **stamp}], indent=1))


def main() -> None:
    """Measure the requested runs that are not finished yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--final", action="store_true", help="train on both parts, measure on the test")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--baselines", action="store_true", help="popularity, item-kNN and EASE on the test")
    add_settings(parser)
    parser.add_argument("--rows", action="store_true", help="train with tt.fit on sampled candidates")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="for --rows")
    parser.add_argument("--every", type=int, default=2, help="epochs between validations")
    parser.add_argument("--runs", type=Path, help="folder for checkpoints, to resume interrupted runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parsed(parser)
    if asked.rows and asked.popularity != [1.0]:
        parser.error("--popularity: for training by whole users, not with --rows")
    first, both = read(asked.data)
    split, holdout = (both, both.test) if asked.final else (first, first.validation)
    if asked.baselines:
        known = {
            "popularity": Popularity(both.train),
            "item-kNN": ItemKNN(both.train),
            "EASE": EASE(both.train, l2=200.0),
        }
        found = measured(known, both.test, both.train)
        record(asked.results, {"key": "baselines", "published": PUBLISHED, "metrics": found})
        return
    for seed in asked.seeds:
        settings = settings_of(asked, seed)
        told = [*ROWS, f"objective.temperature={settings.temperature}", f"training.seed={seed}", *asked.overrides]
        what = told if asked.rows else asdict(settings)
        key = json.dumps([what, asked.popularity, bool(asked.final)], sort_keys=True)
        if key in [run["key"] for run in kept_runs(asked.results)]:
            continue
        directory = None
        if asked.runs is not None:
            directory = asked.runs / "".join(c if c.isalnum() or c in ".-" else "_" for c in key)[-200:]
        found = (
            by_rows(split, told, holdout, directory)
            if asked.rows
            else by_users(split, settings, asked.popularity, holdout, directory, asked.every)
        )
        print(
            key, {k: found["metrics"][k] for k in ("Recall@20", "NDCG@20")}, f"{found['cpu_seconds']:.0f} s", flush=True
        )
        record(asked.results, {"key": key, "measured_on": holdout.name, "seed": seed, **found})


if __name__ == "__main__":
    main()
