"""Calibration of the models of a comparison: what their softmax says against what was observed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from twotower.analysis import estimates_softmax
from twotower.build import build_objective
from twotower.data import Holdout, Split
from twotower.evaluation.calibration import softmax_calibration
from twotower.serving import Retriever

#: (query, item) pairs looked at, at most; queries are drawn where there are more.
_PAIRS = 200_000_000


def calibrations(directories: Mapping[str, Path], split: Split, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """By name, the calibration of each model whose objective estimates the softmax.

    Args:
        directories: by name, a run folder.
        split: the data; its test queries are asked.
        seed: of the queries that are drawn where the catalog is so large that not all can be looked at.
    """
    found = {}
    rows = _drawn(split, seed)
    histories, targets = _parts(split.test, rows)
    for name, directory in directories.items():
        retriever = Retriever.load(directory)
        artifact = retriever.artifact
        if not estimates_softmax(build_objective(artifact.config, split.train)):
            continue
        context = None if split.test.context is None else split.test.context[rows]
        queries = retriever.ranker.embed(split.test.queries[rows], histories, context=context)
        calibration = softmax_calibration(
            queries,
            artifact.item_embeddings,
            targets,
            temperature=float(artifact.towers.temperature.detach()),
            exclude=histories if artifact.config.evaluation.exclude_seen else None,
        )
        found[name] = calibration.to_dict()
    return found


def _drawn(split: Split, seed: int) -> np.ndarray:
    count = len(split.test)
    most = max(_PAIRS // split.train.num_items, 100)
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def _parts(holdout: Holdout, rows: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Histories and targets of some queries, as compressed rows."""
    histories = _taken(holdout.history_offsets, holdout.history_items, rows)
    return histories, _taken(holdout.target_offsets, holdout.target_items, rows)


def _taken(offsets: np.ndarray, items: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.diff(offsets)[rows]
    ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    place = np.repeat(offsets[rows] - ends[:-1], sizes) + np.arange(ends[-1])
    return ends, np.asarray(items)[place]
