"""Batches of training rows: an exact shuffle of all rows in each epoch, which can be resumed mid-epoch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.data.interactions import Interactions
from twotower.data.loading.histories import gather_histories
from twotower.data.loading.packing import Packed, Windows
from twotower.data.loading.passed_over import PassedOver
from twotower.data.loading.shuffle import EpochPosition, Shuffle, require_at_least
from twotower.data.loading.slates import Slates
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError

logger = logging.getLogger("twotower")

#: One array per feature, in the order of the declarations.
Encoded = list[NDArray[Any]]


@dataclass(frozen=True)
class RepeatedRows:
    """Encoded rows with many duplicates, such as long text embeddings: each distinct row is stored once.

    Attributes:
        values: the distinct rows, [U, ...].
        codes: int32 [n], the position of each row in `values`.
    """

    values: NDArray[Any]
    codes: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Gather rows, as from an array [n, ...]."""
        found: NDArray[Any] = self.values[self.codes[rows]]
        return found


#: The encoded context of all rows, one entry per feature.
EncodedRows = Sequence[NDArray[Any] | RepeatedRows]


@dataclass(frozen=True, eq=False)
class Asked:
    """The questions of a batch: several rows, one for each target, share one query (questions.py).

    Attributes:
        queries: int64 [G], the query code of each question.
        of: int64 [B], ascending, the question of each row.
        windows: how the questions were drawn.
    """

    queries: Tensor
    of: Tensor
    windows: Windows

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Asked:
        """Move the tensors to a device."""
        return Asked(
            self.queries.to(device, non_blocking=non_blocking),
            self.of.to(device, non_blocking=non_blocking),
            self.windows,
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of training rows.

    Attributes:
        rows: int64 [B], row numbers in the training interactions.
        queries: int64 [B], query codes.
        items: int64 [B], codes of the positives.
        history: int64 [B, L], the query's items before each row, newest last, padded with -1 on the left.
        weights: float32 [B], the weight of each row in the loss; None for equal weights.
        mean_weight: the mean weight of all training rows; the loss divides the weights by it.
        groups: int64 [B], the group code of each row; None if the data has no groups.
        group: the group of all rows if batches are built within groups; otherwise None.
        total: number of rows of all ranks; this rank has the rows `Communicator.part(total)`. None if unknown.
        sizes: number of rows of each of the W ranks, if it differs from `Communicator.part`; otherwise None.
        sequences: the packed sequences whose positions are the rows, if the batch consists of whole sequences
            (sequences.py); `history` is then [B, 0]. Otherwise None.
        context: the encoded context of each row's request, one tensor of B rows per feature; or None.
        asked: the questions whose targets are the rows, if several rows share a query; `history` and `context` then
            have one row per question. Otherwise None.
        epoch: the epoch to which the batch belongs; None for a single batch made outside an epoch.
        passed_over: the slate of each row (`Slates`); None without feedback.
        times: int64 [B], the time of each row in microseconds since 1970, if items are eligible for a limited time;
            otherwise None.
        history_events: int64 [B, L], the event type of each item of `history`, -1 where empty or unknown; None if the
            towers do not read event types.
    """

    rows: Tensor
    queries: Tensor
    items: Tensor
    history: Tensor
    weights: Tensor | None = None
    groups: Tensor | None = None
    group: int | None = None
    total: int | None = None
    sizes: tuple[int, ...] | None = None
    sequences: Packed | None = None
    context: tuple[Tensor, ...] | None = None
    asked: Asked | None = None
    epoch: int | None = None
    mean_weight: float = 1.0
    passed_over: PassedOver | None = None
    times: Tensor | None = None
    history_events: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def windows(self) -> Windows | None:
        """How the whole sequences or questions of this batch were drawn; None if single rows were drawn."""
        if self.asked is not None:
            return self.asked.windows
        return None if self.sequences is None else self.sequences.windows

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Move the batch to a device."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor | Packed | Asked | PassedOver)
        }
        if self.context is not None:
            moved["context"] = tuple(one.to(device, non_blocking=non_blocking) for one in self.context)
        return replace(self, **moved)


class TrainingBatches(EpochPosition):
    """Batches of all interactions, once per epoch, in an order determined by seed and epoch.

    Iterating yields the rest of the current epoch, then advances to the next epoch. The order is computed, not stored,
    so 100 million rows need no permutation in memory; the global random state is not used. A background thread
    prepares a few batches ahead; the saved state counts only the batches already yielded.

    Args:
        interactions: the rows to train on.
        batch_size: B.
        history_length: L, 0 for no history.
        seed: 0 or more.
        drop_last: whether to omit the last, smaller batch. With fewer rows than `batch_size` there is still one batch.
        rows: int64 [n], the row numbers to train on, ascending; None for all rows.
        ranks: the processes; each gets its own part of every batch. `batch_size` is the total over all ranks.
        context: the encoded context of all interactions (`encode_context`), or None.
        slates: the slates of all interactions, or None.
        events: codes of the event types of all interactions, int8 [n] (event_codes.py), if the towers read the event
            types of the history; otherwise None.

    Raises:
        InputError: there are no rows, all weights are 0, or a size or seed is out of range.
    """

    def __init__(
        self,
        interactions: Interactions,
        batch_size: int,
        *,
        history_length: int = 0,
        seed: int = 0,
        drop_last: bool = True,
        rows: np.ndarray[Any, np.dtype[np.int64]] | None = None,
        ranks: Communicator | None = None,
        context: EncodedRows | None = None,
        slates: Slates | None = None,
        events: NDArray[np.int8] | None = None,
    ) -> None:
        require_at_least(batch_size=(batch_size, 1), history_length=(history_length, 0), seed=(seed, 0))
        self.rows, self.context, self.slates, self.events = rows, context, slates, events
        self.num_rows = len(interactions) if rows is None else len(rows)
        if not self.num_rows:
            raise InputError("training batches: no interactions to train on.")
        self.interactions, self.history_length, self.seed = interactions, history_length, seed
        self.batch_size, self.drop_last = min(batch_size, self.num_rows), drop_last
        self.ranks = ranks or Communicator()
        self.mean_weight = mean_weight(interactions.weights, rows)
        self.epoch, self.position = 0, 0

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        n = self.num_rows
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def _fixed(self) -> dict[str, int]:
        return {"batch_size": self.batch_size, "rows": self.num_rows}

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch
        order = Shuffle(self.num_rows, self.seed, epoch)

        def shuffle(places: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
            return order(places) if self.rows is None else self.rows[order(places)]

        def make(position: int) -> Batch:
            start = position * self.batch_size
            stop = min(start + self.batch_size, self.num_rows)
            return replace(self.part(shuffle(np.arange(start, stop))), epoch=epoch)

        yield from self.rest(make, len(self))

    def part(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Batch:
        """Build this rank's part of the batch with these row numbers."""
        return replace(self.batch(rows[self.ranks.part(len(rows))]), total=len(rows))

    def batch(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Batch:
        """Build the batch with these row numbers, int64 [B]."""
        data = self.interactions
        queries = np.searchsorted(data.offsets, rows, side="right") - 1
        history = gather_histories(data.offsets, data.item_codes, queries, rows, self.history_length)
        return Batch(
            rows=torch.from_numpy(rows),
            queries=torch.from_numpy(queries),
            items=torch.from_numpy(data.item_codes[rows].astype(np.int64)),
            history=torch.from_numpy(history),
            weights=None if data.weights is None else torch.from_numpy(np.array(data.weights[rows])),
            groups=None if data.groups is None else torch.from_numpy(data.groups[rows].astype(np.int64)),
            context=context_rows(self.context, rows),
            mean_weight=self.mean_weight,
            passed_over=None if self.slates is None else self.slates.of(rows),
            times=row_times(data, rows),
            history_events=None
            if self.events is None
            else torch.from_numpy(gather_histories(data.offsets, self.events, queries, rows, self.history_length)),
        )


def mean_weight(weights: NDArray[Any] | Tensor | None, rows: NDArray[np.int64] | None = None) -> float:
    """Return the mean weight of the training rows; 1 if there are no weights.

    Raises:
        InputError: all weights are 0.
    """
    if weights is None:
        return 1.0
    mean = float(np.mean(np.asarray(weights if rows is None else weights[rows]), dtype=np.float64))
    if not mean > 0:
        raise InputError(
            "training batches: the weights of all training rows are 0, so there is nothing to learn; expected some "
            "weights above 0 in the column data.columns.weight."
        )
    return mean


def context_rows(context: EncodedRows | None, rows: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Tensor, ...] | None:
    """Select rows of an encoded context, as tensors."""
    return None if context is None else tuple(torch.from_numpy(one[rows]) for one in context)


def row_times(data: Interactions, rows: NDArray[np.int64]) -> Tensor | None:
    """Return the times of rows, int64 [B], if the items of the data are eligible for a limited time; otherwise None."""
    if data.eligibility is None or data.eligibility.start is None or data.timestamps is None:
        return None
    return torch.from_numpy(np.asarray(data.timestamps[rows], dtype=np.int64))


class GroupedBatches:
    """Batches whose rows all come from one group, such as a market, in an order determined by seed and epoch.

    Each group yields as many full batches as it has rows for; a group with fewer rows than a batch yields one batch of
    all its rows. The batches of all groups are shuffled together. A batch from one group is not a random draw from all
    rows, so the objective needs the item frequency within the group.

    Args:
        batches: the ungrouped batches, from which everything but the order is taken; they must have groups.
        in_batch_alone: whether the other rows of the batch are the only candidates. A row that is alone in its group
            then has no candidates, and its gradient is 0; such rows are omitted, with a warning.

    Attributes:
        left_out: number of rows omitted because they are alone in their group.

    Raises:
        InputError: there is no group column, or every row is alone in its group and would be omitted.
    """

    def __init__(self, batches: TrainingBatches, *, in_batch_alone: bool = False) -> None:
        groups = batches.interactions.groups
        if groups is None:
            raise InputError(
                "training batches: batches within groups need a group column; name it in data.columns.group."
            )
        self.batches = batches
        codes = np.asarray(groups if batches.rows is None else groups[batches.rows], dtype=np.int64)
        self._rows = np.argsort(codes, kind="stable")
        if batches.rows is not None:
            self._rows = batches.rows[self._rows]
        self._sizes = np.bincount(codes)
        self._starts = np.cumsum(self._sizes) - self._sizes
        number = np.maximum(self._sizes // batches.batch_size, self._sizes > in_batch_alone)
        self._group_of_batch = np.repeat(np.arange(len(self._sizes)), number)
        self.left_out = int((self._sizes == 1).sum()) if in_batch_alone else 0
        if not len(self._group_of_batch):
            raise InputError(
                "training batches: every row is alone in its group, so no batch has two rows; name another column in "
                "data.columns.group, or set objective.frequency to counted."
            )
        if self.left_out:
            logger.warning(
                "%d rows are not used for training: each is the only row of its group, so in_batch alone gives it no "
                "candidates; add a source such as uniform",
                self.left_out,
            )

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self._group_of_batch)

    def set_epoch(self, epoch: int) -> None:
        """See `TrainingBatches.set_epoch`."""
        self.batches.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """See `TrainingBatches.state_dict`."""
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """See `TrainingBatches.load_state_dict`."""
        self.batches.load_state_dict(state)

    def __iter__(self) -> Iterator[Batch]:
        inner = self.batches
        size, epoch = inner.batch_size, inner.epoch
        order = Shuffle(len(self), inner.seed, inner.epoch)
        # Groups differ in size, so each needs its own shuffle.
        within = [Shuffle(max(int(n), 1), inner.seed + 1 + g, inner.epoch) for g, n in enumerate(self._sizes)]
        first = np.searchsorted(self._group_of_batch, np.arange(len(self._sizes)))

        def make(position: int) -> Batch:
            number = int(order(np.array([position]))[0])
            group = int(self._group_of_batch[number])
            start = (number - int(first[group])) * size
            stop = min(start + size, int(self._sizes[group]))
            rows = self._rows[self._starts[group] + within[group](np.arange(start, stop))]
            return replace(inner.part(rows), group=group, epoch=epoch)

        yield from inner.rest(make, len(self))
