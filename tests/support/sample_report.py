"""A comparison document with ten objectives and awkward names, from real measurements of artificial rankers."""

from dataclasses import replace

import numpy as np

from twotower.comparison.document import build_document
from twotower.comparison.examples import disagreements
from twotower.comparison.statistics import compare
from twotower.config.run import Config
from twotower.evaluation import evaluate_all
from twotower.ranking import ItemKNN, Popularity

OBJECTIVES = [
    "expected-count",
    "full-softmax",
    "in-batch",
    "in-batch-logq",
    "mixed",
    "refined-logq",
    "in-batch-logq-all",
    "mixed-by-source",
    "in-batch-logq-batch-probability",
    "negative-sampling",
]


GENRES = [f"Genre {letter} of many" for letter in "ABCDEFGHIJKLMNOPQR"]


class Leaning:
    """A ranker that knows the taste of a query (the parity of its items) to some degree and is random otherwise."""

    def __init__(self, taste, seed):
        self.taste, self.seed = taste, seed

    def rank(self, holdout, k, exclude_seen):
        random = np.random.default_rng(self.seed)
        scores = random.normal(size=(len(holdout), 100)) - 0.01 * np.arange(100)
        scores[:, 0::2] += self.taste * (holdout.queries % 2 == 0)[:, None]
        scores[:, 1::2] += self.taste * (holdout.queries % 2 == 1)[:, None]
        if exclude_seen:
            rows = np.repeat(np.arange(len(holdout)), np.diff(holdout.history_offsets))
            scores[rows, holdout.history_items] = -np.inf
        return np.argsort(-scores, axis=1)[:, :k].astype(np.int64)


def metadata(name, seed, place):
    config = Config.load(None, [f"objective={name}", f"training.seed={seed}", "data.split=leave-last-out"])
    history = [{"epoch": e, "step": 9 * e, "NDCG@10": 0.1 + 0.02 * e - 0.004 * place + 0.002 * seed} for e in range(4)]
    return {
        "created": f"2026-01-0{seed + 1}T0{place % 10}:00:00+00:00",
        "config": config.model_dump(mode="json"),
        "versions": {"twotower": "0.1.0", "torch": "2.13.0"},
        "data": {
            "source": "/somewhere/<b>data</b>/purchases.parquet",
            "fingerprint": "0123456789abcdef" * 4,
            "account": {"lines": [{"label": "rows read", "count": 1440, "note": "/a/rather/long/path/" + "x" * 90}]},
        },
        "split": {
            "name": "leave_last_out",
            "settings": {},
            "account": {"lines": [{"label": "leak through time", "count": None, "note": "by_time does not"}]},
        },
        "training": {
            "epochs": 4,
            "seconds": 3600.0 + 100 * place,
            "cpu_seconds": 3000.0 + 210 * place + seed,
            "peak_memory": (600 + 7 * place) << 20,
            "history": history,
        },
    }


def audited(names):
    found = []
    for place, name in enumerate(names):
        known = {"bias": 0.03 * place, "bias_error": 0.004, "spread": 0.4 + 0.1 * place, "spread_error": 0.02}
        known |= {"distinct": 900.0, "effective": 60.0 + place}
        verdict = ["no bias found", "small bias", "biased"][min(place, 2)]
        overall = None if name == "negative-sampling" else known
        found.append({"name": name, "overall": overall, "verdict": verdict, "note": None})
    return {"asked": {"model": "expected-count-0"}, "objectives": found, "rows": 40, "draws": 24}


def calibrated(place):
    """Return values as `Calibration.to_dict()` does: ten bins, rare to probable, with larger errors at later places."""
    bins = [
        {
            "low": 0,
            "high": 1,
            "pairs": 99,
            "predicted": p,
            "observed": p * 1.3 ** (place * (n - 5) / 5),
            "targets": n * 9,
        }
        for n, p in enumerate(0.00021 * 2.3**n for n in range(10))
    ]
    return {"bins": bins, "expected_calibration_error": 0.02 * place, "perplexity": 400.0 + place}


def dialled():
    """Return values as `DialCurve.to_dict()` does: recall falls as coverage grows, three settings nearly coincide."""
    points = [
        {
            "popularity": b,
            "recall": 0.30 - 0.12 * (1 - b) ** 2,
            "tail_recall": 0.05 + 0.03 * (1 - b**3),
            "ndcg": 0.2 - 0.08 * (1 - b) ** 2,
            "coverage": 0.25 + 0.4 * (1 - b) ** 1.5,
            "interactions": 40 + 200 * b,
            "percentile": 0.5 + 0.3 * b,
        }
        for b in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    ]
    return {"holdout": "test", "k": 20, "points": points}


def sample_document(split, *, names=OBJECTIVES, seeds=3, kind="comparison"):
    """Build a document of the given shape; `split` is the planted leave-last-out split."""
    rankers = {
        f"{name}-{seed}": Leaning(2.0 - 0.15 * place, 100 * place + seed)
        for place, name in enumerate(names)
        for seed in range(seeds)
    }
    baselines = {"popularity": Popularity(split.train), "item-kNN": ItemKNN(split.train)}
    found = evaluate_all({**rankers, **baselines}, split.test, train=split.train)
    rows = {name: [found[f"{name}-{seed}"] for seed in range(seeds)] for name in names}
    beside = [found[name] for name in baselines]
    ranked = {name: rankers[f"{name}-0"].rank(split.test, 20, True).astype(np.int32) for name in names}
    for row in found.rows:  # as slices of a column are
        row.slices.update({f"items.genre={genre}": dict(row.slices["tail"]) for genre in GENRES})
    sizes = {f"items.genre={genre}": {"items": 9, "targets": 20, "queries": 20} for genre in GENRES}
    found = replace(
        found,
        slice_sizes={**found.slice_sizes, **sizes},
        slice_groups={**found.slice_groups, "items.genre": tuple(sizes)},
    )
    compared = compare(rows, beside, metric="NDCG@10", tail_metric="Recall@10")
    return build_document(
        kind,
        compared,
        found,
        beside,
        metadata={n: [metadata(n, s, place) for s in range(seeds)] for place, n in enumerate(names)},
        data=split.data,
        command="twotower compare purchases.parquet --objectives a,b --out there",
        objectives={name: metadata(name, 0, 0)["config"]["objective"] for name in names},
        examples=disagreements(ranked, split.test, split.train, True),
        audit=audited(names) if len(names) > 1 else None,
        diagnostics={name: {"gradient_tail": 0.3} for name in names},
        calibration={name: calibrated(place) for place, name in enumerate(names)},
        dial=dialled() if kind == "evaluation" else None,
    )
