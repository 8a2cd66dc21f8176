"""Test of the masks of real batches: exactly the candidates that are not negatives of a row must be masked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twotower.data import Batch, Interactions, KnownPositives
from twotower.errors import counted
from twotower.negatives import Candidates, DrawRequest
from twotower.objectives import Objective
from twotower.training.step import draw_blocks

#: Largest number of rows of a batch whose masks are compared.
_ROWS = 256


@dataclass(frozen=True)
class MaskAudit:
    """Masked candidates of real batches, compared with the training interactions.

    Attributes:
        share: share of (row, candidate) pairs that are masked.
        expected: number of pairs that must be masked.
        missing: number of expected pairs that are not masked, so that a row is pushed away from a positive.
        excess: number of pairs that are masked although the candidate is a negative of the row.
    """

    share: float
    expected: int
    missing: int
    excess: int

    @property
    def is_right(self) -> bool:
        """Return whether exactly the expected pairs are masked."""
        return self.missing == self.excess == 0

    @property
    def verdict(self) -> str:
        """Return the finding as a sentence."""
        if self.is_right:
            return "as expected"
        found = []
        if self.missing:
            found.append(
                f"wrong mask: {self.missing:,} of {self.expected:,} candidates that are positives of their row are not "
                "masked, so the row is pushed away from them"
            )
        if self.excess:
            wrong = ("negative is masked in its row", "negatives are masked in their rows")
            found.append(f"wrong mask: {counted(self.excess, *wrong)}")
        return "; ".join(found)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "is_right": self.is_right, "verdict": self.verdict}


def items_of(train: Interactions, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Return the training items of each row's query, as (row [P], item [P]), int64."""
    parts = [
        np.asarray(train.item_codes[train.offsets[query] : train.offsets[query + 1]], dtype=np.int64)
        for query in queries.tolist()
    ]
    rows = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))
    return rows, torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *parts]))


@torch.no_grad()
def audit_masks(
    objective: Objective,
    batches: Iterator[Batch],
    count: int,
    *,
    train: Interactions,
    known_positives: KnownPositives | None,
) -> MaskAudit:
    """Compare the masks that training makes for the rows of real batches with the required ones.

    By the training interactions, candidate j of a row (x, y) has to be masked if j = y; if known positives are masked
    and j is a training item of x; and, among the candidates of other sources, if j is in the stratum of a source
    (observed or mined items of x).

    Args:
        objective: draws the candidates.
        batches: an iterator over training batches.
        count: number of batches.
        train: the training interactions.
        known_positives: as passed to the training step; None if only a row's own positive is masked.
    """
    masked = pairs = expected = missing = excess = 0
    training = objective.training
    objective.eval()
    try:
        for _ in range(count):
            batch = next(batches)
            # Rows of sequences are ordered by the length of the sequence, so start at a random row.
            start = int(torch.randint(max(len(batch) - _ROWS, 0) + 1, ()))
            rows = slice(start, min(start + _ROWS, len(batch)))
            slates = None if batch.passed_over is None else batch.passed_over[rows]
            own = replace(batch, queries=batch.queries[rows], passed_over=slates)
            blocks = draw_blocks(objective, own, batch.items, rows, known_positives=known_positives)
            for block in blocks:
                queries, drawn = block.of(batch.queries[rows]), block.candidates.without_slate()
                wanted = _required(objective, drawn, queries, train, known_positives is not None)
                for mask, right in zip(_masks(drawn), wanted, strict=True):
                    masked, pairs = masked + int(mask.sum()), pairs + mask.numel()
                    expected += int(right.sum())
                    missing, excess = missing + int((right & ~mask).sum()), excess + int((mask & ~right).sum())
    finally:
        objective.train(training)
    return MaskAudit(masked / max(pairs, 1), expected, missing, excess)


def _masks(drawn: Candidates) -> list[Tensor]:
    """Return the masks of the shared candidates, [B, M], and of the per-row candidates, [B, R], if any."""
    return [drawn.mask, *([] if drawn.row_mask is None else [drawn.row_mask])]


def _required(
    objective: Objective, drawn: Candidates, queries: Tensor, train: Interactions, masks_known: bool
) -> list[Tensor]:
    """Return the masks that the interactions require, computed row by row, in the form of `_masks`."""
    request = DrawRequest(drawn.positives, queries)
    members = [one for one in objective.pool.members() if one.deterministic and one.per_row]
    always = [source.stratum(request).items for source in members]
    shared, of_rows = [], []
    for place, (query, own) in enumerate(zip(queries.tolist(), drawn.positives.tolist(), strict=True)):
        hits = torch.tensor([own])
        if masks_known:
            items = np.asarray(train.item_codes[train.offsets[query] : train.offsets[query + 1]], dtype=np.int64)
            hits = torch.cat([hits, torch.from_numpy(items)])
        included = torch.cat([hits, *(items[place].long() for items in always)])
        shared.append(torch.isin(drawn.items, included) | (drawn.multiplicity == 0))
        if drawn.row_items is not None:
            of_rows.append(torch.isin(drawn.row_items[place], hits) | (drawn.row_items[place] < 0))
    return [torch.stack(shared), *([torch.stack(of_rows)] if of_rows else [])]
