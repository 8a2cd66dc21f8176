"""Distance of an objective's gradient from the gradient of the full softmax, measured by redrawing candidates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from twotower.data import Batch, KnownPositives
from twotower.data.loading.passed_over import PassedOver
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError
from twotower.hashing import GOLDEN, mix64
from twotower.negatives import Candidates, CrossBatchMemory, InBatch, NegativeMask, Pool
from twotower.objectives import Embedded, Objective, PositiveCorrectedSoftmax, RefinedLogQ, SampledSoftmax
from twotower.training.step import Block, draw_blocks


@dataclass(frozen=True)
class AuditedRows:
    """Rows whose gradient is measured, with their logits over the catalog.

    Attributes:
        logits: s(x, j), already divided by the temperature, float64 [R, N].
        positives: positive y of each row, int64 [R].
        queries: query of each row, int64 [R], for sources that look up items by query.
        groups: group of each row, int64 [R], if batches are built within groups.
        known: pairs (row [P], item [P]) of further items that are masked for a row. The target is then the softmax
            without these items.
        numbers: index of each row in the training batches (`Batch.rows`), int64 [R], so that a batch never contains
            the audited row twice; None if rows cannot be identified.
        questions: question of each row, int64 [R], ascending. The rows of a question share one query and one draw. None
            if every row has its own query and draw.
        weights: weight of each row in the loss of its question, [R]; None for equal weights.
        passed_over: the slate of each row (`Batch.passed_over`); None without feedback.
        feedback: w; an item of a row's slate with weight v counts 1 + w v times in the partition sum of the target.
    """

    logits: Tensor
    positives: Tensor
    queries: Tensor | None = None
    groups: Tensor | None = None
    known: tuple[Tensor, Tensor] | None = None
    numbers: Tensor | None = None
    questions: Tensor | None = None
    weights: Tensor | None = None
    passed_over: PassedOver | None = None
    feedback: float = 0.0

    def __len__(self) -> int:
        return len(self.positives)

    def units(self) -> list[Tensor]:
        """Return the row indices of each unit that shares a draw: a row, or all rows of a question."""
        if self.questions is None:
            return list(torch.arange(len(self))[:, None])
        sizes = torch.unique_consecutive(self.questions, return_counts=True)[1].tolist()
        return list(torch.arange(len(self)).split(sizes))  # type: ignore[no-untyped-call]

    def shares(self, unit: Tensor) -> Tensor:
        """Return the share of each row in the loss of its question, float64, summing to 1."""
        weights = torch.ones(len(self)) if self.weights is None else self.weights
        return weights[unit].double() / weights[unit].double().sum()

    def target_logits(self) -> Tensor:
        """Return the logits s_j + log omega_j of the target softmax, -inf for masked items, float64 [R, N]."""
        logits, rows = self.logits.clone(), torch.arange(len(self))
        if self.passed_over is not None and self.feedback:
            items, weights = self.passed_over.distinct()
            added = torch.zeros_like(logits).scatter_add_(1, items.clamp(min=0), self.feedback * weights.double())
            logits += torch.log1p(added)
        if self.known is not None:
            logits[self.known] = -torch.inf
        logits[rows, self.positives] = self.logits[rows, self.positives]
        return logits

    def exact_gradient(self) -> Tensor:
        """Return dL/ds_j = P(j|x) - [j = y] of the target softmax, float64 [R, N]."""
        gradient = torch.softmax(self.target_logits(), 1)
        gradient[torch.arange(len(self)), self.positives] -= 1.0
        return gradient


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
        partition: mean of Z_hat / Z, the estimated partition sum divided by the exact one. Its expectation is 1 if all
            counts and masks are correct, for any number of candidates; NaN for objectives other than `SampledSoftmax`.
        partition_error: Monte-Carlo error of `partition`.
        weight: mean of the weight 1 - P_hat(y) of refined logQ; None for other objectives.
        together: the same measurement for whole questions, [G], with the gradient of a question's loss, sum_i w_i
            dL_i/ds. The rows of a question share their candidates, so their errors do not average out. None if every
            row has its own draw.
    """

    bias: Tensor
    noise: Tensor
    spread: Tensor
    spread_error: Tensor
    distinct: Tensor
    effective: Tensor
    draws: Tensor
    partition: Tensor
    partition_error: Tensor
    weight: Tensor | None = None
    together: Measurement | None = None

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
        """Return the mean of `distinct`, `effective`, `bias`, `noise`, `weight` or `draws` over some rows."""
        values: Tensor = getattr(self, name)[self._measured(rows)]
        return float(values.mean()) if len(values) else math.nan

    def _measured(self, rows: Tensor | None) -> Tensor:
        """Mark the given rows with at least two draws, bool [R]; rows of a rare group may have fewer."""
        measured = self.draws >= 2
        return measured if rows is None else measured & rows

    def mean_partition(self) -> tuple[float, float]:
        """Return the mean of Z_hat / Z over the rows, and its Monte-Carlo error; NaN if it is not defined."""
        chosen = self._measured(None)
        count = max(int(chosen.sum()), 1)
        return float(self.partition[chosen].mean()), float(self.partition_error[chosen].norm()) / count

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
    """Return the spread of `present` divided by the spread of `other`, and its standard error.

    The ratio is a geometric mean over the same rows. Its error comes from the log-ratios of the rows; it includes
    Monte-Carlo error and differences between rows.
    """
    both = (present.draws >= 2) & (other.draws >= 2)
    ratio = (present.spread[both] / other.spread[both]).log()
    gain = float(ratio.mean().exp())
    return gain, gain * float(ratio.std()) / len(ratio) ** 0.5 if len(ratio) > 1 else math.nan


#: Maximum numbers of draws and logits in one call of the loss; small draws share a call because its fixed cost
#: dominates.
_DRAWS, _CELLS = 16, 1 << 15


def estimates_softmax(objective: Objective) -> bool:
    """Return whether an objective estimates the full softmax, so that gradients are comparable.

    Binary objectives do not, nor does a softmax with a binary or pairwise loss on slates. A softmax with feedback in
    its partition sum does; its target is the full softmax with the same weights.
    """
    if objective.feedback is not None and objective.feedback.form != "softmax":
        return False
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
    known_positives: KnownPositives | None = None,
    generator: torch.Generator | None = None,
    ranks: Communicator | None = None,
) -> Measurement:
    """Draw candidates for every row repeatedly, and compare the gradient of the loss with the exact one.

    The objective runs as in training (`draw_blocks`). The embedding of an item is its logit, and the embedding of a
    query is 1, so the gradient with respect to the embeddings is the gradient with respect to the logits. In each
    draw, the audited row takes a place in a real batch: its own place, or the place of a different row. If batches
    consist of whole sequences or questions, it replaces a whole sequence or question, so that the rest of the batch
    is still a random draw.

    Before draw n the generators are seeded with n and one number from the given generator. So several ranks can share
    the draws, and the sums over ranks equal the sums of a single process up to rounding.

    Args:
        objective: an objective that estimates the softmax.
        rows: the audited rows.
        batches: an endless iterator over training batches.
        draws: number of draws n for each row; an average if batches are built within groups.
        known_positives: items that training masks for a row; None masks only its own positive.
        generator: random generator of the proposals; None for torch's.
        ranks: the processes that share the draws; all of them must call this with equal arguments and random
            states.

    Raises:
        InputError: the objective does not estimate the softmax, or `draws` is less than 2.
    """
    if not estimates_softmax(objective):
        raise InputError(
            "audit: this objective does not estimate the full softmax; its gradient has a different target"
        )
    if draws < 2:
        raise InputError(f"draws: expected at least 2, found {draws}")
    training = objective.training
    objective.eval()  # `follow` updates the state, because an audited row is not a training step
    totals, units = _Totals(objective, rows), rows.units()
    if not depends_on_batch(objective.pool) and rows.groups is None:
        batches = itertools.repeat(next(batches))  # the candidates do not depend on it
    ranks = ranks or Communicator()
    start = int(torch.randint(1 << 62, (), generator=generator))
    state = torch.get_rng_state()
    try:
        for number, (unit, batch) in enumerate(_assigned(objective.pool, rows, units, batches, draws * len(units))):
            if number % ranks.size != ranks.rank:
                continue
            seed = mixed(start, number)
            for random in (torch.default_generator, generator):
                if random is not None:
                    random.manual_seed(seed)
            drawn = _draw(objective, rows, units[unit], batch, known_positives=known_positives, generator=generator)
            totals.add(units[unit], unit, drawn)
        totals.flush()
    finally:
        torch.set_rng_state(state)  # equal on all ranks, whatever each has drawn
        objective.train(training)
    totals.share(ranks)
    return totals.result()


def mixed(start: int, number: int) -> int:
    """Mix two numbers into the seed of one draw, a non-negative int64."""
    hashed = mix64(np.array([start + number], dtype=np.uint64) * GOLDEN)
    return int(hashed[0] >> np.uint64(1))


def follow(pool: Pool, batch: Batch, *, drawn: bool) -> None:
    """Update the state of a pool as a training step does: frequencies before the draw, memories after it."""
    if not drawn:
        for frequency in pool.frequencies():
            frequency.observe(batch.items, batch.group)
        return
    for member in pool.members():
        if isinstance(member, CrossBatchMemory):
            member.remember(batch.items, batch.group, epoch=batch.epoch, windows=batch.windows)


def units_of(batch: Batch) -> Tensor:
    """Return the number of each row's unit (the row itself, its sequence or its question), int64 [B], from 0 up."""
    if batch.asked is not None:
        return batch.asked.of
    if batch.sequences is not None:
        return (batch.sequences.positions[batch.sequences.rows] == 0).cumsum(0) - 1
    return torch.arange(len(batch))


def _assigned(
    pool: Pool, rows: AuditedRows, units: list[Tensor], batches: Iterator[Batch], total: int
) -> Iterator[tuple[int, Batch]]:
    """Pair units with batches in turn; if batches have groups, a batch is paired with a unit of its group.

    A memory holds rows of the current epoch and must not contain the audited row. After its own batch, an audited row
    is therefore not paired again before the next epoch.
    """
    first = torch.stack([unit[0] for unit in units])
    queues: dict[int | None, list[int]] = {None: list(range(len(units)))}
    if rows.groups is not None:
        for unit, group in enumerate(rows.groups[first].tolist()):
            queues.setdefault(group, []).append(unit)
    turn = dict.fromkeys(queues, 0)
    remembers = any(isinstance(member, CrossBatchMemory) for member in pool.members())
    gone, epoch, done = torch.zeros(len(units), dtype=torch.bool), None, 0
    for attempt, batch in enumerate(batches):
        if done == total or attempt == 20 * total:
            return
        follow(pool, batch, drawn=False)
        if batch.epoch != epoch:
            gone, epoch = torch.zeros_like(gone), batch.epoch
        queue = queues.get(batch.group, [])
        for _ in range(len(queue)):
            unit = queue[turn[batch.group] % len(queue)]
            turn[batch.group] += 1
            if not bool(gone[unit]):
                yield unit, batch
                done += 1
                break
        follow(pool, batch, drawn=True)
        if remembers:
            gone |= _are_in(rows, first, batch)


def _are_in(rows: AuditedRows, chosen: Tensor, batch: Batch) -> Tensor:
    """Return whether each chosen audited row is in a batch, bool [len(chosen)]."""
    if batch.asked is not None and rows.queries is not None:
        return torch.isin(rows.queries[chosen], batch.queries)
    if rows.numbers is None:
        return torch.zeros(len(chosen), dtype=torch.bool)
    return torch.isin(rows.numbers[chosen], batch.rows)


def _draw(
    objective: Objective,
    rows: AuditedRows,
    unit: Tensor,
    batch: Batch,
    *,
    known_positives: KnownPositives | None,
    generator: torch.Generator | None,
) -> list[Block]:
    """Draw the candidates of an audited row, or of the rows of a question, with `draw_blocks`."""
    count, items = len(unit), rows.positives[unit]
    if depends_on_batch(objective.pool):  # otherwise the other rows have no effect
        items = torch.cat([items, batch.items[~_replaced(rows, unit, batch)]])
    if objective.rows_per_draw is not None:
        items = items[: -(-count // objective.rows_per_draw) * objective.rows_per_draw]
    queries = torch.full_like(unit, -1) if rows.queries is None else rows.queries[unit]
    slates = None if rows.passed_over is None else rows.passed_over[unit]
    own = replace(batch, queries=queries, passed_over=slates)
    return draw_blocks(objective, own, items, slice(0, count), known_positives=known_positives, generator=generator)


def _replaced(rows: AuditedRows, unit: Tensor, batch: Batch) -> Tensor:
    """Choose the row, sequence or question of a batch that the audited one replaces, bool [B].

    If the batch contains the audited row, the row replaces itself. Otherwise it replaces the first row or question,
    because they are in random order, or a random sequence, because sequences are ordered by length.
    """
    units = units_of(batch)
    if batch.asked is not None and rows.queries is not None:
        own = units[batch.queries == rows.queries[unit[0]]]
    else:
        own = units[:0] if rows.numbers is None else units[batch.rows == rows.numbers[unit[0]]]
    place = own[:1] if len(own) else units[:1]
    if not len(own) and batch.sequences is not None:
        place = torch.randint(int(units[-1]) + 1, (1,))
    return units == place


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
    """Sums over the draws, for rows and for questions: gradients [R, N], d = ||g_hat - g||^2, and d^2."""

    def __init__(self, objective: Objective, rows: AuditedRows) -> None:
        self.objective, self.rows = objective, rows
        self.exact = rows.exact_gradient()
        self.norm = self.exact.norm(dim=1)
        self.gradient = torch.zeros_like(rows.logits)
        self.log_partition = torch.logsumexp(rows.target_logits(), 1)
        sums = torch.zeros(6, len(rows), dtype=torch.float64)
        self.squares, self.fourths, self.distinct, self.effective, self.draws, self.weight = sums
        self.partition = torch.zeros(2, len(rows), dtype=torch.float64)
        self.of_questions = torch.zeros(2, len(rows.units()), dtype=torch.float64)
        self.waiting: list[tuple[int, Candidates]] = []
        self.number_of_draws = 0
        #: Draw and question of each waiting row, and its share in the question's loss.
        self.asked: list[tuple[int, int, float]] = []
        #: Draw -> its question, and the weighted sum of g_hat - g over its rows so far flushed, [N].
        self.begun: dict[int, tuple[int, Tensor]] = {}

    def add(self, unit: Tensor, number: int, blocks: list[Block]) -> None:
        """Add one draw of a row, or of all rows of a question."""
        self.number_of_draws += 1
        if self.rows.questions is None:
            self.waiting.append((int(unit[0]), blocks[0].candidates))
            self._flush_if_full()
            return
        shares = self.rows.shares(unit)
        for block in blocks:
            # The rows of a block are consecutive rows of the question.
            for place, row in enumerate(block.of(unit).tolist()):
                self.waiting.append((row, block.candidates.row(place)))
                self.asked.append((self.number_of_draws, number, float(shares[unit == row])))
                self._flush_if_full()

    def _flush_if_full(self) -> None:
        width = sum(len(part.items) for _, part in self.waiting)
        if len(self.waiting) == _DRAWS or len(self.waiting) * width >= _CELLS:
            self.flush()

    def flush(self) -> None:
        """Run the loss on the collected draws and add their gradients to the sums."""
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
        gradient, own_gradient = self._gradients(row, drawn, scores, own)

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
        if self.asked:
            place = torch.cat([of_key, torch.arange(count)])
            item = torch.cat([key % number, drawn.positives])
            self._add_questions(row, place, item, torch.cat([merged, own_gradient]))
        self.squares.index_add_(0, row, squares)
        self.fourths.index_add_(0, row, squares**2)
        self.draws.index_add_(0, row, torch.ones_like(own))
        self.distinct.index_add_(0, row, torch.zeros_like(own).index_add_(0, of_key, torch.ones_like(merged)))
        ratio = torch.zeros_like(own).index_add_(0, of, torch.exp(log_weight - self.log_partition[row][of]))
        ratio += torch.exp(self.rows.logits[row, drawn.positives] - self.log_partition[row])
        self.partition.index_add_(1, row, torch.stack([ratio, ratio**2]))
        largest = torch.full_like(own, -torch.inf).scatter_reduce(0, of, log_weight, "amax")
        weight = torch.exp(log_weight - largest[of])
        first, second = (torch.zeros_like(own).index_add_(0, of, weight**power) for power in (1, 2))
        self.effective.index_add_(0, row, torch.where(second > 0, first**2 / second, 0.0))

    def _add_questions(self, row: Tensor, place: Tensor, item: Tensor, gradient: Tensor) -> None:
        """Add g_hat - g of the flushed rows to their draws, weighted by share; `gradient` is g_hat at (place, item)."""
        numbers, questions, shares = zip(*self.asked, strict=True)
        self.asked = []
        draws, draw = torch.unique(torch.tensor(numbers), return_inverse=True)
        share = torch.tensor(shares, dtype=torch.float64)
        difference = torch.zeros(len(draws), self.exact.shape[1], dtype=torch.float64)
        difference.index_put_((draw[place], item), share[place] * gradient, accumulate=True)
        difference.index_add_(0, draw, -share[:, None] * self.exact[row])
        question_of = dict(zip(numbers, questions, strict=True))
        for one, part in zip(draws.tolist(), difference, strict=True):
            before = self.begun.get(one)
            self.begun[one] = (question_of[one], part if before is None else before[1] + part)
        self._close_questions(self.number_of_draws)  # rows of the last draw may be missing

    def _close_questions(self, end: int) -> None:
        """Add ||g_hat - g||^2 of each draw before `end` to the sums of its question."""
        for draw in [one for one in self.begun if one < end]:
            question, difference = self.begun.pop(draw)
            distance = difference.square().sum()
            self.of_questions[:, question] += torch.stack([distance, distance**2])

    def _gradients(self, row: Tensor, drawn: Candidates, scores: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients with respect to the logits of the negatives and of the positives."""
        scores, own = scores[:, None].requires_grad_(), own[:, None].requires_grad_()
        shared = scores[: len(drawn.items)]
        per_row = None if drawn.row_items is None else scores[len(drawn.items) :].reshape(*drawn.row_items.shape, 1)
        embedded = Embedded(torch.ones_like(own), own, shared, per_row)
        loss = self.objective(embedded, drawn, temperature=1.0)
        with torch.enable_grad():
            of_scores, of_own = torch.autograd.grad(loss.sum(), [scores, own])
        if isinstance(self.objective, RefinedLogQ):
            weight = self.objective.row_weight(embedded, drawn, temperature=1.0).detach()
            self.weight.index_add_(0, row, weight.double())
        return of_scores[:, 0], of_own[:, 0]

    def share(self, ranks: Communicator) -> None:
        """Add up the sums of all ranks, after the last `flush`."""
        self._close_questions(self.number_of_draws + 1)
        for sums in (self.gradient, self.squares, self.fourths, self.distinct, self.effective, self.draws, self.weight):
            ranks.sum_in_place(sums)
        for sums in (self.partition, self.of_questions):
            ranks.sum_in_place(sums)

    def result(self) -> Measurement:
        """Return the measurement of the rows, and of the questions if there are any."""
        draws, mean = self.draws, self.gradient / self.draws[:, None]
        each = torch.stack([self.squares, self.fourths, self.distinct / draws, self.effective / draws])
        ratio, square = self.partition / draws
        error = ((square - ratio**2).clamp(min=0.0) / (draws - 1.0)).sqrt()
        each = torch.cat([each, torch.stack([ratio, error])])
        if not isinstance(self.objective, SampledSoftmax):
            each[4:] = math.nan
        found = _measurement(mean, self.exact, draws, each)
        if isinstance(self.objective, RefinedLogQ):
            found = replace(found, weight=self.weight / draws)
        if self.rows.questions is None:
            return found
        units = self.rows.units()

        def joined(values: Tensor) -> Tensor:
            return torch.stack([self.rows.shares(unit) @ values[unit] for unit in units])

        values = (found.distinct, found.effective, found.partition, found.partition_error)
        each = torch.stack([*self.of_questions, *(joined(value) for value in values)])
        first = torch.stack([unit[0] for unit in units])
        return replace(found, together=_measurement(joined(mean), joined(self.exact), draws[first], each))


def _measurement(mean: Tensor, exact: Tensor, draws: Tensor, each: Tensor) -> Measurement:
    """Compute a measurement from mean gradients [R, N]; `each` [6, R] has the sums of d and d^2, then four means."""
    squares, fourths, distinct, effective, partition, partition_error = each
    norm = exact.norm(dim=1)
    bias = (mean - exact).norm(dim=1)
    # E||g_hat - E g_hat||^2 with Bessel's correction; NaN for n < 2, where nothing was measured.
    variance = (squares - draws * bias**2).clamp(min=0.0) / (draws - 1.0)
    scatter = (fourths - squares**2 / draws).clamp(min=0.0) / (draws - 1.0)
    unmeasured = draws < 2
    variance, scatter = variance.masked_fill(unmeasured, math.nan), scatter.masked_fill(unmeasured, math.nan)
    return Measurement(
        bias=bias / norm,
        noise=(variance / draws).sqrt() / norm,
        spread=variance.sqrt() / norm,
        spread_error=(scatter / draws).sqrt() / norm**2,
        distinct=distinct,
        effective=effective,
        draws=draws,
        partition=partition,
        partition_error=partition_error,
    )
