"""Approximate indexes by kind: build one, measure its recall, reject it if recall is below a floor, load it.

Kinds are mapped to classes here and not in run/, because serving loads indexes without the trainer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.distributed.communicator import Communicator
from twotower.distributed.launch import Coordinator
from twotower.distributed.partition import RowShard
from twotower.errors import InputError
from twotower.index.approximate.code_store import BinaryStore, CodeStore, Int8Store
from twotower.index.approximate.hnsw import HNSW
from twotower.index.approximate.index import ApproximateIndex, Engine
from twotower.index.approximate.ivfpq import IVFPQ
from twotower.index.approximate.narrow import FETCH, NarrowEngine
from twotower.index.approximate.pgvector import PgVector
from twotower.index.catalog import Index, Mask, Vectors
from twotower.index.exact import ExactIndex
from twotower.index.prefix import Prefix
from twotower.index.ties import merge_best

#: Kind of an approximate index -> its engine.
ENGINES: dict[str, type[Any]] = {
    "hnsw": HNSW,
    "ivfpq": IVFPQ,
    "int8": Int8Store,
    "binary": BinaryStore,
    "pgvector": PgVector,
}
KINDS = ("exact", *ENGINES)

#: Number of queries searched at a time when recall is measured, and of items searched exactly at a time.
BLOCK, ITEMS = 256, 1 << 19


@dataclass(frozen=True)
class IndexReport:
    """The settings and the measured recall of an index.

    Attributes:
        kind: hnsw, ivfpq, int8, binary or pgvector.
        num_items: N, including removed items.
        settings: settings of the engine; `effort` is the final value.
        recall: share of the exact top K that the index finds, per named set of queries.
        k: K, number of results per query that recall is measured at.
        num_queries: number of queries in the largest set.
        build_seconds: build time, without measuring recall.
        bytes: size of the engine in memory or in the database, without the model's own embeddings.
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
    last: Tensor | None = None,
    folder: Path | None = None,
    team: Coordinator | None = None,
) -> tuple[ApproximateIndex, IndexReport]:
    """Build an approximate index and measure its recall on realistic queries.

    While recall is below the floor, the search effort is doubled, up to the maximum of the kind.

    With a folder, int8 and binary codes are written part by part and mapped, so that neither the codes nor a copy of
    the items has to fit into memory; several ranks divide the parts. Other kinds are built by rank 0 and read by the
    other ranks. To measure recall, each rank searches its part of the items exactly, and searches the index for its
    part of the queries.

    Args:
        kind: hnsw, ivfpq, int8, binary or pgvector.
        items: item embeddings, float [N, D]; may be memory-mapped.
        queries: sets of queries [E, D] by name; the floor applies to each set.
        k: K of the recall, at most N.
        min_recall: the floor, in (0, 1]; None for no floor.
        settings: settings of the engine, such as `effort`.
        prefix: shortens the vectors for the engine; None for the whole embeddings. A prefix adds the setting `fetch`
            (see `NarrowEngine`). Recall is always measured against the exact top K at the full width.
        last: float [N], one more coordinate of the items, which is not in `items`; None if there is none.
        folder: an existing folder for the files of the index, accessible to all ranks; None to keep the index in
            memory.
        team: the processes that build the index; requires a folder. None for a single process.

    Raises:
        InputError: the kind or a setting is unknown, the floor is out of range or not reached, or the kind needs a
            package or database that is missing.
    """
    if min_recall is not None and not 0.0 < min_recall <= 1.0:
        raise InputError(f"min_recall: expected a number above 0 and at most 1, found {min_recall}")
    if kind not in ENGINES:
        raise InputError(f"index: unknown kind {kind!r}; expected one of {', '.join(KINDS)}")
    team, given = team or Coordinator(Communicator()), dict(settings or {})
    fetch = FETCH if prefix is None else given.pop("fetch", FETCH)
    start, vectors = time.perf_counter(), Vectors(items, last=last)
    try:
        engine = _engine(kind, vectors, given, folder=folder, team=team, prefix=prefix)
    except TypeError as error:
        raise InputError(f"index: unknown setting for {kind} ({error})") from None
    if prefix is not None:
        engine = NarrowEngine(engine, prefix, fetch=fetch)
    seconds = time.perf_counter() - start
    index, ranks = ApproximateIndex(vectors, engine), team.ranks
    best = {name: exact_answers(vectors, chosen, k, ranks) for name, chosen in queries.items()}
    recall = {name: recall_of(index, chosen, best[name], ranks) for name, chosen in queries.items()}
    while min_recall is not None and min(recall.values()) < min_recall and engine.effort < engine.max_effort:
        engine.effort = min(2 * engine.effort, engine.max_effort)
        recall = {name: recall_of(index, chosen, best[name], ranks) for name, chosen in queries.items()}
    if min_recall is not None and min(recall.values()) < min_recall:
        worst = min(recall, key=lambda name: recall[name])
        build_settings = "raise links or build_effort, " if "links" in engine.settings() else ""
        raise InputError(
            f"index: {kind} finds {recall[worst]:.4f} of the exact top {min(k, len(items))} ({worst}) at its maximum "
            f"effort ({engine.effort}), below the floor {min_recall}, and is rejected. Lower --min-recall, "
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


def _engine(
    kind: str,
    vectors: Vectors,
    settings: dict[str, Any],
    *,
    folder: Path | None,
    team: Coordinator,
    prefix: Prefix | None,
) -> Engine:
    """Build an engine on the vectors or their prefix, in memory or, together with the other ranks, in a folder.

    Raises:
        TypeError: the engine has no such setting.
    """

    def rows(chosen: slice) -> NDArray[np.float32]:
        whole = vectors.rows(chosen)
        return np.ascontiguousarray((whole if prefix is None else prefix(whole)).numpy())

    made = ENGINES[kind]
    if folder is not None and issubclass(made, CodeStore):
        width = vectors.dim if prefix is None else vectors.dim - prefix.dimension + prefix.width
        codes, shape = made, (vectors.num_items, width)
        settings = team.all_at_once(lambda: codes.write(folder, rows, shape, team.ranks, **settings), "codes")
        loaded: Engine = codes.load(folder, settings)
        return loaded
    if not team.ranks.is_first:
        assert folder is not None
        read: Engine = made.load(folder, json.loads(team.broadcast_text("engine", "")))
        return read
    built: Engine = made(rows(slice(None)), **settings)
    if folder is not None:
        built.save(folder)
    team.broadcast_text("engine", json.dumps(built.settings()))
    return built


def load_index(
    report: Mapping[str, Any],
    items: Tensor,
    folder: Path,
    alive: Mask | None = None,
    *,
    last: Tensor | None = None,
    prefix: Prefix | None = None,
) -> ApproximateIndex:
    """Load an existing index.

    Args:
        report: `IndexReport.to_dict()`.
        items: the embeddings that the index was built on.
        folder: the folder where its engine was saved.
        alive: bool [N], False for removed items.
        last: float [N], the items' last coordinate if it is stored separately; see `Vectors`.
        prefix: shortens the vectors for the engine; None for the whole embeddings.

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


def exact_answers(vectors: Vectors, queries: Tensor, k: int, ranks: Communicator | None = None) -> Tensor:
    """Compute the exact top K of each query, int64 [E, min(K, N)]; the items are copied one block at a time.

    With several ranks, each searches its part of the items for all queries, which are the same on every rank.
    """
    ranks, k, queries = ranks or Communicator(), min(k, vectors.num_items), vectors.checked_queries(queries)
    scores = torch.full((len(queries), k), -torch.inf)
    items = torch.full((len(queries), k), -1, dtype=torch.int64)
    own = RowShard(ranks, vectors.num_items).own
    for start in range(own.start, own.stop, ITEMS):
        rows = slice(start, min(start + ITEMS, own.stop))
        found, places = ExactIndex(vectors.rows(rows), first=start).search(queries, k)
        block = torch.where(places >= 0, places + start, -1)
        scores, items = merge_best(torch.stack([scores, found]), torch.stack([items, block]))
    every = (ranks.gather(one[None]) for one in (scores, items))
    return merge_best(*every)[1]


def recall_of(index: Index, queries: Tensor, best: Tensor, ranks: Communicator | None = None) -> float:
    """Compute the recall of an index: the mean share of the exact top K, [E, K], that it returns.

    With several ranks, each searches for its part of the queries, which are the same on every rank.
    """
    ranks = ranks or Communicator()
    shares, own = [torch.empty(0, dtype=torch.float64)], ranks.part(len(queries))
    for start in range(own.start, own.stop, BLOCK):
        rows = slice(start, min(start + BLOCK, own.stop))
        _, items = index.search(queries[rows], best.shape[1])
        ascending, expected = items.sort(1).values, best[rows].contiguous()
        at = torch.searchsorted(ascending.contiguous(), expected).clamp(max=items.shape[1] - 1)
        shares.append((ascending.gather(1, at) == expected).double().mean(1))
    every = ranks.gather(torch.cat(shares), ranks.shares(len(queries)))
    return float(every.numpy().mean()) if len(every) else 0.0
