"""Approximate indexes by kind: build one, measure its recall, reject it if recall is below a floor, load it.

Kinds are mapped to classes here and not in run/, because serving loads indexes without the trainer.
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
from twotower.index.approximate.code_store import BinaryStore, Int8Store
from twotower.index.approximate.hnsw import HNSW
from twotower.index.approximate.index import ApproximateIndex, Engine
from twotower.index.approximate.ivfpq import IVFPQ
from twotower.index.approximate.narrow import FETCH, NarrowEngine
from twotower.index.approximate.pgvector import PgVector
from twotower.index.catalog import ExactCatalog, Index, Mask
from twotower.index.prefix import Prefix

#: Kind of an approximate index -> its engine.
ENGINES: dict[str, type[Any]] = {
    "hnsw": HNSW,
    "ivfpq": IVFPQ,
    "int8": Int8Store,
    "binary": BinaryStore,
    "pgvector": PgVector,
}
KINDS = ("exact", *ENGINES)

#: Queries searched at a time when recall is measured.
BLOCK = 256


@dataclass(frozen=True)
class IndexReport:
    """The settings and the measured recall of an index.

    Attributes:
        kind: hnsw, ivfpq, int8, binary or pgvector.
        num_items: N.
        settings: settings of the engine; `effort` is the final value.
        recall: share of the exact top K that the index finds, per named set of queries.
        k: K.
        num_queries: queries in the largest set.
        build_seconds: build time, without measuring recall.
        bytes: memory, or disk space in a database, excluding the embeddings.
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
        """Convert to JSON values."""
        return asdict(self)


def build_index(
    kind: str,
    items: Tensor,
    queries: Mapping[str, Tensor],
    *,
    k: int = 100,
    min_recall: float | None = None,
    settings: Mapping[str, Any] | None = None,
    prefix: Prefix | None = None,
) -> tuple[ApproximateIndex, IndexReport]:
    """Build an approximate index and measure its recall on realistic queries.

    While recall is below the floor, the search effort is doubled, up to the maximum of the kind.

    Args:
        kind: hnsw, ivfpq, int8, binary or pgvector.
        items: float [N, D].
        queries: sets of queries [E, D] by name; the floor applies to each set.
        k: K of the recall, at most N.
        min_recall: the floor, in (0, 1]; None for no floor.
        settings: settings of the engine, such as `effort`.
        prefix: the width of the engine's vectors; None for the whole embeddings. Recall is always of the exact top K
            at the whole width. The setting `fetch` is then known too; see `NarrowEngine`.

    Raises:
        InputError: the kind or a setting is unknown, the floor is out of range or not reached, or the kind needs a
            package or database that is missing.
    """
    if min_recall is not None and not 0.0 < min_recall <= 1.0:
        raise InputError(f"min_recall: expected a number above 0 and at most 1, found {min_recall}")
    if kind not in ENGINES:
        raise InputError(f"index: unknown kind {kind!r}; expected one of {', '.join(KINDS)}")
    start, given = time.perf_counter(), dict(settings or {})
    fetch = FETCH if prefix is None else given.pop("fetch", FETCH)
    vectors = items.detach().float().cpu()
    try:
        engine: Engine = ENGINES[kind]((vectors if prefix is None else prefix(vectors)).numpy(), **given)
    except TypeError as error:
        raise InputError(f"index: unknown setting for {kind} ({error})") from None
    if prefix is not None:
        engine = NarrowEngine(engine, prefix, fetch=fetch)
    seconds = time.perf_counter() - start
    index = ApproximateIndex(items, engine)
    best = {name: exact_answers(items, chosen, k) for name, chosen in queries.items()}
    recall = {name: recall_of(index, chosen, best[name]) for name, chosen in queries.items()}
    while min_recall is not None and min(recall.values()) < min_recall and engine.effort < engine.max_effort:
        engine.effort = min(2 * engine.effort, engine.max_effort)
        recall = {name: recall_of(index, chosen, best[name]) for name, chosen in queries.items()}
    if min_recall is not None and min(recall.values()) < min_recall:
        worst = min(recall, key=lambda name: recall[name])
        build_settings = "raise links or build_effort, " if "links" in engine.settings() else ""
        raise InputError(
            f"index: {kind} finds {recall[worst]:.4f} of the exact top {min(k, len(items))} ({worst}) at its maximum "
            f"effort ({engine.effort}), below the floor {min_recall}; nothing was written. Lower --min-recall, "
            f"{build_settings}or use exact"
        )
    report = IndexReport(
        kind=kind,
        num_items=len(items),
        settings=engine.settings(),
        recall={name: round(value, 5) for name, value in recall.items()},
        k=min(k, len(items)),
        num_queries=max((len(chosen) for chosen in queries.values()), default=0),
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
    prefix: Prefix | None = None,
) -> ApproximateIndex:
    """Load an index that was built before.

    Args:
        report: `IndexReport.to_dict()`.
        items: the embeddings that the index was built on.
        folder: the folder where its engine was saved.
        alive: bool [N], False for removed items.
        last: float [N], the items' last coordinate if it is stored separately; see `Vectors`.
        prefix: the width of the engine's vectors; None for the whole embeddings.

    Raises:
        InputError: the kind is unknown, or it needs a package or database that is missing.
    """
    kind = report["kind"]
    if kind not in ENGINES:
        raise InputError(f"{folder}: index of unknown kind {kind!r}; rebuild it with `twotower index`")
    engine: Engine = ENGINES[kind].load(folder, dict(report["settings"]))
    if (
        isinstance(engine, HNSW)
        and len(engine.codes)
        and not 0 <= engine.codes.min() <= engine.codes.max() < len(items)
    ):
        raise InputError(f"{folder}: the items of the graph and of the model differ; rebuild it with `twotower index`")
    if prefix is not None:
        engine = NarrowEngine(engine, prefix, fetch=report["settings"].get("fetch"))
    return ApproximateIndex(items, engine, alive=alive, last=last)


def exact_answers(items: Tensor, queries: Tensor, k: int) -> Tensor:
    """Compute the exact top K of each query, int64 [E, min(K, N)]."""
    return ExactCatalog(items).search(queries, min(k, len(items)))[1]


def recall_of(index: Index, queries: Tensor, best: Tensor) -> float:
    """Compute the recall of an index: the mean share of the exact top K, [E, K], that it returns."""
    shares = []
    for start in range(0, len(queries), BLOCK):
        rows = slice(start, start + BLOCK)
        _, items = index.search(queries[rows], best.shape[1])
        ascending, expected = items.sort(1).values, best[rows].contiguous()
        at = torch.searchsorted(ascending.contiguous(), expected).clamp(max=items.shape[1] - 1)
        shares.append((ascending.gather(1, at) == expected).double().mean(1))
    return float(np.concatenate([part.numpy() for part in shares]).mean()) if shares else 0.0
