"""The mask of candidates that are not negatives of a row, and the duplicate and membership tests behind it.

`NegativeMask` stores pairs and makes the [B, M] matrix on request. Shapes do not depend on the data, so that an
accelerator never waits for a size: a removed duplicate leaves an empty slot, marked -1. Only `compact` drops empty
slots, and only on the CPU, where that saves work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Protocol, Self

import torch
from torch import Tensor

from twotower.errors import InputError


class RowRule(Protocol):
    """A rule that masks items, one per column, in each row of a batch.

    `EligibleRows` (data/eligibility.py) and `GuardedRows` (guard.py) are rules.
    """

    def blocked(self, rows: slice) -> Tensor:
        """Return the mask of some rows over all columns, bool [rows, M]; no shape depends on the data."""
        ...

    def blocked_of_rows(self, items: Tensor) -> Tensor:
        """Return the mask of each row's own items, given as columns [B, R]; columns below 0 are not masked."""
        ...

    def select(self, columns: Tensor) -> Self:
        """Return the rule for the same rows and some of the columns, given by number, int64 [M']."""
        ...

    def of_rows(self, rows: slice | Tensor) -> Self:
        """Return the rule for some of the rows and the same columns."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Return a copy on another device."""
        ...


def empty_duplicates(items: Tensor) -> Tensor:
    """Sort codes and replace every copy but the first with -1; int64 [m]."""
    ordered = torch.sort(items).values
    later = torch.zeros_like(ordered, dtype=torch.bool)
    later[1:] = ordered[1:] == ordered[:-1]
    return ordered.masked_fill(later, -1)


def row_duplicates(items: Tensor) -> Tensor:
    """Apply `empty_duplicates` within each row, [B, R]."""
    ordered = torch.sort(items, 1).values
    later = torch.zeros_like(ordered, dtype=torch.bool)
    later[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ordered.masked_fill(later, -1)


def compact(items: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return items, a mask of their empty slots, and their sources; on the CPU the empty slots are dropped.

    On an accelerator an empty slot gets a valid code (0), since its embedding is looked up before it is masked.
    """
    empty = items < 0
    if items.device.type == "cpu":
        live = ~empty
        return items[live], empty[live], source[live]
    return items.clamp(min=0), empty, source


def membership(items: Tensor, row: Tensor, item: Tensor, *, rows: int) -> Tensor:
    """Test which candidates belong to each row's set, by binary search.

    Args:
        items: candidates, int64 [M], in any order, duplicates allowed.
        row: row of each member, int64 [P].
        item: item code of each member, int64 [P]; -1 marks an empty slot.
        rows: number of rows, B.

    Returns:
        bool [B, M].
    """
    keys = torch.sort(items).values
    place = torch.searchsorted(keys, item).clamp_(max=max(len(keys) - 1, 0))
    # Mark the first copy of each key. Members that are not candidates go to an extra column, which is dropped, so that
    # no shape depends on the data.
    marks = torch.zeros(rows, len(keys) + 1, dtype=torch.bool, device=items.device)
    if len(keys) and len(item):
        marks[row, torch.where(keys[place] == item, place, len(keys))] = True
    return marks[:, torch.searchsorted(keys, items)]


def membership_of_rows(items: Tensor, members: Tensor) -> Tensor:
    """Test whether items [B, R] are among the members [B, S] of their row; bool [B, R], False for empty slots (-1)."""
    if members.shape[1] == 0:
        return torch.zeros_like(items, dtype=torch.bool)
    ordered = torch.sort(members, 1).values
    place = torch.searchsorted(ordered, items).clamp_(max=members.shape[1] - 1)
    return (ordered.gather(1, place) == items) & (items >= 0)


def known_in_rows(items: Tensor, row: Tensor, item: Tensor) -> Tensor:
    """Test whether items [B, R] are among the pairs (row [P], item [P]) of their row; bool [B, R]."""
    if len(item) == 0 or items.numel() == 0:
        return torch.zeros_like(items, dtype=torch.bool)
    width = torch.maximum(items.max(), item.max()) + 2
    keys = torch.sort(row * width + item).values
    queried = torch.arange(len(items), device=items.device)[:, None] * width + items
    place = torch.searchsorted(keys, queried).clamp_(max=len(keys) - 1)
    return (keys[place] == queried) & (items >= 0)


def as_pairs(known: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Convert [B, H], padded with -1, to pairs (row [P], item [P]); pairs are returned unchanged."""
    if isinstance(known, tuple):
        return known
    row = torch.arange(len(known), device=known.device)[:, None].expand_as(known)
    return row.reshape(-1), known.reshape(-1)


#: Pairs (row [P], item [P]), int64: every candidate with this item is a hit in this row.
Pairs = tuple[Tensor, Tensor]


class NegativeMask:
    """The masked entries of a batch, as (row, item) pairs that are matched against the candidates' items.

    For 65,536 rows and as many candidates the matrix takes 4 GiB of booleans, with perhaps a few hundred thousand hits.
    Tiled losses read the hits of a few rows at a time (`tiles`); `dense` is the matrix.

    Args:
        pairs: sets of pairs; they may overlap, and may contain items that are not candidates.
        rows: number of rows, B.
        items: codes of the candidates, int64 [M]; None if the pairs contain candidate positions instead of items.
        size: number of candidates, M.
        empty: bool [M], candidates that are hits in every row; None if there are none.
        eligible: a rule whose masked candidates are hits too; None without a rule.
    """

    def __init__(
        self,
        pairs: Iterable[Pairs],
        *,
        rows: int,
        items: Tensor | None,
        size: int,
        empty: Tensor | None = None,
        eligible: RowRule | None = None,
    ) -> None:
        self.pairs = list(pairs)
        self.eligible = eligible
        self.rows, self.size = rows, size
        self.items, self.empty = items, empty
        self._dense: Tensor | None = None
        self._matches: list[tuple[Tensor, Tensor, Tensor | None]] | None = None
        self._order: Tensor | None = None

    @classmethod
    def of(cls, dense: Tensor) -> NegativeMask:
        """Convert a matrix, bool [B, M].

        Raises:
            InputError: `dense` is not a boolean matrix.
        """
        if dense.ndim != 2 or dense.dtype != torch.bool:
            raise InputError(f"mask: expected bool [B, M], found {dense.dtype} {list(dense.shape)}")
        row, place = dense.nonzero(as_tuple=True)
        mask = cls([(row, place)], rows=dense.shape[0], items=None, size=dense.shape[1])
        mask._dense = dense
        return mask

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix, (B, M)."""
        return self.rows, self.size

    def dense(self) -> Tensor:
        """Return the matrix, bool [B, M], computed once. No shape in the computation depends on the data."""
        if self._dense is None:
            row, item = (torch.cat(part) for part in zip(*self.pairs, strict=True))
            items = torch.arange(self.size, device=item.device) if self.items is None else self.items
            hits = membership(items, row, item, rows=self.rows)
            hits = hits if self.empty is None else hits | self.empty
            self._dense = hits if self.eligible is None else hits | self.eligible.blocked(slice(0, self.rows))
        return self._dense

    def tiles(self, starts: list[int]) -> Iterator[Pairs | Tensor]:
        """Yield the hits of rows starts[0]:starts[1], starts[1]:starts[2], ..., without the empty slots.

        Yields:
            (row, place), int64 [H] each, row relative to the tile's first row; a hit may occur more than once. On an
            accelerator, where reading the number of hits would synchronize, and with a rule (`eligible`), which may
            mask many candidates, bool [R, M] instead.
        """
        if self.eligible is not None or (self.pairs and self.pairs[0][0].device.type != "cpu"):
            yield from self.matrices(starts)
            return
        boundaries = torch.tensor(starts)
        hits: list[tuple[Tensor, Tensor, Tensor | None, list[int]]] = []
        for row, first, copies in self._index():
            bounds = torch.searchsorted(row, boundaries).tolist()
            if copies is None and self._order is not None:
                first = self._order[first]  # noqa: PLW2901
            hits.append((row, first, copies, bounds))
        for tile, start in enumerate(starts[:-1]):
            rows, places = [], []
            for row, first, copies, bounds in hits:
                part = slice(bounds[tile], bounds[tile + 1])
                hit_row, place = row[part], first[part]
                if copies is not None:
                    hit_row, place = self._expand(hit_row, place, copies[part])
                rows.append(hit_row)
                places.append(place)
            yield torch.cat(rows) - start, torch.cat(places)

    def matrices(self, starts: list[int]) -> Iterator[Tensor]:
        """Yield the hits as one bool [R, M] per tile. No shape in the computation depends on the data."""
        if self.eligible is not None:
            for hits, (start, stop) in zip(self._matrices(starts), pairwise(starts), strict=True):
                yield hits | self.eligible.blocked(slice(start, stop))
            return
        yield from self._matrices(starts)

    def _matrices(self, starts: list[int]) -> Iterator[Tensor]:
        """Yield the pairs as one bool [R, M] per tile."""
        if not self.pairs:
            yield from (torch.zeros(stop - start, self.size, dtype=torch.bool) for start, stop in pairwise(starts))
            return
        marked, spread = self.pairs, None
        if self.items is not None:
            keys, order = torch.sort(self.items, stable=True)
            # Position of the first copy of each candidate's item among the keys; its mark holds for all copies.
            spread = torch.empty_like(order).scatter_(0, order, torch.searchsorted(keys, keys))
            marked = []
            for row, item in self.pairs:
                place = torch.searchsorted(keys, item)
                if self.size:
                    place = torch.where(keys[place.clamp(max=self.size - 1)] == item, place, self.size)
                marked.append((row, place))
        for start, stop in pairwise(starts):
            # An extra column takes the marks of other tiles' rows and of items that are not candidates.
            marks = torch.zeros(stop - start, self.size + 1, dtype=torch.bool, device=marked[0][0].device)
            for row, place in marked:
                if stop > start:
                    is_here = (row >= start) & (row < stop)
                    marks[torch.where(is_here, row - start, 0), torch.where(is_here, place, self.size)] = True
            yield marks[:, : self.size] if spread is None else marks.index_select(1, spread)

    def count(self, weight: Tensor) -> Tensor:
        """Sum a weight of the candidates, [M], over each row's hits, [B]; a hit listed twice counts once."""
        total = weight.new_zeros(self.rows)
        if self.size == 0:
            return total
        if self.eligible is not None:
            return (self.dense() * weight).sum(1)
        if self.empty is not None:
            total += weight[self.empty].sum()
            weight = weight.masked_fill(self.empty, 0)
        hits = self._index()
        key = torch.unique(torch.cat([row * self.size + first for row, first, _ in hits]))
        first = key % self.size
        _, copies, order = self._ordered()
        sums = torch.cat([weight.new_zeros(1), (weight if order is None else weight[order]).cumsum(0)])
        last = first + (1 if copies is None else copies[first])
        return total.index_add_(0, key // self.size, sums[last] - sums[first])

    def places(self, item: Tensor) -> Tensor | None:
        """Return each item's position among the candidates, int64 [P], or -1; None if some candidate is repeated."""
        keys, copies, order = self._ordered()
        if copies is not None:
            return None
        place = item if keys is None else first_places(keys, item)
        return place if order is None else torch.where(place < 0, -1, order[place])

    def without(self, own: Tensor, candidates: Tensor) -> NegativeMask:
        """Return the mask without the pairs of each row's own item, [B]; empty slots remain masked.

        Args:
            own: the item of each row, int64 [B].
            candidates: the item codes of the candidates, int64 [M].
        """
        kept = []
        for row, item in self.pairs:
            code = item if self.items is not None else candidates[item]
            live = code != own[row]
            kept.append((row[live], item[live]))
        return NegativeMask(
            kept, rows=self.rows, items=self.items, size=self.size, empty=self.empty, eligible=self.eligible
        )

    def select(self, places: Tensor) -> NegativeMask:
        """Return the mask of some of the candidates, given by position, int64 [M']."""
        items = places if self.items is None else self.items[places]
        empty = None if self.empty is None else self.empty[places]
        eligible = None if self.eligible is None else self.eligible.select(places)
        return NegativeMask(self.pairs, rows=self.rows, items=items, size=len(places), empty=empty, eligible=eligible)

    def head(self, rows: int) -> NegativeMask:
        """Return the mask of the first `rows` rows only."""
        kept = [(row[live], item[live]) for row, item in self.pairs for live in [row < rows]]
        eligible = None if self.eligible is None else self.eligible.of_rows(slice(rows))
        return NegativeMask(
            kept, rows=min(rows, self.rows), items=self.items, size=self.size, empty=self.empty, eligible=eligible
        )

    def to(self, device: torch.device | str) -> NegativeMask:
        """Return a copy on another device."""
        return NegativeMask(
            [(row.to(device), item.to(device)) for row, item in self.pairs],
            rows=self.rows,
            items=None if self.items is None else self.items.to(device),
            size=self.size,
            empty=None if self.empty is None else self.empty.to(device),
            eligible=None if self.eligible is None else self.eligible.to(device),
        )

    def _index(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Return the pairs of each set that are candidates: (row, ascending; first place in `_order`; copies).

        `copies` is None if no candidate item is repeated.
        """
        if self._matches is None:
            keys, copies, self._order = self._ordered()
            self._matches = []
            for row, item in self.pairs:
                first = item if keys is None else first_places(keys, item)
                live = (first >= 0).nonzero()[:, 0]
                if len(live) < len(first):  # drop pairs that are not candidates
                    row, first = row.index_select(0, live), first.index_select(0, live)  # noqa: PLW2901
                if bool((row[1:] < row[:-1]).any()):
                    row, turn = torch.sort(row, stable=True)  # noqa: PLW2901
                    first = first[turn]
                self._matches.append((row, first, None if copies is None else copies[first]))
        return self._matches

    def _ordered(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return (items, ascending; number of copies of the item from each place on; original positions).

        Items are None if pairs contain positions, copies are None if no item is repeated, and positions are None if
        the items are already in ascending order.
        """
        if self.items is None:
            return None, None, None
        keys, order = self.items, None
        if not bool((keys[1:] > keys[:-1]).all()):
            keys, order = torch.sort(keys, stable=True)
            if bool((keys[1:] == keys[:-1]).any()):
                place = torch.arange(len(keys), device=keys.device)
                return keys, torch.searchsorted(keys, keys, right=True) - place, order
        return keys, None, order

    def _expand(self, row: Tensor, first: Tensor, copies: Tensor) -> Pairs:
        """Repeat each hit once per copy of its item."""
        row = torch.repeat_interleave(row, copies)
        before = torch.repeat_interleave(copies.cumsum(0) - copies, copies)
        first = torch.repeat_interleave(first, copies) + torch.arange(len(row)) - before
        return row, first if self._order is None else self._order[first]


def first_places(keys: Tensor, item: Tensor) -> Tensor:
    """Return the position of each item's first copy among ascending keys, int64 [P], or -1."""
    if len(keys) == 0 or len(item) == 0:
        return torch.full_like(item, -1)
    size = int(keys[-1]) + 1
    # A lookup table is several times faster than binary search, unless filling it dominates.
    if size <= 16 * (len(keys) + len(item)):
        head = torch.ones_like(keys, dtype=torch.bool)
        head[1:] = keys[1:] != keys[:-1]
        heads = head.nonzero()[:, 0]
        # One extra slot at each end, for codes below and above the range.
        table = torch.full((size + 2,), -1, dtype=torch.int32, device=keys.device)
        table.index_copy_(0, keys[heads] + 1, heads.to(torch.int32))
        return table.index_select(0, item.clamp(min=-1, max=size) + 1).long()
    place = torch.searchsorted(keys, item).clamp_(max=len(keys) - 1)
    return torch.where(keys[place] == item, place, -1)
