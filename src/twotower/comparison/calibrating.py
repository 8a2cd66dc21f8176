"""Calibration of the models of a comparison: predicted softmax probabilities against observed frequencies."""

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

#: Maximum number of (query, item) pairs; with more, queries are sampled.
_PAIRS = 200_000_000


def calibrations(directories: Mapping[str, Path], split: Split, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Measure the calibration of each model whose objective estimates the softmax.

    Args:
        directories: name -> run folder.
        split: the data; its test queries are used.
        seed: seed of the query sample that is drawn if the catalog is too large to use all queries.

    Returns:
        Calibration by name, as `to_dict` values.
    """
    found = {}
    rows = _sampled_queries(split, seed)
    histories, targets = _histories_and_targets(split.test, rows)
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


def _sampled_queries(split: Split, seed: int) -> np.ndarray:
    count = len(split.test)
    most = max(_PAIRS // split.train.num_items, 100)
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def _histories_and_targets(
    holdout: Holdout, rows: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Select histories and targets of some queries, in compressed-row format."""
    histories = _select_rows(holdout.history_offsets, holdout.history_items, rows)
    return histories, _select_rows(holdout.target_offsets, holdout.target_items, rows)


def _select_rows(offsets: np.ndarray, items: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.diff(offsets)[rows]
    ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    place = np.repeat(offsets[rows] - ends[:-1], sizes) + np.arange(ends[-1])
    return ends, np.asarray(items)[place]
