"""Deviation of an objective's gradient from that of the full softmax, measured by redrawing its candidates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from twotower.analysis.measurement import AuditedRows, Measurement
from twotower.data import Batch
from twotower.errors import InputError
from twotower.losses import Embedded, Objective, PositiveCorrectedSoftmax, RefinedLogQ, SampledSoftmax
from twotower.negatives import Candidates, CrossBatchMemory, Hits, InBatch, Pool

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
            member.remember(batch.items)


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
        positives, known_positives=rows.known_of(row), queries=queries, group=batch.group, generator=generator
    )
    # Drop the other rows before copies are merged: merging a whole batch is expensive and changes nothing for one row.
    return objective.prepare(drawn.head(1))


def stack(parts: list[Candidates]) -> tuple[Candidates, Tensor]:
    """Combine single-row draws into one batch in which each row's candidates are masked for all other rows.

    Returns:
        The batch, and the row that each shared candidate belongs to, int64 [M].
    """
    places = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part.items) for part in parts]))
    own = torch.cat([part.hits[0] for part in parts])
    hits = (places != torch.arange(len(parts))[:, None]) | own

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    per_row = parts[0].row_items is not None
    stacked = Candidates(
        items=joined("items"),
        log_expected_count=joined("log_expected_count"),
        masks=Hits.of(hits),
        multiplicity=joined("multiplicity"),
        source=joined("source"),
        positives=joined("positives"),
        positive_log_count=joined("positive_log_count"),
        row_items=joined("row_items") if per_row else None,
        row_log_expected_count=joined("row_log_expected_count") if per_row else None,
        row_hits=joined("row_hits") if per_row else None,
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
        live = torch.cat([~part.hits[0] for _, part in self.waiting])
        self.waiting = []
        count, number = len(row), self.rows.logits.shape[1]
        items, log_count = drawn.items, drawn.log_expected_count.double()
        if drawn.row_items is not None and drawn.row_hits is not None and drawn.row_log_expected_count is not None:
            # Per-row candidates follow the shared ones.
            of = torch.cat([of, torch.arange(count).repeat_interleave(drawn.row_items.shape[1])])
            items = torch.cat([items, drawn.row_items.clamp(min=0).reshape(-1)])
            live = torch.cat([live, ~drawn.row_hits.reshape(-1)])
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
