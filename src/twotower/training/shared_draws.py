"""The loss of a batch whose rows share their candidates in blocks: more of the catalog is met at the same cost."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from twotower.data import Batch, KnownPositives
from twotower.losses import Embedded, Objective
from twotower.negatives import Candidates
from twotower.towers import TwoTower
from twotower.training.embedding import embed_once


def loss_by_draws(
    towers: TwoTower,
    objective: Objective,
    batch: Batch,
    query: Tensor,
    known_positives: KnownPositives | None = None,
    *,
    micro_batch: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Embedded, Candidates]:
    """The mean loss of a batch, each block of rows with candidates of its own.

    Every block is a draw of the pool like any other, so a row's estimate is as unbiased as with one draw for the batch,
    and as noisy. What changes is the mean over rows: M candidates shared by B rows err alike in all of them, and the
    errors of B / `objective.rows_per_draw` independent draws average out. The products are as many.

    Args:
        towers: the model.
        objective: what is minimised.
        batch: the rows.
        query: their embeddings, [B, D].
        known_positives: what a row must not be pushed away from.
        micro_batch: items that go through the tower at a time; None for all.
        generator: of the draws.

    Returns:
        The mean loss; embeddings and candidates of the last block.
    """
    each = objective.rows_per_draw or len(batch)
    bounds = [*range(0, len(batch), each), len(batch)]
    parts = [slice(start, stop) for start, stop in pairwise(bounds)]
    draws = [
        objective.draw(
            batch.items[part],
            known_positives=None if known_positives is None else known_positives.pairs(batch.queries[part]),
            queries=batch.queries[part],
            group=batch.group,
            generator=generator,
        )
        for part in parts
    ]
    asked = [batch.items]
    for drawn in draws:
        asked.append(drawn.items)
        if drawn.row_items is not None:
            asked.append(drawn.row_items.clamp(min=0).reshape(-1))
    vectors = list(torch.split(embed_once(towers, torch.cat(asked), chunk=micro_batch), [len(part) for part in asked]))
    positive = vectors.pop(0)
    weights = torch.ones(len(batch), device=query.device) if batch.weights is None else batch.weights
    weights = weights / weights.sum()
    losses = []
    for part, drawn in zip(parts, draws, strict=True):
        candidates = vectors.pop(0)
        own = None if drawn.row_items is None else vectors.pop(0).reshape(*drawn.row_items.shape, -1)
        embedded = Embedded(query[part], positive[part], candidates, own)
        losses.append(objective.mean(embedded, drawn, temperature=towers.temperature, weights=weights[part]))
    return torch.stack(losses).sum(), embedded, drawn
