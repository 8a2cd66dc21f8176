"""Binary losses: the positive and each negative are questions of their own. One value for each row, no reduction.

All take logits, already divided by the temperature and corrected where a form wants that: see `candidate_logits`.
A masked negative has logit -inf and adds nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def logistic(positive_logit: Tensor, negative_logits: Tensor) -> Tensor:
    """Binary cross-entropy of one positive and its negatives, summed.

        loss_x = -log sigmoid(s_y) - sum_i log sigmoid(-s_i)

    With K uniform negatives for each positive this is negative sampling (Mikolov et al. 2013, equation 4); with
    log kappa subtracted from every logit, the positive's too, it is NCE or sampled logistic (Gutmann and Hyvarinen
    2010; "Candidate Sampling" in the TensorFlow documentation).

    Args:
        positive_logit: [B].
        negative_logits: [B, K], -inf where masked.

    Returns:
        [B].
    """
    return softplus(-positive_logit) + softplus(negative_logits).sum(1)


def gbce(positive_logit: Tensor, negative_logits: Tensor, *, beta: float) -> Tensor:
    """Generalised binary cross-entropy: the positive's probability is raised to beta <= 1 against overconfidence.

        loss_x = -beta log sigmoid(s_y) - sum_i log sigmoid(-s_i)

    Args:
        positive_logit: [B].
        negative_logits: [B, K], -inf where masked; K uniform negatives for each row.
        beta: `gbce_beta(K, N, t)`.

    Returns:
        [B].

    Source: Petrov and Macdonald 2023, "gSASRec", equation 8.
    """
    return beta * softplus(-positive_logit) + softplus(negative_logits).sum(1)


def gbce_beta(size: int, num_items: int, calibration: float = 0.75) -> float:
    """Beta = a (t (1 - 1/a) + 1/a) with sampling rate a = K / (N - 1) and calibration t in [0, 1].

    t = 0 gives plain binary cross-entropy (beta = 1), t = 1 a fully calibrated one (beta = a). Multiplied out, which
    also serves a = 0: beta = 1 - t (1 - a).

    Source: Petrov and Macdonald 2023, "gSASRec", equation 10.
    """
    rate = min(size / max(num_items - 1, 1), 1.0)
    return 1.0 - calibration * (1.0 - rate)


def bpr(positive_logit: Tensor, negative_logits: Tensor) -> Tensor:
    """Bayesian personalised ranking: the mean over negatives of -log sigmoid(s_y - s_i).

    Args:
        positive_logit: [B].
        negative_logits: [B, K], -inf where masked.

    Returns:
        [B]; 0 for a row without negatives.

    Source: Rendle et al. 2009, section 4.
    """
    live = ~torch.isneginf(negative_logits)
    return softplus(negative_logits - positive_logit[:, None]).sum(1) / live.sum(1).clamp(min=1)


def softplus(logits: Tensor) -> Tensor:
    """log(1 + e^x), with value and gradient 0 at -inf, where the plain form has a gradient that is not a number."""
    masked = torch.isneginf(logits)
    # Beyond the threshold x stands for log(1 + e^x): at 40 the difference is below the last digit of float64; at
    # torch's own 20 the gradient would be off by 2e-9.
    return F.softplus(logits.masked_fill(masked, 0.0), threshold=40.0).masked_fill(masked, 0.0)
