"""Softmax losses: pure functions of embeddings, one value per row, no reduction and no state."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower.errors import InputError
from twotower.losses.binary import softplus


def sampled_softmax(
    query: Tensor,
    positive: Tensor,
    candidates: Tensor,
    log_expected_count: Tensor,
    *,
    mask: Tensor | None = None,
    row_candidates: Tensor | None = None,
    row_log_expected_count: Tensor | None = None,
    row_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    row_offset: Tensor | None = None,
) -> Tensor:
    """Estimate softmax cross-entropy from candidates, each weighted by one over its expected count.

    With s(x, j) = <u(x), v(j)> / temperature and kappa_j the expected number of times item j is among the candidates of
    a row,

        loss_x = -s(x, y) + log( exp s(x, y) + sum_{i not a hit} exp( s(x, j_i) - log kappa_{j_i} ) ).

    If every kappa_j > 0, the sum in the logarithm has expectation sum_j exp s(x, j) over the whole catalog: the
    positive is always present, so it is not corrected (docs/theory.md, section 2). Temperature divides the score
    before the correction. All computation stays in log space.

    Args:
        query: query embeddings u, [B, D].
        positive: embeddings of the rows' positives, [B, D].
        candidates: embeddings shared by all rows, [M, D]; M may be 0.
        log_expected_count: log kappa of each candidate, [M].
        mask: bool [B, M], True where a candidate is not a negative for the row (its own positive, a known positive).
        row_candidates: embeddings of per-row candidates, [B, R, D].
        row_log_expected_count: log kappa of the per-row candidates, [B, R]; 0 for candidates that are always included.
        row_mask: bool [B, R], True where a per-row candidate is not a negative for its row.
        temperature: divides every score; a number or a scalar tensor, > 0.
        row_offset: also subtracted from all candidate logits of a row, [B]: the part of a log count that depends on the
            row, such as log n' - log(1 - q_y) of refined logQ. With -log p_y the positive is corrected as well.

    Returns:
        One loss per row, [B], float32 (float64 if the inputs are); a row with no negative left has loss 0.

    Raises:
        InputError: shapes do not fit, or the temperature is not above 0 (not checked on an accelerator).

    Example:
        >>> import torch
        >>> import twotower as tt
        >>> query, items = torch.eye(2, 3), torch.eye(3)  # row b likes item b; all three items are candidates
        >>> own = torch.eye(2, 3, dtype=torch.bool)
        >>> tt.losses.sampled_softmax(query, items[:2], items, torch.zeros(3), mask=own)  # -1 + log(e + 2)
        tensor([0.5514, 0.5514])
    """
    positive_logit, logits = candidate_logits(
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
    )
    return softmax_loss(positive_logit, logits)


def refined_logq(
    query: Tensor,
    positive: Tensor,
    candidates: Tensor,
    log_count: Tensor,
    *,
    mask: Tensor | None = None,
    log_left: Tensor,
    row_offset: Tensor,
    temperature: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute the refined logQ loss in its published form, and the weight of each row.

    With Q'_j = q_j / (1 - q_y), n' candidates left after masking y, and no gradient through P_hat,

        P_hat(y) = exp s_y / ( exp s_y + (1/n') sum_i exp( s_i - log Q'_i ) )
        loss     = -(1 - P_hat(y)) log( exp s_y / sum_i exp( s_i - log Q'_i ) )

    Its gradient equals the gradient of `sampled_softmax` with kappa_j = n' Q'_j (docs/theory.md, section 3). Use
    `sampled_softmax` unless you want the published value or the weight.

    Args:
        query: query embeddings, [B, D].
        positive: embeddings of the rows' positives, [B, D].
        candidates: embeddings of the shared candidates, [M, D].
        log_count: log q_j of each candidate, minus the log of the number of copies it represents, [M].
        mask: bool [B, M], True where a candidate is masked.
        log_left: log n', [B]: the sum in the loss, unlike the sum in P_hat, is not divided by n'.
        row_offset: log n' - log(1 - q_y), [B], so that `log_count + row_offset` is log(n' Q'_j); if known positives
            K(x) are masked too, log n' - log(1 - q(K(x) and y)).
        temperature: divides every score.

    Returns:
        (loss, weight), [B] each; weight = 1 - P_hat(y), without gradient. Both are 0 for a row without candidates.

    Source: Khrylchenko et al. 2025, "Correcting the LogQ Correction", arXiv 2507.09331, equations 8 to 10.
    """
    positive_logit, logits = candidate_logits(
        query, positive, candidates, log_count, mask=mask, temperature=temperature, row_offset=row_offset
    )
    # Every logit already contains - log n': the sum here is (1/n') sum_i exp(s_i - log Q'_i).
    log_negatives = torch.logsumexp(logits, 1)
    weight = torch.sigmoid(log_negatives - positive_logit).detach()
    empty = torch.isneginf(log_negatives)
    log_sum = log_negatives.masked_fill(empty, 0.0) + log_left.to(log_negatives.dtype)
    loss = weight * (log_sum - positive_logit).masked_fill(empty, 0.0)
    return loss, weight


def softmax_loss(positive_logit: Tensor, logits: Tensor) -> Tensor:
    """Compute -s_y + log( exp s_y + sum_i exp l_i ) from corrected logits: [B] and [B, M] -> [B]."""
    # log(e^s + Z) - s = log(1 + e^(log Z - s)): the positive is added without copying the matrix.
    return softplus(log_sum_exp(logits) - positive_logit)


def log_sum_exp(logits: Tensor) -> Tensor:
    """Compute log sum_i exp(l_i) over the last dimension; -inf if nothing is left to sum.

    A row with nothing left has gradient 0 if its logits were masked with `masked_fill`, as in `candidate_logits`.
    """
    if logits.shape[-1] == 0:
        return logits.new_full(logits.shape[:-1], -torch.inf)
    return torch.logsumexp(logits, -1)


def candidate_logits(
    query: Tensor,
    positive: Tensor,
    candidates: Tensor,
    log_expected_count: Tensor,
    *,
    mask: Tensor | None = None,
    row_candidates: Tensor | None = None,
    row_log_expected_count: Tensor | None = None,
    row_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    row_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute corrected logits, (positive [B], candidates [B, M + R]), -inf where masked. See `sampled_softmax`."""
    _check_shapes(query, positive, candidates, log_expected_count, mask)
    check_temperature(temperature)
    query, positive, candidates = (_accumulating(tensor) for tensor in (query, positive, candidates))
    scaled = query / temperature
    positive_logit = (scaled * positive).sum(-1)
    # Allocate one [B, M] matrix and modify it in place: it accounts for most of a step's memory traffic.
    logits = torch.addmm(-log_expected_count.to(scaled.dtype)[None, :], scaled, candidates.T)
    if mask is not None:
        logits = logits.masked_fill_(mask, -torch.inf)
    if row_candidates is not None:
        _check_row_shapes(query, row_candidates, row_log_expected_count, row_mask)
        row_logits = torch.einsum("bd,brd->br", scaled, _accumulating(row_candidates))
        if row_log_expected_count is not None:
            row_logits = row_logits - row_log_expected_count.to(scaled.dtype)
        if row_mask is not None:
            row_logits = row_logits.masked_fill(row_mask, -torch.inf)
        logits = torch.cat([logits, row_logits], 1)
    if row_offset is not None:
        if row_offset.shape != query.shape[:1]:
            raise InputError(f"row_offset: expected [{len(query)}], found {list(row_offset.shape)}")
        logits = logits - row_offset[:, None].to(scaled.dtype)
    return positive_logit, logits


def full_softmax(
    query: Tensor,
    positive_items: Tensor,
    items: Tensor,
    *,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """Compute softmax cross-entropy over the whole catalog: L = -log( exp s(x, y) / sum_j exp s(x, j) ).

    Args:
        query: query embeddings, [B, D].
        positive_items: codes of the positives, int64 [B].
        items: embeddings of all items, [N, D].
        temperature: divides every score, > 0.

    Returns:
        One loss per row, [B].

    Raises:
        InputError: the temperature is not above 0.
    """
    check_temperature(temperature)
    query, items = _accumulating(query), _accumulating(items)
    return torch.nn.functional.cross_entropy((query / temperature) @ items.T, positive_items, reduction="none")


def check_temperature(temperature: float | Tensor) -> None:
    """Reject a temperature of 0 or below; on an accelerator it is not checked, since reading it would synchronize.

    Raises:
        InputError: the temperature is 0 or below.
    """
    if isinstance(temperature, Tensor) and temperature.device.type != "cpu":
        return
    value = float(temperature.detach() if isinstance(temperature, Tensor) else temperature)
    if value <= 0.0:
        raise InputError(f"temperature: expected a number above 0, found {value}")


def _accumulating(tensor: Tensor) -> Tensor:
    """Convert half precision to float32 for accumulation."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _check_shapes(
    query: Tensor, positive: Tensor, candidates: Tensor, log_expected_count: Tensor, mask: Tensor | None
) -> None:
    if query.ndim != 2:
        raise InputError(f"query: expected [B, D], found {list(query.shape)}")
    rows, width = query.shape
    if positive.shape != query.shape:
        raise InputError(f"positive: expected the shape of query, {list(query.shape)}; found {list(positive.shape)}")
    if candidates.ndim != 2 or candidates.shape[1] != width:
        raise InputError(f"candidates: expected [M, {width}], found {list(candidates.shape)}")
    if log_expected_count.shape != candidates.shape[:1]:
        raise InputError(
            f"log_expected_count: expected one number per candidate, [{len(candidates)}]; "
            f"found {list(log_expected_count.shape)}"
        )
    if mask is not None and (mask.shape != (rows, len(candidates)) or mask.dtype != torch.bool):
        raise InputError(f"mask: expected bool [{rows}, {len(candidates)}], found {mask.dtype} {list(mask.shape)}")


def _check_row_shapes(
    query: Tensor, row_candidates: Tensor, row_log_expected_count: Tensor | None, row_mask: Tensor | None
) -> None:
    rows, width = query.shape
    if row_candidates.ndim != 3 or row_candidates.shape[0] != rows or row_candidates.shape[2] != width:
        raise InputError(f"row_candidates: expected [{rows}, R, {width}], found {list(row_candidates.shape)}")
    expected = row_candidates.shape[:2]
    if row_log_expected_count is not None and row_log_expected_count.shape != expected:
        raise InputError(
            f"row_log_expected_count: expected {list(expected)}, found {list(row_log_expected_count.shape)}"
        )
    if row_mask is not None and (row_mask.shape != expected or row_mask.dtype != torch.bool):
        raise InputError(f"row_mask: expected bool {list(expected)}, found {row_mask.dtype} {list(row_mask.shape)}")
