"""Top-K over a score matrix that is never completely in memory.

Scores arrive in tiles (a block of rows by a range of columns). Most tiles contain hardly any new result: once a row has
K results, a random column beats the worst of them with probability K / (columns seen). So a tile is read once, to
compute the maxima of small chunks; only scores above their row's threshold are gathered, packed into sortable integers
(`twotower.index.keys`), and merged in batches.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from twotower.index.best import LANES, Best, above, chunk_maxima, kth_largest
from twotower.index.exclusions import Excluded, Exclusion
from twotower.index.keys import EMPTY, MAX_COLUMNS, pack_keys, unpack_columns, unpack_scores

__all__ = ["Exclusion", "Progress", "ScoreTile", "pack_keys", "top_k", "unpack_columns", "unpack_scores"]

ScoreTile = Callable[[slice, slice], Tensor]
"""`tile(rows, columns) -> [rows, columns]` scores; the caller may overwrite the result."""

Progress = Callable[[int, int], None]
"""`progress(done, total)`, called after every tile with the number of tiles."""

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
        row_block: rows per tile (for tests and unusual memory sizes; the result does not depend on it).
        column_tile: columns per tile; the result does not depend on it.
        progress: called after every tile.

    Returns:
        scores: [B, K] float32, descending, -inf where no item was left.
        items: [B, K] int64 item codes, -1 where no item was left. An item with score -inf is never returned.

    Raises:
        ValueError: a score is NaN, or a shape, K or an exclusion is out of range.
    """
    num_items, device = order.numel(), order.device
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if num_items > MAX_COLUMNS:
        raise ValueError(f"a catalog of {num_items} items is too large: at most {MAX_COLUMNS} can be ranked")
    # With few rows, widen the tiles: many small ones would each pay a fixed overhead.
    widest = max(_MAX_TILE_COLUMNS, _TILE_ELEMENTS // (4 * max(num_rows, 1)))
    columns = column_tile or min(max(num_items, 1), widest)
    kept = min(k, num_items)
    # A row needs memory for its results and for one complete tile that passes the filter.
    rows_fit = max(1, 8 * _TILE_ELEMENTS // (kept + columns))
    rows = row_block or max(1, min(_MAX_ROWS, _TILE_ELEMENTS // columns, rows_fit))
    excluded = None if exclude is None else Excluded.of(exclude, num_rows, order)
    counter = Told(progress, num_rows, rows, num_items, columns)

    results = Results(num_rows, k, order)
    for block in blocks(num_rows, rows):
        best = Best(block.stop - block.start, kept, device)
        entries = None if excluded is None else excluded.block(block.start, block.stop, columns)
        for index, part in enumerate(blocks(num_items, columns)):
            tile = score_tile(block, part).to(dtype=torch.float32).contiguous()
            if entries is not None:
                tile[entries.tile(index, part.start)] = -torch.inf
            _offer(best, tile, part.start)
            counter.tile()
        results.put(block, best.sorted())
    return results.scores, results.items


class Told:
    """A counter of finished tiles that calls the progress function."""

    def __init__(self, progress: Progress | None, num_rows: int, rows: int, num_items: int, columns: int) -> None:
        self._progress, self._done = progress, 0
        self._total = -(-num_rows // rows) * -(-num_items // columns)

    def tile(self, count: int = 1) -> None:
        """Count finished tiles and report progress."""
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


class Results:
    """The scores and items of a search, filled by blocks of rows.

    Args:
        num_rows: B.
        k: K.
        order: [N], the item of each column.
    """

    def __init__(self, num_rows: int, k: int, order: Tensor) -> None:
        self.scores = torch.full((num_rows, k), -torch.inf, dtype=torch.float32, device=order.device)
        self.items = torch.full((num_rows, k), -1, dtype=torch.int64, device=order.device)
        self._order = order

    def put(self, block: slice, keys: Tensor) -> None:
        """Store the sorted keys of a block of rows, [rows, at most K]."""
        found, kept = keys != EMPTY, keys.shape[1]
        self.scores[block, :kept] = torch.where(found, unpack_scores(keys), -torch.inf)
        self.items[block, :kept] = torch.where(found, self._order[unpack_columns(keys)], -1)


def blocks(total: int, size: int) -> Iterator[slice]:
    """Split 0 .. total into slices of `size`; the last may be smaller."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _offer(best: Best, tile: Tensor, left: int) -> None:
    maxima = chunk_maxima(tile)
    if _has_nan(maxima) or _has_nan(tile[:, maxima.shape[1] * LANES :]):
        raise ValueError("a score is NaN: the model has diverged (look for NaN in its parameters or inputs)")
    if not best.bounded and (least := kth_largest(tile, maxima, best.k)) is not None:
        best.bound(least)
    row, column, score = above(tile, maxima, best.threshold)
    best.offer(row, column + left, score)


def _has_nan(scores: Tensor) -> bool:
    # The maximum is NaN if any score is NaN: one pass, no mask.
    return scores.numel() > 0 and bool(scores.amax().isnan())
