"""Embedding of a batch, in chunks if memory is short; on a CPU, each distinct item goes through the tower once.

Chunks need a gradient cache, which gives the exact gradients of a batch whose activations would not fit in memory. A
loss with in-batch candidates needs all embeddings of the batch together, but not all activations of the towers: the
gradient with respect to a tower's weights is the sum over rows of the gradient with respect to the row's embedding,
times the derivative of the embedding with respect to the weights. So `cached_embedding` embeds the rows in chunks
without a graph, the loss is computed from the embeddings, and each chunk is embedded again with a graph, through which
the gradient of its embeddings is propagated.

Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from twotower.data import Batch, Packed
from twotower.distributed.communicator import Communicator
from twotower.towers import TwoTower


def cached_embedding(embed: Callable[..., Tensor], *inputs: Tensor | None, chunk: int, anchor: Tensor) -> Tensor:
    """Compute embed(*inputs) in chunks of rows, without keeping activations.

    The value and the gradient are the same as when each chunk is embedded directly. Dropout is the same in both passes:
    the state of the random generators (CPU, and CUDA if the rows are on a GPU) is saved for each chunk and restored. A
    layer that mixes rows, such as batch normalisation, sees only its chunk.

    Args:
        embed: maps tensors of rows to [rows, D], such as `towers.embed_queries`; its parameters get their gradients.
        inputs: tensors, [rows, ...] each; None is passed on to `embed`.
        chunk: rows per chunk.
        anchor: any tensor with `requires_grad`, such as a parameter of the tower. It makes autograd treat the result as
            differentiable, and gets no gradient.

    Returns:
        The embeddings, [rows, D].
    """
    rows = len(next(given for given in inputs if given is not None))
    if rows <= chunk or not torch.is_grad_enabled():
        return embed(*inputs)
    starts = range(0, rows, chunk)
    parts = [tuple(None if one is None else one[s : s + chunk] for one in inputs) for s in starts]
    return cached_parts(embed, parts, anchor=anchor)


def cached_parts(embed: Callable[..., Tensor], parts: list[tuple[Any, ...]], *, anchor: Tensor) -> Tensor:
    """Embed all parts and concatenate the results, without keeping activations; see `cached_embedding`.

        torch.cat([embed(*part) for part in parts])

    Args:
        embed: maps a part to [rows, D], such as `towers.embed_sequences` of packed sequences.
        parts: the arguments of `embed` for each part; at least one part.
        anchor: as in `cached_embedding`; on the device of the rows.
    """
    if len(parts) == 1 or not torch.is_grad_enabled():
        return torch.cat([embed(*part) for part in parts])
    embedded: Tensor = _Cached.apply(anchor, embed, parts)  # type: ignore[no-untyped-call]
    return embedded


class _Cached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, embed: Callable[..., Tensor], parts: list[tuple[Any, ...]]) -> Tensor:
        ctx.embed, ctx.parts, ctx.states = embed, parts, []
        ctx.autocast = {
            device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")
        }
        embedded = []
        with torch.no_grad():
            for part in parts:
                ctx.states.append(_random_state(anchor.device))
                embedded.append(embed(*part))
        ctx.sizes = [len(one) for one in embedded]
        return torch.cat(embedded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        (grad,) = grads
        pieces = torch.split(grad, ctx.sizes)
        device = grad.device.type
        enabled, dtype = ctx.autocast.get(device, (False, torch.bfloat16))
        for part, state, piece in zip(ctx.parts, ctx.states, pieces, strict=True):
            with _replayed(state), torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
                again = ctx.embed(*part)
            torch.autograd.backward(again, piece.to(again.dtype))
        return None, None, None


def _random_state(device: torch.device) -> list[tuple[torch.device | None, Tensor]]:
    """Return the random state of the CPU and, if the rows are on a CUDA device, of that device."""
    states: list[tuple[torch.device | None, Tensor]] = [(None, torch.get_rng_state())]
    return [*states, (device, torch.cuda.get_rng_state(device))] if device.type == "cuda" else states


@contextmanager
def _replayed(states: list[tuple[torch.device | None, Tensor]]) -> Iterator[None]:
    """Restore earlier random states inside the block; afterwards the generators continue as if it had drawn nothing."""
    now = [(d, torch.get_rng_state() if d is None else torch.cuda.get_rng_state(d)) for d, _ in states]
    _restore(states)
    try:
        yield
    finally:
        _restore(now)


def _restore(states: list[tuple[torch.device | None, Tensor]]) -> None:
    for device, state in states:
        if device is None:
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


def embed_queries(
    towers: TwoTower,
    queries: Tensor,
    history: Tensor,
    context: tuple[Tensor, ...] | None = None,
    events: Tensor | None = None,
    *,
    chunk: int | None = None,
) -> Tensor:
    """Embed queries, [B, D], `chunk` at a time, or all at once if it is None."""
    if context is None:
        return _in_chunks(towers, towers.embed_queries, queries, history, chunk=chunk)
    typed = () if events is None else (events,)

    def embed(queries: Tensor, history: Tensor, *rest: Tensor) -> Tensor:
        parts = len(rest) - len(typed)
        return towers.embed_queries(queries, history, context=rest[:parts], events=rest[parts] if typed else None)

    return _in_chunks(towers, embed, queries, history, *context, *typed, chunk=chunk)


def embed_rows(towers: TwoTower, batch: Batch, *, chunk: int | None = None) -> Tensor:
    """Embed the queries of a batch, [B, D]; if it consists of sequences, all their positions in one pass."""
    if batch.sequences is not None:
        return embed_sequences(towers, batch, chunk=chunk)
    if batch.asked is not None:  # rows with the same question share its embedding
        embedded = embed_queries(towers, batch.asked.queries, batch.history, batch.context, chunk=chunk)
        return embedded.index_select(0, batch.asked.of)
    if chunk is not None and towers.repeats_queries and towers.encodes_text:
        # Within a chunk a text is encoded once. Distinct queries make this hold for the whole batch.
        queries, place = torch.unique(batch.queries, return_inverse=True)
        return embed_queries(towers, queries, batch.history[: len(queries)], chunk=chunk).index_select(0, place)
    return embed_queries(towers, batch.queries, batch.history, batch.context, batch.history_events, chunk=chunk)


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
    """Embed items, [M, D], `chunk` at a time; on a CPU, each distinct item goes through the tower once."""
    if items.device.type != "cpu":  # counting distinct items would synchronize with the device
        return _in_chunks(towers, towers.embed_items, items, chunk=chunk)
    distinct, place = torch.unique(items, return_inverse=True)
    # Not `[place]`: on a CPU the backward pass of indexing takes five times as long as that of index_select.
    return _in_chunks(towers, towers.embed_items, distinct, chunk=chunk).index_select(0, place)


def embed_parts(towers: TwoTower, parts: list[Tensor], *, chunk: int | None = None) -> list[Tensor]:
    """Embed any number of item lists, [M, D] each; on a CPU, each distinct item goes through the tower once.

    On a CPU, if there are two lists and the second is sorted, has no duplicates and contains the first (as merged
    candidates contain the batch's positives), the second is embedded directly, so that its embeddings, possibly of the
    whole catalog, are not copied.
    """
    if len(parts) == 2 and parts[1].device.type == "cpu" and len(parts[1]):
        few, many = parts
        place = torch.searchsorted(many, few).clamp_(max=len(many) - 1)
        if bool((many[1:] > many[:-1]).all()) and torch.equal(many.index_select(0, place), few):
            table = _in_chunks(towers, towers.embed_items, many, chunk=chunk)
            return [table.index_select(0, place), table]
    if not parts:
        return []
    return list(torch.split(embed_once(towers, torch.cat(parts), chunk=chunk), [len(part) for part in parts]))


def embed_by_ranks(towers: TwoTower, items: Tensor, ranks: Communicator, *, chunk: int | None = None) -> Tensor:
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


def share_of_items(items: Tensor, ranks: Communicator) -> tuple[Tensor, Tensor | None, int]:
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
