"""A two-tower model as a ranker: the same path from queries to items for validation, evaluation and serving."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from twotower.data import Holdout, ragged_histories
from twotower.data.loading.batches import Encoded
from twotower.data.loading.event_codes import event_codes
from twotower.data.loading.gaps import gap_codes
from twotower.errors import InputError
from twotower.features.feature_set import FeatureSet
from twotower.features.requests import ContextRows, EncodedContext, encode_context_rows
from twotower.index import ExactIndex
from twotower.towers import TwoTower

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


#: Seconds before the bar appears.
PATIENCE = 3.0


class SlowProgress:
    """A progress bar on standard error that appears only if the work takes long, and only on a terminal.

    Args:
        title: description of the work.
        patience: seconds before the bar appears.

    Example:
        >>> from twotower.ranking.tower_ranker import SlowProgress
        >>> with SlowProgress("ranking") as progress:
        ...     for done in range(1, 4):
        ...         progress(done, 3)
    """

    def __init__(self, title: str, patience: float = PATIENCE) -> None:
        self._title, self._from = title, time.monotonic() + patience
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> SlowProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Report that `done` of `total` steps are done."""
        if self._bar is None:
            if time.monotonic() < self._from or not sys.stderr.isatty():
                return
            # Standard output is for results.
            from rich.console import Console  # noqa: PLC0415  # needed only for slow work
            from rich.progress import Progress  # noqa: PLC0415

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self._title, total=total)
            self._bar.start()
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=total)


#: Number of queries embedded at a time; bounds the memory of gathered histories.
BLOCK = 4096


class TowerRanker:
    """A ranker of the whole catalog by <u(x), v(j)>.

    Args:
        towers: the model; it is switched to evaluation mode while it ranks.
        history_length: L, the number of recent items that the query tower reads; 0 for a tower without a history.
        item_embeddings: [N, D] if already computed; None computes them.
        progress: show a progress bar if embedding the items or ranking a holdout takes long.
    """

    def __init__(
        self,
        towers: TwoTower,
        history_length: int,
        item_embeddings: Tensor | None = None,
        *,
        progress: bool = False,
    ) -> None:
        self.progress = progress
        self.towers = towers
        self.history_length = history_length
        self.item_embeddings = self._items() if item_embeddings is None else item_embeddings

    @property
    def directions(self) -> Tensor:
        """The first D coordinates of the item embeddings (`TwoTower.width`), [N, D]."""
        return self.item_embeddings[:, : self.towers.item_tower.dimension]

    @cached_property
    def index(self) -> ExactIndex:
        """Exact search over the items, built on first use, because a served model may use a different index."""
        return ExactIndex(self.item_embeddings)

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool) -> np.ndarray:
        """Return the best items of every query of a holdout, int64 [E, k], -1 if fewer are left."""
        histories = (holdout.history_offsets, holdout.history_items)
        queries, exclude = self.embed_holdout(holdout), histories if exclude_seen else None
        with SlowProgress("ranking") as bar:
            _, items = self.index.search(
                queries, k, exclude, eligible=holdout.eligible, progress=bar if self.progress else None
            )
        return items.cpu().numpy()

    def embed_holdout(self, holdout: Holdout) -> Tensor:
        """Embed every query of a holdout, u(x), float32 [E, D]."""
        histories = (holdout.history_offsets, holdout.history_items)
        marks = holdout_marks(holdout, self.towers)
        return self.embed(holdout.queries, histories, context=holdout.context, marks=marks)

    @torch.no_grad()
    def embed(
        self,
        queries: np.ndarray,
        histories: tuple[np.ndarray, np.ndarray],
        features: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        context: ContextRows | EncodedContext | None = None,
        marks: np.ndarray | None = None,
    ) -> Tensor:
        """Embed queries, u(x), float32 [E, D].

        Args:
            queries: codes, int64 [E]; -1 for a query never seen in training.
            histories: compressed rows (offsets int64 [E+1], item codes), oldest first.
            features: values of the declared feature columns for each query; None to use a query's features from
                training.
            context: the context of each query's request: a frame, a mapping or None per query, or encoded contexts. A
                tower without context ignores a frame, because a holdout has a frame whenever the data has additional
                columns.
            marks: int8, for each item of the histories the code of the gap before it (data/loading/gaps.py) or its
                event type, whichever the tower reads (`TwoTower.history_marks`); None if unknown.

        Raises:
            InputError: features or contexts are given but the query tower has no such input, a value has the wrong
                type, or a declared feature is missing.
        """
        offsets, items = histories
        inputs = getattr(self.towers.query_tower, "features", None)
        if features is not None and inputs is None:
            raise InputError(
                "features: the query tower of this model has no features; set query_tower.features and retrain"
            )
        requests = self.encoded_context(context, len(queries))
        reads = self.towers.history_marks
        device = self.towers.log_temperature.device
        was_training = self.towers.training
        self.towers.eval()
        parts = []
        for start in range(0, len(queries), BLOCK):
            rows = np.arange(start, min(start + BLOCK, len(queries)))
            codes = torch.from_numpy(np.asarray(queries[rows], dtype=np.int64)).to(device)
            history = None
            if self.history_length:
                recent = ragged_histories(offsets, items, rows, self.history_length)
                history = torch.from_numpy(recent).to(device)
            given = None
            if features is not None and inputs is not None:
                given = inputs.encode_some(codes, [features[row] for row in rows.tolist()])
            read: dict[str, Tensor] = {}
            if marks is not None and reads is not None and self.history_length:
                newest = ragged_histories(offsets, marks, rows, self.history_length)
                read = {reads: torch.from_numpy(np.maximum(newest, 0) if reads == "gaps" else newest).to(device)}
            encoded = None if requests is None else [torch.from_numpy(one[rows]).to(device) for one in requests]
            parts.append(self.towers.embed_queries(codes, history, given, encoded, **read).float())
        self.towers.train(was_training)
        return torch.cat(parts) if parts else torch.empty(0, self.item_embeddings.shape[1], device=device)

    def context_features(self) -> FeatureSet:
        """Return the encoder of request contexts.

        Raises:
            InputError: the query tower has no context.
        """
        features = self.towers.context_features
        if features is None:
            raise InputError("context: this model does not use a request context; set query_tower.context and retrain")
        return features

    def encoded_context(self, given: ContextRows | EncodedContext | None, rows: int) -> Encoded | None:
        """Encode the context of some requests for the tower; see `embed`."""
        if given is None or (self.towers.context_features is None and isinstance(given, pl.DataFrame)):
            return None
        features = self.context_features()
        if len(given) != rows:
            raise InputError(f"context: expected one row for each query, {rows}; found {len(given)}")
        return given.arrays if isinstance(given, EncodedContext) else encode_context_rows(features, given)

    def _items(self) -> Tensor:
        was_training = self.towers.training
        self.towers.eval()
        with SlowProgress("embedding the items") as bar:
            embeddings = self.towers.item_embeddings(bar if self.progress else None)
        self.towers.train(was_training)
        return embeddings


def holdout_marks(holdout: Holdout, towers: TwoTower) -> np.ndarray | None:
    """Compute the `marks` of the histories of a holdout (`TowerRanker.embed`); None if it or the towers have none."""
    if towers.history_marks == "events":
        return event_codes(holdout.history_events, towers.event_types)
    times = holdout.history_timestamps
    return None if times is None or towers.history_marks is None else gap_codes(holdout.history_offsets, times)
