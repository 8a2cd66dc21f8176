"""Sources of candidates. Each source draws items and knows its own expected count for every item.

Each source defines two numbers for an item j (docs/theory.md, "One estimator: the expected count"):

    expected count   E[number of times j is among this source's candidates of a row]
    absence          P(j is not among them) = 1 - inclusion probability

A source is either *random* (in-batch, sampled from a proposal, remembered from earlier batches) or *deterministic* (the
head, the whole catalog, items stored per query). A deterministic source includes its items in every draw with kappa =
1, unless it draws some of the items of a `Stratum`; copies of its items from random sources are masked. The candidates
of a source are shared by the batch, [m], or *per row*, [B, R]. `Pool` (pool.py) adds expected counts, or multiplies
absences, and applies the masks.

The rows of a batch and of a memory are not independent draws: they are drawn without replacement from the rows (or the
whole sequences) of an epoch. `log_absence_in_epoch` computes their absence.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from twotower.data.loading.packing import Windows
from twotower.data.loading.passed_over import PassedOver
from twotower.errors import InputError
from twotower.negatives.frequency import Frequency, Group, GroupedFrequency
from twotower.negatives.masks import row_duplicates
from twotower.negatives.proposals import Proposal


@dataclass(frozen=True)
class DrawRequest:
    """The batch that candidates are drawn for: the argument of `Objective.draw`, `Pool.draw` and `Source.draw`.

    A batch may be split over processes: each process then passes the positives of the whole batch, the same generator
    state, and its own `rows`. Items and kappa are computed for the whole batch, masks for the selected rows.

    Attributes:
        positives: item of each row, int64 [B].
        queries: query of each row, int64 [B], for sources that look items up by query.
        group: the group that all rows of the batch belong to, or None for a batch drawn from all rows.
        generator: the random generator of the draw, or None for torch's default.
        windows: how the batch was drawn, if its rows are positions of whole sequences; None if single rows were drawn.
        epoch: number of the epoch that the batch belongs to, so that a memory can separate the rows of this epoch from
            rows of earlier epochs; None for data that is not read in epochs or is read only once.
        known_positives: other items that a row must not be pushed away from: int64 [B, H] padded with -1, or a pair
            (row [P], item [P]). They are masked for their row; kappa is unchanged (docs/theory.md, rule 7).
        rows: the rows for which masks and per-row candidates are made, a slice with start and stop; None for all rows.
            If set, `known_positives`, `queries` and `passed_over` cover only these rows, numbered from the first.
        passed_over: items that were shown to each row's query and passed over, for objectives that learn from them; or
            None. They change neither the draws nor kappa.
        groups: the group of each row of the whole batch, int64 [B], for a pool with a rule for eligible items.
        times: the time of each row of the whole batch in microseconds since 1970, int64 [B], for a rule with intervals.
    """

    positives: Tensor
    queries: Tensor | None = None
    group: Group | None = None
    generator: torch.Generator | None = None
    windows: Windows | None = None
    known_positives: Tensor | tuple[Tensor, Tensor] | None = None
    rows: slice | None = None
    epoch: int | None = None
    passed_over: PassedOver | None = None
    groups: Tensor | None = None
    times: Tensor | None = None

    @property
    def own_positives(self) -> Tensor:
        """The positives of the selected rows, [B] without `rows`."""
        return self.positives if self.rows is None else self.positives[self.rows]

    @classmethod
    def of(cls, request: DrawRequest | Tensor, **options: Any) -> DrawRequest:
        """Return a request with the given fields replaced; a tensor is taken as the positives."""
        return replace(request, **options) if isinstance(request, DrawRequest) else cls(request, **options)


@dataclass(frozen=True)
class Stratum:
    """The items of each row that only one source may contribute, and the items that it contributes in this draw.

    This source alone estimates the stratum's part of the partition sum, so the pool masks its items in all other
    sources.

    Attributes:
        items: all items of the stratum, int64 [B, S], -1 where empty.
        drawn: the distinct items of this draw, int64 [B, R], -1 where empty.
        log_count: log kappa of every item of the row's stratum, float64 [B]; None for kappa = 1, where all are drawn.
        skipped: items that no source may contribute, int64 [B, F], -1 where empty: they are left out of the row's sum,
            as known positives are. None if there are none.
    """

    items: Tensor
    drawn: Tensor
    log_count: Tensor | None = None
    skipped: Tensor | None = None


class Source(nn.Module, ABC):
    """A source of candidates.

    Attributes:
        unique: duplicates within the source are removed, so that the expected count is an inclusion probability.
        deterministic: its items are masked in the random sources. They are in every draw, unless the source is per
            row and draws some of the items of a `Stratum`.
        per_row: candidates belong to single rows, [B, R] with -1 for an empty slot, not to the whole batch, [m].
        varies_by_row: an item's expected count differs from row to row, for example because it depends on the row's
            positive. A pool then accepts per-row sources only: a shared candidate has one count for the whole batch.
    """

    unique: bool = False
    deterministic: bool = False
    per_row: bool = False
    varies_by_row: bool = False

    @abstractmethod
    def draw(self, request: DrawRequest) -> Tensor:
        """Draw the candidates, duplicates included, int64 [m]; [B, R] if the source is per row."""

    def stratum(self, request: DrawRequest) -> Stratum:
        """Return the stratum of the selected rows of a request, for a deterministic per-row source."""
        items = row_duplicates(self.draw(replace(request, positives=request.own_positives)))
        return Stratum(items, items)


class RandomSource(Source):
    """A source of random draws, with the expected count of every item of the catalog."""

    @abstractmethod
    def draws(self, request: DrawRequest) -> int:
        """Return the number of draws per row."""

    @abstractmethod
    def log_prob(self, items: Tensor, request: DrawRequest) -> Tensor:
        """Return the log probability that one draw is the item, float64, the shape of `items`."""

    def epoch_draws(self, request: DrawRequest) -> int:
        """Return how many rows, or whole sequences, of the current epoch this source contains; 0 if it draws none."""
        del request
        return 0

    def log_absence(self, items: Tensor, request: DrawRequest, already: int = 0) -> Tensor:
        """Return the log probability that no draw is item j, float64, the shape of `items`.

        For independent draws it is log (1 - q_j)^n.

        Args:
            items: codes, int64, any shape.
            request: the batch.
            already: number of rows, or whole sequences, of the current epoch that other sources of the pool contain.
                The probability is conditional on the item being in none of them. Independent draws ignore it.
        """
        del already
        return log_absence_after(self.draws(request), self.log_prob(items, request))

    def log_expected_count(self, items: Tensor, request: DrawRequest) -> Tensor:
        """Return log kappa_j of this source alone: log(n q_j), or log(1 - (1-q_j)^n) if the source is unique."""
        if self.unique:
            return log_complement(self.log_absence(items, request))
        draws = self.draws(request)
        return log_or_infinite(draws) + self.log_prob(items, request)


def log_complement(log_probability: Tensor) -> Tensor:
    """Compute log(1 - exp(x)) for x <= 0, accurate at both ends; -inf at x = 0."""
    # Mächler (2012): expm1 is accurate where exp(x) is near 1, log1p where it is near 0.
    near_one = log_probability > -math.log(2.0)
    return torch.where(
        near_one,
        torch.log(-torch.expm1(log_probability)),
        torch.log1p(-torch.exp(log_probability)),
    )


def log_absence_after(draws: int, log_prob: Tensor) -> Tensor:
    """Compute log (1 - q)^n = n log1p(-q): the item is in none of n independent draws, float64."""
    # With q = 1 and no draws the formula would be 0 * -inf; nothing is drawn, so the item is absent: log 1.
    if draws <= 0:
        return torch.zeros_like(log_prob)
    return draws * torch.log1p(-torch.exp(log_prob))


#: For smaller arguments Stirling's series is not precise enough.
_STIRLING = 10.0


def log_absence_in_epoch(draws: int, count: Tensor, others: float) -> Tensor:
    """Compute log [ C(m-c, n) / C(m, n) ]: n draws without replacement from m rows miss all c rows with the item.

    By symmetry this is sum_{i<c} log(1 - n / (m-i)). With gamma functions, at m = 10^8, all digits would cancel; here
    the large terms of Stirling's series are subtracted by hand. With u = n/m, v = c/m, w = 1-u-v:

        m [ v log(1-u) + u log(1-v) - w log(1 - u v / ((1-u)(1-v))) ] + log(1 + u v / w) / 2 + r(m-n) - r(mw) - r(m)
        + r(m-c),        r(z) = 1/(12 z) - 1/(360 z^3) + 1/(1260 z^5)

    Args:
        draws: number of draws, n.
        count: number of rows with the item, c, float64, any shape; not necessarily whole, since it may be an estimate.
        others: number of rows to draw from, m.

    Returns:
        float64, the shape of `count`; -inf where the item cannot be missed.
    """
    n, m = float(draws), float(others)
    if n <= 0.0:
        return torch.zeros_like(count)
    if n >= m:
        return torch.where(count > 0, -torch.inf, 0.0).to(count.dtype)
    count = count.clamp(max=m)
    left = m - n - count
    u, v, w = n / m, count / m, left.clamp(min=1e-9) / m
    log_u, log_v = math.log1p(-u), torch.log1p(-v.clamp(max=1.0 - 1e-15))
    both = u * v
    main = m * (v * log_u + u * log_v - w * torch.log1p(-both / ((1.0 - u) * (1.0 - v)).clamp(min=1e-300)))
    rest = _stirling(m - n) - _stirling(left) - _stirling(m) + _stirling(m - count)
    result = main + 0.5 * torch.log1p(both / w) + rest
    # On an accelerator, finding out whether any count needs the exact form would synchronize.
    if count.device.type == "cpu" and not bool((left < _STIRLING).any()):
        return result
    exact = torch.lgamma(m - count + 1.0) - torch.lgamma(left.clamp(min=0.0) + 1.0)
    exact = exact - (math.lgamma(m + 1.0) - math.lgamma(m - n + 1.0))
    return torch.where(left < _STIRLING, exact.masked_fill(left < 0, -torch.inf), result)


def _stirling(z: Tensor | float) -> Tensor | float:
    """Compute the correction terms of Stirling's series for log z!, for z >= 10."""
    inverse = 1.0 / (z if isinstance(z, float) else z.clamp(min=_STIRLING))
    square = inverse * inverse
    return inverse * (1.0 / 12.0 - square * (1.0 / 360.0 - square / 1260.0))


class InBatch(RandomSource):
    """The positives of the other rows, which are embedded anyway: B-1 draws from the item frequency.

    An epoch has R rows, c_j = R p_j of them with item j. The other B-1 rows of a batch are drawn without replacement
    from the other R-1 rows of the epoch. For any item j except the row's own positive these include all c_j rows:

        kappa_j = (B-1) c_j / (R-1);   without duplicates 1 - C(R-1-c_j, B-1) / C(R-1, B-1)

    B-1, not B: the row's own positive is not a draw. With rows that are independent draws (`epoch_rows` of the
    frequency is None) kappa_j = (B-1) p_j; without duplicates 1 - (1-p_j)^(B-1).

    A batch of whole sequences has S of the epoch's W sequences; w_j of the W contain item j. The rows of a row's own
    sequence are in the batch with certainty and are not draws; the other S-1 sequences are drawn without replacement:

        kappa_j = c_j (S-1) / (W-1);   without duplicates 1 - C(W-1-w_j, S-1) / C(W-1, S-1)

    This is exact for every item that the row's query never interacts with. The items that it does interact with have a
    smaller count among the other sequences, so they are masked (`Pool.draw` requires them). See docs/sequences.md.
    If a batch has S of W questions, whose targets are random, c_j and w_j are expectations. With duplicates kappa_j is
    still exact. Without duplicates, the inclusion probability is too high by at most a share of about S / (2 W), where
    S includes the questions in a memory.

    Args:
        frequency: how often each item is a positive; for grouped batches, the frequency within the group. Batches must
            be drawn from the rows that it was counted on.
        unique: remove duplicates within the batch.
    """

    def __init__(self, frequency: Frequency, *, unique: bool = False) -> None:
        super().__init__()
        self.frequency = frequency
        self.unique = unique

    def draw(self, request: DrawRequest) -> Tensor:
        """Return the positives of the batch, [B]; each row's own positive is masked as a hit, leaving B-1 per row."""
        if request.windows is not None and request.windows.drawn < 2:
            return request.positives[:0]  # no other sequence in the batch
        return request.positives

    def draws(self, request: DrawRequest) -> int:
        """Return B-1, the number of other rows."""
        return len(request.positives) - 1

    def log_prob(self, items: Tensor, request: DrawRequest) -> Tensor:
        """Return log p_j, within the group of the batch."""
        return self.frequency.log_prob(items, request.group)

    def epoch_draws(self, request: DrawRequest) -> int:
        """Return the number of other rows, or of other sequences."""
        return (len(request.positives) if request.windows is None else request.windows.drawn) - 1

    def log_absence(self, items: Tensor, request: DrawRequest, already: int = 0) -> Tensor:
        """Return the log probability that no other row, or no other sequence, has the item."""
        epoch = _Epoch.of(self.frequency, request, request.group)
        if epoch is None:
            return super().log_absence(items, request)
        draws = self.epoch_draws(request)
        epoch.check(draws + 1)
        return log_absence_in_epoch(draws, epoch.holding(items), epoch.size - 1 - already)

    def log_expected_count(self, items: Tensor, request: DrawRequest) -> Tensor:
        """Return log kappa_j over the other rows, or over the rows of the other sequences."""
        epoch = None if self.unique else _Epoch.of(self.frequency, request, request.group)
        if epoch is None:
            return super().log_expected_count(items, request)
        draws = self.epoch_draws(request)
        epoch.check(draws + 1)
        return log_or_infinite(draws / max(epoch.size - 1, 1)) + math.log(epoch.rows) + self.log_prob(items, request)


class Sampled(RandomSource):
    """Independent draws from a proposal: kappa_j = n q_j, or 1 - (1-q_j)^n if unique.

    Args:
        proposal: the distribution drawn from.
        size: n, the number of draws.
        unique: remove duplicates among the draws. The number of *tries* is still n, so the inclusion probability is
            exact.
        per_row: draw n candidates per row instead of n for the whole batch.

    Raises:
        InputError: size is negative.
    """

    def __init__(self, proposal: Proposal, size: int, *, unique: bool = False, per_row: bool = False) -> None:
        super().__init__()
        if size < 0:
            raise InputError(f"size: expected a number of draws >= 0, found {size}")
        self.proposal = proposal
        self.size = size
        self.unique = unique
        self.per_row = per_row

    def draw(self, request: DrawRequest) -> Tensor:
        """Draw `size` items from the proposal, [size] or [B, size]."""
        shape = (len(request.positives), self.size) if self.per_row else (self.size,)
        return self.proposal.sample(shape, request.generator)

    def draws(self, request: DrawRequest) -> int:
        """Return n, the number of draws."""
        del request
        return self.size

    def log_prob(self, items: Tensor, request: DrawRequest) -> Tensor:
        """Return log q_j of the proposal, float64, the shape of `items`."""
        del request
        return self.proposal.log_prob(items)


class Head(Source):
    """The H most frequent items, included in every draw: kappa = 1. With a sampled tail the estimate stays unbiased.

    Args:
        counts: training interactions of each item, [N].
        size: number of items in the head, H.

    Raises:
        InputError: size is less than 1.
    """

    deterministic = True
    items: Tensor

    def __init__(self, counts: Tensor, size: int) -> None:
        super().__init__()
        if size < 1:
            raise InputError(f"size: expected at least 1 item in the head, found {size}")
        order = torch.argsort(torch.as_tensor(counts), descending=True, stable=True)
        self.register_buffer("items", order[:size].sort().values, persistent=False)

    def draw(self, request: DrawRequest) -> Tensor:
        """Return the head, [H]."""
        del request
        return self.items


class Catalog(Source):
    """Every item of the catalog exactly once, kappa = 1: the full softmax.

    Args:
        num_items: number of items, N.
    """

    deterministic = True
    items: Tensor

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.register_buffer("items", torch.arange(num_items), persistent=False)

    def draw(self, request: DrawRequest) -> Tensor:
        """Return all items, [N]."""
        del request
        return self.items


class PerQuery(Source):
    """Items stored per query, such as observed dislikes or mined hard negatives.

    The subclasses `Observed` and `HardNegatives` (hard_negatives.py) provide the items.

    Args:
        items: int64 [Q, R], padded with -1 if a query has fewer than R items.
    """

    deterministic = True
    per_row = True
    items: Tensor

    def __init__(self, items: Tensor) -> None:
        super().__init__()
        self.register_buffer("items", items)

    def draw(self, request: DrawRequest) -> Tensor:
        """Look up the items of the rows' queries, [B, R], padded with -1.

        Raises:
            InputError: the request has no queries.
        """
        if request.queries is None:
            raise InputError("queries: this source looks up items by query; draw with queries=...")
        known = request.queries >= 0
        items = self.items[request.queries.clamp(min=0)].long()
        return items.masked_fill(~known[:, None], -1)


class Observed(PerQuery):
    """The latest `size` observed negatives of the row's query (dislikes, impressions without a click), kappa = 1.

    In a softmax, an item with kappa = 1 counts once, as in the full softmax. Its part of the partition sum is exact,
    which lowers the spread of the estimate but does not change its mean. A softmax therefore does not learn that the
    query disliked the item; `objective.feedback` and `logistic-observed` do.

    Args:
        offsets: int64 [Q+1], where each query's observed negatives begin and end in `item_codes`.
        item_codes: items of the observed negatives, grouped by query, oldest first.
        size: R, how many of a query's latest observed negatives are used.
    """

    def __init__(self, offsets: Tensor, item_codes: Tensor, size: int) -> None:
        if size < 1:
            raise InputError(f"size: expected at least 1 observed negative for each row, found {size}")
        stop = offsets[1:, None]
        place = stop - size + torch.arange(size)
        present = place >= offsets[:-1, None]
        codes = item_codes if len(item_codes) else torch.zeros(1, dtype=torch.int64)
        latest = codes[place.clamp(min=0, max=len(codes) - 1)].long()
        super().__init__(torch.where(present, latest, -1))


@dataclass(frozen=True)
class _Epoch:
    """An epoch, whose rows or whole sequences are drawn into batches without replacement.

    Attributes:
        size: R rows, or W sequences.
        rows: R, the number of rows.
        frequency: the frequency of the items in the epoch.
        request: the batch.
        group: the group that the rows belong to.
    """

    size: float
    rows: float
    frequency: Frequency
    request: DrawRequest
    group: Group | None

    @classmethod
    def of(cls, frequency: Frequency, request: DrawRequest, group: Group | None) -> _Epoch | None:
        """Return the epoch that a batch was drawn from; None if its rows are independent draws."""
        if request.windows is not None:
            return cls(request.windows.total, request.windows.rows, frequency, request, group)
        rows = frequency.epoch_rows(group)
        return None if rows is None else cls(rows, rows, frequency, request, group)

    def check(self, drawn: int) -> None:
        """Reject a batch that is larger than the epoch that it was drawn from."""
        if drawn > self.size:
            raise InputError(
                f"positives: {drawn:,} rows cannot be drawn without replacement from the {self.size:,.0f} rows "
                "that the frequency was counted on; count the rows that batches are drawn from, or pass "
                "replacement=True to CountedFrequency if the rows of a batch are independent draws"
            )

    def holding(self, items: Tensor) -> Tensor:
        """Return the number of rows, or of sequences, that contain each item, float64."""
        windows = self.request.windows
        if windows is not None and windows.holding is not None:
            return windows.holding.of(items)
        return torch.exp(self.frequency.log_prob(items, self.group)) * self.rows


def log_or_infinite(number: float) -> float:
    """Compute log x; -inf at 0."""
    return math.log(number) if number > 0 else -math.inf


@dataclass(frozen=True)
class _Remembered:
    """The rows of a memory that come from one batch: step, group and epoch of the batch, and how many rows are left."""

    step: int
    group: int
    epoch: int
    rows: int


class CrossBatchMemory(RandomSource):
    """The positives of the last M rows before the batch.

    The memory contains item codes, not embeddings: remembered items are embedded again in every step, so no embedding
    is stale and both towers get their gradient. Only the choice of items ages; `age` reports by how much.

    M_e of the M rows belong to epoch e. An epoch has R rows, c_j of them with item j. The M_e rows are drawn without
    replacement, in the current epoch from all but the row itself: m = R-1 in the current epoch, m = R in earlier ones,

        kappa_j = sum_e M_e c_j / m;   without duplicates 1 - prod_e C(m-c_j, M_e) / C(m, M_e)

    In a pool with `InBatch` the other rows of the batch are no longer among the m. The request gives the number of the
    epoch (`DrawRequest.epoch`, `Batch.epoch`). With independent rows (`epoch_rows` of the frequency is None), kappa_j =
    M p_j, or 1 - (1-p_j)^M.

    With batches of whole sequences the memory contains the last whole batches, about M rows in all, and counts
    sequences as `InBatch` does. It keeps whole batches because a part of a batch could contain parts of sequences.

    With a grouped frequency each remembered row was drawn within the group g of its own batch, not within the group of
    the current batch: kappa_j = sum_g M_g p_j^g, with M_g remembered rows of group g.

    State (items, groups, steps, epochs, fill level) is in `state_dict`, so a resumed run continues with the same
    memory.

    Args:
        frequency: how often each item is a positive.
        size: M, how many positives are remembered.
        unique: remove duplicates within the memory.

    Raises:
        InputError: size is less than 1.
    """

    items: Tensor
    groups: Tensor
    steps: Tensor
    epochs: Tensor
    state: Tensor

    def __init__(self, frequency: Frequency, size: int, *, unique: bool = False) -> None:
        super().__init__()
        if size < 1:
            raise InputError(f"size: expected at least 1 remembered item, found {size}")
        self.frequency = frequency
        self.size = size
        self.unique = unique
        # Oldest first, unused places at the end. The other buffers are only filled when the state is saved: a draw uses
        # the Python numbers in `_batches`, so that it never synchronizes with a device.
        self.register_buffer("items", torch.zeros(size, dtype=torch.int64))
        for name in ("groups", "steps", "epochs"):
            self.register_buffer(name, torch.zeros(size, dtype=torch.int64))
        self.register_buffer("state", torch.zeros(3, dtype=torch.int64))
        self._batches: deque[_Remembered] = deque()
        self._filled, self._step = 0, 0
        self.register_state_dict_pre_hook(_store)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_fit_buffers)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_restore)  # type: ignore[no-untyped-call]

    def draw(self, request: DrawRequest) -> Tensor:
        """Return the remembered items, [M] or fewer at the start; call `remember` after the draw."""
        del request
        return self.items[: self._filled].clone()

    def remember(
        self,
        positives: Tensor,
        group: Group | None = None,
        *,
        epoch: int | None = None,
        windows: Windows | None = None,
    ) -> None:
        """Store the positives of a finished draw in place of the oldest ones; arguments as in `DrawRequest`."""
        self._batches.append(_Remembered(self._step, 0 if group is None else int(group), epoch or 0, len(positives)))
        self._step += 1
        held = self._filled + len(positives)
        if windows is None:
            surplus = held - self.size
            while surplus > 0:
                oldest = self._batches.popleft()
                if oldest.rows > surplus:
                    self._batches.appendleft(replace(oldest, rows=oldest.rows - surplus))
                surplus -= oldest.rows
        else:
            batches = max(round(self.size * windows.total / (windows.drawn * windows.rows)), 1)
            while len(self._batches) > batches:
                self._batches.popleft()
        filled = sum(batch.rows for batch in self._batches)
        items = torch.cat([self.items[: self._filled], positives])[held - filled :]
        self.items = torch.nn.functional.pad(items, (0, max(self.size - filled, 0)))
        self._filled = filled

    @property
    def age(self) -> float:
        """Mean age of the remembered items, in steps; 0 while the memory is empty."""
        total = sum(batch.rows * (self._step - batch.step) for batch in self._batches)
        return total / self._filled if self._filled else 0.0

    def draws(self, request: DrawRequest) -> int:
        """Return the number of remembered positives."""
        del request
        return self._filled

    def epoch_draws(self, request: DrawRequest) -> int:
        """Return the number of remembered rows, or sequences, of the current epoch and group."""
        return self._parts(request).get(self._key(request), 0)

    def log_prob(self, items: Tensor, request: DrawRequest) -> Tensor:
        """Return log p_j; with a grouped frequency, p_j is the mean over the groups of the remembered rows."""
        rows: dict[int, int] = {}
        for batch in self._batches:
            rows[batch.group] = rows.get(batch.group, 0) + batch.rows
        if not isinstance(self.frequency, GroupedFrequency) or not rows:
            return self.frequency.log_prob(items, request.group)
        parts = [self.frequency.log_prob(items, group) + math.log(n / self._filled) for group, n in rows.items()]
        return torch.logsumexp(torch.stack(parts), 0)

    def log_absence(self, items: Tensor, request: DrawRequest, already: int = 0) -> Tensor:
        """Return the log probability that no remembered row has item j, float64, the shape of `items`."""
        absence = torch.zeros(items.shape, dtype=torch.float64, device=items.device)
        for (number, group), draws in self._parts(request).items():
            epoch = _Epoch.of(self.frequency, request, group)
            if epoch is None:
                absence += log_absence_after(draws, self.frequency.log_prob(items, group))
                continue
            others = epoch.size - (1 + already if (number, group) == self._key(request) else 0)
            absence += log_absence_in_epoch(draws, epoch.holding(items), others)
        return absence

    def log_expected_count(self, items: Tensor, request: DrawRequest) -> Tensor:
        """Return log kappa_j, summed over the epochs and groups of the remembered rows."""
        parts = self._parts(request)
        if self.unique or not parts:
            return super().log_expected_count(items, request)
        counts = []
        for (number, group), draws in parts.items():
            epoch = _Epoch.of(self.frequency, request, group)
            log_prob = self.frequency.log_prob(items, group)
            if epoch is None:
                counts.append(math.log(draws) + log_prob)
            else:
                others = epoch.size - ((number, group) == self._key(request))
                counts.append(math.log(draws / max(others, 1) * epoch.rows) + log_prob)
        return torch.logsumexp(torch.stack(counts), 0)

    def _key(self, request: DrawRequest) -> tuple[int, int]:
        """Return the key of the current epoch and group in `_parts`."""
        is_grouped = isinstance(self.frequency, GroupedFrequency) and request.group is not None
        return request.epoch or 0, int(request.group) if is_grouped and request.group is not None else 0

    def _parts(self, request: DrawRequest) -> dict[tuple[int, int], int]:
        """Count the remembered rows, or whole sequences, by epoch and group."""
        is_grouped = isinstance(self.frequency, GroupedFrequency)
        parts: dict[tuple[int, int], int] = {}
        for batch in self._batches:
            key = batch.epoch, batch.group if is_grouped else 0
            parts[key] = parts.get(key, 0) + (batch.rows if request.windows is None else request.windows.drawn)
        return parts


def _store(memory: CrossBatchMemory, *_: object) -> None:
    """Copy the Python numbers that a draw uses into the buffers before these are saved."""
    spare = len(memory.items) - memory._filled
    rows = torch.tensor([*(batch.rows for batch in memory._batches), spare])
    for name in ("group", "step", "epoch"):
        values = torch.tensor([*(getattr(batch, name) for batch in memory._batches), 0])
        setattr(memory, f"{name}s", values.repeat_interleave(rows).to(memory.items.device))
    memory.state.copy_(torch.tensor([memory._filled, memory._filled % memory.size, memory._step]))


def _fit_buffers(memory: CrossBatchMemory, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Resize the buffers to a saved state, and add the epochs that earlier versions did not save."""
    if f"{prefix}items" not in state:
        return
    state.setdefault(f"{prefix}epochs", torch.zeros_like(state[f"{prefix}steps"]))
    for name in ("items", "groups", "steps", "epochs"):
        here = getattr(memory, name)
        setattr(memory, name, here.new_zeros(state[f"{prefix}{name}"].shape))


def _restore(memory: CrossBatchMemory, _: object) -> None:
    filled, following, memory._step = (int(value) for value in memory.state)
    if filled == len(memory.items) == memory.size:  # earlier versions overwrote the oldest items in place
        for name in ("items", "groups", "steps", "epochs"):
            setattr(memory, name, getattr(memory, name).roll(-following))
    memory._filled = filled
    memory._batches.clear()
    columns = [getattr(memory, name)[:filled].tolist() for name in ("steps", "groups", "epochs")]
    for step, group, epoch in zip(*columns, strict=True):
        if memory._batches and memory._batches[-1].step == step:
            last = memory._batches.pop()
            memory._batches.append(replace(last, rows=last.rows + 1))
        else:
            memory._batches.append(_Remembered(step, group, epoch, 1))
