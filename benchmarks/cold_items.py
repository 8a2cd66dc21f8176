"""Ranking of cold items by their features, and the effect of features on warm items (global temporal split).

    python benchmarks/cold_items.py --data ../shared/data/online-retail --tests 0.1 0.3 --seeds 0

Every model is trained on the rows before the cut. The test rows after the cut have two parts:

warm   targets that occur in training, ranked in the full catalog and compared with popularity, item-kNN and EASE;
cold   targets that never occur in training, ranked among the cold items and in the full catalog. Chance is the
       expected recall of a random order; popularity is undefined for an item without training rows.

Variants: the default id towers; the same with features (text as words, price, country) and id dropout. With
--text-vectors, the description is a vector of a text encoder, as it is or trained before:

    python benchmarks/text_encoders.py retail --data ../shared/data/online-retail --batch 128 --vectors DIR
    python benchmarks/cold_items.py --data ../shared/data/online-retail --text-vectors DIR frozen "ours, lora"

SEED of a file "NAME, SEED.npy" is the seed of the run, or 0. With --text-model, the encoder is trained together with
the towers, as --train says; the candidates are then the items of the batch alone, because each has to be encoded.
Finished runs are saved in the results file and not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import twotower as tt
from twotower.data import Holdout, Interactions, Split
from twotower.evaluation import evaluate_all
from twotower.ranking import EASE, ItemKNN, Popularity, Ranker
from twotower.ranking.tower_ranker import TowerRanker
from twotower.run import Model
from twotower.serving.model_folder import library_versions
from twotower.system.filesystem import write_text

RESULTS = Path(__file__).parent / "results" / "cold_items.json"
K = 20

#: Candidates only from items seen in training, because a cold item drawn as a negative is pushed away for no reason.
SEEN_ONLY = "objective.sources=[{in_batch: {}}, {frequency: {size: 1024, power: 0}}]"
FEATURES = [
    SEEN_ONLY,
    "item_tower.features=auto",
    "query_tower.features=auto",
    "item_tower.residual=true",
    "item_tower.id_dropout=0.3",
]
VARIANTS: dict[str, list[str]] = {
    "ids": [],
    "ids, candidates seen in training": [SEEN_ONLY],
    "features": FEATURES,
    "features, also of the history": [*FEATURES, "query_tower.history.item_features=true"],
    "features, no id dropout": [*FEATURES, "item_tower.id_dropout=0"],
    "preset dnn": ["preset"],
}


@dataclass(frozen=True)
class Among:
    """A ranker of the cold items alone: the same scores on a smaller catalog."""

    model: Model
    items: NDArray[np.int64]

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool) -> NDArray[np.int64]:
        """Return the top k of `items`, int64 [E, k], padded with -1."""
        towers = self.model.artifact.towers
        histories = (holdout.history_offsets, holdout.history_items)
        embedded = TowerRanker(towers, self.model.artifact.config.history_length).embed(holdout.queries, histories)
        codes = torch.from_numpy(self.items)
        scores = embedded @ towers.embed_items(codes).detach().T
        if exclude_seen:
            scores = scores.masked_fill(torch.from_numpy(_seen(holdout, self.items)), -torch.inf)
        best = scores.topk(min(k, len(self.items)), dim=1)
        found = torch.where(best.values > -torch.inf, codes[best.indices], -1).numpy()
        return np.pad(found, ((0, 0), (0, k - found.shape[1])), constant_values=-1)


def _seen(holdout: Holdout, items: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark which of `items` are in each query's history, [E, items]."""
    owner = np.repeat(np.arange(len(holdout)), np.diff(holdout.history_offsets))
    place = np.searchsorted(items, holdout.history_items)
    known = (place < len(items)) & (items[np.minimum(place, len(items) - 1)] == holdout.history_items)
    seen = np.zeros((len(holdout), len(items)), dtype=bool)
    seen[owner[known], place[known]] = True
    return seen


def cold_part(test: Holdout, train: Interactions) -> Holdout:
    """Select the cold targets of queries that have training rows."""
    cold = train.item_counts()[test.target_items] == 0
    owner = np.repeat(np.arange(len(test)), np.diff(test.target_offsets))
    cold &= (np.diff(train.offsets) > 0)[test.queries][owner]
    sizes = np.bincount(owner[cold], minlength=len(test))
    kept = np.flatnonzero(sizes)
    starts, ends = test.history_offsets[:-1][kept], test.history_offsets[1:][kept]
    history = np.concatenate([test.history_items[a:b] for a, b in zip(starts, ends, strict=True)])
    return Holdout(
        "cold",
        test.queries[kept],
        np.concatenate([[0], np.cumsum(ends - starts)]).astype(np.int64),
        history,
        np.concatenate([[0], np.cumsum(sizes[kept])]).astype(np.int64),
        test.target_items[cold],
    )


def chance(holdout: Holdout, items: NDArray[np.int64]) -> float:
    """Compute the expected Recall@K of a random order of the unseen `items`: min(K / number of items left, 1)."""
    left = len(items) - _seen(holdout, items).sum(1)
    return float(np.minimum(K / left, 1.0).mean())


def values(rankers: dict[str, Ranker], holdout: Holdout, train: Interactions) -> dict[str, dict[str, float]]:
    """Measure recall and NDCG of each ranker."""
    measured = evaluate_all(rankers, holdout, train=train, ks=(10, K))
    return {row.name: dict(row.values) for row in measured.rows}


def baselines(warm: Split, cold: Holdout) -> dict[str, Any]:
    """Measure the baselines, which need no gradient training."""
    train = warm.train
    known: dict[str, Ranker] = {
        "popularity": Popularity(train),
        "item-kNN": ItemKNN(train),
        "EASE": EASE(train, l2=100.0),
    }
    everything = np.arange(train.num_items)
    unseen = np.flatnonzero(train.item_counts() == 0)
    return {
        "warm": values(known, warm.test, train),
        "cold, full catalog": {**values(known, cold, train), "chance": {"Recall@20": chance(cold, everything)}},
        "cold, among cold items": {"chance": {"Recall@20": chance(cold, unseen)}},
    }


def measure(name: str, overrides: list[str], warm: Split, cold: Holdout, common: list[str]) -> dict[str, Any]:
    """Train one variant and evaluate it."""
    preset = overrides == ["preset"]
    config = tt.Config.load("dnn" if preset else None, [*([] if preset else overrides), *common])
    started = time.perf_counter()
    model = tt.fit(warm, config, progress=False)
    seconds = time.perf_counter() - started
    unseen = np.flatnonzero(warm.train.item_counts() == 0)
    return {
        "seconds": round(seconds, 1),
        "epochs": model.fit.epochs,
        "validation": model.fit.best,
        "curve": model.fit.history,
        "config": model.artifact.config.model_dump(mode="json"),
        "warm": values({name: model.retriever}, warm.test, warm.train)[name],
        "cold, full catalog": values({name: model.retriever}, cold, warm.train)[name],
        "cold, among cold items": values({name: Among(model, unseen)}, cold, warm.train)[name],
    }


def main() -> None:
    """Measure the requested runs that are not finished yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tests", nargs="+", type=float, default=[0.1, 0.3], help="shares of the rows after the cut")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help="variants to train")
    parser.add_argument("--text-vectors", nargs="+", metavar="NAME", help="a folder, and the names of its vectors")
    parser.add_argument("--text-model", help="a sentence-transformers model")
    parser.add_argument("--train", nargs="+", choices=["frozen", "lora", "full"], default=["frozen"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    data = tt.Interactions.read(asked.data)
    variants = {name: VARIANTS[name] for name in asked.only}
    for train in asked.train if asked.text_model else ():
        text = {"column": "description", "kind": "text", "model": asked.text_model, "train": train}
        only_batch = [] if train == "frozen" else ["objective.sources=[{in_batch: {}}]"]
        variants[f"features, text model, {train}"] = [*FEATURES, *_with(text), *only_batch]
    for share in asked.tests:
        warm = tt.splits.by_time(data, validation=0.05, test=share)
        cold = cold_part(tt.splits.by_time(data, validation=0.05, test=share, cold="keep").test, warm.train)
        print(f"test {share}: {warm.test!r}; {cold!r}", flush=True)
        facts = {
            "cold_items": int((warm.train.item_counts() == 0).sum()),
            "cold_targets": len(cold.target_items),
            "cold_queries": len(cold),
            "warm_targets": len(warm.test.target_items),
            "training_rows": len(warm.train),
            "items": data.num_items,
        }
        first = {"test": share, "name": "baselines", "seed": None}
        if key_of(first) not in [key_of(run) for run in kept(asked.results)]:
            record(asked.results, {**first, **facts, **baselines(warm, cold)})
        for seed in asked.seeds:
            vectors = _vectors(asked.text_vectors, seed)
            for name, overrides in (variants | vectors).items():
                common = {"overrides": asked.overrides, "threads": torch.get_num_threads()}
                key = key_of({"test": share, "name": name, "seed": seed, **common})
                if key in [key_of(run) for run in kept(asked.results)]:
                    continue
                found = measure(name, overrides, warm, cold, [f"training.seed={seed}", *asked.overrides])
                record(asked.results, {"test": share, "name": name, "seed": seed, **common, **found})


def _with(text: dict[str, Any]) -> list[str]:
    """Return the item features of `FEATURES` with another encoding of the description."""
    price = {"column": "median_price_gbp", "kind": "numeric", "scale": "log"}
    return [f"item_tower.features={json.dumps([text, price])}"]


def _vectors(names: list[str] | None, seed: int) -> dict[str, list[str]]:
    """Return a variant for each of the vectors in a folder; names[0] is the folder."""
    found = {}
    for name in (names or [])[1:]:
        folder = Path((names or [])[0])
        files = [folder / f"{name}, {one}.npy" for one in (seed, 0)]
        file = next((one for one in files if one.exists()), files[0])
        text = {"column": "vector", "kind": "dense", "file": str(file), "ids": str(folder / "ids.txt")}
        found[f"features, vectors: {name}"] = [*FEATURES, *_with(text)]
    return found


def kept(path: Path) -> list[dict[str, Any]]:
    """Read the finished runs."""
    runs: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return runs


def key_of(run: dict[str, Any]) -> tuple[Any, ...]:
    """Return the identity of a run."""
    return run["test"], run["name"], run["seed"], run.get("overrides")


def record(path: Path, run: dict[str, Any]) -> None:
    """Print the metrics of a run and add it to the file."""
    for part in ("warm", "cold, full catalog", "cold, among cold items"):
        rows = run[part] if run["name"] == "baselines" else {run["name"]: run[part]}
        for name, row in rows.items():
            shown = {k: round(v, 4) for k, v in row.items() if k in ("Recall@10", "Recall@20", "NDCG@20")}
            print(f"test {run['test']} seed {run['seed']} {part:24s} {name:36s} {shown}", flush=True)
    stamped = {**run, "versions": library_versions(), "date": datetime.now(UTC).date().isoformat()}
    others = [old for old in kept(path) if key_of(old) != key_of(run)]
    write_text(path, json.dumps([*others, stamped], indent=1))


if __name__ == "__main__":
    main()
