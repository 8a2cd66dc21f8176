"""The losses as training uses them: weighted sums over the rows, evaluated tile by tile together with the gradients.

Each has the value and gradient of the weighted sum of its plain version in softmax.py or binary.py, but needs bounded
memory: no [B, M] matrix is stored, and a mask is a list of pairs (`NegativeMask`). Use the plain versions if a gradient
has to flow through the values of single rows or through log counts, or to differentiate twice. Under bfloat16
`torch.autocast` the products are rounded to bfloat16 and summed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twotower.errors import InputError
from twotower.losses.tiled.autograd import tiled_loss
from twotower.losses.tiled.forms import TiledLogistic, TiledPairwise, TiledSoftmax
from twotower.losses.tiled.inputs import LossInputs
from twotower.negatives import NegativeMask


def tiled_softmax(
    query: Tensor,
    positive: Tensor,
    candidates: Tensor,
    log_expected_count: Tensor,
    *,
    mask: NegativeMask | Tensor | None = None,
    row_candidates: Tensor | None = None,
    row_log_expected_count: Tensor | None = None,
    row_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    row_offset: Tensor | None = None,
    log_left: Tensor | None = None,
    weights: Tensor | None = None,
    repeated_queries: bool = False,
) -> Tensor:
    """Compute sum_b w_b loss_b of `sampled_softmax`, or of `refined_logq` if `log_left` is given.

    Args:
        query: query embeddings, [B, D].
        positive: embeddings of the rows' positives, [B, D].
        candidates: embeddings of the shared candidates, [M, D].
        log_expected_count: log kappa of each candidate, [M].
        mask: `Candidates.negative_mask`, or bool [B, M], True where a candidate is not a negative for the row.
        row_candidates: embeddings of per-row candidates, [B, R, D].
        row_log_expected_count: log kappa of the per-row candidates, [B, R].
        row_mask: bool [B, R], True where a per-row candidate is not a negative for its row.
        temperature: divides every score; may be a tensor with a gradient.
        row_offset: subtracted from all candidate logits of a row, [B].
        log_left: log n' of refined logQ, [B].
        weights: w, [B], constants; None for the mean, 1/B each.
        repeated_queries: compute the logits of rows with equal queries only once. Set it for a tower that reads only
            ids or features; with other towers no queries are equal, and comparing them costs time. CPU only.

    Returns:
        A scalar, float32 (float64 if the inputs are).

    Raises:
        InputError: shapes do not fit.
    """
    if log_left is not None and log_left.requires_grad:
        raise InputError("log_left: expected constants; detach it, or use refined_logq")
    inputs = LossInputs(
        query,
        positive,
        candidates,
        log_expected_count,
        mask,
        row_candidates,
        row_log_expected_count,
        row_mask,
        temperature,
        weights,
        row_offset=row_offset,
        repeated_queries=repeated_queries,
    )
    return tiled_loss(TiledSoftmax(log_left), inputs)


def tiled_full_softmax(
    query: Tensor,
    positive_items: Tensor,
    items: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    weights: Tensor | None = None,
    repeated_queries: bool = False,
) -> Tensor:
    """Compute sum_b w_b loss_b of `full_softmax`; memory: the gradients and one tile of at most 256 MiB.

    Args:
        query: query embeddings, [B, D].
        positive_items: codes of the positives, int64 [B].
        items: embeddings of all items, [N, D].
        temperature: divides every score.
        weights: w, [B], constants; None for the mean, 1/B each.
        repeated_queries: as in `tiled_softmax`.

    Returns:
        A scalar.

    Raises:
        InputError: shapes do not fit, or a positive is not an item of the catalog (checked on the CPU only).
    """
    if query.ndim != 2 or items.ndim != 2 or query.shape[1] != items.shape[1]:
        raise InputError(f"items: expected [N, {query.shape[-1]}], found {list(items.shape)}")
    if positive_items.shape != query.shape[:1] or positive_items.dtype != torch.int64:
        raise InputError(
            f"positive_items: expected int64 [{len(query)}], found {positive_items.dtype} {list(positive_items.shape)}"
        )
    if (
        query.device.type == "cpu"
        and len(query)
        and not 0 <= int(positive_items.min()) <= int(positive_items.max()) < len(items)
    ):
        raise InputError(f"positive_items: expected codes from 0 to {len(items) - 1}")
    rows = torch.arange(len(query), device=query.device)
    inputs = LossInputs(
        query,
        None,
        items,
        None,
        NegativeMask([(rows, positive_items)], rows=len(query), items=None, size=len(items)),
        temperature=temperature,
        weights=weights,
        positive_places=positive_items,
        repeated_queries=repeated_queries,
    )
    return tiled_loss(TiledSoftmax(), inputs)


def tiled_logistic(
    query: Tensor,
    positive: Tensor,
    candidates: Tensor,
    log_expected_count: Tensor,
    *,
    bias: Tensor | None = None,
    own_offset: Tensor | None = None,
    beta: float = 1.0,
    mask: NegativeMask | Tensor | None = None,
    row_candidates: Tensor | None = None,
    row_log_expected_count: Tensor | None = None,
    row_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    weights: Tensor | None = None,
    multiplicity: Tensor | None = None,
) -> Tensor:
    """Compute sum_b w_b loss_b of `logistic`, or of `gbce` with its beta.

    Args:
        query: query embeddings, [B, D].
        positive: embeddings of the rows' positives, [B, D].
        candidates: embeddings of the shared candidates, [M, D].
        log_expected_count: log kappa of each candidate, [M].
        bias: a scalar added to every logit, including the positive's; may have a gradient.
        own_offset: subtracted from the positive's logit, [B]: its log kappa in the corrected losses.
        beta: weight of the positive.
        mask: as in `tiled_softmax`.
        row_candidates: embeddings of per-row candidates, [B, R, D].
        row_log_expected_count: log kappa of the per-row candidates, [B, R].
        row_mask: bool [B, R], True where a per-row candidate is not a negative for its row.
        temperature: divides every score.
        weights: w, [B], constants; None for the mean, 1/B each.
        multiplicity: how many equal candidates each shared candidate represents, [M]; None for one each.

    Returns:
        A scalar.

    Raises:
        InputError: shapes do not fit.
    """
    inputs = LossInputs(
        query,
        positive,
        candidates,
        log_expected_count,
        mask,
        row_candidates,
        row_log_expected_count,
        row_mask,
        temperature,
        weights,
        own_offset=own_offset,
        bias=bias,
        multiplicity=multiplicity,
    )
    return tiled_loss(TiledLogistic(beta), inputs)


def tiled_bpr(
    query: Tensor,
    positive: Tensor,
    candidates: Tensor,
    log_expected_count: Tensor,
    *,
    mask: NegativeMask | Tensor | None = None,
    row_candidates: Tensor | None = None,
    row_log_expected_count: Tensor | None = None,
    row_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    weights: Tensor | None = None,
    multiplicity: Tensor | None = None,
) -> Tensor:
    """Compute sum_b w_b loss_b of `bpr`; arguments, result and errors as in `tiled_logistic`."""
    inputs = LossInputs(
        query,
        positive,
        candidates,
        log_expected_count,
        mask,
        row_candidates,
        row_log_expected_count,
        row_mask,
        temperature,
        weights,
        multiplicity=multiplicity,
    )
    return tiled_loss(TiledPairwise(), inputs)
