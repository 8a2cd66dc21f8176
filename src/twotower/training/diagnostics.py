"""Diagnostics of an objective's candidates during training: cheap numbers for the log, and warnings."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from twotower.negatives import Candidates, CrossBatchMemory, GroupedFrequency, HardNegatives, compare_frequencies
from twotower.objectives import Embedded, Objective, corrected_logits

logger = logging.getLogger("twotower")

#: Number of rows that are examined: enough for a mean, without a logit matrix of all rows.
ROWS = 1024
#: Names of the popularity thirds in the log.
THIRDS = ("head", "mid", "tail")


@torch.no_grad()
def diagnose(embedded: Embedded, drawn: Candidates, temperature: Tensor | float, thirds: Tensor) -> dict[str, float]:
    """Compute diagnostics of a softmax batch, from the weights w_i = exp(s_i - log kappa_i) of its first rows.

    Args:
        embedded: the embeddings of the batch.
        drawn: the candidates of the batch.
        temperature: divides every score.
        thirds: 0 head, 1 mid, 2 tail for each item, int8 [N].

    Returns:
        effective_candidates: mean over rows of (sum w)^2 / sum w^2, the effective sample size of the estimate.
        masked_share: share of (row, candidate) pairs that are masked.
        uncertainty: mean of 1 - P_hat(y), the model's own probability of being wrong.
        largest_weight: mean over rows of max w / sum w.
        gradient_head, gradient_mid, gradient_tail: share of the negatives' gradient that falls on each third.

        Empty if every candidate is masked.
    """
    if len(embedded.query) > ROWS:  # rows are shuffled, so the first rows are a random sample
        own = None if embedded.row_candidates is None else embedded.row_candidates[:ROWS]
        embedded = Embedded(embedded.query[:ROWS], embedded.positive[:ROWS], embedded.candidates, own)
        drawn = drawn.head(ROWS)
    positive, logits = corrected_logits(embedded, drawn, temperature)
    total = torch.logsumexp(logits, 1)
    alive = ~torch.isneginf(total)
    if not bool(alive.any()):
        return {}
    shared = drawn.items.expand(len(logits), -1)
    items = shared if drawn.row_items is None else torch.cat([shared, drawn.row_items.clamp(min=0)], 1)
    items, logits, total = items[alive], logits[alive], total[alive]
    effective = torch.exp(2 * total - torch.logsumexp(2 * logits, 1))
    # The gradient of a row's loss with respect to s_i is the probability of candidate i in a softmax with the positive.
    gradient = torch.softmax(torch.cat([positive[alive, None], logits], 1), 1)[:, 1:]
    third = thirds[items].long()
    by_third = torch.zeros(3, device=gradient.device, dtype=gradient.dtype).index_add_(
        0, third.reshape(-1), gradient.reshape(-1)
    )
    by_third = by_third / by_third.sum().clamp(min=1e-30)
    numbers = {
        "effective_candidates": effective.mean(),
        "masked_share": torch.isneginf(logits).float().mean(),
        "uncertainty": torch.sigmoid(total - positive[alive]).mean(),
        "largest_weight": torch.exp(logits.amax(1) - total).mean(),
        **{f"gradient_{name}": by_third[place] for place, name in enumerate(THIRDS)},
    }
    return {name: float(value) for name, value in numbers.items()}


def frequency_drift(objective: Objective, counts: Tensor) -> float | None:
    """Return the total variation distance between an estimated frequency and the counts; None for an exact frequency.

    Args:
        objective: the objective.
        counts: occurrences of each item, [N]; for a grouped frequency, occurrences within each group, [G, N]. The
            result is then the mean over groups, weighted by their rows.
    """
    counts = counts.to(objective_device(objective))
    for frequency in objective.pool.frequencies():
        if frequency.is_exact:
            continue
        if not isinstance(frequency, GroupedFrequency):
            total = counts if counts.ndim == 1 else counts.sum(0)
            return compare_frequencies(frequency, total).total_variation
        if counts.ndim == 2:
            shares = (counts.sum(1) / counts.sum()).tolist()
            each = [
                share * compare_frequencies(frequency, counts[group], group).total_variation
                for group, share in enumerate(shares)
                if share
            ]
            return float(sum(each))
    return None


def source_state(objective: Objective) -> dict[str, float]:
    """Return diagnostics of the sources that change during training.

    Returns:
        memory_age: mean age of the items of a cross-batch memory, in steps.
        mined_eligible: mean number of items that may be drawn as mined negatives of a row, as of the last mining; the
            smallest over the sources.
        mined_none: share of the rows without any such item; the largest over the sources. Both are absent until items
            are mined.
    """
    members = objective.pool.members()
    ages = [member.age for member in members if isinstance(member, CrossBatchMemory)]
    found = {"memory_age": ages[0]} if ages else {}  # a pool has at most one memory
    mined = [member.eligible() for member in members if isinstance(member, HardNegatives) and member.is_mined]
    if mined:
        found |= {"mined_eligible": min(one[0] for one in mined), "mined_none": max(one[1] for one in mined)}
    return found


def objective_device(objective: Objective) -> torch.device:
    """Return the device of the objective's buffers."""
    return next((buffer.device for buffer in objective.buffers()), torch.device("cpu"))


class DiagnosticsMonitor:
    """A monitor that logs a warning, once per kind, when a diagnostic is out of range."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def look(self, numbers: dict[str, float]) -> None:
        """Warn about diagnostics of a batch that are out of range."""
        if numbers.get("effective_candidates", 99.0) < 3:
            self._warn(
                "effective_candidates",
                f"the softmax is estimated from {numbers['effective_candidates']:.1f} effective candidates; draw more, "
                "or use a proposal closer to the model (`twotower audit DIR --suggest` compares them)",
            )
        if numbers.get("masked_share", 0.0) > 0.5:
            self._warn(
                "masked_share",
                f"{numbers['masked_share']:.0%} of the candidates are masked as positives; add uniform candidates",
            )
        if numbers.get("mined_none", 0.0) > 0.5:
            self._warn(
                "mined_none",
                f"{numbers['mined_none']:.0%} of the rows have no mined negatives within the ranks and score limits; "
                "use wider ranks, or a smaller margin, for the source `mined`",
            )
        if numbers.get("frequency_drift", 0.0) > 0.3:
            self._warn(
                "frequency_drift",
                f"the streaming frequency differs from the counts by {numbers['frequency_drift']:.2f} (total "
                "variation), so corrections are biased; use counted frequencies, or train on more rows",
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("%s", text)
