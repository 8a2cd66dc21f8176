"""Proposals: distributions over the catalog that negatives are drawn from, with exact probabilities."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from twotower.errors import InputError
from twotower.negatives.alias import AliasTable


class Proposal(nn.Module, ABC):
    """A probability distribution q over the N items of the catalog.

    Attributes:
        num_items: N.
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
        num_items: N.

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
    """Uniform over the items currently in the catalog; items can be added and withdrawn during training.

    The set of active items is live state, part of `state_dict`.

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
