"""Calibration of a model's softmax probabilities.

Unlike the ranking metrics, calibration depends on the scores themselves. It only makes sense for a two-tower model
whose scores estimate log P(y | x) up to a constant per query, that is, for a model trained with a (sampled) softmax and
unbiased corrections. It is separate from the ranking metrics because a model may rank well and be badly calibrated, or
the reverse.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.data.eligibility import EligibleRows
from twotower.errors import InputError
from twotower.index import Exclusion

#: Number of logits in memory at a time, queries x N: 16 MB in float64, plus a few arrays of that size.
_BLOCK = 1 << 21
#: Cells of the histogram of log2 P: 16 per octave, from 2^-128 to 1; smaller values fall into the first.
_CELLS_PER_OCTAVE = 16
_OCTAVES = 128


@dataclass(frozen=True)
class CalibrationBin:
    """The (query, item) pairs whose predicted probability lies in one range.

    Attributes:
        low: smallest probability of the range.
        high: largest probability of the range.
        pairs: number of pairs.
        predicted: mean P(item | query) of the pairs.
        observed: mean over the pairs of their observed share (`softmax_calibration`).
        targets: number of targets among the pairs; if small, `observed` is uncertain.
    """

    low: float
    high: float
    pairs: int
    predicted: float
    observed: float
    targets: int


@dataclass(frozen=True)
class Calibration:
    """Predicted probabilities compared with observed frequencies.

    Attributes:
        bins: from the least to the most probable pairs, each with about the same predicted mass.
        expected_calibration_error: sum over bins of pairs |predicted - observed| / E, in [0, 2].
        log_likelihood: mean over queries of the mean log P of their targets, nats.
        perplexity: exp(-log_likelihood): a target is as hard to guess as one of this many equally likely items.
        num_queries: E, number of queries with targets.
    """

    bins: tuple[CalibrationBin, ...]
    expected_calibration_error: float
    log_likelihood: float
    perplexity: float
    num_queries: int

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types for JSON."""
        return {
            "bins": [vars(one).copy() for one in self.bins],
            "expected_calibration_error": self.expected_calibration_error,
            "log_likelihood": self.log_likelihood,
            "perplexity": self.perplexity,
            "num_queries": self.num_queries,
        }


@torch.no_grad()
def softmax_calibration(
    queries: Tensor,
    items: Tensor,
    targets: Exclusion,
    *,
    temperature: float | Tensor = 1.0,
    exclude: Exclusion | None = None,
    eligible: EligibleRows | None = None,
    bins: int = 10,
) -> Calibration:
    """Compare the predicted probability of an item with how often it was the target.

        P(j | x) = exp(<u(x), v(j)> / T) / sum_{j' not excluded} exp(<u(x), v(j')> / T)
        observed share of (x, j) = 1 / |targets of x| for a target of x, else 0

    Both sum to 1 over the items of a query. All E N pairs (not only the targets) are binned by P, so that each bin has
    about the same predicted mass. In a calibrated model the mean observed share of a bin equals its mean predicted
    probability (reliability diagram: DeGroot & Fienberg 1983). The expected calibration error sums the differences
    between the predicted and the observed mass of the bins, per query. An average weighted by the number of pairs, as
    in Naeini et al. 2015, would be near 0, because nearly all pairs have a P near 0. Because of sampling noise the
    error is positive even for a calibrated model; the noise shrinks with more targets per bin.

    Args:
        queries: u(x) of each query, [E, D].
        items: v(j), [N, D].
        targets: compressed rows (offsets int64 [E+1], item codes); repeats count once.
        temperature: T > 0.
        exclude: compressed rows of items that cannot be recommended, such as the history. P is normalised over the
            remaining items, and an excluded target is ignored.
        eligible: the items that can be recommended to each query (`Holdout.eligible`), over which P is normalised; None
            for all items.
        bins: maximum number of bins; fewer if many pairs have the same P.

    Returns:
        The calibration over queries with at least one target.

    Raises:
        InputError: shapes disagree, a setting is out of range, or no query has a target.
    """
    if bins < 1:
        raise InputError(f"bins must be at least 1, got {bins}")
    target_pairs, left_out = _targets_and_excluded(targets, exclude, len(queries), len(items))
    if eligible is not None:
        row, item = (torch.from_numpy(part) for part in target_pairs)
        target_pairs = target_pairs[:, ~eligible.of_rows(row).blocked_of_rows(item[:, None])[:, 0].numpy()]
    sizes = np.bincount(target_pairs[0], minlength=len(queries))
    if not sizes.any():
        raise InputError("no query has a target: nothing to calibrate")
    histogram, log_probability = _Histogram(), np.empty(target_pairs.shape[1])
    for start, log_p in _log_softmax_blocks(queries, items, temperature, left_out, eligible):
        inside, found = _of_block(target_pairs, start, log_p)
        log_probability[inside] = found
        histogram.add(log_p[np.flatnonzero(sizes[start : start + len(log_p)])])
    share = 1.0 / sizes[target_pairs[0]]
    histogram.observe(log_probability, share)
    num_queries = int((sizes > 0).sum())
    merged = histogram.bins(bins)
    likelihood = float(log_probability @ share) / num_queries
    error = sum(part.pairs * abs(part.predicted - part.observed) for part in merged) / num_queries
    return Calibration(tuple(merged), error, likelihood, _exp(-likelihood), num_queries)


@torch.no_grad()
def refined_weights(
    queries: Tensor,
    items: Tensor,
    targets: Exclusion,
    *,
    temperature: float | Tensor = 1.0,
    exclude: Exclusion | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Compute 1 - P(y | x), the weight of refined logQ, for every target y of every query x.

    P is the softmax over the whole catalog, as in `softmax_calibration`; training estimates it from candidates. The
    weight is the model's own probability of being wrong (docs/theory.md).

    Args:
        queries: u(x) of each query, [E, D].
        items: v(j), [N, D].
        targets: compressed rows (offsets int64 [E+1], item codes); repeats count once.
        temperature: T > 0.
        exclude: compressed rows of items that are left out of the normalisation of P; an excluded target is ignored.

    Returns:
        Index of the query, item code and weight of each pair, [P] each, sorted by query.
    """
    target_pairs, left_out = _targets_and_excluded(targets, exclude, len(queries), len(items))
    weights = np.empty(target_pairs.shape[1])
    for start, log_p in _log_softmax_blocks(queries, items, temperature, left_out):
        inside, found = _of_block(target_pairs, start, log_p)
        weights[inside] = -np.expm1(found)
    return target_pairs[0], target_pairs[1], weights


def _targets_and_excluded(
    targets: Exclusion, exclude: Exclusion | None, num_queries: int, num_items: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the (query, target) pairs that are not excluded, and the excluded pairs, int64 [2, P] each."""
    pairs, left_out = _pairs(targets, num_queries, num_items, "targets"), np.empty((2, 0), dtype=np.int64)
    if exclude is not None:
        left_out = _pairs(exclude, num_queries, num_items, "exclude")
        pairs = pairs[:, ~np.isin(pairs[0] * num_items + pairs[1], left_out[0] * num_items + left_out[1])]
    return pairs, left_out


def _log_softmax_blocks(
    queries: Tensor,
    items: Tensor,
    temperature: float | Tensor,
    left_out: NDArray[np.int64],
    eligible: EligibleRows | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield the first query of each block and log P of the block, float64 [B, N]; -inf for excluded pairs."""
    catalog = items.double().T / temperature
    block = max(1, _BLOCK // len(items))
    for start in range(0, len(queries), block):
        logits = queries[start : start + block].double() @ catalog
        row, column = _within(left_out, start, start + block)
        logits[row, column] = -torch.inf
        if eligible is not None:
            logits.masked_fill_(eligible.blocked(slice(start, start + len(logits))), -torch.inf)
        yield start, torch.log_softmax(logits, 1)


def _of_block(pairs: NDArray[np.int64], start: int, log_p: Tensor) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return which pairs are in the block of queries that begins at `start`, and their log P."""
    row, column = _within(pairs, start, start + len(log_p))
    inside = (pairs[0] >= start) & (pairs[0] < start + len(log_p))
    return inside, log_p[row, column].cpu().numpy()


def _exp(value: float) -> float:
    """Return exp(value), or infinity on overflow."""
    return math.exp(value) if value < math.log(np.finfo(np.float64).max) else math.inf


class _Histogram:
    """Counts of pairs and their predicted and observed mass by cell of log2 P, collected in one pass over all pairs."""

    def __init__(self) -> None:
        cells = _OCTAVES * _CELLS_PER_OCTAVE
        self.pairs = np.zeros(cells, dtype=np.int64)
        self.targets = np.zeros(cells, dtype=np.int64)
        self.predicted, self.observed = np.zeros(cells), np.zeros(cells)

    def add(self, log_p: Tensor) -> None:
        """Add all pairs of some queries, log P, [rows, N]; -inf marks an excluded item, which is not a pair."""
        flat = log_p[torch.isfinite(log_p)].cpu().numpy()
        cell = self._cell(flat)
        self.pairs += np.bincount(cell, minlength=len(self.pairs))
        self.predicted += np.bincount(cell, np.exp(flat), len(self.pairs))

    def observe(self, log_p: NDArray[np.float64], share: NDArray[np.float64]) -> None:
        """Add the observed mass of the pairs that are targets."""
        cell = self._cell(log_p)
        self.targets += np.bincount(cell, minlength=len(self.pairs))
        self.observed += np.bincount(cell, share, len(self.pairs))

    def bins(self, count: int) -> list[CalibrationBin]:
        """Merge neighbouring cells into bins of about the same predicted mass."""
        mass = np.cumsum(self.predicted)
        # A cell belongs to the bin that contains the middle of its mass.
        of_cell = np.minimum(((mass - self.predicted / 2) / mass[-1] * count).astype(np.int64), count - 1)
        merged = []
        for number in range(count):
            cells = np.flatnonzero((of_cell == number) & (self.pairs > 0))
            if len(cells):
                pairs = int(self.pairs[cells].sum())
                low, high = cells[0] / _CELLS_PER_OCTAVE - _OCTAVES, (cells[-1] + 1) / _CELLS_PER_OCTAVE - _OCTAVES
                predicted, observed = float(self.predicted[cells].sum()), float(self.observed[cells].sum())
                targets = int(self.targets[cells].sum())
                # The first cell extends down to 0.
                smallest = 0.0 if cells[0] == 0 else 2.0**low
                merged.append(CalibrationBin(smallest, 2.0**high, pairs, predicted / pairs, observed / pairs, targets))
        return merged

    def _cell(self, log_p: NDArray[np.float64]) -> NDArray[np.int64]:
        cell = np.floor((log_p / math.log(2) + _OCTAVES) * _CELLS_PER_OCTAVE).astype(np.int64)
        return np.clip(cell, 0, len(self.pairs) - 1)


def _pairs(rows: Exclusion, count: int, num_items: int, what: str) -> NDArray[np.int64]:
    """Return the (query, item) pairs of compressed rows, without repeats, int64 [2, P], sorted by query."""
    offsets, items = (np.asarray(part, dtype=np.int64) for part in rows)
    if offsets.shape != (count + 1,):
        raise InputError(f"{what}: offsets must be [{count + 1}], one row for each query, got {list(offsets.shape)}")
    if len(items) and not 0 <= items.min() <= items.max() < num_items:
        raise InputError(f"{what} must be item codes in 0 .. {num_items - 1}")
    row = np.repeat(np.arange(count), np.diff(offsets))
    return np.stack(np.divmod(np.unique(row * num_items + items), num_items))


def _within(pairs: NDArray[np.int64], start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return the pairs of some queries, with query numbers relative to `start`."""
    first, last = np.searchsorted(pairs[0], [start, stop])
    return torch.from_numpy(pairs[0, first:last] - start), torch.from_numpy(pairs[1, first:last])
