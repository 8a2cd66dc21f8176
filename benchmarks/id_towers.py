"""Id towers without an order of the rows: Gowalla (split of LightGCN) and Online Retail (everything after a date).

    python benchmarks/id_towers.py --data ../shared/data --only gowalla --set item_tower.dimension=64   # choose
    python benchmarks/id_towers.py --data ../shared/data --only gowalla --final --seeds 0 1 2           # measure

The model is the preset lightgcn with the settings in SETTINGS: one vector for each query and item, cosines at a fixed
temperature, and the full softmax over all items of a query. Without --final, it is trained on the training rows and
measured on the validation; this is where settings are chosen. With --final, it is trained on both for the whole
schedule, like the published models, and the last weights are measured on the test. `twotower train` with the same
settings and files gives the same model:

    cat gowalla/train.txt gowalla/valid.txt > both.txt
    twotower train both.txt --test gowalla/test.txt --config lightgcn --set item_tower.dimension=256 ...

Every query is ranked against all items except those of its training rows. Recall@20 is hits divided by the query's
number of targets, NDCG@20 has binary gain, and both are averaged over queries. --popularity is the setting of the
popularity dial, chosen on the validation. Finished runs are in the results file and are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import twotower as tt
from twotower.data import Holdout, Interactions, Split, by_time, from_parts
from twotower.evaluation import evaluate_all
from twotower.ranking import EASE, ItemKNN, Popularity, Ranker
from twotower.serving.model_folder import library_versions
from twotower.system.filesystem import write_text

RESULTS = Path(__file__).parent / "results" / "id_towers.json"
#: Settings in addition to the preset, and of the popularity dial.
SETTINGS: dict[str, tuple[list[str], float]] = {
    "gowalla": (
        [
            "item_tower.dimension=256",
            "training.batch_size=13890",  # the rows of 512 users
            "training.max_epochs=10",
            "training.precision=bf16-mixed",
        ],
        1.0,
    ),
    "online-retail": (
        [
            "query_tower.propagation=0",
            "item_tower.popularity=0",
            "item_tower.dimension=256",
            "training.question_weight=1",
            "training.batch_size=14000",  # the rows of 256 customers
            "training.learning_rate=0.002",
            "training.max_epochs=20",
        ],
        1.2,
    ),
}


def gowalla(data: Path, *, final: bool) -> Split:
    """Read the published split; its training part is divided into train.txt and valid.txt."""
    train, valid, test = (data / "gowalla" / f"{name}.txt" for name in ("train", "valid", "test"))
    return from_parts([train, valid], None, test) if final else from_parts(train, valid, test)


def online_retail(data: Path, *, final: bool) -> Split:
    """Split the purchases at a date, with the newest 30 % of the rows as test."""
    rows = Interactions.read(data / "online-retail" / "interactions.parquet")
    return by_time(rows, validation=0.0 if final else 0.05, test=0.3)


SPLITS: dict[str, Callable[..., Split]] = {"gowalla": gowalla, "online-retail": online_retail}


class AtDial:
    """A retriever at a setting of the popularity dial."""

    def __init__(self, retriever: tt.Retriever, popularity: float) -> None:
        self.retriever, self.popularity = retriever, popularity

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool) -> Any:
        """Return the k best items of every query."""
        return self.retriever.rank(holdout, k, exclude_seen, popularity=self.popularity)


def measured(rankers: dict[str, Ranker], split: Split, holdout: Holdout) -> dict[str, dict[str, float]]:
    """Measure rankers on a holdout; undefined metrics, which JSON cannot represent, are left out."""
    rows = evaluate_all(rankers, holdout, train=split.train, ks=(10, 20)).rows
    return {row.name: {name: round(v, 5) for name, v in row.values.items() if not math.isnan(v)} for row in rows}


def main() -> None:
    """Measure the requested runs that are not finished yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--only", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--final", action="store_true", help="train on all rows before the test, measure on the test")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--popularity", type=float, help="setting of the popularity dial")
    parser.add_argument("--baselines", action="store_true", help="also popularity, item-kNN and EASE")
    options = parser.parse_args()
    runs: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for name in options.only:
        split = SPLITS[name](options.data, final=options.final)
        holdout = split.test if options.final else split.validation
        settings, dial = SETTINGS[name]
        dial = dial if options.popularity is None else options.popularity
        for seed in options.seeds:
            chosen = [*settings, *options.overrides, f"training.seed={seed}"]
            key = json.dumps([name, chosen, dial, options.final])
            if key not in runs:
                model = tt.fit(split, tt.Config.load("lightgcn", chosen), progress=False)
                found = measured({"model": AtDial(model.retriever, dial)}, split, holdout)["model"]
                runs[key] = {
                    "measured_on": holdout.name,
                    "metrics": found,
                    "cpu_seconds": round(model.fit.cpu_seconds, 1),
                    "epochs": model.fit.epochs,
                    **stamp(),
                }
                write_text(RESULTS, json.dumps(runs, indent=1))
            values = runs[key]["metrics"]
            print(key, values["Recall@20"], values["NDCG@20"], f"{runs[key]['cpu_seconds']:.0f} s", flush=True)
        key = json.dumps([name, "baselines", options.final])
        if options.baselines and key not in runs:
            known: dict[str, Ranker] = {"popularity": Popularity(split.train), "item-kNN": ItemKNN(split.train)}
            if EASE.refusal(split.train) is None:
                known["EASE"] = EASE(split.train, l2=100.0)
            runs[key] = {"metrics": measured(known, split, holdout), **stamp()}
            write_text(RESULTS, json.dumps(runs, indent=1))
        if key in runs:
            print(key, {row: (v["Recall@20"], v["NDCG@20"]) for row, v in runs[key]["metrics"].items()}, flush=True)


def stamp() -> dict[str, Any]:
    """Return threads, versions and date."""
    date = datetime.now(UTC).isoformat(timespec="minutes")
    return {"threads": torch.get_num_threads(), "versions": library_versions(), "date": date}


if __name__ == "__main__":
    main()
