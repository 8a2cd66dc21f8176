"""Softmax losses: pure functions of embeddings, one value for each row, no reduction and no state."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower.errors import InputError


def sampled_softmax(
    query: Tensor,
    positive: Tensor,
    candidates: Tensor,
    log_expected_count: Tensor,
    *,
    hits: Tensor | None = None,
    row_candidates: Tensor | None = None,
    row_log_expected_count: Tensor | None = None,
    row_hits: Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """Softmax cross-entropy estimated from candidates, each weighted by one over its expected count.

    With s(x, j) = <u(x), v(j)> / temperature and kappa_j the expected number of times item j stands among the
    candidates of a row,

        loss_x = -s(x, y) + log( exp s(x, y) + sum_{i not a hit} exp( s(x, j_i) - log kappa_{j_i} ) ).

    The sum in the logarithm has expectation sum_j exp s(x, j) over the whole catalog where every kappa_j > 0: the
    positive is always present, so it is not corrected (THEORY, section 2). Temperature divides the score before the
    correction. Nothing leaves log space.

    Args:
        query: query embeddings u, [B, D].
        positive: embeddings of the rows' positives, [B, D].
        candidates: embeddings shared by all rows, [M, D]; M may be 0.
        log_expected_count: log kappa of each candidate, [M].
        hits: bool [B, M], True where a candidate is no negative for the row (its own positive, a known positive).
        row_candidates: candidates of single rows, [B, R, D].
        row_log_expected_count: their log kappa, [B, R]; 0 for candidates that are always included.
        row_hits: bool [B, R], True where a row's candidate is no negative for it.
        temperature: divides every score; a number or a scalar tensor, > 0.

    Returns:
        One loss for each row, [B], float32 (float64 where the inputs are); a row with no negative left has loss 0.

    Raises:
        InputError: shapes do not fit.

    Example:
        >>> query, item = torch.randn(2, 4), torch.randn(3, 4)
        >>> sampled_softmax(query, item[:2], item, torch.zeros(3), hits=torch.eye(2, 3, dtype=torch.bool)).shape
        torch.Size([2])
    """
    _check_shapes(query, positive, candidates, log_expected_count, hits)
    query, positive, candidates = (_accumulating(tensor) for tensor in (query, positive, candidates))
    scaled = query / temperature
    positive_logit = (scaled * positive).sum(-1)
    logits = scaled @ candidates.T - log_expected_count.to(scaled.dtype)
    if hits is not None:
        logits = logits.masked_fill(hits, -torch.inf)
    parts = [positive_logit[:, None], logits]
    if row_candidates is not None:
        _check_row_shapes(query, row_candidates, row_log_expected_count, row_hits)
        row_logits = torch.einsum("bd,brd->br", scaled, _accumulating(row_candidates))
        if row_log_expected_count is not None:
            row_logits = row_logits - row_log_expected_count.to(scaled.dtype)
        if row_hits is not None:
            row_logits = row_logits.masked_fill(row_hits, -torch.inf)
        parts.append(row_logits)
    return torch.logsumexp(torch.cat(parts, 1), 1) - positive_logit


def full_softmax(
    query: Tensor,
    positive_items: Tensor,
    items: Tensor,
    *,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """Softmax cross-entropy over the whole catalog: L = -log( exp s(x, y) / sum_j exp s(x, j) ).

    Args:
        query: query embeddings, [B, D].
        positive_items: codes of the positives, int64 [B].
        items: embeddings of all items, [N, D].
        temperature: divides every score, > 0.

    Returns:
        One loss for each row, [B].
    """
    query, items = _accumulating(query), _accumulating(items)
    return torch.nn.functional.cross_entropy((query / temperature) @ items.T, positive_items, reduction="none")


def _accumulating(tensor: Tensor) -> Tensor:
    """Half precisions are accumulated in float32."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _check_shapes(
    query: Tensor, positive: Tensor, candidates: Tensor, log_expected_count: Tensor, hits: Tensor | None
) -> None:
    rows, width = query.shape
    if positive.shape != query.shape:
        raise InputError(f"positive: expected the shape of query, {list(query.shape)}; found {list(positive.shape)}")
    if candidates.ndim != 2 or candidates.shape[1] != width:
        raise InputError(f"candidates: expected [M, {width}], found {list(candidates.shape)}")
    if log_expected_count.shape != candidates.shape[:1]:
        raise InputError(
            f"log_expected_count: expected one number for each candidate, [{len(candidates)}]; "
            f"found {list(log_expected_count.shape)}"
        )
    if hits is not None and (hits.shape != (rows, len(candidates)) or hits.dtype != torch.bool):
        raise InputError(f"hits: expected bool [{rows}, {len(candidates)}], found {hits.dtype} {list(hits.shape)}")


def _check_row_shapes(
    query: Tensor, row_candidates: Tensor, row_log_expected_count: Tensor | None, row_hits: Tensor | None
) -> None:
    rows, width = query.shape
    if row_candidates.ndim != 3 or row_candidates.shape[0] != rows or row_candidates.shape[2] != width:
        raise InputError(f"row_candidates: expected [{rows}, R, {width}], found {list(row_candidates.shape)}")
    expected = row_candidates.shape[:2]
    if row_log_expected_count is not None and row_log_expected_count.shape != expected:
        raise InputError(
            f"row_log_expected_count: expected {list(expected)}, found {list(row_log_expected_count.shape)}"
        )
    if row_hits is not None and (row_hits.shape != expected or row_hits.dtype != torch.bool):
        raise InputError(f"row_hits: expected bool {list(expected)}, found {row_hits.dtype} {list(row_hits.shape)}")
