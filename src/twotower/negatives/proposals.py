"""Proposals: distributions over the catalog that negatives are drawn from, with exact probabilities.

`AliasTable` (Walker 1977) draws from any weights in constant time, with one memory access per draw.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from twotower.errors import InputError

#: Acceptance thresholds have 31 bits, so that threshold and alias share one 64-bit word.
_BITS = 31

#: Draws per block on the CPU: small enough for the intermediate results to stay in cache.
_BLOCK = 1 << 16


class AliasTable(nn.Module):
    """A sampler that draws item j with probability w_j / sum w (Walker 1977).

    Built with prefix sums, after Hübschle-Schneider and Sanders 2019, "Parallel Weighted Random Sampling".
    With weights scaled to mean 1, an item below 1 (light) keeps its own slot with probability w and yields the rest of
    the slot to a heavy item. Light and heavy items are matched in order: light item i is filled by the first heavy item
    whose cumulative excess exceeds the cumulative deficit before i. A heavy item whose excess runs out is itself
    filled by the next heavy item.

    Args:
        weights: float64 [N], >= 0, not all zero; fewer than 2^31 items.
    """

    packed: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        threshold, alias = build_alias(weights)
        quantised = (threshold * (1 << _BITS)).round().long().clamp_(0, (1 << _BITS) - 1)
        # A slot that always keeps its own item must not lose it to rounding, so its alias is the item itself.
        own = torch.arange(len(weights), device=weights.device)
        alias = torch.where(threshold >= 1.0, own, alias)
        self.register_buffer("packed", (quantised << 32) | alias, persistent=False)

    def sample(self, size: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Draw independently; return int64 codes of shape `size`."""
        drawn = torch.empty(size, dtype=torch.int64, device=self.packed.device)
        flat = drawn.view(-1)
        for part in torch.split(flat, _BLOCK if flat.device.type == "cpu" else max(len(flat), 1)):
            self._fill(part.random_(generator=generator))
        return drawn

    def _fill(self, bits: Tensor) -> None:
        """Turn numbers of 63 random bits into draws, in place.

        One number u in [0, 1) gives both slot and coin: the integer part of N u and its fraction. With u = bits / 2^63
        the product is computed in two halves, so that it is exact to 32 binary places. With only 32 random bits, a
        remainder or a product would bias some slots by N / 2^32.
        """
        slots = len(self.packed)
        scaled = (bits & 0x7FFFFFFF).mul_(slots).bitwise_right_shift_(31)
        scaled.add_((bits >> 31).mul_(slots))
        torch.bitwise_right_shift(scaled, 32, out=bits)
        coin = scaled.bitwise_and_(0xFFFFFFFF).bitwise_right_shift_(1)
        word = self.packed.index_select(0, bits)
        moved = coin >= word >> 32
        torch.where(moved, word.bitwise_and_(0xFFFFFFFF), bits, out=bits)


def build_alias(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Compute Walker's thresholds in [0, 1] and aliases, (float64 [N], int64 [N]), without a loop over items."""
    # Scale the largest weight to 1 first, so that no sum or quotient overflows if the weights are huge or tiny.
    scaled = weights.double() / weights.double().max()
    scaled = scaled * (len(weights) / scaled.sum())
    light, heavy = torch.nonzero(scaled < 1.0)[:, 0], torch.nonzero(scaled >= 1.0)[:, 0]
    threshold, alias = torch.ones_like(scaled), torch.arange(len(weights), device=weights.device)
    if len(light) == 0 or len(heavy) == 0:
        return threshold, alias
    deficit = (1.0 - scaled[light]).cumsum(0)
    excess = (scaled[heavy] - 1.0).cumsum(0)
    before = torch.cat([deficit.new_zeros(1), deficit[:-1]])
    # right=True: a heavy item whose excess is used up exactly fills no further slot.
    filler = torch.searchsorted(excess, before, right=True).clamp_(max=len(heavy) - 1)
    threshold[light], alias[light] = scaled[light], heavy[filler]
    # `short`: the light item at which a heavy item runs out, if any; it determines what the heavy item keeps of its own
    # slot. right=False: an item that is used up exactly, or has no excess to begin with, keeps its whole slot.
    short = torch.searchsorted(deficit, excess)
    runs_short = (short < len(deficit)) & (excess > 0)
    runs_short[-1] = False  # the last heavy item can run short only by rounding
    left = 1.0 - (deficit[short.clamp(max=len(deficit) - 1)] - excess)
    following = heavy[torch.arange(len(heavy), device=heavy.device).add(1).clamp(max=len(heavy) - 1)]
    threshold[heavy] = torch.where(runs_short, left, threshold[heavy])
    alias[heavy] = torch.where(runs_short, following, alias[heavy])
    return threshold.clamp_(0.0, 1.0), alias


class Proposal(nn.Module, ABC):
    """A probability distribution q over the N items of the catalog.

    Attributes:
        num_items: number of items, N.
    """

    num_items: int

    @abstractmethod
    def log_prob(self, items: Tensor) -> Tensor:
        """Return log q_j, float64, the shape of `items` (int64 codes); -inf if the proposal never draws the item."""

    @abstractmethod
    def sample(self, size: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Draw independently with replacement; return int64 codes of shape `size` on the proposal's device."""


class Uniform(Proposal):
    """q_j = 1/N for every item of the catalog, whether or not it occurs in training.

    Args:
        num_items: number of items, N.

    Raises:
        InputError: N is less than 1.
    """

    anchor: Tensor

    def __init__(self, num_items: int) -> None:
        super().__init__()
        if num_items < 1:
            raise InputError(f"num_items: expected at least 1, found {num_items}")
        self.num_items = num_items
        # An empty buffer that moves with the module: its device is the device of the draws.
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    def log_prob(self, items: Tensor) -> Tensor:
        """Return -log N, float64, the shape of `items`."""
        return torch.full(items.shape, -math.log(self.num_items), dtype=torch.float64, device=items.device)

    def sample(self, size: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Draw codes of shape `size`, each item with probability 1/N."""
        return torch.randint(self.num_items, size, generator=generator, device=self.anchor.device)


class Weighted(Proposal):
    """q_j = w_j / sum of w, drawn in constant time from an alias table.

    Args:
        weights: one number >= 0 per item, [N]; items of weight 0 are never drawn.

    Raises:
        InputError: weights are negative, not finite, or all zero.
    """

    log_probability: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        values = torch.as_tensor(weights).to(torch.float64)
        if values.ndim != 1 or len(values) == 0:
            raise InputError(f"weights: expected one number per item, shape [N]; found {list(values.shape)}")
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()) or not bool(values.sum() > 0):
            raise InputError("weights: expected finite numbers >= 0, not all of them zero")
        self.num_items = len(values)
        # logsumexp: a sum of very large weights would overflow.
        log_weight = values.log()
        self.register_buffer("log_probability", log_weight - log_weight.logsumexp(0), persistent=False)
        self.table = AliasTable(values)

    def log_prob(self, items: Tensor) -> Tensor:
        """Return log w_j - log sum w, float64, the shape of `items`."""
        return self.log_probability[items]

    def sample(self, size: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Draw codes of shape `size` in proportion to the weights."""
        return self.table.sample(size, generator)


class FrequencyPower(Weighted):
    """q_j proportional to count_j^power: 1 is the unigram distribution, 0.75 word2vec's, 0 uniform over items seen.

    Args:
        counts: training interactions of each item, [N].
        power: the exponent.
        floor: added to every count first, so that items never seen can be drawn as well.

    Raises:
        InputError: counts with the floor added are negative, not finite, or all zero.
    """

    def __init__(self, counts: Tensor, power: float, *, floor: float = 0.0) -> None:
        values = torch.as_tensor(counts).to(torch.float64) + floor
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            raise InputError("counts: expected finite numbers >= 0, one per item")
        # 0^0 is 1 in torch, but an item never seen must stay at zero whatever the power.
        super().__init__(torch.where(values > 0, values.pow(power), 0.0))
        self.power = power


class LogUniform(Proposal):
    """q = log((r+2)/(r+1)) / log(N+1) for the item of popularity rank r = 0, 1, ...: Zipf's law in closed form.

    Source: the log-uniform candidate sampler of TensorFlow. Useful if only the popularity order is known, not counts.

    Args:
        counts: numbers that order the items by popularity, [N].

    Raises:
        InputError: counts are empty or not of shape [N].
    """

    item_of_rank: Tensor
    rank_of_item: Tensor

    def __init__(self, counts: Tensor) -> None:
        super().__init__()
        counts = torch.as_tensor(counts)
        if counts.ndim != 1 or len(counts) == 0:
            raise InputError(f"counts: expected one number per item, shape [N]; found {list(counts.shape)}")
        order = torch.argsort(counts, descending=True, stable=True)
        self.num_items = len(order)
        self.register_buffer("item_of_rank", order, persistent=False)
        self.register_buffer("rank_of_item", torch.argsort(order), persistent=False)

    def log_prob(self, items: Tensor) -> Tensor:
        """Return log( log((r+2)/(r+1)) / log(N+1) ), float64, the shape of `items`."""
        rank = self.rank_of_item[items].double()
        return torch.log1p(1.0 / (rank + 1.0)).log() - math.log(math.log(self.num_items + 1))

    def sample(self, size: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Draw codes of shape `size`: rank = floor(exp(u log(N+1))) - 1."""
        device = self.item_of_rank.device
        u = torch.rand(size, generator=generator, dtype=torch.float64, device=device)
        rank = torch.exp(u * math.log(self.num_items + 1)).long() - 1
        return self.item_of_rank[rank.clamp_(0, self.num_items - 1)]


class IndexStream(Proposal):
    """The uniform distribution over the items of the corpus: the index stream of Yang et al. (2020).

    Items have a probability even if they do not occur in training, and can be added and withdrawn during training. The
    set of active items is part of `state_dict`. In a run, the active items are the rows of the item table.

    Args:
        num_items: N, the maximum size of the catalog (rows of the item table).
        active: codes that are active at the start, int64; None for all.

    Raises:
        InputError: no item is active, or a code is out of range.
    """

    members: Tensor
    place: Tensor
    size: Tensor

    def __init__(self, num_items: int, active: Tensor | None = None) -> None:
        super().__init__()
        self.num_items = num_items
        # `members[:size]` are the active items; `place[item]` is the item's position there, -1 if not active.
        self.register_buffer("members", torch.zeros(num_items, dtype=torch.int64))
        self.register_buffer("place", torch.full((num_items,), -1, dtype=torch.int64))
        self.register_buffer("size", torch.zeros((), dtype=torch.int64))
        self._set(torch.arange(num_items) if active is None else torch.unique(active))

    def add(self, items: Tensor) -> None:
        """Add items to the catalog; items already active are ignored."""
        self._check(items)
        inside = self.place >= 0
        inside[items] = True
        self._set(torch.nonzero(inside)[:, 0])

    def withdraw(self, items: Tensor) -> None:
        """Remove items from the catalog; items not active are ignored."""
        self._check(items)
        inside = self.place >= 0
        inside[items] = False
        self._set(torch.nonzero(inside)[:, 0])

    def log_prob(self, items: Tensor) -> Tensor:
        """Return -log(number of active items), float64; -inf for an item that is not active."""
        value = -self.size.double().log()
        return torch.where(self.place[items] >= 0, value, -torch.inf)

    def sample(self, size: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Draw codes of shape `size`, each active item with equal probability."""
        u = torch.rand(size, generator=generator, dtype=torch.float64, device=self.members.device)
        # The size stays on the device: reading it would stall an accelerator.
        return self.members[(u * self.size).long()]

    def _set(self, active: Tensor) -> None:
        if len(active) == 0:
            raise InputError("index stream: no item would be left; at least one must remain in the catalog")
        self._check(active)
        self.members[: len(active)] = active
        self.place.fill_(-1)
        self.place[active] = torch.arange(len(active), device=self.place.device)
        self.size.fill_(len(active))

    def _check(self, items: Tensor) -> None:
        if len(items) and (int(items.min()) < 0 or int(items.max()) >= self.num_items):
            raise InputError(f"index stream: expected item codes from 0 to {self.num_items - 1}")
