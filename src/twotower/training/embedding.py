"""Embedding of a batch: each distinct item goes through the tower once, in chunks if memory is short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from twotower.data import Batch, Packed
from twotower.ranks import Ranks
from twotower.towers import TwoTower
from twotower.training.gradient_cache import cached_embedding, cached_parts


def embed_queries(
    towers: TwoTower,
    queries: Tensor,
    history: Tensor,
    context: tuple[Tensor, ...] | None = None,
    *,
    chunk: int | None = None,
) -> Tensor:
    """Embed queries, [B, D], `chunk` of them at a time."""
    if context is None:
        return _in_chunks(towers, towers.embed_queries, queries, history, chunk=chunk)

    def embed(queries: Tensor, history: Tensor, *context: Tensor) -> Tensor:
        return towers.embed_queries(queries, history, context=context)

    return _in_chunks(towers, embed, queries, history, *context, chunk=chunk)


def embed_rows(towers: TwoTower, batch: Batch, *, chunk: int | None = None) -> Tensor:
    """Embed the queries of a batch, [B, D]; if it consists of sequences, all their positions in one pass."""
    if batch.sequences is not None:
        return embed_sequences(towers, batch, chunk=chunk)
    return embed_queries(towers, batch.queries, batch.history, batch.context, chunk=chunk)


def embed_sequences(towers: TwoTower, batch: Batch, *, chunk: int | None = None) -> Tensor:
    """Embed all positions of a batch's sequences, [B, D], in chunks of `chunk` tokens that keep sequences whole."""
    assert batch.sequences is not None
    if chunk is None:
        return towers.embed_sequences(batch.sequences, batch.queries, batch.context)

    def embed(sequences: Packed, queries: Tensor, *context: Tensor) -> Tensor:
        return towers.embed_sequences(sequences, queries, context or None)

    parts: list[tuple[Any, ...]] = []
    done = 0
    for part in batch.sequences.parts(chunk):
        rows = slice(done, done + len(part.rows))
        parts.append((part, batch.queries[rows], *(one[rows] for one in batch.context or ())))
        done = rows.stop
    return cached_parts(embed, parts, anchor=_anchor(towers))


def embed_once(towers: TwoTower, items: Tensor, *, chunk: int | None = None) -> Tensor:
    """Embed items, [M, D], passing each distinct item through the tower once, `chunk` of them at a time."""
    if items.device.type != "cpu":  # counting distinct items would synchronize with the device
        return _in_chunks(towers, towers.embed_items, items, chunk=chunk)
    distinct, place = torch.unique(items, return_inverse=True)
    # Not `[place]`: on a CPU the backward pass of indexing takes five times as long as that of index_select.
    return _in_chunks(towers, towers.embed_items, distinct, chunk=chunk).index_select(0, place)


def embed_parts(towers: TwoTower, parts: list[Tensor], *, chunk: int | None = None) -> list[Tensor]:
    """Embed several lists of items, [M, D] each, passing each distinct item through the tower once.

    If the second list is sorted, has no duplicates and contains all of the first, as merged candidates contain the
    batch's positives, it is embedded directly: its embeddings, possibly of the whole catalog, are not copied.
    """
    if len(parts) == 2 and parts[1].device.type == "cpu" and len(parts[1]):
        few, many = parts
        place = torch.searchsorted(many, few).clamp_(max=len(many) - 1)
        if bool((many[1:] > many[:-1]).all()) and torch.equal(many.index_select(0, place), few):
            table = _in_chunks(towers, towers.embed_items, many, chunk=chunk)
            return [table.index_select(0, place), table]
    return list(torch.split(embed_once(towers, torch.cat(parts), chunk=chunk), [len(part) for part in parts]))


def embed_by_ranks(towers: TwoTower, items: Tensor, ranks: Ranks, *, chunk: int | None = None) -> Tensor:
    """Embed items that are the same on every rank, [M, D]; each rank embeds M/W of them.

    The shares are gathered with their gradient: the backward pass returns to each rank the sum of all ranks' gradients
    for its own items. Shares have equal size, so no sizes are exchanged; the last one is padded.

    Args:
        towers: the model, the same on every rank.
        items: codes, int64 [M], the same on every rank.
        ranks: the processes of the run.
        chunk: items that go through the tower at a time; None for all.
    """
    if ranks.size == 1 or len(items) == 0:
        return embed_once(towers, items, chunk=chunk)
    own, place, count = share_of_items(items, ranks)
    every = ranks.gather_with_gradient(_in_chunks(towers, towers.embed_items, own, chunk=chunk))[:count]
    return every if place is None else every.index_select(0, place)


def share_of_items(items: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor | None, int]:
    """Select this rank's share of items that are the same on every rank, padded to ceil(M' / W).

    Returns:
        The codes of the share; the position of each of `items` in the concatenation of all shares, or None if they are
        in that order; and M', the number of items in all shares without padding.
    """
    place = None
    if items.device.type == "cpu":
        items, place = torch.unique(items, return_inverse=True)
    each = -(-len(items) // ranks.size)
    own = torch.arange(ranks.rank * each, (ranks.rank + 1) * each, device=items.device).clamp_(max=len(items) - 1)
    return items[own], place, len(items)


def _in_chunks(towers: TwoTower, embed: Callable[..., Tensor], *inputs: Tensor | None, chunk: int | None) -> Tensor:
    if chunk is None:
        return embed(*inputs)
    return cached_embedding(embed, *inputs, chunk=chunk, anchor=_anchor(towers))


def _anchor(towers: TwoTower) -> Tensor:
    return next(parameter for parameter in towers.parameters() if parameter.requires_grad)
