"""The K best scores of each row seen so far, and the filter that finds new candidates for them."""

from collections.abc import Callable

import torch
from torch import Tensor

from twotower.index.keys import EMPTY, pack_keys, unpack_scores

#: Scores per chunk maximum. They are strided in memory, so that the maximum is computed with full vector operations.
LANES = 32

Rescore = Callable[[Tensor, Tensor], Tensor]
"""`rescore(row [P], column [P]) -> [P]` float32: the exact scores of candidates that were offered by an estimate."""


class Best:
    """The K best keys of each row of one block, and candidates waiting to be merged with them.

    Args:
        rows: R, rows of the block.
        k: K.
        device: the device of the scores.
        rescore: computes the scores of candidates that are offered without one.

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
        # Late merges sort more at once; early merges raise the thresholds sooner.
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
    # A strided view, because rows of a tile with leftover columns are not contiguous chunks.
    body = tile.as_strided((len(tile), LANES, chunks), (tile.stride(0), chunks, 1))
    maxima: Tensor = body.amax(1)
    return maxima


def above(tile: Tensor, maxima: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, columns and values of the entries above their row's threshold, without reading the whole tile again.

    Args:
        tile: [R, width], contiguous, any ordered dtype.
        maxima: its `chunk_maxima`.
        threshold: [R, 1] of the same dtype.
    """
    width, chunks = tile.shape[1], maxima.shape[1]
    passing = (maxima > threshold).view(-1).nonzero()[:, 0]
    row, chunk = passing // max(chunks, 1), passing % max(chunks, 1)
    lanes = torch.arange(0, chunks * LANES, max(chunks, 1), device=tile.device)
    values = tile.view(-1).index_select(0, ((row * width + chunk)[:, None] + lanes).view(-1)).view(len(row), len(lanes))
    hit, lane = (values > threshold[row]).nonzero(as_tuple=True)
    found = row[hit], chunk[hit] + lane * chunks, values[hit, lane]
    rest = tile[:, chunks * LANES :]
    if not rest.shape[1]:
        return found
    rest_row, rest_column = (rest > threshold).nonzero(as_tuple=True)
    more = rest_row, rest_column + chunks * LANES, rest[rest_row, rest_column]
    return torch.cat([found[0], more[0]]), torch.cat([found[1], more[1]]), torch.cat([found[2], more[2]])


def kth_largest(tile: Tensor, maxima: Tensor, k: int) -> Tensor | None:
    """Return a lower bound on the K-th largest value of each row of a tile, [R, 1]; None if it has < K columns.

    Each chunk maximum is a score, so the K-th largest of them is such a bound, at a fraction of the cost.
    """
    if tile.shape[1] < k:
        return None
    source = maxima if maxima.shape[1] >= 2 * k else tile
    return source.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
