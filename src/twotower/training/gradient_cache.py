"""The gradient cache: exact gradients of a batch far larger than the memory for its activations allows.

A loss with in-batch candidates needs all embeddings of the batch at once, but not all activations of the towers: the
gradient of a tower's weights is the sum over rows of the gradient by the embedding times that of the embedding by the
weights. So the rows are embedded in chunks without a graph, the loss is computed from the embeddings, and each chunk is
embedded again with a graph, through which the gradient of its embeddings is propagated.

Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def cached_embedding(embed: Callable[..., Tensor], *inputs: Tensor | None, chunk: int, anchor: Tensor) -> Tensor:
    """Compute embed(*inputs) in chunks of rows, without keeping activations.

    Value and gradient are those of embedding each chunk directly. Dropout is the same in both passes: the state of the
    random generators is saved for each chunk (CPU, and CUDA if the rows are there) and restored. A layer that looks at
    other rows, such as batch normalisation, sees only its chunk.

    Args:
        embed: maps tensors of rows to [rows, D], such as `towers.embed_queries`; its parameters get their gradients.
        inputs: [rows, ...] each, or None.
        chunk: rows at a time.
        anchor: any tensor with `requires_grad`, such as a parameter of the tower: it marks the result as
            differentiable for autograd, and gets no gradient itself.

    Returns:
        [rows, D].
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
        parts: at least one.
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
    """Return the state of the CPU generator, and of the rows' CUDA device if they are on one."""
    states: list[tuple[torch.device | None, Tensor]] = [(None, torch.get_rng_state())]
    return [*states, (device, torch.cuda.get_rng_state(device))] if device.type == "cuda" else states


@contextmanager
def _replayed(states: list[tuple[torch.device | None, Tensor]]) -> Iterator[None]:
    """Replay earlier random states in the block; afterwards the generators continue as if nothing had been drawn."""
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
