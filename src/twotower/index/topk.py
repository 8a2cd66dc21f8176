"""Top-K over a score matrix that is never completely in memory.

Scores arrive in tiles (a block of rows by a range of columns). Most tiles contain hardly any new result: once a row has
K results, a random column beats the worst of them with probability K / (columns seen). So a tile is read only once, to
compute the maxima of small chunks; only scores above their row's threshold are gathered and merged in batches
(`BestKeys`). Items that a search must leave out are removed tile by tile (`ExcludedColumns`).

Scores are sorted by a key, which packs a score and its column into one integer:

    key(score, column) = order(score) * 2^32 + (2^32 - 1 - column)

where `order` maps float32 to int32 and preserves the order. Keys are distinct, so the largest K are well defined:
scores descending, then columns ascending. The result does not depend on tile sizes or on the stability of a sort.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from twotower.errors import InputError

_LOW = (1 << 32) - 1

#: Maximum number of columns that fit into a key.
MAX_COLUMNS = _LOW - 1

#: Key of an empty slot, smaller than the key of any score.
EMPTY = torch.iinfo(torch.int64).min


def pack_keys(score: Tensor, column: Tensor) -> Tensor:
    """Pack score and column into one int64: larger is better, and lower columns win among equal scores.

    Args:
        score: float32, no NaN.
        column: int64 in 0 .. 2^32 - 2, of the same shape.
    """
    # Adding 0.0 turns -0.0 into 0.0: equal scores must have equal bits.
    bits = (score + 0.0).view(torch.int32).to(torch.int64)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << 32) | (_LOW - column)


def unpack_scores(key: Tensor) -> Tensor:
    """Return the float32 scores of keys."""
    ordered = key >> 32
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(torch.int32).view(torch.float32)


def unpack_columns(key: Tensor) -> Tensor:
    """Return the int64 columns of keys, 0 for an empty key."""
    # An empty key must not index out of range; the caller masks it.
    return torch.where(key == EMPTY, 0, _LOW - (key & _LOW))


#: Number of scores per chunk; they are strided in memory, so that maxima are computed with full vector operations.
LANES = 32

Rescore = Callable[[Tensor, Tensor], Tensor]
"""`rescore(row [P], column [P]) -> [P]` float32: the exact scores of candidates that were offered without a score."""


class BestKeys:
    """The K best keys of each row of one block, and candidates waiting to be merged with them.

    Args:
        rows: R, number of rows in the block.
        k: K, number of keys kept per row.
        device: the device of the scores.
        rescore: computes the scores of candidates that are offered without scores.

    Attributes:
        threshold: [R, 1] float32; only a score above it can be among the K best. Columns arrive in tie order, so a
            score equal to the current K-th best loses to it.
    """

    def __init__(self, rows: int, k: int, device: torch.device, rescore: Rescore | None = None) -> None:
        self.k = k
        self.threshold = torch.full((rows, 1), -torch.inf, dtype=torch.float32, device=device)
        self.bounded = False
        self._rescore = rescore
        self._keys = torch.full((rows, k), EMPTY, dtype=torch.int64, device=device)
        self._waiting: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._count = 0
        # Waiting for more candidates saves sorts; merging earlier raises the thresholds sooner.
        self._most = rows * max(k // 4, 16)

    def bound(self, least: Tensor) -> None:
        """Set a lower bound on the final K-th best score, [R, 1]; an equal score may still be among the best."""
        self.threshold = torch.maximum(self.threshold, torch.nextafter(least, least.new_tensor(-torch.inf)))
        self.bounded = True

    def offer(self, row: Tensor, column: Tensor, score: Tensor | None) -> bool:
        """Add candidates [P], in any order; return True if the thresholds may have risen."""
        if row.numel() == 0:
            return False
        self._waiting.append((row, column, score))
        self._count += len(row)
        if self._count < self._most:
            return False
        self._merge()
        return True

    def sorted(self) -> Tensor:
        """Return the keys [R, K], descending."""
        self._merge()
        return self._keys.sort(dim=1, descending=True).values

    def _merge(self) -> None:
        if not self._waiting:
            return
        row = torch.cat([part[0] for part in self._waiting])
        column = torch.cat([part[1] for part in self._waiting])
        score = self._scores(row, column)
        self._waiting, self._count = [], 0
        row, by_row = row.sort()
        count = torch.bincount(row, minlength=len(self._keys))
        # Rows are sorted, so an entry's place in its row is its position minus the start of its row.
        place = torch.arange(len(row), device=row.device) - (torch.cumsum(count, 0) - count)[row]
        keys = self._keys.new_full((len(self._keys), self.k + int(count.max())), EMPTY)
        keys[:, : self.k] = self._keys
        keys[row, self.k + place] = pack_keys(score, column)[by_row]
        self._keys = keys.topk(self.k, dim=1, sorted=False).values
        worst = self._keys.amin(1, keepdim=True)
        held = torch.where(worst == EMPTY, -torch.inf, unpack_scores(worst))
        self.threshold = torch.maximum(self.threshold, held)
        self.bounded = True

    def _scores(self, row: Tensor, column: Tensor) -> Tensor:
        if self._rescore is not None:
            return self._rescore(row, column)
        return torch.cat([part[2] for part in self._waiting if part[2] is not None])


def chunk_maxima(tile: Tensor) -> Tensor:
    """Compute maxima over chunks of LANES columns, [R, width // LANES]; the last width % LANES columns are skipped."""
    chunks = tile.shape[1] // LANES
    # The strided view leaves out the leftover columns without a copy.
    body = tile.as_strided((len(tile), LANES, chunks), (tile.stride(0), chunks, 1))
    maxima: Tensor = body.amax(1)
    return maxima


def above(tile: Tensor, maxima: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, columns and values of the entries above their row's threshold, without reading the whole tile again.

    Args:
        tile: [R, width], contiguous, any ordered dtype.
        maxima: `chunk_maxima` of the tile.
        threshold: [R, 1] of the same dtype.
    """
    width, chunks = tile.shape[1], maxima.shape[1]
    passing = (maxima > threshold).view(-1).nonzero()[:, 0]
    row, chunk = passing // max(chunks, 1), passing % max(chunks, 1)
    lanes = torch.arange(0, chunks * LANES, max(chunks, 1), device=tile.device)
    values = tile.view(-1).index_select(0, ((row * width + chunk)[:, None] + lanes).view(-1)).view(len(row), len(lanes))
    hit, lane = (values > threshold[row]).nonzero(as_tuple=True)
    hits = row[hit], chunk[hit] + lane * chunks, values[hit, lane]
    rest = tile[:, chunks * LANES :]
    if not rest.shape[1]:
        return hits
    rest_row, rest_column = (rest > threshold).nonzero(as_tuple=True)
    more = rest_row, rest_column + chunks * LANES, rest[rest_row, rest_column]
    return torch.cat([hits[0], more[0]]), torch.cat([hits[1], more[1]]), torch.cat([hits[2], more[2]])


def kth_largest(tile: Tensor, maxima: Tensor, k: int) -> Tensor | None:
    """Return a lower bound on the K-th largest value of each row of a tile, [R, 1]; None for fewer than K columns.

    Each chunk maximum is a score, so the K-th largest maximum is such a bound, at a fraction of the cost.
    """
    if tile.shape[1] < k:
        return None
    source = maxima if maxima.shape[1] >= 2 * k else tile
    return source.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)


Exclusion = tuple[Tensor | np.ndarray, Tensor | np.ndarray]
"""Compressed rows `(offsets [B+1], items)`: row b excludes `items[offsets[b]:offsets[b+1]]`."""


@dataclass(frozen=True)
class ExcludedEntries:
    """The excluded entries of one block of rows, sorted by column tile."""

    rows: Tensor
    columns: Tensor
    bounds: list[int]

    def tile(self, index: int, left: int) -> tuple[Tensor, Tensor]:
        """Return rows and columns of the entries in tile number `index`, relative to its first column, `left`."""
        chosen = slice(self.bounds[index], self.bounds[index + 1])
        return self.rows[chosen], self.columns[chosen] - left


@dataclass(frozen=True)
class ExcludedColumns:
    """Validated exclusions, with items converted to columns."""

    offsets: Tensor
    columns: Tensor
    num_items: int

    @classmethod
    def of(cls, exclude: Exclusion, num_rows: int, order: Tensor) -> "ExcludedColumns":
        """Validate compressed rows [num_rows + 1] of items; `order` is [N], the item of each column.

        Raises:
            InputError: the offsets are invalid, or an item is out of range.
        """
        offsets = torch.as_tensor(np.asarray(exclude[0], dtype=np.int64))
        items = torch.as_tensor(np.asarray(exclude[1], dtype=np.int64)).to(order.device)
        num_items = order.numel()
        if offsets.shape != (num_rows + 1,):
            raise InputError(f"exclude: offsets must have shape [{num_rows + 1}], got {list(offsets.shape)}")
        if offsets[0] != 0 or offsets[-1] != len(items) or bool((offsets.diff() < 0).any()):
            raise InputError(f"exclude: offsets must ascend from 0 to the number of excluded items, {len(items)}")
        if len(items) and not 0 <= int(items.min()) <= int(items.max()) < num_items:
            raise InputError(f"exclude: items must be codes in 0 .. {num_items - 1}")
        column_of = torch.empty_like(order)
        column_of[order] = torch.arange(num_items, device=order.device)
        return cls(offsets, column_of[items], num_items)

    def block(self, start: int, stop: int, columns: int) -> ExcludedEntries:
        """Return the entries of rows start:stop, for tiles of `columns` columns."""
        offsets = self.offsets[start : stop + 1]
        column = self.columns[int(offsets[0]) : int(offsets[-1])]
        row = torch.repeat_interleave(torch.arange(stop - start), offsets.diff()).to(column.device)
        if columns >= self.num_items:
            return ExcludedEntries(row, column, [0, len(column)])
        tile, by_tile = (column // columns).sort()
        edges = torch.arange(-(-self.num_items // columns) + 1, device=column.device)
        bounds = torch.searchsorted(tile, edges)
        return ExcludedEntries(row[by_tile], column[by_tile], bounds.tolist())


__all__ = [
    "Exclusion",
    "Progress",
    "RowFilter",
    "ScoreTile",
    "pack_keys",
    "top_k",
    "unpack_columns",
    "unpack_scores",
]


class RowFilter(Protocol):
    """A rule for the items that may be found for each row of a search; see `twotower.data.eligibility.EligibleRows`."""

    def select(self, columns: Tensor, /) -> "RowFilter":
        """Return the rule for some items, given by code, int64 [M]; they become columns 0, 1, ..."""

    def of_rows(self, rows: slice, /) -> "RowFilter":
        """Return the rule for some of the rows."""

    def to(self, device: torch.device | str, /) -> "RowFilter":
        """Return a copy on another device."""

    def blocked(self, rows: slice, columns: slice, /) -> Tensor:
        """Return which columns must not be found for some rows, bool [rows, columns]."""


ScoreTile = Callable[[slice, slice], Tensor]
"""`tile(rows, columns) -> [rows, columns]` scores; the caller may overwrite the result."""

Progress = Callable[[int, int], None]
"""`progress(done, total)`, called after every tile with the number of finished tiles and the number of all tiles."""

# A tile of this size stays in the last-level cache, where the filter is nearly free.
_TILE_ELEMENTS = 1 << 22
_MAX_TILE_COLUMNS = 8192
_MAX_ROWS = 2048


def top_k(
    score_tile: ScoreTile,
    num_rows: int,
    order: Tensor,
    k: int,
    exclude: Exclusion | None = None,
    *,
    eligible: RowFilter | None = None,
    row_block: int | None = None,
    column_tile: int | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the K best items of each row; equal scores have a fixed order.

    Columns are items in *tie order*: column c is item `order[c]`, and of two equal scores the lower column wins. See
    `twotower.index.tie_order`. Scores are compared as float32 (0.0 and -0.0 are equal).

    Args:
        score_tile: `score_tile(rows, columns)` returns the scores of a slice of rows by a slice of columns, on the
            device of `order`. Its result is overwritten.
        num_rows: B, the number of rows.
        order: [N] int64, the item code of each column: a permutation of 0 .. N-1.
        k: K, results per row. May exceed N.
        exclude: compressed rows of item codes to leave out; duplicates and any order are allowed.
        eligible: the items that may be found for each row; None for all.
        row_block: rows per tile (for tests and unusual memory sizes; the result does not depend on it).
        column_tile: columns per tile; the result does not depend on it.
        progress: called after every tile.

    Returns:
        scores: [B, K] float32, descending, -inf where no item was left.
        items: [B, K] int64 item codes, -1 where no item was left. An item with score -inf is never returned.

    Raises:
        InputError: a score is NaN, the exclusions have a wrong shape, or K, N or an exclusion is out of range.
    """
    num_items, device = order.numel(), order.device
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    if num_items > MAX_COLUMNS:
        raise InputError(f"a catalog of {num_items} items is too large: at most {MAX_COLUMNS} can be ranked")
    # With few rows, tiles are wider, because each tile has a fixed overhead.
    widest = max(_MAX_TILE_COLUMNS, _TILE_ELEMENTS // (4 * max(num_rows, 1)))
    columns = column_tile or min(max(num_items, 1), widest)
    kept = min(k, num_items)
    # A row needs memory for its results and, at worst, for all scores of a tile as candidates.
    rows_fit = max(1, 8 * _TILE_ELEMENTS // (kept + columns))
    rows = row_block or max(1, min(_MAX_ROWS, _TILE_ELEMENTS // columns, rows_fit))
    excluded = None if exclude is None else ExcludedColumns.of(exclude, num_rows, order)
    in_columns = None if eligible is None else eligible.to(device).select(order)
    counter = ProgressReport(progress, num_rows, rows, num_items, columns)

    results = TopKResults(num_rows, k, order)
    for block in blocks(num_rows, rows):
        best = BestKeys(block.stop - block.start, kept, device)
        entries = None if excluded is None else excluded.block(block.start, block.stop, columns)
        for index, part in enumerate(blocks(num_items, columns)):
            tile = score_tile(block, part).to(dtype=torch.float32).contiguous()
            if entries is not None:
                tile[entries.tile(index, part.start)] = -torch.inf
            if in_columns is not None:
                tile.masked_fill_(in_columns.blocked(block, part), -torch.inf)
            _offer(best, tile, part.start)
            counter.tile()
        results.put(block, best.sorted())
    return results.scores, results.items


class ProgressReport:
    """A counter of finished tiles that calls the progress function."""

    def __init__(self, progress: Progress | None, num_rows: int, rows: int, num_items: int, columns: int) -> None:
        self._progress, self._done = progress, 0
        self._total = -(-num_rows // rows) * -(-num_items // columns)

    def tile(self, count: int = 1) -> None:
        """Count finished tiles and report progress."""
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


class TopKResults:
    """The scores and items of a search, filled one block of rows at a time.

    Args:
        num_rows: B, number of rows of the search.
        k: K, number of results per row.
        order: [N], the item of each column.
    """

    def __init__(self, num_rows: int, k: int, order: Tensor) -> None:
        self.scores = torch.full((num_rows, k), -torch.inf, dtype=torch.float32, device=order.device)
        self.items = torch.full((num_rows, k), -1, dtype=torch.int64, device=order.device)
        self._order = order

    def put(self, block: slice, keys: Tensor) -> None:
        """Store the sorted keys of a block of rows, [rows, at most K]."""
        is_filled, kept = keys != EMPTY, keys.shape[1]
        self.scores[block, :kept] = torch.where(is_filled, unpack_scores(keys), -torch.inf)
        self.items[block, :kept] = torch.where(is_filled, self._order[unpack_columns(keys)], -1)


def blocks(total: int, size: int) -> Iterator[slice]:
    """Split 0 .. total into slices of `size`; the last may be smaller."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _offer(best: BestKeys, tile: Tensor, left: int) -> None:
    maxima = chunk_maxima(tile)
    if _has_nan(maxima) or _has_nan(tile[:, maxima.shape[1] * LANES :]):
        raise InputError("a score is NaN: the model has diverged (look for NaN in its parameters or inputs)")
    if not best.bounded and (least := kth_largest(tile, maxima, best.k)) is not None:
        best.bound(least)
    row, column, score = above(tile, maxima, best.threshold)
    best.offer(row, column + left, score)


def _has_nan(scores: Tensor) -> bool:
    # The maximum is NaN if any score is NaN: one pass, no mask.
    return scores.numel() > 0 and bool(scores.amax().isnan())
