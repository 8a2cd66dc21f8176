"""Amazon beauty and sports, the last item of every user: HR@10 and NDCG@10 beside the published figures.

    python benchmarks/amazon.py --data ../shared/data/amazon --only beauty --validation 0.1 --runs runs/amazon

The test is the last item of every user; the whole catalog is ranked without what the user has had. At test time the
validation item is part of the history, for it happened before. The validation is the second last item, either of every
user or, with --validation, of that share of the users: the others' second last items are training rows then, as in
the protocol of MovieLens-1M that names 512 validation users. How published figures were made in this respect is seldom
told, so results say which it was. Nothing is chosen on the test.

A finished run is not repeated; an interrupted one goes on from its last epoch (--runs).
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from twotower.process import tune

tune()  # before the first large tensors are made

import torch  # noqa: E402

import twotower as tt  # noqa: E402
from twotower.evaluation import EASE, ItemKNN, evaluate_all  # noqa: E402
from twotower.files import write_text  # noqa: E402
from twotower.serving.artifact import library_versions  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "amazon.json"
#: HR@10 and NDCG@10: SASRec trained by sampled softmax, as published, and what is aimed at here.
PUBLISHED = {
    "beauty": {"published": (0.0921, 0.0531), "aim": (0.0935, 0.0544)},
    "sports": {"published": (0.0569, 0.0314), "aim": (0.0569, 0.0317)},
}


def trained(told: dict[str, Any], root: Path, folder: Path | None, *, baselines: bool) -> dict[str, Any]:
    """Train, or go on, and measure on the test."""
    data = tt.Interactions.read(root / f"{told['data']}.txt")
    split = tt.splits.leave_last_out(data, validation_queries=told["validation"])
    overrides = ["data.split=leave-last-out", f"training.seed={told['seed']}", *told["overrides"]]
    config = tt.Config.load(told["preset"], overrides)
    if folder is not None:
        name = json.dumps(told, sort_keys=True)
        folder = folder / "".join(c if c.isalnum() or c in ".-" else "_" for c in name)[-200:]
    resume = folder is not None and (folder / "checkpoints" / "last.ckpt").exists()
    model = tt.fit(split, config, directory=folder, resume=resume, progress=False)
    rankers: dict[str, Any] = {"model": model.retriever}
    if baselines:
        rankers |= {"item-kNN": ItemKNN(split.train), "EASE": EASE(split.train, l2=100.0)}
    found = evaluate_all(rankers, split.test, train=split.train, ks=(10,))
    values = {
        row.name: {name: round(float(value), 5) for name, value in row.values.items() if value == value}
        for row in found.rows
    }
    return {
        "training_rows": len(split.train),
        "test": values.pop("model"),
        "baselines": values,
        "validation": model.fit.best,
        "curve": model.fit.history,
        "cpu_seconds_since_the_last_interruption": round(model.fit.cpu_seconds, 1),
        "config": config.model_dump(mode="json"),
    }


def kept_runs(path: Path) -> list[dict[str, Any]]:
    """The runs that are finished."""
    runs: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return runs


def main() -> None:
    """Measure what is asked for and not yet there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with beauty.txt and sports.txt")
    parser.add_argument("--only", nargs="+", choices=list(PUBLISHED), default=list(PUBLISHED))
    parser.add_argument("--preset", help="a preset or a YAML file; the defaults without it")
    parser.add_argument("--validation", type=float, help="share of the users in the validation; all without it")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--baselines", action="store_true", help="item-kNN and EASE as well")
    parser.add_argument("--runs", type=Path, help="a folder for checkpoints, so that an interrupted run goes on")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    for name in asked.only:
        for seed in asked.seeds:
            told = {
                "data": name,
                "preset": asked.preset,
                "overrides": asked.overrides,
                "validation": asked.validation,
                "seed": seed,
            }
            if told in [run["told"] for run in kept_runs(asked.results)]:
                continue
            found = trained(told, asked.data, asked.runs, baselines=asked.baselines)
            print(name, seed, found["validation"], found["test"], found["baselines"], flush=True)
            stamp = {
                "threads": torch.get_num_threads(),
                "versions": library_versions(),
                "date": datetime.now(UTC).isoformat(timespec="minutes"),
            }
            entry = {"told": told, "figures": PUBLISHED[name], **found, **stamp}
            asked.results.parent.mkdir(parents=True, exist_ok=True)
            # Read again: another process may have written meanwhile.
            write_text(asked.results, json.dumps([*kept_runs(asked.results), entry], indent=1))


if __name__ == "__main__":
    main()
