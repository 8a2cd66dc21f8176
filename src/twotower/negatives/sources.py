"""Sources of candidates. Each source draws items and knows its own expected count for every item.

The numbers of a source, for item j (docs/theory.md, "One estimator: the expected count"):

    expected count   E[number of times j is among this source's candidates of a row]
    absence          P(j is not among them) = 1 - inclusion probability

A source is either *random* (in-batch, sampled from a proposal, remembered from earlier batches) or *deterministic* (the
head, the whole catalog, items stored per query). A deterministic source includes its items in every draw with kappa =
1, and they are masked from every random source of the row. The candidates of a source are shared by the batch, [m], or
*per row*, [B, R]. `Pool` (pool.py) adds expected counts, or multiplies absences, and applies the masks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from twotower.data.loading.packing import Windows
from twotower.errors import InputError
from twotower.negatives.frequency import Frequency, Group, GroupedFrequency
from twotower.negatives.proposals import Proposal


@dataclass(frozen=True)
class DrawRequest:
    """The batch that candidates are drawn for: the argument of `Objective.draw`, `Pool.draw` and `Source.draw`.

    A batch may be split over processes: each process then passes the positives of all of them, the same generator
    state, and its own `rows`. Items and kappa are computed for the whole batch, masks for the selected rows.

    Attributes:
        positives: item of each row, int64 [B].
        queries: query of each row, int64 [B], for sources that look items up by query.
        group: the group that the batch was built in, or None for batches that are random draws.
        generator: the random generator of the draw, or None for torch's default.
        windows: how the batch was drawn, if its rows are positions of whole sequences; None for a draw of rows.
        known_positives: other items that a row must not be pushed away from: int64 [B, H] padded with -1, or a pair
            (row [P], item [P]). They are masked for their row; kappa is unchanged (docs/theory.md, rule 7).
        rows: the rows for which masks and per-row candidates are made, with start and stop set; None for all rows.
            `known_positives` and `queries` then cover only these rows, counted from the first of them.
    """

    positives: Tensor
    queries: Tensor | None = None
    group: Group | None = None
    generator: torch.Generator | None = None
    windows: Windows | None = None
    known_positives: Tensor | tuple[Tensor, Tensor] | None = None
    rows: slice | None = None

    @classmethod
    def of(cls, request: DrawRequest | Tensor, **options: Any) -> DrawRequest:
        """Return a request, with its fields given by name replaced; a tensor contains the positives."""
        return replace(request, **options) if isinstance(request, DrawRequest) else cls(request, **options)


class Source(nn.Module, ABC):
    """A source of candidates.

    Attributes:
        unique: duplicates within the source are removed, so that the expected count is an inclusion probability.
        deterministic: its items are in every draw and are masked from the random sources.
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


class RandomSource(Source):
    """A source of independent draws, with the expected count of every item of the catalog."""

    @abstractmethod
    def draws(self, request: DrawRequest) -> int:
        """Return the number of independent draws per row."""

    @abstractmethod
    def log_prob(self, items: Tensor, request: DrawRequest) -> Tensor:
        """Return the log probability that one draw is the item, float64, the shape of `items`."""

    def log_absence(self, items: Tensor, request: DrawRequest) -> Tensor:
        """Return log (1 - q_j)^n: no draw is item j, float64, the shape of `items`."""
        return log_absence_after(self.draws(request), self.log_prob(items, request))

    def log_expected_count(self, items: Tensor, request: DrawRequest) -> Tensor:
        """Return log kappa_j of this source alone: log(n q_j), or log(1 - (1-q_j)^n) if the source is unique."""
        if self.unique:
            return log_complement(self.log_absence(items, request))
        draws = self.draws(request)
        return (math.log(draws) if draws else -math.inf) + self.log_prob(items, request)


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
    if draws == 0:
        return torch.zeros_like(log_prob)
    return draws * torch.log1p(-torch.exp(log_prob))


class InBatch(RandomSource):
    """The other rows' positives: B-1 draws from the item frequency, which are embedded anyway.

    kappa_j = (B-1) p_j; without duplicates 1 - (1-p_j)^(B-1). B-1, not B: the row's own positive is not a draw.

    In a batch of S of W whole sequences, with c_j = R p_j of all R rows, the rows of a row's own sequence are in the
    batch with certainty and are not draws; the others are S-1 of the W-1 other sequences, drawn without replacement:

        kappa_j = c_j (S-1) / (W-1);   without duplicates 1 - prod_{k < S-1} (1 - c_j / (W-1-k))

    This is exact for every item that the row's query never interacts with; the second formula also assumes that no
    sequence contains an item twice. Items that the query does interact with are masked (`Pool.draw` requires them):
    their count among the other sequences would be smaller. See docs/sequences.md.

    Args:
        frequency: how often each item is a positive; for grouped batches, the frequency within the group.
        unique: remove duplicates within the batch.
    """

    def __init__(self, frequency: Frequency, *, unique: bool = False) -> None:
        super().__init__()
        self.frequency = frequency
        self.unique = unique

    def draw(self, request: DrawRequest) -> Tensor:
        """Return the positives of the batch, [B]; each row's own is masked as a hit, which leaves B-1 per row."""
        if request.windows is not None and request.windows.drawn < 2:
            return request.positives[:0]  # no other sequence in the batch
        return request.positives

    def draws(self, request: DrawRequest) -> int:
        """Return B-1."""
        return len(request.positives) - 1

    def log_prob(self, items: Tensor, request: DrawRequest) -> Tensor:
        """Return log p_j, within the group of the batch."""
        return self.frequency.log_prob(items, request.group)

    def log_absence(self, items: Tensor, request: DrawRequest) -> Tensor:
        """Return the log probability that no other row, or no other sequence, has the item."""
        if request.windows is None:
            return super().log_absence(items, request)
        others, drawn = request.windows.total - 1, request.windows.drawn - 1
        holding = torch.exp(self.log_prob(items, request)) * request.windows.rows
        left = others - torch.arange(drawn, dtype=torch.float64, device=items.device)
        # If all sequences left contain the item, it cannot be missed: probability 1 at most.
        return torch.log1p(-(holding[..., None] / left).clamp(max=1.0)).sum(-1)

    def log_expected_count(self, items: Tensor, request: DrawRequest) -> Tensor:
        """Return log kappa_j over the other rows, or over the rows of the other sequences."""
        if request.windows is None or self.unique:
            return super().log_expected_count(items, request)
        others, drawn = request.windows.total - 1, request.windows.drawn - 1
        share = math.log(drawn / others) if drawn else -math.inf
        return share + math.log(request.windows.rows) + self.log_prob(items, request)


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
        """Return n."""
        del request
        return self.size

    def log_prob(self, items: Tensor, request: DrawRequest) -> Tensor:
        """Return log q_j."""
        del request
        return self.proposal.log_prob(items)


class Head(Source):
    """The H most frequent items, included in every draw: kappa = 1. With a sampled tail the estimate stays unbiased.

    Args:
        counts: training interactions of each item, [N].
        size: H.

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
        num_items: N.
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
    """Items stored per query, always included: observed dislikes, or mined hard negatives.

    The subclasses `Observed` and `HardNegatives` provide the items.

    Args:
        items: int64 [Q, R], -1 where a query has fewer.
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
            raise InputError("queries: this source looks its items up by query; draw with queries=...")
        known = request.queries >= 0
        found = self.items[request.queries.clamp(min=0)].long()
        return found.masked_fill(~known[:, None], -1)


class Observed(PerQuery):
    """The latest `size` observed negatives of the row's query (dislikes, impressions without a click), kappa = 1.

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


class HardNegatives(PerQuery):
    """Hard negatives: the items that the current model ranks highest for each query, refreshed periodically, kappa = 1.

    This is stratified sampling: the hard set is summed exactly and masked from the random sources, which estimate the
    rest, so the pool stays unbiased. Mine by the raw scores: on corrected logits rare items would look hard.

    State (the mined items) is in `state_dict`.

    Args:
        num_queries: Q.
        size: R, items per query; empty until the first `refresh`.
    """

    def __init__(self, num_queries: int, size: int) -> None:
        if size < 1:
            raise InputError(f"size: expected at least 1 hard negative for each row, found {size}")
        super().__init__(torch.full((num_queries, size), -1, dtype=torch.int32))
        self.size = size

    def refresh(self, queries: Tensor, ranked: Tensor) -> None:
        """Replace the mined items of some queries by the first R items of a new ranking.

        Args:
            queries: codes, int64 [E].
            ranked: their highest-ranked items, known positives excluded, int64 [E, >= R], padded with -1.

        Raises:
            InputError: the ranking has a different number of queries, or fewer than R items per query.
        """
        if ranked.ndim != 2 or len(ranked) != len(queries) or ranked.shape[1] < self.size:
            raise InputError(
                f"ranked: expected [{len(queries)}, at least {self.size}], padded with -1; found {list(ranked.shape)}"
            )
        self.items[queries] = ranked[:, : self.size].to(self.items.dtype)


class CrossBatchMemory(RandomSource):
    """The last M positives of earlier batches: kappa_j = M p_j, or 1 - (1-p_j)^M if unique.

    The memory contains item codes, not embeddings: remembered items are embedded again in every step, so no embedding
    is stale and both towers get their gradient. Only the choice of items ages; `age` reports by how much.

    With a grouped frequency each remembered row was drawn within the group g of its own batch, not within the group of
    the current batch: kappa_j = sum_g M_g p_j^g, with M_g remembered rows of group g.

    State (items, groups, steps, fill level) is in `state_dict`, so a resumed run continues with the same memory.

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
    state: Tensor

    def __init__(self, frequency: Frequency, size: int, *, unique: bool = False) -> None:
        super().__init__()
        if size < 1:
            raise InputError(f"size: expected at least 1 remembered item, found {size}")
        self.frequency = frequency
        self.size = size
        self.unique = unique
        self.register_buffer("items", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("groups", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros(size, dtype=torch.int64))
        # Filled places, next place, step: Python integers, so that reading them never synchronizes with a device.
        self._filled, self._next, self._step = 0, 0, 0
        self.register_buffer("state", torch.zeros(3, dtype=torch.int64))
        self.register_load_state_dict_post_hook(_restore)  # type: ignore[no-untyped-call]

    def draw(self, request: DrawRequest) -> Tensor:
        """Return the remembered items, [M] or fewer at the start; call `remember` after the draw."""
        del request
        return self.items[: self._filled].clone()

    def remember(self, positives: Tensor, group: Group | None = None) -> None:
        """Store the positives of a finished draw, and their group, in place of the oldest ones."""
        newest = positives[-self.size :]
        places = (torch.arange(len(newest), device=self.items.device) + self._next) % self.size
        self.items[places] = newest
        self.groups[places] = 0 if group is None else int(group)
        self.steps[places] = self._step
        self._next = (self._next + len(newest)) % self.size
        self._filled = min(self._filled + len(newest), self.size)
        self._step += 1
        self.state.copy_(torch.tensor([self._filled, self._next, self._step]))

    @property
    def age(self) -> float:
        """Mean age of the remembered items, in steps; 0 while the memory is empty."""
        return float((self._step - self.steps[: self._filled]).double().mean()) if self._filled else 0.0

    def draws(self, request: DrawRequest) -> int:
        """Return the number of remembered positives."""
        del request
        return self._filled

    def log_prob(self, items: Tensor, request: DrawRequest) -> Tensor:
        """Return log p_j; with a grouped frequency, of the mean over the remembered rows' groups."""
        if not self._mixes_groups:
            return self.frequency.log_prob(items, request.group)
        rows, log_prob = self._by_group(items)
        return torch.logsumexp(log_prob + rows.log(), 0) - math.log(self._filled)

    def log_absence(self, items: Tensor, request: DrawRequest) -> Tensor:
        """Return the log of prod_g (1 - p_j^g)^M_g: no remembered row is item j, float64, the shape of `items`."""
        if not self._mixes_groups:
            return super().log_absence(items, request)
        rows, log_prob = self._by_group(items)
        absence = rows * torch.log1p(-torch.exp(log_prob))
        return torch.where(rows > 0, absence, 0.0).sum(0)

    @property
    def _mixes_groups(self) -> bool:
        return isinstance(self.frequency, GroupedFrequency) and self._filled > 0

    def _by_group(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Count the remembered rows of each group, float64 [G, 1, ...]; also return log p_j within each, [G, ...]."""
        frequency: GroupedFrequency = self.frequency  # type: ignore[assignment]  # called only if `_mixes_groups`
        log_prob = torch.stack([frequency.log_prob(items, group) for group in range(len(frequency.members))])
        rows = torch.zeros(len(log_prob), dtype=torch.float64, device=items.device)
        remembered = self.groups[: self._filled]
        rows.index_add_(0, remembered, torch.ones(len(remembered), dtype=torch.float64, device=items.device))
        return rows.reshape(-1, *[1] * items.ndim), log_prob


def _restore(memory: CrossBatchMemory, _: object) -> None:
    memory._filled, memory._next, memory._step = (int(value) for value in memory.state)
