"""An approximate index by its kind: built, its recall measured, refused below a floor, and loaded again.

Names are turned into classes here, as towers are in `towers/build.py`: a served model does it without the trainer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twotower.errors import InputError
from twotower.index.ann import ApproximateIndex, Engine
from twotower.index.catalog import ExactCatalog, Index, Mask
from twotower.index.graph import HNSW
from twotower.index.pgvector import PgVector
from twotower.index.quantized import IVFPQ

KINDS = ("exact", "hnsw", "ivfpq", "pgvector")

#: Kind -> candidates fetched for each result. Product quantization orders coarsely; the others know every score.
OVERSAMPLE = {"hnsw": 1.0, "ivfpq": 4.0, "pgvector": 1.0}

#: Exact answers are computed for so many queries at once.
BLOCK = 256


@dataclass(frozen=True)
class IndexReport:
    """How an index was built and what it is worth.

    Attributes:
        kind: hnsw, ivfpq or pgvector.
        num_items: N.
        settings: of the engine; `effort` as it was left.
        recall: share of the exact K best that it finds, for each name of a set of queries.
        k: K.
        num_queries: queries in each set.
        build_seconds: without the measuring.
        bytes: memory, or disk in a database, beside the embeddings.
    """

    kind: str
    num_items: int
    settings: dict[str, Any]
    recall: dict[str, float]
    k: int
    num_queries: int
    build_seconds: float
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def build_index(
    kind: str,
    items: Tensor,
    queries: Mapping[str, Tensor],
    *,
    k: int = 100,
    min_recall: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> tuple[ApproximateIndex, IndexReport]:
    """Build an approximate index and measure its recall on queries as they will be asked.

    Where recall is below the floor, the index is told to look harder, twice as hard each time, as far as its kind goes.

    Args:
        kind: hnsw, ivfpq or pgvector.
        items: float [N, D].
        queries: sets of queries [E, D] by name; the floor holds for each.
        k: K of the recall; at most N are looked at.
        min_recall: the floor, in (0, 1]; None takes what comes.
        settings: of the engine, such as `effort`.

    Raises:
        InputError: an unknown kind or setting, a floor out of range or not reached, or what the kind needs is missing.
    """
    if min_recall is not None and not 0.0 < min_recall <= 1.0:
        raise InputError(f"min_recall: expected a number above 0 and at most 1, found {min_recall}")
    kinds: dict[str, type[Any]] = {"hnsw": HNSW, "ivfpq": IVFPQ, "pgvector": PgVector}
    if kind not in kinds:
        raise InputError(f"index: unknown kind {kind!r}; expected one of {', '.join(KINDS)}")
    start = time.perf_counter()
    try:
        engine: Engine = kinds[kind](items.detach().float().cpu().numpy(), **(settings or {}))
    except TypeError as error:
        raise InputError(f"index: {kind} has no such setting ({error})") from None
    seconds = time.perf_counter() - start
    index = ApproximateIndex(items, engine, oversample=OVERSAMPLE[kind])
    best = {name: exact_answers(items, asked, k) for name, asked in queries.items()}
    recall = {name: recall_of(index, asked, best[name]) for name, asked in queries.items()}
    while min_recall is not None and min(recall.values()) < min_recall and engine.effort < engine.max_effort:
        engine.effort = min(2 * engine.effort, engine.max_effort)
        recall = {name: recall_of(index, asked, best[name]) for name, asked in queries.items()}
    if min_recall is not None and min(recall.values()) < min_recall:
        worst = min(recall, key=lambda name: recall[name])
        raise InputError(
            f"index: {kind} finds {recall[worst]:.4f} of the exact top {min(k, len(items))} ({worst}) with all its "
            f"effort ({engine.effort}), below the floor {min_recall}; nothing was written. Lower --min-recall, raise "
            "links or build_effort, or use exact"
        )
    report = IndexReport(
        kind=kind,
        num_items=len(items),
        settings=engine.settings(),
        recall={name: round(value, 5) for name, value in recall.items()},
        k=min(k, len(items)),
        num_queries=max((len(asked) for asked in queries.values()), default=0),
        build_seconds=round(seconds, 2),
        bytes=engine.size(),
    )
    return index, report


def load_index(
    report: Mapping[str, Any],
    items: Tensor,
    folder: Path,
    alive: Mask | None = None,
    *,
    last: Tensor | None = None,
) -> ApproximateIndex:
    """An index that was built before.

    Args:
        report: `IndexReport.to_dict()`.
        items: the embeddings it was built on.
        folder: what its engine wrote.
        alive: bool [N], False for removed items.
        last: float [N], their last coordinate where it is kept apart; see `Vectors`.

    Raises:
        InputError: an unknown kind, or what the kind needs is missing.
    """
    loaders: dict[str, Any] = {"hnsw": HNSW.load, "ivfpq": IVFPQ.load, "pgvector": PgVector.load}
    kind = report["kind"]
    if kind not in loaders:
        raise InputError(f"{folder}: an index of the unknown kind {kind!r}; build it again with `twotower index`")
    engine: Engine = loaders[kind](folder, dict(report["settings"]))
    return ApproximateIndex(items, engine, alive=alive, oversample=OVERSAMPLE[kind], last=last)


def exact_answers(items: Tensor, queries: Tensor, k: int) -> Tensor:
    """The exact K best of each query, int64 [E, min(K, N)]."""
    return ExactCatalog(items).search(queries, min(k, len(items)))[1]


def recall_of(index: Index, queries: Tensor, best: Tensor) -> float:
    """Mean share of the exact answers [E, K] among the index's own K."""
    shares = []
    for start in range(0, len(queries), BLOCK):
        rows = slice(start, start + BLOCK)
        _, found = index.search(queries[rows], best.shape[1])
        ascending, expected = found.sort(1).values, best[rows].contiguous()
        at = torch.searchsorted(ascending.contiguous(), expected).clamp(max=found.shape[1] - 1)
        shares.append((ascending.gather(1, at) == expected).double().mean(1))
    return float(np.concatenate([part.numpy() for part in shares]).mean()) if shares else 0.0
