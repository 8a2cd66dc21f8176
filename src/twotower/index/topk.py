"""The K best columns of a matrix of scores that is never whole in memory.

Scores arrive in tiles (a block of rows by a range of columns). Most tiles hold next to nothing: once a row has K
results, a random column beats the worst of them with probability K / (columns seen). So a tile is filtered first,
by the maxima of small chunks, and only what passes is gathered, packed into sortable integers, and merged:

    key(score, column) = order(score) * 2^32 + (2^32 - 1 - column)

where `order` maps float32 to int32 keeping the order. Keys are distinct, so the largest K are one well-defined set:
scores descending, then columns ascending. Nothing depends on tile sizes or on the stability of a sort.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ScoreTile = Callable[[slice, slice], Tensor]
"""`tile(rows, columns) -> [rows, columns]` scores; the caller of `tile` may overwrite what comes back."""

Exclusion = tuple[Tensor | np.ndarray, Tensor | np.ndarray]
"""Compressed rows `(offsets [B+1], items)`: row b excludes `items[offsets[b]:offsets[b+1]]`."""

_CHUNK = 64
_LOW = (1 << 32) - 1
_EMPTY = torch.iinfo(torch.int64).min
# A tile of at most 32 MiB stays in the last-level cache, where the filter is nearly free.
_TILE_ELEMENTS = 1 << 23
_MAX_TILE_COLUMNS = 8192
_MAX_ROWS = 1024


def top_k(
    score_tile: ScoreTile,
    num_rows: int,
    order: Tensor,
    k: int,
    exclude: Exclusion | None = None,
    *,
    row_block: int | None = None,
    column_tile: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The K best items of each row, in a fixed order among equal scores.

    Columns are items laid out in *tie order*: column c is item `order[c]`, and of two equal scores the lower column
    wins. See `twotower.index.tie_order`. Scores are compared as float32 (0.0 and -0.0 are equal).

    Args:
        score_tile: `score_tile(rows, columns)` gives the scores of a slice of rows by a slice of columns, on the
            device of `order`. Its result is overwritten.
        num_rows: B, the number of rows.
        order: [N] int64, the item code of each column: a permutation of 0 .. N-1.
        k: K, how many results a row gets. May exceed N.
        exclude: compressed rows of item codes that must not come back; repeats and any order are fine.
        row_block: rows of a tile (for tests and unusual memory; the result does not depend on it).
        column_tile: columns of a tile, likewise.

    Returns:
        scores: [B, K] float32, descending, -inf where nothing was left.
        items: [B, K] int64 item codes, -1 where nothing was left. An item of score -inf never comes back.

    Raises:
        ValueError: a score is NaN, or a shape, K or an exclusion is out of range.
    """
    num_items, device = order.numel(), order.device
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if num_items >= _LOW:
        raise ValueError(f"a catalog of {num_items} items is too large: at most {_LOW - 1} can be ranked")
    columns = column_tile or min(max(num_items, 1), _MAX_TILE_COLUMNS)
    kept = min(k, num_items)
    # A row needs room for its results and for one whole tile that passes the filter.
    rows_fit = max(1, 4 * _TILE_ELEMENTS // (kept + columns))
    rows = row_block or max(1, min(_MAX_ROWS, _TILE_ELEMENTS // columns, rows_fit))
    excluded = None if exclude is None else _Excluded.of(exclude, num_rows, order)

    scores = torch.full((num_rows, k), -torch.inf, dtype=torch.float32, device=device)
    items = torch.full((num_rows, k), -1, dtype=torch.int64, device=device)
    for start in range(0, num_rows, rows):
        stop = min(start + rows, num_rows)
        best = _Best(stop - start, kept, device)
        entries = None if excluded is None else excluded.block(start, stop, columns)
        for tile_index, left in enumerate(range(0, num_items, columns)):
            tile = score_tile(slice(start, stop), slice(left, min(left + columns, num_items)))
            tile = tile.to(dtype=torch.float32)
            if entries is not None:
                rows_out, columns_out = entries.tile(tile_index, left)
                tile[rows_out, columns_out] = -torch.inf
            best.offer(tile, left)
        keys = best.sorted()
        found = keys != _EMPTY
        scores[start:stop, :kept] = torch.where(found, unpack_scores(keys), -torch.inf)
        items[start:stop, :kept] = torch.where(found, order[unpack_columns(keys)], -1)
    return scores, items


class _Best:
    """The best K keys of each row of one block, and the keys that wait to be merged with them."""

    def __init__(self, rows: int, k: int, device: torch.device) -> None:
        self.k = k
        self.keys = torch.full((rows, k + max(k, _CHUNK)), _EMPTY, dtype=torch.int64, device=device)
        self.waiting = torch.zeros(rows, dtype=torch.int64, device=device)
        self.most = 0  # the fullest row of `waiting`
        self.threshold = torch.full((rows, 1), -torch.inf, dtype=torch.float32, device=device)
        self.full = False  # whether the thresholds are scores of K results that are already held

    def offer(self, tile: Tensor, left: int) -> None:
        """Take what may belong to the best of `tile` [rows, columns], whose first column is `left`."""
        row, column = self._passing(tile)
        if row.numel() == 0:
            return
        count = torch.bincount(row, minlength=len(tile))
        most = int(count.max())
        if self.k + self.most + most > self.keys.shape[1]:
            self._merge()
            self._grow(self.k + most)
        # `row` ascends, so an entry's place in its row is its position less the start of its row.
        first = torch.cumsum(count, 0) - count
        place = torch.arange(len(row), device=row.device) - first[row] + self.waiting[row]
        self.keys[row, self.k + place] = pack_keys(tile[row, column], column + left)
        self.waiting += count
        self.most = int(self.waiting.max())
        # Merging before the columns seen have doubled keeps the thresholds sharp at little cost.
        if not self.full or self.most >= max(self.k // 2, _CHUNK):
            self._merge()

    def _passing(self, tile: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (ascending) and columns of the scores above their row's threshold.

        A tile is read once, for the maxima of chunks; only chunks whose maximum passes are looked into. Columns
        come in tie order, so a score that equals the threshold of K held results loses to them: strictly above.
        """
        rows, width = tile.shape
        chunks = width // _CHUNK
        body = tile[:, : chunks * _CHUNK].reshape(rows * chunks, _CHUNK)
        maxima = body.amax(1).view(rows, chunks)
        rest = tile[:, chunks * _CHUNK :]
        if _has_nan(maxima) or _has_nan(rest):
            raise ValueError("a score is NaN: the model has diverged (look for NaN in its parameters or inputs)")
        threshold = self.threshold
        if not self.full and width >= self.k:
            # The K-th best of this tile bounds the K-th best of all from below; so does, at a fraction of the cost,
            # the K-th largest of the maxima, for each of them is a score. Without a bound the whole tile would pass.
            source = maxima if chunks >= self.k else tile
            bound = source.topk(self.k, dim=1).values[:, -1:]
            threshold = torch.maximum(threshold, torch.nextafter(bound, bound.new_tensor(-torch.inf)))
        row, chunk = (maxima > threshold).nonzero(as_tuple=True)
        inside = body.index_select(0, row * chunks + chunk) > threshold[row]
        hit, lane = inside.nonzero(as_tuple=True)
        row, column = row[hit], chunk[hit] * _CHUNK + lane
        if rest.shape[1]:
            rest_row, rest_column = (rest > threshold).nonzero(as_tuple=True)
            row = torch.cat([row, rest_row])
            column = torch.cat([column, rest_column + chunks * _CHUNK])
            row, by_row = row.sort(stable=True)
            column = column[by_row]
        return row, column

    def _grow(self, width: int) -> None:
        # Only ties by the hundred or an unfortunate first tile need it: room for a whole tile would be mostly idle.
        if width > self.keys.shape[1]:
            keys = self.keys.new_full((len(self.keys), width), _EMPTY)
            keys[:, : self.k] = self.keys[:, : self.k]
            self.keys = keys

    def _merge(self) -> None:
        used = self.keys[:, : self.k + self.most]
        best = used.topk(self.k, dim=1, sorted=False).values
        used.fill_(_EMPTY)
        self.keys[:, : self.k] = best
        self.waiting.zero_()
        self.most = 0
        worst = best.amin(1, keepdim=True)
        self.threshold = torch.where(worst == _EMPTY, -torch.inf, unpack_scores(worst))
        self.full = True

    def sorted(self) -> Tensor:
        """[rows, K] keys, descending."""
        return self.keys[:, : self.k + self.most].topk(self.k, dim=1).values


def _has_nan(scores: Tensor) -> bool:
    # The largest of scores is NaN where any of them is: one pass, no mask.
    return scores.numel() > 0 and bool(scores.amax().isnan())


def pack_keys(score: Tensor, column: Tensor) -> Tensor:
    """One int64 for each score and column: larger is better, lower columns win among equal scores.

    Args:
        score: float32, no NaN.
        column: int64 in 0 .. 2^32 - 2, of the same shape.
    """
    # Adding 0.0 turns -0.0 into 0.0: two equal scores must have equal bits.
    bits = (score + 0.0).view(torch.int32).to(torch.int64)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << 32) | (_LOW - column)


def unpack_scores(key: Tensor) -> Tensor:
    """The float32 scores of keys."""
    ordered = key >> 32
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(torch.int32).view(torch.float32)


def unpack_columns(key: Tensor) -> Tensor:
    """The int64 columns of keys, 0 for an empty one."""
    # An empty key must not index out of range; the caller masks it.
    return torch.where(key == _EMPTY, 0, _LOW - (key & _LOW))


@dataclass(frozen=True)
class _Entries:
    """The excluded entries of one block of rows, sorted by column tile."""

    rows: Tensor
    columns: Tensor
    bounds: list[int]

    def tile(self, index: int, left: int) -> tuple[Tensor, Tensor]:
        chosen = slice(self.bounds[index], self.bounds[index + 1])
        return self.rows[chosen], self.columns[chosen] - left


@dataclass(frozen=True)
class _Excluded:
    """Checked exclusions, with items turned into columns."""

    offsets: Tensor
    columns: Tensor
    num_items: int

    @classmethod
    def of(cls, exclude: Exclusion, num_rows: int, order: Tensor) -> "_Excluded":
        offsets = torch.as_tensor(np.asarray(exclude[0], dtype=np.int64))
        items = torch.as_tensor(np.asarray(exclude[1], dtype=np.int64)).to(order.device)
        num_items = order.numel()
        if offsets.shape != (num_rows + 1,):
            raise ValueError(f"exclude: offsets must have shape [{num_rows + 1}], got {list(offsets.shape)}")
        if offsets[0] != 0 or offsets[-1] != len(items) or bool((offsets.diff() < 0).any()):
            raise ValueError(f"exclude: offsets must rise from 0 to the number of items, {len(items)}")
        if len(items) and not 0 <= int(items.min()) <= int(items.max()) < num_items:
            raise ValueError(f"exclude: items must be codes in 0 .. {num_items - 1}")
        column_of = torch.empty_like(order)
        column_of[order] = torch.arange(num_items, device=order.device)
        return cls(offsets, column_of[items], num_items)

    def block(self, start: int, stop: int, columns: int) -> _Entries:
        offsets = self.offsets[start : stop + 1]
        column = self.columns[int(offsets[0]) : int(offsets[-1])]
        row = torch.repeat_interleave(torch.arange(stop - start), offsets.diff()).to(column.device)
        if columns >= self.num_items:
            return _Entries(row, column, [0, len(column)])
        tile, by_tile = (column // columns).sort()
        edges = torch.arange(-(-self.num_items // columns) + 1, device=column.device)
        bounds = torch.searchsorted(tile, edges)
        return _Entries(row[by_tile], column[by_tile], bounds.tolist())
