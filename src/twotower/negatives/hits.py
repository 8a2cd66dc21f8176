"""Which candidates are no negatives of which rows, kept as pairs: a matrix [B, M] is made only for those who ask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from twotower.errors import InputError
from twotower.negatives.duplicates import membership

#: Pairs (row [P], item [P]), int64: in this row every candidate that is this item is a hit.
Pairs = tuple[Tensor, Tensor]


class Hits:
    """The masked places of a batch, as (row, item) pairs compared with the candidates' items.

    A batch of 65,536 rows and as many candidates has 4 GiB of booleans and perhaps a few hundred thousand hits. Losses
    that work tile by tile ask for the hits of a few rows (`tiles`); `dense` is the matrix.

    Args:
        pairs: sets of pairs; they may overlap, and name items that are no candidate.
        rows: B.
        items: codes of the candidates, int64 [M]; None where pairs name places among the candidates instead.
        size: M.
        empty: bool [M], places that are hits of every row; None where there are none.
    """

    def __init__(
        self, pairs: Iterable[Pairs], *, rows: int, items: Tensor | None, size: int, empty: Tensor | None = None
    ) -> None:
        self.pairs = list(pairs)
        self.rows, self.size = rows, size
        self.items, self.empty = items, empty
        self._dense: Tensor | None = None
        self._found: list[tuple[Tensor, Tensor, Tensor | None]] | None = None
        self._order: Tensor | None = None

    @classmethod
    def of(cls, dense: Tensor) -> Hits:
        """From a matrix, bool [B, M].

        Raises:
            InputError: it is none.
        """
        if dense.ndim != 2 or dense.dtype != torch.bool:
            raise InputError(f"hits: expected bool [B, M], found {dense.dtype} {list(dense.shape)}")
        row, place = dense.nonzero(as_tuple=True)
        hits = cls([(row, place)], rows=dense.shape[0], items=None, size=dense.shape[1])
        hits._dense = dense
        return hits

    @property
    def shape(self) -> tuple[int, int]:
        """(B, M)."""
        return self.rows, self.size

    def dense(self) -> Tensor:
        """The matrix, bool [B, M]; made once. Nothing in it has a shape that depends on the data."""
        if self._dense is None:
            row, item = (torch.cat(part) for part in zip(*self.pairs, strict=True))
            items = torch.arange(self.size, device=item.device) if self.items is None else self.items
            found = membership(items, row, item, rows=self.rows)
            self._dense = found if self.empty is None else found | self.empty
        return self._dense

    def tiles(self, starts: list[int]) -> Iterator[Pairs | Tensor]:
        """The hits of rows starts[0]:starts[1], starts[1]:starts[2], ... without the empty places.

        Yields:
            (row, place), int64 [H] each, row counted from the tile's first, where a hit may come more than once; or,
            on an accelerator, which would have to be awaited for the number of them, bool [R, M].
        """
        if self.pairs and self.pairs[0][0].device.type != "cpu":
            yield from self.matrices(starts)
            return
        asked = torch.tensor(starts)
        found: list[tuple[Tensor, Tensor, Tensor | None, list[int]]] = []
        for row, first, copies in self._index():
            bounds = torch.searchsorted(row, asked).tolist()
            if copies is None and self._order is not None:
                first = self._order[first]  # noqa: PLW2901
            found.append((row, first, copies, bounds))
        for tile, start in enumerate(starts[:-1]):
            rows, places = [], []
            for row, first, several, bounds in found:
                part = slice(bounds[tile], bounds[tile + 1])
                one, place = row[part], first[part]
                if several is not None:
                    one, place = self._expand(one, place, several[part])
                rows.append(one)
                places.append(place)
            yield torch.cat(rows) - start, torch.cat(places)

    def matrices(self, starts: list[int]) -> Iterator[Tensor]:
        """The same as bool [R, M], one for each tile; nothing here has a shape that depends on the data."""
        if not self.pairs:
            yield from (torch.zeros(stop - start, self.size, dtype=torch.bool) for start, stop in pairwise(starts))
            return
        marked, spread = self.pairs, None
        if self.items is not None:
            keys, order = torch.sort(self.items, stable=True)
            # Where each candidate's item first stands among the keys: there it is marked for all its copies.
            spread = torch.empty_like(order).scatter_(0, order, torch.searchsorted(keys, keys))
            marked = []
            for row, item in self.pairs:
                place = torch.searchsorted(keys, item)
                if self.size:
                    place = torch.where(keys[place.clamp(max=self.size - 1)] == item, place, self.size)
                marked.append((row, place))
        for start, stop in pairwise(starts):
            # One column too many takes the marks of other tiles' rows and of items that are no candidate.
            marks = torch.zeros(stop - start, self.size + 1, dtype=torch.bool, device=marked[0][0].device)
            for row, place in marked:
                if stop > start:
                    is_here = (row >= start) & (row < stop)
                    marks[torch.where(is_here, row - start, 0), torch.where(is_here, place, self.size)] = True
            yield marks[:, : self.size] if spread is None else marks.index_select(1, spread)

    def count(self, weight: Tensor) -> Tensor:
        """Sum over each row's hits of a weight of the candidates, [M] -> [B]; a hit named twice counts once."""
        total = weight.new_zeros(self.rows)
        if self.size == 0:
            return total
        if self.empty is not None:
            total += weight[self.empty].sum()
            weight = weight.masked_fill(self.empty, 0)
        found = self._index()
        key = torch.unique(torch.cat([row * self.size + first for row, first, _ in found]))
        first = key % self.size
        _, copies, order = self._ordered()
        sums = torch.cat([weight.new_zeros(1), (weight if order is None else weight[order]).cumsum(0)])
        last = first + (1 if copies is None else copies[first])
        return total.index_add_(0, key // self.size, sums[last] - sums[first])

    def places(self, item: Tensor) -> Tensor | None:
        """Where items stand among the candidates, int64 [P]; -1 where they do not. None where one stands twice."""
        keys, copies, order = self._ordered()
        if copies is not None:
            return None
        place = item if keys is None else first_places(keys, item)
        return place if order is None else torch.where(place < 0, -1, order[place])

    def without(self, own: Tensor, candidates: Tensor) -> Hits:
        """The same but for each row's own item, [B], among the candidates' codes, [M]; empty places stay."""
        kept = []
        for row, item in self.pairs:
            code = item if self.items is not None else candidates[item]
            live = code != own[row]
            kept.append((row[live], item[live]))
        return Hits(kept, rows=self.rows, items=self.items, size=self.size, empty=self.empty)

    def select(self, places: Tensor) -> Hits:
        """The hits among some of the candidates, int64 [M']."""
        items = places if self.items is None else self.items[places]
        empty = None if self.empty is None else self.empty[places]
        return Hits(self.pairs, rows=self.rows, items=items, size=len(places), empty=empty)

    def head(self, rows: int) -> Hits:
        """The hits of the first rows alone."""
        kept = [(row[live], item[live]) for row, item in self.pairs for live in [row < rows]]
        return Hits(kept, rows=min(rows, self.rows), items=self.items, size=self.size, empty=self.empty)

    def to(self, device: torch.device | str) -> Hits:
        """The same hits on another device."""
        return Hits(
            [(row.to(device), item.to(device)) for row, item in self.pairs],
            rows=self.rows,
            items=None if self.items is None else self.items.to(device),
            size=self.size,
            empty=None if self.empty is None else self.empty.to(device),
        )

    def _index(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """For each set of pairs, those that are candidates: row, ascending; first place in `_order`; copies.

        Copies are None where no item stands twice among the candidates.
        """
        if self._found is None:
            keys, copies, self._order = self._ordered()
            self._found = []
            for row, item in self.pairs:
                first = item if keys is None else first_places(keys, item)
                live = (first >= 0).nonzero()[:, 0]
                if len(live) < len(first):  # the rest is of no use
                    row, first = row.index_select(0, live), first.index_select(0, live)  # noqa: PLW2901
                if bool((row[1:] < row[:-1]).any()):
                    row, turn = torch.sort(row, stable=True)  # noqa: PLW2901
                    first = first[turn]
                self._found.append((row, first, None if copies is None else copies[first]))
        return self._found

    def _ordered(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Items in ascending order; how many of an item stand from each place on; where they stand.

        None where pairs name places; where no item stands twice; where they ascend already.
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
        """Each hit once for every copy of its item."""
        row = torch.repeat_interleave(row, copies)
        before = torch.repeat_interleave(copies.cumsum(0) - copies, copies)
        first = torch.repeat_interleave(first, copies) + torch.arange(len(row)) - before
        return row, first if self._order is None else self._order[first]


def first_places(keys: Tensor, item: Tensor) -> Tensor:
    """Where each item first stands among ascending keys, int64 [P]; -1 where it does not."""
    if len(keys) == 0 or len(item) == 0:
        return torch.full_like(item, -1)
    size = int(keys[-1]) + 1
    # A table of the catalog answers several times faster than bisection, where filling it is not the larger part.
    if size <= 16 * (len(keys) + len(item)):
        head = torch.ones_like(keys, dtype=torch.bool)
        head[1:] = keys[1:] != keys[:-1]
        heads = head.nonzero()[:, 0]
        # A place at either end for codes below and above those of the catalog.
        table = torch.full((size + 2,), -1, dtype=torch.int32, device=keys.device)
        table.index_copy_(0, keys[heads] + 1, heads.to(torch.int32))
        return table.index_select(0, item.clamp(min=-1, max=size) + 1).long()
    place = torch.searchsorted(keys, item).clamp_(max=len(keys) - 1)
    return torch.where(keys[place] == item, place, -1)
