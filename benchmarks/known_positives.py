"""Accidental negatives: is it better to mask a query's other positives among its candidates, and what does it cost?

    python benchmarks/known_positives.py --data ../shared/data --only ml-100k movietweetings --seeds 0 1 2

For each data set, models are trained for the next item with `objective.mask_known_positives` off and on, from the same
seed, with in-batch candidates with and without uniform ones. (With the questions `horizon` and `set` and with sequence
towers, candidates that come from rows are always masked.) `difference` is the mean over seeds of on minus off, and
`seed_error` its standard error over seeds. `p` is the p-value of the paired test over queries, with values averaged
over seeds. `step_ratio` is the processor time of a step with masks divided by that without, measured alternately in one
process. Finished runs are saved in runs/ and not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

import twotower as tt
from twotower.config.run import Config
from twotower.data import Interactions, KnownPositives, Split, TrainingBatches, by_time, leave_last_out
from twotower.evaluation import paired_comparison
from twotower.objectives.build import build_objective
from twotower.serving.model_folder import library_versions
from twotower.system.filesystem import write_text
from twotower.towers import build_towers
from twotower.training import TableOptimizer, compute_loss
from twotower.training.optimizer import parameter_groups

RESULTS = Path(__file__).parent / "results" / "known_positives.json"
RUNS = Path("runs") / "known_positives.json"
POOLS = {
    "in-batch": "[{in_batch: {}}]",
    "in-batch and uniform": "[{in_batch: {}}, {uniform: {size: 1024}}]",
}
METRICS = ("NDCG@10", "Recall@10", "coverage@10")
#: Steps of one block, and blocks of each contender, when steps are timed.
STEPS, BLOCKS = 15, 5


def _ml_100k(data: Path) -> Split:
    columns = {"query": "user_id:token", "item": "item_id:token", "timestamp": "timestamp:float"}
    return leave_last_out(Interactions.read(data / "ml-100k/ml-100k.inter", columns=columns))


#: Data set -> (its natural split, epochs).
SETS: dict[str, tuple[Callable[[Path], Split], int]] = {
    "ml-100k": (_ml_100k, 3),
    "movietweetings": (lambda data: by_time(Interactions.read(data / "movietweetings/interactions.csv"), 0.05, 0.1), 3),
    "online-retail": (
        lambda data: by_time(Interactions.read(data / "online-retail/interactions.parquet"), 0.05, 0.1),
        2,
    ),
    "beauty": (lambda data: leave_last_out(Interactions.read(data / "amazon/beauty.txt"), validation_queries=0.1), 2),
}


def settings(pool: str, epochs: int, seed: int, *, masked: bool) -> Config:
    """Return the settings of one run."""
    return Config.load(
        None,
        [
            f"objective.sources={POOLS[pool]}",
            f"objective.mask_known_positives={str(masked).lower()}",
            "training.question=next",
            "training.recent_prior=false",
            "query_tower.history.length=20",
            f"training.max_epochs={epochs}",
            f"training.validate_every={epochs}",
            f"training.seed={seed}",
        ],
    )


def measure(split: Split, config: Config) -> dict[str, Any]:
    """Train and evaluate once; return the metrics and the values of every query."""
    began = time.process_time()
    model = tt.fit(split, config, progress=False)
    row = tt.evaluate(model, split.test, ks=(10,), baselines=False)["model"]
    return {
        "values": {name: row.values[name] for name in METRICS} | {"tail Recall@10": row.slices["tail"]["Recall@10"]},
        "ndcg": [round(float(value), 5) for value in row.per_query["NDCG@10"]],
        "seconds": time.process_time() - began,
    }


def step_seconds(split: Split, pool: str) -> dict[str, float]:
    """Return the median processor seconds of a step with and without masks, measured alternately."""
    ways: dict[bool, Callable[[], None]] = {}
    for masked in (False, True):
        config = settings(pool, 1, 0, masked=masked).resolved(len(split.train))
        torch.manual_seed(0)
        towers = build_towers(config, num_queries=split.train.num_queries, num_items=split.train.num_items)
        objective = build_objective(config, split.train)
        model = torch.nn.ModuleList([towers, objective])
        optimizer = TableOptimizer(parameter_groups(model, 0.0, lr=2e-3), lr=2e-3)
        batches = TrainingBatches(
            split.train, int(config.training.batch_size), history_length=config.history_length, seed=0
        )
        known = KnownPositives(split.train) if masked else None

        def steps(
            towers: Any = towers,
            objective: Any = objective,
            batches: Any = batches,
            known: Any = known,
            optimizer: Any = optimizer,
        ) -> None:
            for batch in islice(batches, STEPS):
                loss, _, _ = compute_loss(towers, objective, batch, known_positives=known)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()

        ways[masked] = steps
    taken: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(BLOCKS):
        for masked, run in ways.items():
            began = time.process_time()
            run()
            taken[masked].append((time.process_time() - began) / STEPS)
    return {"off": statistics.median(taken[False][1:]), "on": statistics.median(taken[True][1:])}


def summary(runs: dict[str, dict[str, Any]], seconds: dict[str, float]) -> dict[str, Any]:
    """Compare masked with unmasked runs of one data set and pool; runs are named "off 0", "on 0", ..."""
    seeds = sorted(
        {int(name.split()[1]) for name in runs if {"off " + name.split()[1], "on " + name.split()[1]} <= set(runs)}
    )
    mean = {way: np.mean([runs[f"{way} {seed}"]["ndcg"] for seed in seeds], axis=0) for way in ("off", "on")}
    tested = paired_comparison(mean["on"], mean["off"])
    found: dict[str, Any] = {"seeds": seeds, "p": tested.p_value, "step_seconds": seconds}
    found["step_ratio"] = seconds["on"] / seconds["off"]
    for name in (*METRICS, "tail Recall@10"):
        off, on = ([runs[f"{way} {seed}"]["values"][name] for seed in seeds] for way in ("off", "on"))
        differences = np.subtract(on, off)
        found[name] = {
            "off": float(np.mean(off)),
            "on": float(np.mean(on)),
            "difference": float(differences.mean()),
            "seed_error": float(differences.std(ddof=1) / len(seeds) ** 0.5) if len(seeds) > 1 else None,
        }
    return found


def main() -> None:
    """Measure the requested data sets, and save after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    RUNS.parent.mkdir(exist_ok=True)
    known = json.loads(RUNS.read_text()) if RUNS.exists() else {}
    for name in asked.only:
        read, epochs = SETS[name]
        split = read(asked.data)
        for pool in POOLS:
            part = known.setdefault(name, {}).setdefault(pool, {"runs": {}})
            if "step_seconds" not in part:
                part["step_seconds"] = step_seconds(split, pool)
            for seed in asked.seeds:
                for way in ("off", "on"):
                    if f"{way} {seed}" not in part["runs"]:
                        config = settings(pool, epochs, seed, masked=way == "on")
                        part["runs"][f"{way} {seed}"] = found = measure(split, config)
                        print(f"{name}, {pool}, {way} {seed}: {found['values']}, {found['seconds']:.0f} s", flush=True)
                        write_text(RUNS, json.dumps(known))
    complete: dict[str, dict[str, Any]] = {
        name: {"epochs": SETS[name][1]}
        | {pool: summary(part["runs"], part["step_seconds"]) for pool, part in pools.items()}
        for name, pools in known.items()
        if set(pools) == set(POOLS) and all(part["runs"] for part in pools.values())
    }
    result = {"data_sets": complete, "versions": library_versions(), "date": datetime.now(UTC).date().isoformat()}
    write_text(asked.results, json.dumps(result, indent=1))
    for name, pools in complete.items():
        for pool in POOLS:
            one = pools[pool]["NDCG@10"]
            print(
                f"{name}, {pool}: NDCG@10 {one['off']:.4f} -> {one['on']:.4f}, p {pools[pool]['p']:.3f}, "
                f"step x{pools[pool]['step_ratio']:.2f}"
            )


if __name__ == "__main__":
    main()
