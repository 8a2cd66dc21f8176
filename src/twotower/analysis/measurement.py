"""Input and result of a gradient measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AuditedRows:
    """Rows whose gradient is measured, with their logits over the catalog.

    Attributes:
        logits: s(x, j), already divided by the temperature, float64 [R, N].
        positives: positive y of each row, int64 [R].
        queries: query of each row, int64 [R], for sources that look up items by query.
        groups: group of each row, int64 [R], if batches are built within groups.
        known: (row [P], item [P]): items masked for a row in addition to its positive. The target is then the softmax
            over the rest of the catalog.
    """

    logits: Tensor
    positives: Tensor
    queries: Tensor | None = None
    groups: Tensor | None = None
    known: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.positives)

    def exact_gradient(self) -> Tensor:
        """Return dL/ds_j = P(j|x) - [j = y] of the full softmax, float64 [R, N]."""
        logits, rows = self.logits, torch.arange(len(self))
        if self.known is not None:
            logits = logits.clone()
            logits[self.known] = -torch.inf
            logits[rows, self.positives] = self.logits[rows, self.positives]
        gradient = torch.softmax(logits, 1)
        gradient[rows, self.positives] -= 1.0
        return gradient

    def known_of(self, row: int) -> tuple[Tensor, Tensor] | None:
        """Return the masked items of one row as (row, item) pairs for a batch in which it is row 0."""
        if self.known is None:
            return None
        items = self.known[1][self.known[0] == row]
        return torch.zeros_like(items), items


@dataclass(frozen=True)
class Measurement:
    """Measured values of each row, float64 [R]. `bias`, `noise` and `spread` are relative to the exact gradient's norm.

    Attributes:
        bias: ||mean g_hat - g|| / ||g||; with a finite number of draws it exceeds the true bias by about `noise`.
        noise: Monte-Carlo error of `bias`, sqrt(E||g_hat - E g_hat||^2 / n) / ||g||.
        spread: standard deviation of one draw, sqrt(E||g_hat - E g_hat||^2) / ||g||.
        spread_error: Monte-Carlo error of `spread`^2, from the scatter of ||g_hat - g||^2 over the draws.
        distinct: mean number of distinct negatives of the row.
        effective: mean effective sample size, (sum w)^2 / sum w^2 over the negatives, w = exp(s - log kappa).
        draws: number of draws n for the row.
    """

    bias: Tensor
    noise: Tensor
    spread: Tensor
    spread_error: Tensor
    distinct: Tensor
    effective: Tensor
    draws: Tensor

    def corrected_bias(self, rows: Tensor | None = None) -> tuple[float, float]:
        """Return the bias over some rows without its noise floor, and its standard error.

            b^2 = mean over rows of (bias^2 - noise^2),   b = sqrt(max(b^2, 0))

        The error is estimated from the scatter of b^2 over the rows; for a single row it is `noise`.
        """
        chosen = self._measured(rows)
        square = (self.bias**2 - self.noise**2)[chosen]
        if len(square) == 0:
            return math.nan, math.nan
        value = math.sqrt(max(float(square.mean()), 0.0))
        if len(square) == 1:
            return value, float(self.noise[chosen][0])
        error = float(square.std()) / math.sqrt(len(square))
        # d sqrt(x) = dx / (2 sqrt x); near zero, sqrt(dx) is the bound.
        return value, min(error / (2 * value), math.sqrt(error)) if value > 0 else math.sqrt(error)

    def mean(self, name: str, rows: Tensor | None = None) -> float:
        """Average `distinct`, `effective`, `bias`, `noise` or `draws` over some rows."""
        values: Tensor = getattr(self, name)[self._measured(rows)]
        return float(values.mean()) if len(values) else math.nan

    def _measured(self, rows: Tensor | None) -> Tensor:
        """Select the given rows that have at least two draws, bool [R]: a group may be too rare to get batches."""
        measured = self.draws >= 2
        return measured if rows is None else measured & rows

    def mean_spread(self, rows: Tensor | None = None) -> tuple[float, float]:
        """Return the root mean square of the spread over some rows, and its Monte-Carlo error."""
        chosen = self._measured(rows)
        square = (self.spread**2)[chosen]
        if len(square) == 0:
            return math.nan, math.nan
        value = math.sqrt(float(square.mean()))
        error = float(self.spread_error[chosen].norm()) / len(square)
        return value, error / (2 * value) if value > 0 else 0.0


def spread_gain(present: Measurement, other: Measurement) -> tuple[float, float]:
    """Return the spread of `present` over that of `other`, geometric mean over the same rows, and its standard error.

    The error is that of the log-ratios of the rows, which includes Monte-Carlo error and differences between rows.
    """
    both = (present.draws >= 2) & (other.draws >= 2)
    ratio = (present.spread[both] / other.spread[both]).log()
    gain = float(ratio.mean().exp())
    return gain, gain * float(ratio.std()) / len(ratio) ** 0.5 if len(ratio) > 1 else math.nan
