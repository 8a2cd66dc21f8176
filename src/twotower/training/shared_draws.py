"""The loss of a batch whose blocks of rows share candidates: more of the catalog is seen at the same cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.data import Batch, KnownPositives
from twotower.losses import Embedded, Objective
from twotower.negatives import Candidates
from twotower.towers import TwoTower
from twotower.training.embedding import embed_once, embed_rows


@dataclass(frozen=True)
class Draw:
    """The candidates that a block of rows shares.

    Attributes:
        rows: which of this process's rows are in the block, possibly none.
        candidates: items and counts of the whole block; masks of `rows` only.
    """

    rows: slice
    candidates: Candidates

    @property
    def looked_up(self) -> list[Tensor]:
        """Return the codes of the items to embed: those of the block and, if present, of single rows; [M] each."""
        own = self.candidates.row_items
        return [self.candidates.items, *([] if own is None else [own.clamp(min=0).reshape(-1)])]


def draw_by_blocks(
    objective: Objective,
    batch: Batch,
    known_positives: KnownPositives | None = None,
    *,
    everyone: Tensor | None = None,
    own: slice | None = None,
    generator: torch.Generator | None = None,
) -> list[Draw]:
    """Draw candidates for every `objective.rows_per_draw` rows of the batch over all ranks, in its order.

    Every rank makes all draws with the same generator, so that cross-batch memory and streaming frequencies see the
    same draws everywhere. A block may span several ranks, and a rank several blocks.

    Args:
        objective: what is minimised; defines how many rows share a draw.
        batch: the rank's own rows, possibly none.
        known_positives: items that are never negatives of a row.
        everyone: items of the rows of all ranks, int64; None for the batch's own.
        own: which of those belong to this rank; None for all.
        generator: of the draws, in the same state on every rank.
    """
    items = batch.items if everyone is None else everyone
    first, end = (0, len(items)) if own is None else (own.start, own.stop)
    each = objective.rows_per_draw or len(items)
    draws = []
    for start in range(0, len(items), each):
        stop = min(start + each, len(items))
        low, high = (min(max(edge, first), end) for edge in (start, stop))
        rows = slice(low - first, high - first)
        queries = batch.queries[rows]
        candidates = objective.draw(
            items[start:stop],
            known_positives=None if known_positives is None else known_positives.pairs(queries),
            queries=queries,
            group=batch.group,
            generator=generator,
            rows=slice(low - start, high - start) if low < high else slice(0, 0),
        )
        draws.append(Draw(rows, candidates))
    return draws


def loss_by_draws(
    towers: TwoTower,
    objective: Objective,
    batch: Batch,
    draws: Sequence[Draw],
    weights: Tensor,
    *,
    micro_batch: int | None = None,
) -> tuple[Tensor, Embedded, Candidates]:
    """Compute the loss of a batch's rows, each block with its own candidates.

    Each block is an independent draw of the pool, so the estimate for a row has the same bias and variance as with one
    draw per batch. What changes is the mean over rows: M candidates shared by B rows give them correlated errors, while
    the errors of B / `objective.rows_per_draw` independent draws average out. The number of dot products is the same.

    Args:
        towers: the model.
        objective: what is minimised.
        batch: the rows, at least one.
        draws: the draws of `draw_by_blocks`.
        weights: of the rows, [B]; they sum to one over all ranks.
        micro_batch: rows that go through a tower at a time; None for all.

    Returns:
        sum of w_b loss_b; embeddings and candidates of the last block with rows on this rank.
    """
    drawn = [draw for draw in draws if draw.rows.start < draw.rows.stop]
    query = embed_rows(towers, batch, chunk=micro_batch)
    codes = [batch.items, *(part for draw in drawn for part in draw.looked_up)]
    vectors = list(torch.split(embed_once(towers, torch.cat(codes), chunk=micro_batch), [len(part) for part in codes]))
    positive = vectors.pop(0)
    losses = []
    for draw in drawn:
        found, part = draw.candidates, draw.rows
        candidates = vectors.pop(0)
        own = None if found.row_items is None else vectors.pop(0).reshape(*found.row_items.shape, -1)
        embedded = Embedded(query[part], positive[part], candidates, own)
        losses.append(objective.mean(embedded, found, temperature=towers.temperature, weights=weights[part]))
    return torch.stack(losses).sum(), embedded, found
