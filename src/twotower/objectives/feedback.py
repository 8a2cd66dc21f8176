"""Feedback: the term of a softmax objective for the items that were shown with a row and passed over."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from twotower.errors import InputError
from twotower.losses.binary import slate_logistic, slate_pairwise
from twotower.negatives import Candidates, DrawRequest
from twotower.negatives.masks import RowRule, as_pairs, known_in_rows
from twotower.objectives.embeddings import Embedded


class Feedback(nn.Module):
    """The term of a softmax objective for the slate S(x) of each row, the distinct items that were passed over.

    softmax: each item j of the slate counts w v_j more times in the partition sum, so the target has weights omega,

        loss_x = -s_y + log( exp s_y + sum_{j != y} omega_j exp s_j ),   omega_j = 1 + w v_j [j in S(x)],

    where v_j is the weight of the item's outcome (`data.feedback.passed_over`), 1 by default.

    The candidates estimate the part with weight 1 as always; the items of the slate are added with -log kappa_j =
    log(w v_j). Their part of the sum is exact, so the estimate stays unbiased in every pool.

    logistic, pairwise: w times `slate_logistic` or `slate_pairwise` on the row's own slate is added to the loss.

    A row's positive, its known positives if they are masked, and items that are not eligible for it, or that a guard
    masks, are never in its slate.

    Args:
        weight: w, above 0.
        form: softmax, logistic or pairwise.
        bias: learn a bias that the logistic form adds to its logits: scores of a softmax have no absolute level.
        size: the largest number of items in a slate, for the memory plan.
    """

    bias: nn.Parameter | None

    def __init__(
        self, weight: float, form: Literal["softmax", "logistic", "pairwise"], *, bias: bool = True, size: int = 0
    ) -> None:
        super().__init__()
        self.weight, self.form, self.size = weight, form, size
        self.bias = nn.Parameter(torch.tensor(0.0)) if bias and form == "logistic" else None

    def add_slates(self, drawn: Candidates, request: DrawRequest, eligible: RowRule | None = None) -> Candidates:
        """Add the slates of the rows to their candidates.

        Args:
            drawn: the candidates of the pool.
            request: the rows, with their slates.
            eligible: the rule for the selected rows of the request and all items; None without a rule.

        Raises:
            InputError: the request has no slates.
        """
        if request.passed_over is None:
            raise InputError(
                "objective.feedback: the batch has no feedback; build the batches with the slates of data.feedback, or "
                "remove objective.feedback"
            )
        items, weights = request.passed_over.distinct()
        live = (items >= 0) & (items != drawn.positives[:, None])
        if request.known_positives is not None:
            live &= ~known_in_rows(items, *as_pairs(request.known_positives))
        if eligible is not None:
            live &= ~eligible.blocked_of_rows(items)
        in_softmax = self.form == "softmax"
        mask = ~live if in_softmax else torch.ones_like(live)
        log_count = -(math.log(self.weight) + weights.log()).masked_fill(mask, -torch.inf)
        if drawn.row_items is not None and drawn.row_log_expected_count is not None and drawn.row_mask is not None:
            log_count = torch.cat([drawn.row_log_expected_count, log_count], 1)
            items, mask = torch.cat([drawn.row_items, items], 1), torch.cat([drawn.row_mask, mask], 1)
        return replace(
            drawn,
            row_items=items,
            row_log_expected_count=log_count,
            row_mask=mask,
            slate=None if in_softmax else weights.masked_fill(~live, 0.0),
        )

    def loss(self, embedded: Embedded, slate: Tensor, temperature: Tensor | float) -> Tensor:
        """Compute w times the loss of each row on its own slate, [B]; `slate` is the attribute of `Candidates`."""
        assert embedded.row_candidates is not None
        dtype = torch.float64 if embedded.query.dtype == torch.float64 else torch.float32
        scaled = embedded.query.to(dtype) / temperature
        positive = (scaled * embedded.positive.to(dtype)).sum(1)
        shown = embedded.row_candidates[:, embedded.row_candidates.shape[1] - slate.shape[1] :].to(dtype)
        logits = (shown * scaled[:, None]).sum(2)
        if self.bias is not None:
            positive, logits = positive + self.bias, logits + self.bias
        logits = logits.masked_fill(slate <= 0, -torch.inf)
        loss = slate_logistic if self.form == "logistic" else slate_pairwise
        return self.weight * loss(positive, logits, slate.to(dtype))
