"""Batches of questions: some rows of a query are its history, and several later or hidden items are the targets.

In next-item training, row i is predicted from everything before it. An evaluation, however, predicts any item in a span
of time after a cut or, for rows without an order, items left out at random. These batches train for the second task.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from twotower.data.interactions import Interactions
from twotower.data.loading.batches import Asked, Batch, EncodedRows, context_rows, mean_weight, row_times
from twotower.data.loading.histories import PAD, first_at, gather_histories, take_ranges
from twotower.data.loading.packing import ItemUnits, Windows
from twotower.data.loading.sequences import shares_of
from twotower.data.loading.shuffle import EpochPosition, Shuffle, require_at_least
from twotower.data.loading.slates import Slates
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError
from twotower.hashing import mix64

#: Minimum number of steps in an epoch, if there are enough questions.
STEPS = 50
#: Number of questions whose rows are used to estimate the mean weight, with an error below 1 %.
SAMPLE = 10_000
#: Number of rows whose expected counts are computed at a time.
BLOCK = 1_000_000

#: Message for a tower with a history if all rows would be targets.
NO_HISTORY = "training.hidden_share: 1 leaves no item for the history; use a share below 1, or query_tower.history=null"

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class QuestionRule:
    """The rule that builds questions from a query's rows.

    Attributes:
        kind: "horizon": the history is everything before a cut, and the targets are the rows in a span that starts at
            the cut. "set": a random part of the rows is the history, and the other rows are the targets.
        horizon: length H of the span in microseconds, for "horizon".
        share: probability that a row is a target, for "set". With 1, all rows are targets and there is no history.
        weight: a; a question with m targets has weight m^a in the loss, and each target m^(a-1). With 1, all targets
            have equal weight; with 0, all questions do.
        new_only: whether only the first occurrence of an item in a query's rows can be a target, because rankings
            exclude the items of the history. For "set", repeats are omitted from the history too.
    """

    kind: Literal["horizon", "set"]
    horizon: int = 0
    share: float = 0.5
    weight: float = 0.5
    new_only: bool = True


class QuestionBatches(EpochPosition):
    """Batches of one question per query, drawn again in each epoch; the targets of a question share a query embedding.

    horizon: one row is drawn from the possible targets later than the query's first timestamp, and the cut is at the
    timestamp of this row. The history is all rows before the cut; the targets are the rows within [cut, cut + H). Rows
    with the same timestamp are never separated.

    set: each row is independently a target with probability `share`. If there is then no target, a random row becomes
    one; if there is no history, a random row becomes the history, unless `share` is 1.

    Every batch has the same number of questions, drawn without replacement, so in-batch candidates from a different
    question have a known expected count (`item_counts`, `Batch.windows`), as in `SequenceBatches`; the items of a
    row's own query must be masked. The number of rows varies.

    Args:
        interactions: the training interactions.
        batch_size: B, average number of rows in a batch; reduced if an epoch would have fewer than 50 batches.
        rule: the rule that builds the questions.
        history_length: L, 0 for no history.
        seed: 0 or more.
        rows: ascending numbers of the rows that may be targets; None for all rows. Other rows occur only in histories.
        ranks: the processes; each gets whole questions, with about equal numbers of rows. `batch_size` is the total.
        context: the encoded context of all interactions (`encode_context`), or None. A question has the context of its
            first target.
        slates: the slates of all interactions, or None.

    Raises:
        InputError: the rule is "horizon" and there are no timestamps, no query can form a question, all weights are 0,
            or a setting is out of range.
    """

    def __init__(
        self,
        interactions: Interactions,
        batch_size: int,
        rule: QuestionRule,
        *,
        history_length: int = 0,
        seed: int = 0,
        rows: Rows | None = None,
        ranks: Communicator | None = None,
        context: EncodedRows | None = None,
        slates: Slates | None = None,
    ) -> None:
        require_at_least(batch_size=(batch_size, 1), history_length=(history_length, 0), seed=(seed, 0))
        if not 0 < rule.share <= 1 or (rule.kind == "horizon" and rule.horizon < 1):
            raise InputError(
                f"training.question: share {rule.share}, horizon {rule.horizon} microseconds; expected a share above 0 "
                "and at most 1, and a horizon above 0."
            )
        if rule.kind == "set" and rule.share == 1 and history_length:
            raise InputError(NO_HISTORY)
        if rule.kind == "horizon" and interactions.timestamps is None:
            raise InputError(
                "training.question: horizon needs timestamps; name the column (data.columns.timestamp), or use set"
            )
        self.interactions, self.rule, self.history_length, self.seed = interactions, rule, history_length, seed
        self.context, self.slates, self.ranks = context, slates, ranks or Communicator()
        can = np.ones(len(interactions), dtype=np.bool_)
        if rule.new_only:
            can = first_occurrences(interactions)
        self._pool = np.flatnonzero(can) if rule.kind == "set" else np.empty(0, dtype=np.int64)
        if rows is not None:
            learnt = np.zeros(len(interactions), dtype=np.bool_)
            learnt[rows] = True
            can &= learnt
        if rule.kind == "horizon":
            times, starts = interactions.timestamps, np.asarray(interactions.offsets[:-1])
            assert times is not None
            sizes = np.diff(interactions.offsets)
            opening = np.repeat(np.asarray(times)[np.minimum(starts, max(len(interactions) - 1, 0))], sizes)
            can &= np.asarray(times) > opening
        self._targets = np.flatnonzero(can)
        offsets = np.asarray(interactions.offsets)
        #: The possible targets of query q are `_targets[_runs[q] : _runs[q + 1]]`. For set, the rows to divide into
        #: history and targets are `_pool[_pools[q] : _pools[q + 1]]`.
        self._runs = np.searchsorted(self._targets, offsets)
        self._pools = np.searchsorted(self._pool, offsets) if rule.kind == "set" else offsets
        some = np.diff(self._runs) > 0
        if rule.kind == "set" and rule.share < 1:
            some &= np.diff(self._pools) > 1
        self.queries = np.flatnonzero(some).astype(np.int64)
        if not len(self.queries):
            raise InputError(
                f"training.question: {rule.kind}: no query has rows for a history and for a target; use "
                "training.question=next"
            )
        counts, rows_per_epoch = self._expected()
        self._counts, self.rows_per_epoch = counts, rows_per_epoch
        self._holding = None if rule.new_only else ItemUnits(self.question_counts)
        mean = rows_per_epoch / len(self.queries)
        most = len(self.queries) // STEPS
        # At least two, so that a row has in-batch candidates from a different question.
        self.questions_per_batch = min(max(min(round(batch_size / mean), most), 2), len(self.queries))
        self.epoch, self.position = 0, 0
        self.mean_weight = 1.0
        found = self.batch_of_all(SAMPLE).weights
        # If nearly all rows have weight 0, a sample may contain only such rows.
        self.mean_weight = mean_weight(found if found is not None and bool(found.any()) else interactions.weights)

    def __len__(self) -> int:
        """Return the number of batches in an epoch; remaining questions that do not fill a batch are omitted."""
        return len(self.queries) // self.questions_per_batch

    def item_counts(self) -> NDArray[np.float64]:
        """Return the expected number of rows of an epoch that have each item as a target, [N].

        Without `new_only`, an item can be a target of a question twice; `Windows.holding` then counts questions.
        """
        return self._counts

    def question_counts(self) -> NDArray[np.float64]:
        """Return the expected number of questions of an epoch that have each item as a target, once or several times.

        horizon: a query draws each of its E eligible rows d with probability 1/E. Row r is the *first* target with its
        item if the span of d contains r and begins after the previous eligible row of the item.

        set: if k of the query's n rows have the item, with m possible targets and s = share,

            P = 1 - (1-s)^k + (1-s)^m k / m - [m = n, k = 1, s < 1] s^n / n.

        Returns:
            The expected numbers, float64 [N].
        """
        data, targets = self.interactions, self._targets
        offsets, items = np.asarray(data.offsets), np.asarray(data.item_codes)[targets].astype(np.int64)
        queries = np.searchsorted(offsets, targets, side="right") - 1
        runs = np.diff(self._runs)[queries]
        counts = np.zeros(data.num_items)
        keys = queries * data.num_items + items
        if self.rule.kind == "set":
            _, first, copies = np.unique(keys, return_index=True, return_counts=True)
            able = np.isin(queries[first], self.queries)
            first, k = first[able], copies[able].astype(np.float64)
            s, m, n = self.rule.share, runs[first].astype(np.float64), np.diff(self._pools)[queries[first]]
            chance = 1 - (1 - s) ** k + (1 - s) ** m * k / m - ((m == n) & (k == 1) & (s < 1)) * s**n / n
            np.add.at(counts, items[first], chance)
            return counts
        order = np.argsort(keys, kind="stable")
        before = np.full(len(targets), -1, dtype=np.int64)
        again = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
        before[order[again + 1]] = targets[order[again]]
        begin, end = self._span(targets, queries)
        # `begin` and `end` ascend, so the rows d whose spans contain r are consecutive; the first span ends after r.
        low = np.maximum(np.searchsorted(end, targets, side="right"), np.searchsorted(begin, before, side="right"))
        high = np.searchsorted(begin, targets, side="right")
        np.add.at(counts, items, np.maximum(high - low, 0) / runs)
        return counts

    def _fixed(self) -> dict[str, int]:
        return {
            "questions_per_batch": self.questions_per_batch,
            "questions": len(self.queries),
            "rows": len(self.interactions),
            "horizon": self.rule.horizon,
        }

    def __iter__(self) -> Iterator[Batch]:
        shuffle, epoch = Shuffle(len(self.queries), self.seed, self.epoch), self.epoch
        size = self.questions_per_batch

        def make(position: int) -> Batch:
            return self.batch(shuffle(np.arange(position * size, (position + 1) * size)), epoch)

        yield from self.rest(make, len(self))

    def batch(self, numbers: Rows, epoch: int = 0) -> Batch:
        """Build this rank's part of the batch with these questions, given as positions in `queries`, int64 [S].

        The concatenated rows of all ranks are the rows that a single process would have.
        """
        data = self.interactions
        queries = self.queries[numbers]
        rows, offsets, history = (
            self._horizon(queries, epoch) if self.rule.kind == "horizon" else self._set(queries, epoch)
        )
        own, sizes = shares_of(np.diff(offsets), self.ranks)
        rows, offsets = rows[offsets[own.start] : offsets[own.stop]], offsets[own.start : own.stop + 1]
        counts, queries = np.diff(offsets), queries[own]
        of = np.repeat(np.arange(len(queries)), counts)
        weights = counts.astype(np.float32)[of] ** np.float32(self.rule.weight - 1.0)
        if data.weights is not None:
            weights *= np.asarray(data.weights)[rows]
        firsts = rows[offsets[:-1] - offsets[0]] if len(queries) else rows
        return Batch(
            rows=torch.from_numpy(rows),
            queries=torch.from_numpy(queries[of]),
            items=torch.from_numpy(np.asarray(data.item_codes)[rows].astype(np.int64)),
            history=torch.from_numpy(history[own]),
            weights=torch.from_numpy(weights),
            groups=None if data.groups is None else torch.from_numpy(np.asarray(data.groups)[rows].astype(np.int64)),
            total=sum(sizes),
            sizes=sizes,
            context=context_rows(self.context, firsts),
            epoch=epoch,
            mean_weight=self.mean_weight,
            passed_over=None if self.slates is None else self.slates.of(rows),
            times=row_times(data, rows),
            asked=Asked(
                torch.from_numpy(queries),
                torch.from_numpy(of),
                Windows(len(numbers), len(self.queries), self.rows_per_epoch, self._holding),
            ),
        )

    def batch_of_all(self, count: int) -> Batch:
        """Build a batch of up to `count` questions of epoch 0, spread over the queries; every rank gets all of it."""
        numbers = np.linspace(0, len(self.queries) - 1, count).astype(np.int64)
        ranks, self.ranks = self.ranks, Communicator()
        try:
            return self.batch(np.unique(numbers))
        finally:
            self.ranks = ranks

    def _horizon(self, queries: Rows, epoch: int) -> tuple[Rows, Rows, Rows]:
        """Draw the cut of each query; return the target rows, their offsets [S+1], and the histories [S, L]."""
        data, starts = self.interactions, self._runs[queries]
        drawn = self._targets[
            starts + (self._random(queries, epoch, 0) * (self._runs[queries + 1] - starts)).astype(np.int64)
        ]
        begin, end = self._span(drawn, queries)
        history = gather_histories(data.offsets, data.item_codes, queries, begin, self.history_length)
        low, high = np.searchsorted(self._targets, begin), np.searchsorted(self._targets, end)
        places, offsets = take_ranges(low, high)
        return self._targets[places], offsets, history

    def _span(self, rows: Rows, queries: Rows) -> tuple[Rows, Rows]:
        """Return, for each row, the first row of its query at the same time, and the end of the span [cut, cut + H)."""
        times, offsets = self.interactions.timestamps, np.asarray(self.interactions.offsets)
        assert times is not None
        cut = np.asarray(times[rows])
        first, last = offsets[queries], offsets[queries + 1]
        return first_at(times, first, rows, cut), first_at(times, rows, last, cut + self.rule.horizon)

    def _set(self, queries: Rows, epoch: int) -> tuple[Rows, Rows, Rows]:
        """Divide each query's rows at random; return the target rows, their offsets [S+1], and the histories [S, L]."""
        places, offsets = take_ranges(self._pools[queries], self._pools[queries + 1])
        rows, of = self._pool[places], np.repeat(np.arange(len(queries)), np.diff(offsets))
        number = self._random(rows, epoch, 1)
        may = self._is_target(rows)
        hidden = may & (number < self.rule.share)
        tie = np.arange(len(rows))
        # Without a target, the row with the smallest number becomes one; without a history, the one with the largest.
        order = np.lexsort((tie, np.where(may, number, 2.0), of))
        smallest = order[offsets[:-1]]
        hidden[smallest[np.add.reduceat(hidden, offsets[:-1]) == 0]] = True
        if self.rule.share < 1:
            order = np.lexsort((tie, number, of))
            largest = order[offsets[1:] - 1]
            hidden[largest[np.add.reduceat(~hidden, offsets[:-1]) == 0]] = False
        kept = ~hidden
        history = np.full((len(queries), self.history_length), PAD, dtype=np.int64)
        if self.history_length:
            back = np.cumsum(kept[::-1])[::-1]  # number of kept rows from here to the end
            after = np.concatenate([back, [0]])[offsets[1:]]
            column = self.history_length - (back - after[of])
            shown = kept & (column >= 0)
            history[of[shown], column[shown]] = np.asarray(self.interactions.item_codes)[rows[shown]]
        sizes = np.add.reduceat(hidden, offsets[:-1]).astype(np.int64)
        return rows[hidden], np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), history

    def _is_target(self, rows: Rows) -> NDArray[np.bool_]:
        place = np.minimum(np.searchsorted(self._targets, rows), len(self._targets) - 1)
        found: NDArray[np.bool_] = self._targets[place] == rows
        return found

    def _random(self, numbers: Rows, epoch: int, stream: int) -> NDArray[np.float64]:
        """Compute a pseudo-random value in [0, 1) for each number, with splitmix64 keyed by seed and epoch."""
        key = np.random.SeedSequence([self.seed, epoch, 2 + stream]).generate_state(1, np.uint64)[0]
        return (mix64(numbers.astype(np.uint64) + key) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def _expected(self) -> tuple[NDArray[np.float64], float]:
        """Compute the probability that each row is a target of its query's question, summed per item and in total.

        horizon: each of the E_q eligible rows of a query is drawn with probability 1/E_q, and row r is a target if the
        span of the drawn row contains it. set: with n rows, m of them possible targets, and s = share,

            P(target) = s + (1-s)^m / m - [m = n, s < 1] s^n / n.
        """
        data = self.interactions
        counts = np.zeros(data.num_items)
        offsets = np.asarray(data.offsets)
        runs = np.diff(self._runs)
        able = np.zeros(data.num_queries, dtype=np.bool_)
        able[self.queries] = True
        if self.rule.kind == "set":
            s, m, n = self.rule.share, np.maximum(runs, 1).astype(np.float64), np.diff(self._pools).astype(np.float64)
            each = np.where(able, s + (1 - s) ** m / m - ((m == n) & (s < 1)) * s**n / np.maximum(n, 1), 0.0)
            chance = np.repeat(each, runs)
        else:
            # A difference array over the targets: +1/E at the first target of each span, -1/E after its last target.
            steps = np.zeros(len(self._targets) + 1)
            for start in range(0, len(self._targets), BLOCK):
                rows = self._targets[start : start + BLOCK]
                queries = np.searchsorted(offsets, rows, side="right") - 1
                begin, end = self._span(rows, queries)
                share = 1.0 / runs[queries]
                np.add.at(steps, np.searchsorted(self._targets, begin), share)
                np.add.at(steps, np.searchsorted(self._targets, end), -share)
            chance = np.cumsum(steps[:-1]).clip(0.0, 1.0)
        np.add.at(counts, np.asarray(data.item_codes)[self._targets], chance)
        return counts, float(chance.sum())


def first_occurrences(data: Interactions) -> NDArray[np.bool_]:
    """Return which rows are the first with their item among the rows of their query, bool [n]."""
    first = np.zeros(len(data), dtype=np.bool_)
    offsets = np.asarray(data.offsets)
    start = 0
    while start < data.num_queries:
        stop = max(int(np.searchsorted(offsets, offsets[start] + BLOCK, side="right")) - 1, start + 1)
        rows = slice(int(offsets[start]), int(offsets[stop]))
        owner = np.repeat(np.arange(stop - start, dtype=np.int64), np.diff(offsets[start : stop + 1]))
        keys = owner * data.num_items + np.asarray(data.item_codes[rows])
        first[rows.start + np.unique(keys, return_index=True)[1]] = True
        start = stop
    return first
