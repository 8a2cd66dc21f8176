"""How far an objective's gradient is from that of the full softmax, measured by redrawing its candidates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.data import Batch
from twotower.errors import InputError
from twotower.negatives import Candidates, CrossBatchMemory, InBatch, NegativeMask, Pool
from twotower.objectives import Embedded, Objective, PositiveCorrectedSoftmax, RefinedLogQ, SampledSoftmax


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


#: Maximum draws and logits in one call of the loss: small draws share a call because its fixed cost dominates.
_DRAWS, _CELLS = 16, 1 << 15


def estimates_softmax(objective: Objective) -> bool:
    """Return whether an objective estimates the full softmax, so that gradients are comparable. Binary forms do not."""
    return isinstance(objective, SampledSoftmax | PositiveCorrectedSoftmax | RefinedLogQ)


def depends_on_batch(pool: Pool) -> bool:
    """Return whether the candidates depend on the other rows of the batch."""
    return any(isinstance(member, InBatch | CrossBatchMemory) for member in pool.members())


def measure(
    objective: Objective,
    rows: AuditedRows,
    batches: Iterator[Batch],
    *,
    draws: int,
    generator: torch.Generator | None = None,
) -> Measurement:
    """Draw candidates for every row repeatedly, and compare the gradient of the loss with the exact one.

    The objective runs as in training. The embedding of an item is its logit, [N, 1], and the embedding of a query is 1,
    so the gradient with respect to the embeddings is the gradient with respect to the logits. In each draw, the audited
    row replaces the first row of a batch, so its in-batch candidates are those of real batches.

    Args:
        objective: an objective that estimates the softmax.
        rows: the audited rows.
        batches: an endless iterator over training batches.
        draws: number of draws n for each row; an average if batches are built within groups.
        generator: random generator of the proposals.

    Raises:
        InputError: the objective does not estimate the softmax, or `draws` is less than 2.
    """
    if not estimates_softmax(objective):
        raise InputError("audit: this objective does not estimate the full softmax; its gradient has another target")
    if draws < 2:
        raise InputError(f"draws: expected at least 2, found {draws}")
    training = objective.training
    objective.eval()  # state is updated explicitly by `follow`: an audited row is not a training step
    totals = _Totals(objective, rows)
    if not depends_on_batch(objective.pool) and rows.groups is None:
        batches = itertools.repeat(next(batches))  # the batch is not used
    try:
        for row, batch in _assigned(objective.pool, rows, batches, draws * len(rows)):
            totals.add(row, _draw(objective, rows, row, batch, generator))
        totals.flush()
    finally:
        objective.train(training)
    return totals.result()


def follow(pool: Pool, batch: Batch, *, drawn: bool) -> None:
    """Update the state of a pool as a training step does: frequencies before the draw, memories after it."""
    if not drawn:
        for frequency in pool.frequencies():
            frequency.observe(batch.items, batch.group)
        return
    for member in pool.members():
        if isinstance(member, CrossBatchMemory):
            member.remember(batch.items, batch.group, epoch=batch.epoch, windows=batch.windows)


def _assigned(pool: Pool, rows: AuditedRows, batches: Iterator[Batch], total: int) -> Iterator[tuple[int, Batch]]:
    """Pair rows with batches in turn; if batches have groups, only rows of the batch's group."""
    queues: dict[int | None, list[int]] = {None: list(range(len(rows)))}
    if rows.groups is not None:
        for row, group in enumerate(rows.groups.tolist()):
            queues.setdefault(group, []).append(row)
    turn = dict.fromkeys(queues, 0)
    done = 0
    for attempt, batch in enumerate(batches):
        if done == total or attempt == 20 * total:
            return
        follow(pool, batch, drawn=False)
        queue = queues.get(batch.group, [])
        if queue:
            yield queue[turn[batch.group] % len(queue)], batch
            turn[batch.group] += 1
            done += 1
        follow(pool, batch, drawn=True)


def _draw(
    objective: Objective, rows: AuditedRows, row: int, batch: Batch, generator: torch.Generator | None
) -> Candidates:
    """Draw the candidates of an audited row that replaces the first row of a batch."""
    # Without in-batch candidates the other rows have no effect, and a batch of one is cheaper.
    size = len(batch) if depends_on_batch(objective.pool) else 1
    positives = torch.cat([rows.positives[row : row + 1], batch.items[1:size]])
    queries = None if rows.queries is None else torch.cat([rows.queries[row : row + 1], batch.queries[1:size]])
    drawn = objective.pool.draw(
        positives,
        known_positives=rows.known_of(row),
        queries=queries,
        group=batch.group,
        generator=generator,
        epoch=batch.epoch,
    )
    # Drop the other rows before copies are merged: merging a whole batch is expensive and changes nothing for one row.
    return objective.prepare(drawn.head(1))


def stack(parts: list[Candidates]) -> tuple[Candidates, Tensor]:
    """Combine single-row draws into one batch in which each row's candidates are masked for all other rows.

    Returns:
        The batch, and the row that each shared candidate belongs to, int64 [M].
    """
    places = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part.items) for part in parts]))
    own = torch.cat([part.mask[0] for part in parts])
    mask = (places != torch.arange(len(parts))[:, None]) | own

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    per_row = parts[0].row_items is not None
    stacked = Candidates(
        items=joined("items"),
        log_expected_count=joined("log_expected_count"),
        negative_mask=NegativeMask.of(mask),
        multiplicity=joined("multiplicity"),
        source=joined("source"),
        positives=joined("positives"),
        positive_log_count=joined("positive_log_count"),
        log_unmasked=None if parts[0].log_unmasked is None else joined("log_unmasked"),
        row_items=joined("row_items") if per_row else None,
        row_log_expected_count=joined("row_log_expected_count") if per_row else None,
        row_mask=joined("row_mask") if per_row else None,
    )
    return stacked, places


class _Totals:
    """Sums over the draws of the gradients, [R, N], and of d = ||g_hat - g||^2 and d^2, [R]."""

    def __init__(self, objective: Objective, rows: AuditedRows) -> None:
        self.objective, self.rows = objective, rows
        self.exact = rows.exact_gradient()
        self.norm = self.exact.norm(dim=1)
        self.gradient = torch.zeros_like(rows.logits)
        sums = torch.zeros(5, len(rows), dtype=torch.float64)
        self.squares, self.fourths, self.distinct, self.effective, self.draws = sums
        self.waiting: list[tuple[int, Candidates]] = []

    def add(self, row: int, drawn: Candidates) -> None:
        self.waiting.append((row, drawn))
        width = sum(len(part.items) for _, part in self.waiting)
        if len(self.waiting) == _DRAWS or len(self.waiting) * width >= _CELLS:
            self.flush()

    def flush(self) -> None:
        """Run the loss on the waiting draws and add their gradients to the sums."""
        if not self.waiting:
            return
        row = torch.tensor([place for place, _ in self.waiting])
        drawn, of = stack([part for _, part in self.waiting])
        live = torch.cat([~part.mask[0] for _, part in self.waiting])
        self.waiting = []
        count, number = len(row), self.rows.logits.shape[1]
        items, log_count = drawn.items, drawn.log_expected_count.double()
        if drawn.row_items is not None and drawn.row_mask is not None and drawn.row_log_expected_count is not None:
            # Per-row candidates follow the shared ones.
            of = torch.cat([of, torch.arange(count).repeat_interleave(drawn.row_items.shape[1])])
            items = torch.cat([items, drawn.row_items.clamp(min=0).reshape(-1)])
            live = torch.cat([live, ~drawn.row_mask.reshape(-1)])
            log_count = torch.cat([log_count, drawn.row_log_expected_count.double().reshape(-1)])
        scores = self.rows.logits[row[of], items]
        own = self.rows.logits[row, drawn.positives]
        gradient, own_gradient = self._gradients(drawn, scores, own)

        # Copies of an item in one draw are one coordinate of the gradient; the positive is never among the negatives.
        of, items, gradient, log_weight = of[live], items[live], gradient[live], (scores - log_count)[live]
        key, place = torch.unique(of * number + items, return_inverse=True)
        merged = torch.zeros(len(key), dtype=torch.float64).index_add_(0, place, gradient)
        of_key = key // number
        # ||g_hat - g||^2 = ||g||^2 + sum over the coordinates that g_hat touches of g_hat (g_hat - 2 g).
        exact = self.exact.view(-1)[row[of_key] * number + key % number]
        squares = torch.zeros_like(own).index_add_(0, of_key, merged * (merged - 2.0 * exact))
        squares += own_gradient * (own_gradient - 2.0 * self.exact[row, drawn.positives]) + self.norm[row] ** 2
        self.gradient.view(-1).index_add_(0, row[of_key] * number + key % number, merged)
        self.gradient.view(-1).index_add_(0, row * number + drawn.positives, own_gradient)
        self.squares.index_add_(0, row, squares)
        self.fourths.index_add_(0, row, squares**2)
        self.draws.index_add_(0, row, torch.ones_like(own))
        self.distinct.index_add_(0, row, torch.zeros_like(own).index_add_(0, of_key, torch.ones_like(merged)))
        largest = torch.full_like(own, -torch.inf).scatter_reduce(0, of, log_weight, "amax")
        weight = torch.exp(log_weight - largest[of])
        first, second = (torch.zeros_like(own).index_add_(0, of, weight**power) for power in (1, 2))
        self.effective.index_add_(0, row, torch.where(second > 0, first**2 / second, 0.0))

    def _gradients(self, drawn: Candidates, scores: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients with respect to the logits of the negatives and of the positives."""
        scores, own = scores[:, None].requires_grad_(), own[:, None].requires_grad_()
        shared = scores[: len(drawn.items)]
        per_row = None if drawn.row_items is None else scores[len(drawn.items) :].reshape(*drawn.row_items.shape, 1)
        embedded = Embedded(torch.ones_like(own), own, shared, per_row)
        loss = self.objective(embedded, drawn, temperature=1.0)
        with torch.enable_grad():
            of_scores, of_own = torch.autograd.grad(loss.sum(), [scores, own])
        return of_scores[:, 0], of_own[:, 0]

    def result(self) -> Measurement:
        draws, norm = self.draws, self.norm
        bias = (self.gradient / draws[:, None] - self.exact).norm(dim=1)
        # E||g_hat - E g_hat||^2 with Bessel's correction; NaN for n < 2, where nothing was measured.
        variance = (self.squares - draws * bias**2).clamp(min=0.0) / (draws - 1.0)
        scatter = (self.fourths - self.squares**2 / draws).clamp(min=0.0) / (draws - 1.0)
        unmeasured = draws < 2
        variance, scatter = variance.masked_fill(unmeasured, math.nan), scatter.masked_fill(unmeasured, math.nan)
        return Measurement(
            bias=bias / norm,
            noise=(variance / draws).sqrt() / norm,
            spread=variance.sqrt() / norm,
            spread_error=(scatter / draws).sqrt() / norm**2,
            distinct=self.distinct / draws,
            effective=self.effective / draws,
            draws=draws,
        )
