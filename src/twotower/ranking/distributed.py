"""Rankers for several ranks, which divide either the queries or the items among themselves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.data import Holdout, ragged_histories
from twotower.data.eligibility import EligibleRows
from twotower.distributed.communicator import Communicator
from twotower.distributed.partition import RowShard
from twotower.distributed.row_exchange import fetch_rows, request_rows
from twotower.index import ExactIndex
from twotower.index.ties import merge_best, tie_order
from twotower.ranking.base import Ranker
from twotower.ranking.tower_ranker import TowerRanker
from twotower.towers import TwoTower
from twotower.towers.sharded_lookup import fetched_rows


class OverRanks:
    """A ranker that divides a holdout over ranks; every rank gets the same ranking as a single process.

    Args:
        ranker: the same on every rank.
        ranks: the processes; all of them call `rank`, with the same holdout.
    """

    def __init__(self, ranker: Ranker, ranks: Communicator) -> None:
        self.ranker, self.ranks = ranker, ranks

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool) -> NDArray[np.int64]:
        """Return the best items of every query, int64 [E, k]."""
        return rank_by_queries(
            lambda own: torch.as_tensor(self.ranker.rank(own, k, exclude_seen)).cpu().numpy(), holdout, k, self.ranks
        )

    def __getattr__(self, name: str) -> Any:
        # Evaluation also reads other attributes of a ranker, such as `is_exact` and `item_embeddings`.
        return getattr(self.ranker, name)


def rank_by_queries(
    rank: Callable[[Holdout], NDArray[np.int64]], holdout: Holdout, k: int, ranks: Communicator
) -> NDArray[np.int64]:
    """Divide the queries of a holdout over ranks; return the ranking of all, int64 [E, k], on every rank."""
    own = slice_holdout(holdout, ranks.part(len(holdout)))
    ranked = torch.as_tensor(rank(own)).cpu() if len(own) else torch.empty(0, k, dtype=torch.int64)
    return ranks.gather(ranked.to(ranks.device), ranks.shares(len(holdout))).cpu().numpy()


def over_ranks(ranker: Ranker, ranks: Communicator) -> Ranker:
    """Wrap a ranker to divide its work over ranks, if there are several."""
    return ranker if ranks.size == 1 else OverRanks(ranker, ranks)


def slice_holdout(holdout: Holdout, rows: slice) -> Holdout:
    """Return the queries of a holdout from `rows.start` up to `rows.stop`."""
    begin, end = rows.start, rows.stop
    history, targets = holdout.history_offsets[begin : end + 1], holdout.target_offsets[begin : end + 1]
    inside = slice(history[0], history[-1])
    return replace(
        holdout,
        queries=holdout.queries[rows],
        history_offsets=history - history[0],
        history_items=holdout.history_items[inside],
        target_offsets=targets - targets[0],
        target_items=holdout.target_items[targets[0] : targets[-1]],
        history_timestamps=None if holdout.history_timestamps is None else holdout.history_timestamps[inside],
        history_events=None if holdout.history_events is None else holdout.history_events[inside],
        query_times=None if holdout.query_times is None else holdout.query_times[rows],
        context=None if holdout.context is None else holdout.context[rows],
        query_groups=None if holdout.query_groups is None else holdout.query_groups[rows],
    )


@torch.no_grad()
def item_embeddings(towers: TwoTower, ranks: Communicator) -> Tensor:
    """Compute all item embeddings, [N, D], as `TwoTower.item_embeddings` does; each rank embeds its part."""
    if ranks.size == 1:
        return towers.item_embeddings()
    was_training = towers.training
    towers.eval()
    shares = ranks.shares(towers.item_tower.num_items)
    own = ranks.within(shares)
    codes = torch.arange(own.start, own.stop, device=towers.log_temperature.device)
    embedded = towers.embed_catalog(codes)
    towers.train(was_training)
    return ranks.gather(embedded, shares)


#: Number of queries searched at a time over all ranks, and of items embedded at a time.
BLOCK = 4096


class ShardedRanker:
    """A ranker for a catalog whose embeddings are sharded: each of W ranks has at most ceil(N / W) of them.

    Every rank embeds its part of the queries, searches its own items for all queries, and merges the results of its
    part of the queries. The ranking equals the ranking of a single index, including ties.

    Args:
        towers: the model, with sharded tables.
        history_length: L, the number of recent items that the query tower reads; 0 for a tower without a history.
        ranks: the processes; all of them create this and call `rank`, with the same holdout.
        width: rank by the first coordinates of the embeddings (`TwoTower.at_width`); None for all.

    Attributes:
        part: this rank's items.
        embeddings: embeddings of this rank's items in tie order, float32 [n, D]; the index uses them without a copy.
    """

    is_exact = True

    def __init__(self, towers: TwoTower, history_length: int, ranks: Communicator, *, width: int | None = None) -> None:
        self.towers, self.ranks = towers, ranks
        self.width = towers.item_tower.dimension if width is None else width
        self.part = RowShard(ranks, towers.item_tower.num_items)
        self._order = tie_order(len(self.part), self.part.own.start)
        self.embeddings = towers.at_width(own_item_embeddings(towers, self.part, self._order), self.width)
        self.queries = TowerRanker(towers, history_length, self.embeddings)
        self.index = ExactIndex(self.embeddings, first=self.part.own.start, in_tie_order=True)

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool) -> NDArray[np.int64]:
        """Return the best items of every query, int64 [E, k], on every rank."""
        return rank_by_items(self.index, self.part, self._embedded, holdout, k=k, exclude_seen=exclude_seen)

    def embeddings_of(self, items: NDArray[np.int64]) -> Tensor:
        """Return embeddings, float32 [n, D], of items on any rank; all ranks call this with the same `items`."""
        codes = torch.from_numpy(items).to(self.embeddings.device)
        requested, place = request_rows(self.part, codes), torch.argsort(self._order).to(codes.device)
        fetched = fetch_rows(self.embeddings, self.part, replace(requested, given=place[requested.given]))
        return fetched.rows.detach()[fetched.place(codes)][:, : self.width]

    @torch.no_grad()
    def _embedded(self, holdout: Holdout) -> Tensor:
        histories = (holdout.history_offsets, holdout.history_items)
        history, length = None, self.queries.history_length
        device = self.embeddings.device
        if length:
            recent = ragged_histories(*histories, np.arange(len(holdout)), length)
            history = torch.from_numpy(recent).to(device)
        queries = torch.from_numpy(np.asarray(holdout.queries, dtype=np.int64)).to(device)
        with fetched_rows(self.towers, queries=queries, history=history):
            return self.towers.at_width(self.queries.embed_holdout(holdout), self.width)


def rank_by_items(
    index: ExactIndex,
    part: RowShard,
    embed: Callable[[Holdout], Tensor],
    holdout: Holdout,
    *,
    k: int,
    exclude_seen: bool,
) -> NDArray[np.int64]:
    """Embed this rank's part of the queries, search this rank's items for all queries, and merge the results.

    Args:
        index: the items of this rank, with `first=part.own.start`.
        part: this rank's items; all ranks call this together.
        embed: returns the embeddings of the queries of a holdout, [E, D].
        holdout: the queries, the same on every rank.
        k: K, number of items per query.
        exclude_seen: leave out the items of a query's history.

    Returns:
        The best items of every query, int64 [E, k], on every rank, as from a single index.
    """
    ranks = part.ranks
    shares = ranks.shares(len(holdout))
    block = max(BLOCK // ranks.size, 1)
    own = []
    for begin in range(0, max(shares), block):
        parts = [
            slice(sum(shares[:rank]) + min(begin, share), sum(shares[:rank]) + min(begin + block, share))
            for rank, share in enumerate(shares)
        ]
        sizes = [rows.stop - rows.start for rows in parts]
        queries = ranks.gather(embed(slice_holdout(holdout, parts[ranks.rank])), sizes)
        histories = _histories(holdout, parts) if exclude_seen else None
        found = search_part(index, part, queries, k, exclude=histories, eligible=_eligible(holdout, parts))
        mine = sizes[ranks.rank]
        results = (ranks.swap(one, sizes, [mine] * ranks.size).view(ranks.size, mine, k) for one in found)
        own.append(merge_best(*results)[1])
    merged = torch.cat(own) if own else torch.empty(0, k, dtype=torch.int64, device=ranks.device)
    return ranks.gather(merged, shares).cpu().numpy()


def search_part(
    index: ExactIndex,
    part: RowShard,
    queries: Tensor,
    k: int,
    *,
    exclude: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
    eligible: EligibleRows | None = None,
) -> tuple[Tensor, Tensor]:
    """Search the items of one rank; exclusions, rule and results use the codes of the whole catalog."""
    own = part.own
    if not len(part):
        empty = (len(queries), k)
        return (
            torch.full(empty, -torch.inf, device=queries.device),
            torch.full(empty, -1, dtype=torch.int64, device=queries.device),
        )
    if exclude is not None:
        offsets, items = exclude
        inside = (items >= own.start) & (items < own.stop)
        exclude = np.concatenate([[0], inside.cumsum()])[offsets], items[inside] - own.start
    inside_part = None if eligible is None else eligible.select(torch.arange(own.start, own.stop))
    scores, found = index.search(queries, k, exclude, eligible=inside_part)
    return scores, torch.where(found >= 0, found + own.start, -1)


@torch.no_grad()
def own_item_embeddings(towers: TwoTower, part: RowShard, order: Tensor | None = None) -> Tensor:
    """Embed this rank's part of the items, float32 [n, D]; collective.

    If the item table is whole, or sharded by the same rows, its rows are local; otherwise they are fetched one block at
    a time.

    Args:
        towers: the model.
        part: this rank's items.
        order: order of the items within the part, int64 [n]; None for order by code.
    """
    was_training, device = towers.training, towers.log_temperature.device
    towers.eval()
    codes = part.own.start + (torch.arange(len(part)) if order is None else order).to(device)
    embedded = torch.empty(len(part), towers.width, device=device)
    table = towers.item_tower.ids
    is_here = table is None or table.part is None or table.part == part
    # Fetching is collective: every rank makes as many calls as the rank with the most items.
    for begin in range(0, len(part) if is_here else part.bounds[1], BLOCK):
        rows = slice(begin, begin + BLOCK)
        with nullcontext() if is_here else fetched_rows(towers, items=codes[rows]):
            embedded[rows] = towers.embed_items(codes[rows])
    towers.train(was_training)
    return embedded


def _eligible(holdout: Holdout, parts: list[slice]) -> EligibleRows | None:
    """Return the items that may be ranked for the queries of several parts."""
    rows = torch.cat([torch.arange(part.start, part.stop) for part in parts])
    return None if holdout.eligible is None else holdout.eligible.of_rows(rows)


def _histories(holdout: Holdout, parts: list[slice]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Collect the histories of the queries of several parts, as compressed rows."""
    chosen = [slice_holdout(holdout, part) for part in parts]
    sizes = np.concatenate([np.diff(one.history_offsets) for one in chosen])
    items = np.concatenate([np.asarray(one.history_items, dtype=np.int64) for one in chosen])
    return np.concatenate([[0], sizes.cumsum()]), items
