"""Batches of whole sequences: every position is a training row, and one pass over a sequence covers all positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from twotower.data.interactions import Interactions
from twotower.data.loading.batches import Batch, EncodedRows, context_rows, mean_weight, row_times
from twotower.data.loading.gaps import gap_codes
from twotower.data.loading.packing import ItemUnits, Windows, length_groups, pack
from twotower.data.loading.shuffle import EpochPosition, Shuffle, require_at_least
from twotower.data.loading.slates import Slates
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError
from twotower.hashing import mix64


class SequenceBatches(EpochPosition):
    """Batches of windows of the queries' sequences; each interaction is in one window per epoch.

    A query with n rows is cut into ceil(n / (L + 1)) windows of at most L + 1 consecutive rows, so that the last row of
    a full window sees L items. If there are several windows, only the first and the last can be shorter than L + 1: a
    cut that depends on seed, epoch and query divides the remainder between them, so the windows differ from epoch to
    epoch. A row sees only the earlier rows of its window.

    Every batch has the same number of windows, drawn without replacement, so a candidate from a different window has a
    known expected count. The number of rows varies.

    Args:
        interactions: the rows to train on.
        batch_size: B, average number of rows in a batch.
        history_length: L.
        seed: 0 or more.
        context: the encoded context of all interactions (`encode_context`), or None.
        gaps: whether to read the time between items.
        ranks: the processes; each gets whole windows of every batch, with about equal numbers of rows. `batch_size` is
            the total over all ranks.
        slates: the slates of all interactions, or None.

    Raises:
        InputError: there are no rows, all weights are 0, a size or seed is out of range, or there are no timestamps for
            `gaps`.
    """

    def __init__(
        self,
        interactions: Interactions,
        batch_size: int,
        *,
        history_length: int,
        seed: int = 0,
        context: EncodedRows | None = None,
        gaps: bool = False,
        ranks: Communicator | None = None,
        slates: Slates | None = None,
    ) -> None:
        require_at_least(batch_size=(batch_size, 1), history_length=(history_length, 1), seed=(seed, 0))
        if not len(interactions):
            raise InputError("training batches: no interactions to train on.")
        self.interactions, self.history_length, self.seed = interactions, history_length, seed
        self.batch_size, self.context, self.ranks = batch_size, context, ranks or Communicator()
        self.slates = slates
        if gaps and interactions.timestamps is None:
            raise InputError(
                "query_tower.history.sequence.gaps: the data has no timestamps; name the column with "
                "data.columns.timestamp, or remove this setting"
            )
        times = interactions.timestamps if gaps else None
        self.mean_weight = mean_weight(interactions.weights)
        self._gaps = None if times is None else gap_codes(interactions.offsets, times)
        sizes = np.diff(interactions.offsets)
        self._windows = -(-sizes // (history_length + 1))
        self.num_windows = int(self._windows.sum())
        mean = len(interactions) / self.num_windows
        self.windows_per_batch = min(max(round(batch_size / mean), 1), self.num_windows)
        # The number of each query's first window.
        self._first = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self._windows)])
        self.epoch, self.position = 0, 0

    def __len__(self) -> int:
        """Return the number of batches in an epoch; remaining windows that do not fill a batch are omitted."""
        return self.num_windows // self.windows_per_batch

    def _fixed(self) -> dict[str, int]:
        return {
            "windows_per_batch": self.windows_per_batch,
            "history_length": self.history_length,
            "rows": len(self.interactions),
        }

    def __iter__(self) -> Iterator[Batch]:
        shuffle, epoch = Shuffle(self.num_windows, self.seed, self.epoch), self.epoch
        size = self.windows_per_batch
        holding = ItemUnits(partial(self.item_windows, epoch))

        def make(position: int) -> Batch:
            return self.batch(shuffle(np.arange(position * size, (position + 1) * size)), epoch, holding)

        yield from self.rest(make, len(self))

    def windows(self, numbers: NDArray[np.int64], epoch: int) -> tuple[NDArray[np.int64], ...]:
        """Compute (query, first row, number of rows) of windows in an epoch, int64 [S] each."""
        queries = np.searchsorted(self._first, numbers, side="right") - 1
        place = numbers - self._first[queries]
        count = self._windows[queries]
        start = np.asarray(self.interactions.offsets)[queries]
        total = np.asarray(self.interactions.offsets)[queries + 1] - start
        full = self.history_length + 1
        least = total - (count - 1) * full  # rows of the first window if all other windows are full
        first = least + self._cut(queries, epoch) % (full - least + 1) * (count > 1)
        begin = np.where(place == 0, 0, first + (place - 1) * full)
        end = np.minimum(np.where(place == 0, first, begin + full), total)
        return queries, start + begin, end - begin

    @cached_property
    def repeats(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows that repeat an item of their query, and the latest earlier row with the item, int64 [P] each."""
        data, count = self.interactions, np.diff(self.interactions.offsets)
        key = np.repeat(np.arange(len(count), dtype=np.int64), count) * data.num_items + data.item_codes
        order = np.argsort(key, kind="stable")
        again = np.flatnonzero(key[order[1:]] == key[order[:-1]])
        return order[again + 1], order[again]

    def batch(self, numbers: NDArray[np.int64], epoch: int = 0, holding: ItemUnits | None = None) -> Batch:
        """Build this rank's part of the batch with these windows, int64 [S]; rows are in the order of `sequences.rows`.

        The windows are ordered as a single process would pack them, and each rank takes a contiguous run, so the
        concatenated rows of all ranks are the rows that a single process would have. `holding` counts the windows of
        the epoch that contain an item; None to create it here.
        """
        data = self.interactions
        queries, starts, lengths = self.windows(numbers, epoch)
        groups = length_groups(lengths)
        order = np.concatenate(groups)
        own, sizes = shares_of(lengths[order], self.ranks)
        chosen, edges = order[own], np.cumsum([0, *(len(group) for group in groups)])
        mine = [np.arange(max(own.start, low), min(own.stop, high)) - own.start for low, high in pairwise(edges)]
        packed, _, rows = pack(
            starts[chosen],
            lengths[chosen],
            data.item_codes,
            last_only=False,
            gaps=self._gaps,
            groups=[group for group in mine if len(group)],
        )
        return Batch(
            rows=torch.from_numpy(rows),
            queries=torch.from_numpy(np.repeat(queries[chosen], lengths[chosen])),
            items=torch.from_numpy(np.asarray(data.item_codes)[rows].astype(np.int64)),
            history=torch.empty(len(rows), 0, dtype=torch.int64),
            weights=None if data.weights is None else torch.from_numpy(np.array(data.weights[rows])),
            groups=None if data.groups is None else torch.from_numpy(data.groups[rows].astype(np.int64)),
            total=sum(sizes),
            sizes=sizes,
            context=context_rows(self.context, rows),
            epoch=epoch,
            mean_weight=self.mean_weight,
            passed_over=None if self.slates is None else self.slates.of(rows),
            times=row_times(data, rows),
            sequences=replace(
                packed,
                windows=Windows(
                    len(numbers),
                    self.num_windows,
                    len(data),
                    holding or ItemUnits(partial(self.item_windows, epoch)),
                ),
            ),
        )

    def item_windows(self, epoch: int) -> NDArray[np.float64]:
        """Count the windows w_j that contain item j in an epoch, [N].

        A row that repeats an item of its query counts unless the earlier row is in the same window:

            w_j = c_j - #{rows of item j whose latest earlier row of the same query and item is in the same window}
        """
        data, (later, earlier) = self.interactions, self.repeats
        counts = np.bincount(data.item_codes, minlength=data.num_items).astype(np.float64)
        if len(later):
            starts = self.windows(np.arange(self.num_windows), epoch)[1]
            own = starts[np.searchsorted(starts, later, side="right") - 1]
            counts -= np.bincount(data.item_codes[later[earlier >= own]], minlength=data.num_items)
        return counts

    def _cut(self, queries: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Compute a nonnegative pseudo-random number for each query, with splitmix64 keyed by seed and epoch."""
        key = np.random.SeedSequence([self.seed, epoch, 1]).generate_state(1, np.uint64)[0]
        return (mix64(queries.astype(np.uint64) + key) >> np.uint64(1)).astype(np.int64)


def shares_of(lengths: NDArray[np.int64], ranks: Communicator) -> tuple[slice, tuple[int, ...]]:
    """Divide whole sequences of rows among the ranks; the middle row of a sequence determines its rank.

    Args:
        lengths: number of rows of each sequence, int64 [S].
        ranks: the processes.

    Returns:
        The sequences of this rank, and the number of rows of every rank.
    """
    size, ends = ranks.size, np.cumsum(lengths)
    middle = ends - lengths / 2
    rank = np.minimum((middle * size / ends[-1]).astype(np.int64), size - 1)
    first = np.searchsorted(rank, np.arange(size + 1))
    before = np.concatenate([[0], ends])[first]
    own = slice(int(first[ranks.rank]), int(first[ranks.rank + 1]))
    return own, tuple(int(rows) for rows in np.diff(before))
