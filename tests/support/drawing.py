"""Repeated draws from a pool, and statistical tests of the result."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from twotower.negatives import Candidates


@dataclass
class Observations:
    """The candidates of one row over many draws, by item.

    Attributes:
        counts: number of unmasked candidates, float64 [n, N].
        weights: the sum of exp(-log kappa) over them, float64 [n, N].
    """

    counts: Tensor
    weights: Tensor

    def partition(self, scores: Tensor, positive: int) -> Tensor:
        """Compute Z_hat of every draw, [n]."""
        return scores[positive].exp() + self.weights @ scores.exp()


def observe(draw: Callable[[int], Candidates], times: int, num_items: int, row: int = 0) -> Observations:
    """Draw many times and record the unmasked candidates of one row, shared and per-row."""
    cells, weights = [], []
    for number in range(times):
        drawn = draw(number)
        live = ~drawn.mask[row]
        cells.append(number * num_items + drawn.items[live])
        weights.append(-drawn.log_expected_count[live])
        if drawn.row_items is not None:
            live = ~drawn.row_mask[row]
            cells.append(number * num_items + drawn.row_items[row][live])
            weights.append(-drawn.row_log_expected_count[row][live])
    cell, weight = torch.cat(cells), torch.cat(weights).double().exp()
    size = times * num_items
    return Observations(
        torch.bincount(cell, minlength=size).double().reshape(times, num_items),
        torch.bincount(cell, weight, minlength=size).reshape(times, num_items),
    )


def agreement(samples: Tensor, expected: Tensor) -> float:
    """Compute the p-value that independent rows [n, k] have the expected mean [k]: Hotelling's test, chi-square limit.

    In a direction without variation (an item that was in every row, or in none) the expected value may differ by as
    much as an event that happens once in n / 5 rows: such an event is missed in n rows with a probability below 1 %.
    """
    error = samples.mean(0) - expected
    spread, directions = torch.linalg.eigh(torch.cov(samples.T) if samples.shape[1] > 1 else samples.var(0)[:, None])
    along = directions.T @ error
    varies = spread > 1e-9 * spread.abs().max().clamp(min=1e-9)
    if bool((along[~varies].abs() > 5 / len(samples)).any()):
        return 0.0
    statistic = float((len(samples) * along[varies] ** 2 / spread[varies]).sum())
    return float(stats.chi2.sf(statistic, int(varies.sum()))) if bool(varies.any()) else 1.0


def standard_errors_off(estimates: Tensor, truth: float) -> float:
    """Return how many standard errors the mean of independent estimates is from the truth."""
    error = float(estimates.std()) / math.sqrt(len(estimates))
    difference = abs(float(estimates.mean()) - truth)
    # Without variance (a pool that is always the same) only rounding is left.
    return difference / max(error, 1e-6 * abs(truth))
