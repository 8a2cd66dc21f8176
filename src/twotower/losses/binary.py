"""Binary losses: the positive and each negative are classified independently, or, in the pairwise losses, compared.

All return one value per row, without a reduction over rows. They take logits, already divided by the temperature and,
where required, corrected: see `candidate_logits`. A masked negative has logit -inf and contributes nothing.
`multiplicity` is the number of identical negatives that each candidate represents.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def logistic(positive_logit: Tensor, negative_logits: Tensor, *, multiplicity: Tensor | None = None) -> Tensor:
    """Compute the summed binary cross-entropy of one positive and its negatives.

        loss_x = -log sigmoid(s_y) - sum_i log sigmoid(-s_i)

    With K uniform negatives per positive this is negative sampling (Mikolov et al. 2013, equation 4). If the logarithm
    of each item's expected count is subtracted from its logit, including the positive's, it is NCE or sampled logistic
    (Gutmann and Hyvarinen 2010; "Candidate Sampling" in the TensorFlow documentation).

    Args:
        positive_logit: logits of the rows' positives, [B].
        negative_logits: logits of the negatives, [B, K], -inf where masked.
        multiplicity: how many equal negatives each candidate represents, [K]; None for one each.

    Returns:
        One loss per row, [B].
    """
    return softplus(-positive_logit) + _summed(softplus(negative_logits), multiplicity)


def gbce(positive_logit: Tensor, negative_logits: Tensor, *, beta: float, multiplicity: Tensor | None = None) -> Tensor:
    """Compute generalised BCE: the positive's probability is raised to beta <= 1 to reduce overconfidence.

        loss_x = -beta log sigmoid(s_y) - sum_i log sigmoid(-s_i)

    Args:
        positive_logit: logits of the rows' positives, [B].
        negative_logits: logits of the negatives, [B, K], -inf where masked; K uniform negatives per row.
        beta: `gbce_beta(K, N, t)`.
        multiplicity: how many equal negatives each candidate represents, [K]; None for one each.

    Returns:
        One loss per row, [B].

    Source: Petrov and Macdonald 2023, "gSASRec", equation 8.
    """
    return beta * softplus(-positive_logit) + _summed(softplus(negative_logits), multiplicity)


def gbce_beta(size: int, num_items: int, calibration: float = 0.75) -> float:
    """Compute beta = a (t (1 - 1/a) + 1/a) with sampling rate a = K / (N - 1) and calibration t in [0, 1].

    t = 0 is plain binary cross-entropy (beta = 1), t = 1 is fully calibrated (beta = a). The simplified form
    beta = 1 - t (1 - a) also covers a = 0.

    Source: Petrov and Macdonald 2023, "gSASRec", equation 10.
    """
    rate = min(size / max(num_items - 1, 1), 1.0)
    return 1.0 - calibration * (1.0 - rate)


def bpr(positive_logit: Tensor, negative_logits: Tensor, *, multiplicity: Tensor | None = None) -> Tensor:
    """Compute Bayesian personalised ranking: the mean over negatives of -log sigmoid(s_y - s_i).

    Args:
        positive_logit: logits of the rows' positives, [B].
        negative_logits: logits of the negatives, [B, K], -inf where masked.
        multiplicity: how many equal negatives each candidate represents, [K]; None for one each.

    Returns:
        One loss per row, [B]; 0 for a row without negatives.

    Source: Rendle et al. 2009, section 4.
    """
    live = ~torch.isneginf(negative_logits)
    total = _summed(softplus(negative_logits - positive_logit[:, None]), multiplicity)
    return total / _summed(live, multiplicity).clamp(min=1)


def slate_logistic(positive_logit: Tensor, negative_logits: Tensor, weights: Tensor) -> Tensor:
    """Compute the mean binary cross-entropy over a row's slate: the positive and its n negatives with weights v.

        loss_x = -( log sigmoid(s_y) + sum_i v_i log sigmoid(-s_i) ) / (1 + n)

    Args:
        positive_logit: logits of the rows' positives, [B].
        negative_logits: logits of the negatives, [B, S], -inf where there is no negative.
        weights: v, [B, S], 0 where there is no negative.

    Returns:
        One loss per row, [B]; 0 for a row without negatives.
    """
    count = (weights > 0).sum(1)
    total = softplus(-positive_logit) + (weights * softplus(negative_logits)).sum(1)
    return total.masked_fill(count == 0, 0.0) / (1 + count)


def slate_pairwise(positive_logit: Tensor, negative_logits: Tensor, weights: Tensor) -> Tensor:
    """Compute the mean of v_i (-log sigmoid(s_y - s_i)) over the negatives of a row's slate; see `slate_logistic`."""
    count = (weights > 0).sum(1)
    return (weights * softplus(negative_logits - positive_logit[:, None])).sum(1) / count.clamp(min=1)


def _summed(terms: Tensor, multiplicity: Tensor | None) -> Tensor:
    """Sum [B, K] over the negatives, each term as often as its candidate was drawn."""
    return terms.sum(1) if multiplicity is None else (terms * multiplicity).sum(1)


def softplus(logits: Tensor) -> Tensor:
    """Compute log(1 + e^x), with value and gradient 0 at -inf, where the plain form has a NaN gradient."""
    masked = torch.isneginf(logits)
    # Above the threshold torch returns x for log(1 + e^x): at 40 the difference is below float64 precision; at torch's
    # default, 20, the gradient would be off by 2e-9.
    return F.softplus(logits.masked_fill(masked, 0.0), threshold=40.0).masked_fill(masked, 0.0)
