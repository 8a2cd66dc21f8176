"""Deterministic sources, always included with kappa = 1: the head, the whole catalog, and items known per query."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower.errors import InputError
from twotower.negatives.sources import Request, Source


class Head(Source):
    """The H most frequent items, included in every draw: kappa = 1. With a sampled tail the estimate stays unbiased.

    Args:
        counts: training interactions of each item, [N].
        size: H.

    Raises:
        InputError: size is less than 1.
    """

    always = True
    items: Tensor

    def __init__(self, counts: Tensor, size: int) -> None:
        super().__init__()
        if size < 1:
            raise InputError(f"size: expected at least 1 item in the head, found {size}")
        order = torch.argsort(torch.as_tensor(counts), descending=True, stable=True)
        self.register_buffer("items", order[:size].sort().values, persistent=False)

    def draw(self, request: Request) -> Tensor:
        """Return the head, [H]."""
        del request
        return self.items


class Catalog(Source):
    """Every item of the catalog exactly once, kappa = 1: the full softmax.

    Args:
        num_items: N.
    """

    always = True
    items: Tensor

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.register_buffer("items", torch.arange(num_items), persistent=False)

    def draw(self, request: Request) -> Tensor:
        """Return all items, [N]."""
        del request
        return self.items


class PerQuery(Source):
    """Items stored per query, always included: observed dislikes, or mined hard negatives.

    The subclasses `Observed` and `Mined` provide the items.

    Args:
        items: int64 [Q, R], -1 where a query has fewer.
    """

    always = True
    per_row = True
    items: Tensor

    def __init__(self, items: Tensor) -> None:
        super().__init__()
        self.register_buffer("items", items)

    def draw(self, request: Request) -> Tensor:
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


class Mined(PerQuery):
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
