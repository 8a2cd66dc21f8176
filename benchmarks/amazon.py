"""HR@10 and NDCG@10 on Amazon beauty and sports (leave-last-out), compared with published results.

    python benchmarks/amazon.py --data ../shared/data/amazon --only beauty --validation 0.1 --runs runs/amazon

The test target is the last item of every user. The whole catalog is ranked, excluding items of the user's history. At
test time the validation item is part of the history, because it is earlier. The validation target is the second last
item of every user or, with --validation, of that share of the users. The second last items of the other users are then
training rows, as in the MovieLens-1M protocol with its 512 validation users. Publications seldom state which variant
they used, so the results record it. Nothing is selected on the test data.

Finished runs are not repeated; an interrupted run is resumed from its last epoch (--runs).
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from twotower.system.tuning import tune

tune()  # before the first large tensors are made

import torch  # noqa: E402

import twotower as tt  # noqa: E402
from twotower.evaluation import evaluate_all  # noqa: E402
from twotower.ranking import EASE, ItemKNN  # noqa: E402
from twotower.serving.model_folder import library_versions  # noqa: E402
from twotower.system.filesystem import write_text  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "amazon.json"
#: HR@10 and NDCG@10: published results of SASRec with sampled softmax, and the goal here.
PUBLISHED = {
    "beauty": {"published": (0.0921, 0.0531), "aim": (0.0935, 0.0544)},
    "sports": {"published": (0.0569, 0.0314), "aim": (0.0569, 0.0317)},
}


def trained(told: dict[str, Any], root: Path, folder: Path | None, *, baselines: bool) -> dict[str, Any]:
    """Train or resume one run, and evaluate it on the test queries."""
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
    """Read the finished runs."""
    runs: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return runs


def main() -> None:
    """Measure the requested runs that are not finished yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with beauty.txt and sports.txt")
    parser.add_argument("--only", nargs="+", choices=list(PUBLISHED), default=list(PUBLISHED))
    parser.add_argument("--preset", help="a preset or a YAML file; default settings if omitted")
    parser.add_argument("--validation", type=float, help="share of the users in the validation; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--baselines", action="store_true", help="also measure item-kNN and EASE")
    parser.add_argument("--runs", type=Path, help="folder for checkpoints, to resume interrupted runs")
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
            # Read again: another process may have written in between.
            write_text(asked.results, json.dumps([*kept_runs(asked.results), entry], indent=1))


if __name__ == "__main__":
    main()
