"""The gain of `twotower tune` over the defaults on the test for a given budget, and the gain of a refit.

    python benchmarks/tune.py --data ../shared/data --budget 4m --runs /tmp/tune

For each data set with its natural split, the defaults and the best settings of a search are trained without a refit and
compared on the same queries with a paired test. The results include the search, its curve and the importances.

refit: the defaults are trained on the rows before the last tenth, with validation and test as usual, and refitted on
all of these rows. Both models are then evaluated on the last tenth, with all rows before it as histories.

Results are saved after each part in results/tune.json; a killed benchmark is resumed from the folder `--runs`.
"""

from __future__ import annotations

import argparse
import json
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import twotower as tt
from twotower.config.run import Config
from twotower.data import Split, by_time
from twotower.evaluation import evaluate_all, paired_comparison
from twotower.run import read_data, refit, reread, train_run
from twotower.serving import Retriever
from twotower.serving.model_folder import library_versions
from twotower.study import Budget, tune_run
from twotower.system.filesystem import write_text

RESULTS = Path(__file__).parent / "results" / "tune.json"
#: Data set -> file, and settings to read and split it.
SETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ml-100k": (
        "ml-100k/ml-100k.inter",
        (
            "data.columns.query='user_id:token'",
            "data.columns.item='item_id:token'",
            "data.columns.timestamp='timestamp:float'",
        ),
    ),
    "online-retail": ("online-retail/interactions.parquet", ()),
    "steam": ("steam/train.csv", ("data.validation={data}/steam/valid.csv", "data.test={data}/steam/test.csv")),
}


def quiet(message: object) -> None:
    """Print the lines about trials."""
    if str(message).startswith(("[", "trial", "search", "resuming")):
        print(message, flush=True)


def searched(name: str, data: Path, budget: str, runs: Path) -> dict[str, Any]:
    """Train the defaults and the tuned settings, and test both."""
    file, changes = SETS[name]
    changes = tuple(change.replace("{data}", str(data.resolve())) for change in changes)
    tuned = tune_run(
        data / file,
        runs / f"{name}-tuned",
        Budget.parse(budget),
        changes=changes,
        refits=False,
        on_message=quiet,
    )
    default = runs / f"{name}-defaults"
    if not (default / "results.json").is_file():
        config = Config.load(None, [*changes, "evaluation.baselines=false"])
        train_run(data / file, default, config, progress=False, on_message=quiet)
    split: Split = reread(default)[1]
    models = {"defaults": Retriever.load(default), "tuned": Retriever.load(runs / f"{name}-tuned")}
    measured = evaluate_all(models, split.test, train=split.train, ks=(10, 20))
    paired = paired_comparison(*(measured[one].per_query["NDCG@10"] for one in ("tuned", "defaults")))
    document = tuned.document
    return {
        "budget": budget,
        "test": {row.name: {name: row.values[name] for name in ("NDCG@10", "Recall@20")} for row in measured.rows},
        "paired": paired.to_dict(),
        "baselines on the test": {
            row.name: {name: row.values[name] for name in ("NDCG@10", "Recall@20")} for row in tuned.measured.rows[1:]
        },
        "baselines on the validation": document["baselines"],
        "importances": document["importances"],
        "chosen": document["trials"][document["best"]]["changed"],
        "trials": [
            {key: one[key] for key in ("number", "state", "value", "changed", "seconds")} for one in document["trials"]
        ],
        "seconds": document["seconds"],
    }


def refitted(name: str, data: Path) -> dict[str, Any]:
    """Measure the validated and the refitted model on rows that are later than the training data of both."""
    file, changes = SETS[name]
    config = Config.load(None, list(changes))
    rows = read_data(data / file, config.data)
    assert isinstance(rows, tt.Interactions) and rows.timestamps is not None
    later = by_time(rows, validation=0, test=0.1, histories=True)
    known = rows.select(np.asarray(rows.timestamps) < int(later.settings["cuts"][1]))
    model = tt.fit(by_time(known, 0.05, 0.1, histories=True), config, progress=False)
    again = refit(model, progress=False)
    models = {"validated": model.retriever, "refitted": again.retriever}
    measured = evaluate_all(models, later.test, train=later.train, ks=(10, 20))
    paired = paired_comparison(*(measured[one].per_query["NDCG@10"] for one in ("refitted", "validated")))
    return {
        "rows": {"validated": len(model.split.train), "refitted": len(known), "later": len(rows) - len(known)},
        "queries": len(later.test),
        "epochs": again.fit.epochs,
        "later window": {
            row.name: {name: row.values[name] for name in ("NDCG@10", "Recall@20")} for row in measured.rows
        },
        "paired": paired.to_dict(),
    }


def main() -> None:
    """Measure the missing parts of the results, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--budget", default="4m", help="time of each search")
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for name in options.only:
        for part in ("tune", "refit"):
            if name == "steam" and part == "refit":
                continue  # no timestamps, so no later window
            if part not in results.get(name, {}):
                if part == "tune":
                    measured = searched(name, options.data, options.budget, options.runs)
                else:
                    measured = refitted(name, options.data)
                results.setdefault(name, {})[part] = {
                    **measured,
                    "threads": torch.get_num_threads(),
                    "measured": datetime.now(UTC).isoformat(timespec="seconds"),
                    "versions": library_versions(),
                }
                write_text(RESULTS, json.dumps(results, indent=1))
            found = results[name][part]
            print(name, part, found.get("test") or found["later window"], found["paired"], flush=True)


if __name__ == "__main__":
    main()
