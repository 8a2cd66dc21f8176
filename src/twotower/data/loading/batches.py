"""Batches of training rows: an exact shuffle of all rows in each epoch, resumable in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.data.interactions import Interactions
from twotower.data.loading.histories import gather_histories
from twotower.data.loading.packing import Packed, Windows
from twotower.data.loading.shuffle import EpochPosition, Shuffle, ahead
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError

#: One array per feature, in the order of the declarations.
Encoded = list[NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Asked:
    """The questions of a batch: several rows, one for each target, share one query (questions.py).

    Attributes:
        queries: int64 [G], query code of each question.
        of: int64 [B], ascending, the question of each row.
        windows: how the questions were drawn.
    """

    queries: Tensor
    of: Tensor
    windows: Windows

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Asked:
        """Move to a device."""
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
        history: int64 [B, L], the query's items before this row, newest last, padded with -1 on the left.
        weights: float32 [B] or None.
        groups: int64 [B] or None.
        group: the group of all rows if batches are built within groups, else None.
        total: rows of the batch over all ranks; this rank has the rows `Communicator.part(total)`. None if unknown.
        sizes: rows of each rank, W numbers, if the parts differ from `Communicator.part`; else None.
        sequences: the packed sequences whose positions are the rows, if the batch consists of whole sequences
            (sequences.py); `history` is then [B, 0]. Else None.
        context: the encoded context of each row's request, one tensor with B rows per feature, or None.
        asked: the questions whose targets are the rows, if several rows share a query; `history` and `context` then
            have one row per question. Else None.
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

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def windows(self) -> Windows | None:
        """How the whole sequences or questions that the rows belong to were drawn; None for a draw of single rows."""
        if self.asked is not None:
            return self.asked.windows
        return None if self.sequences is None else self.sequences.windows

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Move the batch to a device."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor | Packed | Asked)
        }
        if self.context is not None:
            moved["context"] = tuple(one.to(device, non_blocking=non_blocking) for one in self.context)
        return replace(self, **moved)


class TrainingBatches(EpochPosition):
    """All rows of the interactions once per epoch, in an order determined by seed and epoch.

    Iterating yields the rest of the current epoch and then advances to the next one. The order is computed, not stored,
    so 100 million rows need no permutation in memory, and it does not use the global random state. A background thread
    prepares a few batches ahead; the state counts only the batches already yielded.

    Args:
        interactions: the rows to train on.
        batch_size: B.
        history_length: L, 0 for none.
        seed: 0 or more.
        drop_last: leave out the last, smaller batch. With fewer rows than `batch_size` there is still one batch.
        rows: int64 [n], the row numbers to train on, ascending; None: all.
        ranks: this rank gets its part of every batch; `batch_size` is the total over all ranks.
        context: encoded context of all rows of the interactions (`encode_context`), or None.

    Raises:
        InputError: no rows, or a size or seed out of range.
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
        context: Encoded | None = None,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("history_length", history_length, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise InputError(f"{name}: {value}; expected at least {least}.")
        self.rows, self.context = rows, context
        self.num_rows = len(interactions) if rows is None else len(rows)
        if not self.num_rows:
            raise InputError("training batches: no interactions to train on.")
        self.interactions, self.history_length, self.seed = interactions, history_length, seed
        self.batch_size, self.drop_last = min(batch_size, self.num_rows), drop_last
        self.ranks = ranks or Communicator()
        self.epoch, self.position = 0, 0

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        n = self.num_rows
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def _fixed(self) -> dict[str, int]:
        return {"batch_size": self.batch_size, "rows": self.num_rows}

    def __iter__(self) -> Iterator[Batch]:
        order = Shuffle(self.num_rows, self.seed, self.epoch)

        def shuffle(places: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
            return order(places) if self.rows is None else self.rows[order(places)]

        def make(position: int) -> Batch:
            start = position * self.batch_size
            stop = min(start + self.batch_size, self.num_rows)
            return self.part(shuffle(np.arange(start, stop)))

        for batch in ahead(make, self.position, len(self)):
            # Counts batches that were yielded, not those made ahead. Advanced before the yield, so that a state saved
            # while a batch is in use already includes it.
            self.position += 1
            yield batch
        self.epoch, self.position = self.epoch + 1, 0

    def part(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Batch:
        """Make this rank's part of the batch with these row numbers."""
        return replace(self.batch(rows[self.ranks.part(len(rows))]), total=len(rows))

    def batch(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Batch:
        """Make the batch with these row numbers, int64 [B]."""
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
        )


def context_rows(context: Encoded | None, rows: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Tensor, ...] | None:
    """Select rows of an encoded context, as tensors."""
    return None if context is None else tuple(torch.from_numpy(one[rows]) for one in context)


class GroupedBatches:
    """Batches whose rows all come from one group (market, kind of session), in an order determined by seed and epoch.

    Each group yields as many full batches as it has rows for, and the batches of all groups are shuffled together. Such
    a batch is not a random draw from all rows, so the objective needs the item frequency within the group.

    Args:
        batches: provides seed, batch size and history length; its interactions must have groups.

    Raises:
        InputError: no group column, or no group has enough rows for one batch.
    """

    def __init__(self, batches: TrainingBatches) -> None:
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
        self._group_of_batch = np.repeat(np.arange(len(self._sizes)), self._sizes // batches.batch_size)
        if not len(self._group_of_batch):
            raise InputError(
                f"training batches: no group has {batches.batch_size} rows; choose a smaller training.batch_size."
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
        size = inner.batch_size
        order = Shuffle(len(self), inner.seed, inner.epoch)
        # Groups differ in size, so each needs its own shuffle.
        within = [Shuffle(max(int(n), 1), inner.seed + 1 + g, inner.epoch) for g, n in enumerate(self._sizes)]
        first = np.searchsorted(self._group_of_batch, np.arange(len(self._sizes)))

        def make(position: int) -> Batch:
            number = int(order(np.array([position]))[0])
            group = int(self._group_of_batch[number])
            start = (number - int(first[group])) * size
            rows = self._rows[self._starts[group] + within[group](np.arange(start, start + size))]
            return replace(inner.part(rows), group=group)

        for batch in ahead(make, inner.position, len(self)):
            inner.position += 1
            yield batch
        inner.epoch, inner.position = inner.epoch + 1, 0
