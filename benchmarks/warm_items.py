"""Id towers trained on whole users of Online Retail (temporal split), compared with popularity, item-kNN and EASE.

    python benchmarks/warm_items.py --data ../shared/data/online-retail --test 0.3 --temperature 0.2 --epochs 40
    python benchmarks/warm_items.py --data ../shared/data/online-retail --test 0.3 --temperature 0.2 --epochs 40 --final

Without --final, the model is trained on the rows before the validation and measured on the validation. With --final, it
is trained on all rows before the test, like the baselines, and measured on the test. Targets without training rows are
excluded, also for the baselines. Training is done by benchmarks/whole_users.py: one vector for each customer and item,
and the full softmax over all items, computed once per customer. --layers and --popularity are as in
benchmarks/gowalla.py.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from gowalla import at_dials, kept_runs, measured
from whole_users import ByUsers, add_settings, parsed, settings_of

import twotower as tt
from twotower.ranking import EASE, ItemKNN, Popularity
from twotower.serving.model_folder import library_versions
from twotower.system.filesystem import write_text

RESULTS = Path(__file__).parent / "results" / "warm_items.json"


def main() -> None:
    """Train and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=float, default=0.3, help="share of the rows after the cut")
    parser.add_argument("--final", action="store_true")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    add_settings(parser)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parsed(parser)
    data = tt.Interactions.read(asked.data)
    split = tt.splits.by_time(data, validation=0.0 if asked.final else 0.05, test=asked.test)
    train, holdout = split.train, split.test if asked.final else split.validation
    for seed in asked.seeds:
        settings = settings_of(asked, seed)
        key = json.dumps([asdict(settings), asked.popularity, asked.test, asked.final], sort_keys=True)
        if key in [run["key"] for run in kept_runs(asked.results)]:
            continue
        started = time.process_time()
        training, curve = ByUsers(train, settings), []
        for number in range(settings.epochs):
            loss = training.epoch(number)
            last = number + 1 == settings.epochs
            if last or (not asked.final and (number + 1) % asked.every == 0):
                found = at_dials(training, asked.popularity, holdout, train)
                curve.append({"epoch": number + 1, "loss": round(loss, 4), **found})
                print(settings, number + 1, round(loss, 3), found["by_popularity"], flush=True)
        known = {"popularity": Popularity(train), "item-kNN": ItemKNN(train), "EASE": EASE(train, l2=100.0)}
        entry = {
            "key": key,
            "test": asked.test,
            "measured_on": holdout.name,
            "settings": asdict(settings),
            "curve": curve,
            "metrics": curve[-1],
            "cpu_seconds": round(time.process_time() - started, 1),
            "baselines": measured(known, holdout, train),
            "threads": torch.get_num_threads(),
            "versions": library_versions(),
            "date": datetime.now(UTC).isoformat(timespec="minutes"),
        }
        for name, row in entry["baselines"].items():
            print(name, {k: round(v, 4) for k, v in row.items() if k in ("Recall@20", "NDCG@20")}, flush=True)
        others = [run for run in kept_runs(asked.results) if run["key"] != key]
        asked.results.parent.mkdir(parents=True, exist_ok=True)
        write_text(asked.results, json.dumps([*others, entry], indent=1))


if __name__ == "__main__":
    main()
