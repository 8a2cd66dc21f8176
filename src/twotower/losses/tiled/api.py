"""The losses as training uses them: weighted sums over the rows, evaluated tile by tile together with the gradients.

Each equals the weighted sum of its plain version in softmax.py or binary.py, value and gradient, in bounded memory:
no [B, M] matrix is stored, and a mask is a list of pairs (`NegativeMask`). Use the plain versions if a gradient has to
flow through the values of single rows. Under bfloat16 `torch.autocast` the products are rounded to bfloat16 and summed
in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twotower.errors import InputError
from twotower.losses.softmax import _check_row_shapes, _check_shapes
from twotower.losses.tiled.autograd import Tiled
from twotower.losses.tiled.evaluation import LossInputs
from twotower.losses.tiled.forms import TiledLogistic, TiledPairwise, TiledSoftmax, TileLoss
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
) -> Tensor:
    """Compute sum_b w_b loss_b of `sampled_softmax`, or of `refined_logq` if `log_left` is given.

    Args:
        query: [B, D].
        positive: [B, D].
        candidates: [M, D].
        log_expected_count: log kappa of each candidate, [M].
        mask: the mask; `Candidates.masks`, or bool [B, M].
        row_candidates: [B, R, D].
        row_log_expected_count: [B, R].
        row_mask: bool [B, R].
        temperature: divides every score; may be a tensor with a gradient.
        row_offset: subtracted from all candidate logits of a row, [B].
        log_left: log n' of refined logQ, [B].
        weights: w, [B], constants; None for the mean, 1/B each.

    Returns:
        A scalar, float32 (float64 if the inputs are).

    Raises:
        InputError: shapes do not fit.
    """
    return _tiled(
        TiledSoftmax(log_left),
        query,
        positive,
        candidates,
        log_expected_count,
        mask=mask,
        row_candidates=row_candidates,
        row_log_expected_count=row_log_expected_count,
        row_mask=row_mask,
        temperature=temperature,
        row_offset=row_offset,
        weights=weights,
    )


def tiled_full_softmax(
    query: Tensor,
    positive_items: Tensor,
    items: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Compute sum_b w_b loss_b of `full_softmax`; in addition to the gradients it needs one tile, at most 256 MiB.

    Args:
        query: [B, D].
        positive_items: codes of the positives, int64 [B].
        items: embeddings of all items, [N, D].
        temperature: divides every score.
        weights: w, [B]; None for the mean.

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
    task = LossInputs(
        TiledSoftmax(),
        _weights(weights, query),
        mask=NegativeMask([(rows, positive_items)], rows=len(query), items=None, size=len(items)),
        own_places=positive_items,
        low_precision=_low_precision(query),
    )
    return _apply(task, query, None, items, None, temperature=temperature, bias=None)


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
) -> Tensor:
    """Compute sum_b w_b loss_b of `logistic`, or of `gbce` with its beta.

    Args:
        query: [B, D].
        positive: [B, D].
        candidates: [M, D].
        log_expected_count: [M].
        bias: a scalar added to every logit, including the positive's; may have a gradient.
        own_offset: subtracted from the positive's logit, [B]: its log kappa in the corrected losses.
        beta: weight of the positive.
        mask: as in `tiled_softmax`; so are the following.
        row_candidates: [B, R, D].
        row_log_expected_count: [B, R].
        row_mask: bool [B, R].
        temperature: divides every score.
        weights: w, [B]; None for the mean.

    Returns:
        A scalar.

    Raises:
        InputError: shapes do not fit.
    """
    return _tiled(
        TiledLogistic(beta),
        query,
        positive,
        candidates,
        log_expected_count,
        mask=mask,
        row_candidates=row_candidates,
        row_log_expected_count=row_log_expected_count,
        row_mask=row_mask,
        temperature=temperature,
        own_offset=own_offset,
        bias=bias,
        weights=weights,
    )


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
) -> Tensor:
    """Compute sum_b w_b loss_b of `bpr`; arguments, result and errors as in `tiled_logistic`."""
    return _tiled(
        TiledPairwise(),
        query,
        positive,
        candidates,
        log_expected_count,
        mask=mask,
        row_candidates=row_candidates,
        row_log_expected_count=row_log_expected_count,
        row_mask=row_mask,
        temperature=temperature,
        weights=weights,
    )


def _tiled(
    form: TileLoss,
    query: Tensor,
    positive: Tensor,
    candidates: Tensor,
    log_expected_count: Tensor,
    *,
    mask: NegativeMask | Tensor | None,
    row_candidates: Tensor | None,
    row_log_expected_count: Tensor | None,
    row_mask: Tensor | None,
    temperature: float | Tensor,
    weights: Tensor | None,
    row_offset: Tensor | None = None,
    own_offset: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    _check_shapes(query, positive, candidates, log_expected_count, mask if isinstance(mask, Tensor) else None)
    if row_candidates is not None:
        _check_row_shapes(query, row_candidates, row_log_expected_count, row_mask)
    negative_mask = NegativeMask.of(mask) if isinstance(mask, Tensor) else mask
    if negative_mask is not None and negative_mask.shape != (len(query), len(candidates)):
        raise InputError(f"mask: expected shape [{len(query)}, {len(candidates)}], found {list(negative_mask.shape)}")
    for name, offset in (("row_offset", row_offset), ("own_offset", own_offset)):
        if offset is not None and offset.shape != query.shape[:1]:
            raise InputError(f"{name}: expected [{len(query)}], found {list(offset.shape)}")
    task = LossInputs(
        form,
        _weights(weights, query),
        log_count=log_expected_count,
        mask=negative_mask,
        row_log_count=row_log_expected_count,
        row_mask=row_mask,
        row_offset=row_offset,
        own_offset=own_offset,
        low_precision=_low_precision(query),
    )
    return _apply(task, query, positive, candidates, row_candidates, temperature=temperature, bias=bias)


def _apply(
    task: LossInputs, query: Tensor, *others: Tensor | None, temperature: float | Tensor, bias: Tensor | None
) -> Tensor:
    if not isinstance(temperature, Tensor):
        temperature = torch.tensor(temperature, dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)
    total: Tensor = Tiled.apply(task, query, *others, temperature.to(query.device), bias)  # type: ignore[no-untyped-call]
    return total


def _weights(weights: Tensor | None, query: Tensor) -> Tensor:
    rows = len(query)
    if weights is None:
        return torch.full((rows,), 1.0 / max(rows, 1), dtype=torch.float64, device=query.device)
    if weights.shape != (rows,):
        raise InputError(f"weights: expected [{rows}], found {list(weights.shape)}")
    if weights.requires_grad:
        raise InputError("weights: expected constants; use the plain losses if row weights need a gradient")
    return weights


def _low_precision(query: Tensor) -> bool:
    device = query.device.type
    if not torch.amp.is_autocast_available(device):
        return False
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
