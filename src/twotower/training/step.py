"""The training step: from a batch of rows to its loss, in a single process or on one of several ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from twotower.data import Batch, KnownPositives
from twotower.distributed.communicator import Communicator
from twotower.negatives import Candidates, Catalog, DrawRequest, InBatch
from twotower.objectives import Embedded, Objective
from twotower.towers import TwoTower
from twotower.towers.sharded_lookup import fetch_for, shared_tables_of
from twotower.training.embedding import embed_by_ranks, embed_parts, embed_rows, share_of_items


def compute_loss(
    towers: TwoTower,
    objective: Objective,
    batch: Batch,
    communicator: Communicator | None = None,
    *,
    known_positives: KnownPositives | None = None,
    micro_batch: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Embedded, Candidates]:
    """Compute the loss of a batch (the mean over its rows) or, on several ranks, this rank's share, with a gradient.

    With the B rows b of all ranks, their weights w (1 without weights) and the mean weight of all rows of the data,

        share of a rank = sum of w_b loss_b over its own rows / (B mean_weight).

    Over an epoch every row then counts in proportion to its weight. A batch with large weights has a larger loss; a
    batch whose rows all have weight 0 has loss 0 and no gradient. (If the loss were divided by the sum of the batch's
    weights, the rows of a batch with large weights would count less.) The shares add up to the loss of the batch, so
    gradients must be *summed* over ranks (`GradientExchange`), for any number of rows per rank. Every rank draws the
    candidates of the whole batch with the same generator, so kappa counts the B - 1 other rows of all ranks, and
    cross-batch memories and streaming frequencies see the same draws everywhere. A rank makes the masks of its own rows
    only.

    Candidates are drawn first, so that each distinct item can pass through the item tower once. Several ranks embed the
    candidates of a shared draw together, 1/W each. If every block of `objective.rows_per_draw` rows has its own draw, a
    rank embeds the candidates of its own rows and nothing is gathered, because sharing would move the embeddings of all
    draws to every rank. The blocks are independent draws: the estimate for a row has the same bias and variance as with
    one draw per batch, but the errors of different blocks average out, at the same number of dot products.

    Args:
        towers: the model, the same on every rank.
        objective: the objective to minimise, in the same state on every rank.
        batch: the rank's own rows, possibly none if there are several ranks.
        communicator: the processes that train together; None for a single process.
        known_positives: items that are never negatives of a row; None masks only the row's own positive.
        micro_batch: rows that go through a tower at a time, without keeping activations (`cached_embedding`); None for
            all.
        generator: random generator of the draws, in the same state on every rank; None for torch's default.

    Returns:
        The loss, a scalar, and the embeddings and candidates of this rank's rows (of the last block, if several).
    """
    ranks = communicator or Communicator()
    sizes = _rows_of_ranks(batch, ranks)
    items = ranks.gather(batch.items, sizes)
    blocks = draw_blocks(
        objective,
        batch,
        items,
        ranks.within(sizes),
        known_positives=known_positives,
        generator=generator,
        offer=_offer_of_rows(objective, batch, ranks, sizes),
    )
    weights = _row_weights(batch, sum(sizes))
    lookups = plan_lookups(objective, batch, blocks, ranks)
    if ranks.size > 1:
        fetch_for(towers, items=lookups.codes(ranks), queries=batch.queries, history=_history(batch))
    shared = None if lookups.shared is None else embed_by_ranks(towers, lookups.shared, ranks, chunk=micro_batch)
    if len(batch) == 0:
        return _loss_without_rows(towers, shared, blocks)
    query = embed_rows(towers, batch, chunk=micro_batch)
    vectors = embed_parts(towers, lookups.own, chunk=micro_batch)
    if shared is not None and lookups.places is not None:
        positive = shared.index_select(0, lookups.places)
    else:
        positive = vectors.pop(0)
    losses = []
    for block in blocks:
        candidates = vectors.pop(0) if shared is None else shared
        row_items = block.candidates.row_items
        embedded = Embedded(
            block.of(query),
            block.of(positive),
            candidates,
            None if row_items is None else vectors.pop(0).reshape(*row_items.shape, -1),
            repeated_queries=batch.asked is not None or getattr(towers, "repeats_queries", False),
        )
        losses.append(nested_loss(towers, objective, embedded, block.candidates, weights=block.of(weights)))
    return torch.stack(losses).sum(), embedded, blocks[-1].candidates


def nested_loss(
    towers: TwoTower, objective: Objective, embedded: Embedded, candidates: Candidates, *, weights: Tensor | None = None
) -> Tensor:
    """Compute the training loss of a batch: the weighted mean of its losses at all widths of the embeddings, a scalar.

    With widths w_1 < ... < w_n = D, weights a_i, and the first w_i coordinates of each embedding (`TwoTower.at_width`),

        loss = sum_i a_i loss(w_i) / sum_i a_i.

    All widths share the candidates, their counts and masks, the temperature, and the bias of the objective. Without
    nested widths this is `objective.mean`. The weights are divided by their sum so that the learning rate need not
    depend on the number of widths; in the source the losses are added.

    Source: Kusupati et al. 2022, "Matryoshka Representation Learning", equation 1.

    Args:
        towers: the model, for its widths and temperature.
        objective: the objective to minimise.
        embedded: the embeddings of the batch, [..., D].
        candidates: the candidates of the batch.
        weights: weight of each row, [B]; None for the mean.
    """
    widths: tuple[int, ...] = getattr(towers, "widths", ())
    if len(widths) <= 1:
        return objective.mean(embedded, candidates, temperature=towers.temperature, weights=weights)
    of_widths = towers.nested_weights or (1.0,) * len(widths)
    losses = [
        of_width
        / sum(of_widths)
        * objective.mean(
            embedded.map(partial(towers.at_width, width=width)),
            candidates,
            temperature=towers.temperature,
            weights=weights,
        )
        for width, of_width in zip(widths, of_widths, strict=True)
    ]
    return torch.stack(losses).sum()


@dataclass(frozen=True)
class Block:
    """A block of rows that share one draw of candidates.

    Attributes:
        rows: this rank's rows in the block, numbered from the rank's first row; None if the block contains all of them.
        candidates: items and counts of the whole block, with the masks of `rows` only.
    """

    rows: slice | None
    candidates: Candidates

    def of(self, values: Tensor) -> Tensor:
        """Select the block's rows from values of all rows of this rank, [B, ...]."""
        return values if self.rows is None else values[self.rows]


def draw_blocks(
    objective: Objective,
    batch: Batch,
    items: Tensor,
    own: slice,
    *,
    known_positives: KnownPositives | None = None,
    generator: torch.Generator | None = None,
    offer: tuple[Tensor | None, Tensor | None] = (None, None),
) -> list[Block]:
    """Draw the candidates of a batch, one draw per block of `objective.rows_per_draw` rows, in order over all ranks.

    A last block of one row, which has no other rows, is merged with the block before it. A block may span several
    ranks, and a rank several blocks. Every rank makes all draws and keeps the blocks that contain its rows; a rank
    without rows keeps the last block.

    Args:
        objective: the objective to minimise.
        batch: the rank's own rows, possibly none.
        items: items of the rows of all ranks, int64.
        own: the rank's own rows among these.
        known_positives: items that are never negatives of a row.
        generator: random generator of the draws, in the same state on every rank.
        offer: groups and times of the rows of all ranks, for a pool with a rule for eligible items.
    """
    is_one = objective.rows_per_draw is None
    each = objective.rows_per_draw or len(items)
    windows = batch.windows if is_one else None
    edges = [*range(0, len(items), each), len(items)]
    if each > 1 and len(edges) > 2 and edges[-1] - edges[-2] == 1:
        del edges[-2]
    blocks = []
    for start, stop in pairwise(edges):
        first, last = (min(max(edge, own.start), own.stop) for edge in (start, stop))
        rows = slice(first - own.start, last - own.start)
        queries = batch.queries[rows]
        request = DrawRequest(
            items[start:stop],
            queries,
            batch.group,
            generator,
            windows,
            None if known_positives is None else known_positives.pairs(queries),
            slice(first - start, last - start) if first < last else slice(0, 0),
            batch.epoch,
            None if batch.passed_over is None else batch.passed_over[rows],
            *(None if values is None else values[start:stop] for values in offer),
        )
        blocks.append(Block(None if is_one else rows, objective.draw(request)))
    return [block for block in blocks if len(block.candidates.positives)] or blocks[-1:]


@dataclass(frozen=True)
class Lookups:
    """The items to embed for the rows of one rank.

    Attributes:
        shared: candidates that all ranks embed together; None if each rank embeds its own.
        places: positions of the rank's positives among `shared`; None if they are embedded separately.
        own: items that this rank embeds for itself: its positives unless `places` is given, then for each block the
            candidates unless they are `shared`, and the per-row candidates, if any.
    """

    shared: Tensor | None
    places: Tensor | None
    own: list[Tensor]

    def codes(self, ranks: Communicator) -> Tensor:
        """Return the codes of all items that this rank passes through its tower."""
        shared = [] if self.shared is None else [share_of_items(self.shared, ranks)[0]]
        return torch.cat([*shared, *self.own])


def plan_lookups(objective: Objective, batch: Batch, blocks: list[Block], ranks: Communicator) -> Lookups:
    """List the items to embed for the rows of this rank; see `Lookups`."""
    own, shared, places = [], None, None
    if ranks.size > 1 and objective.rows_per_draw is None:
        shared = blocks[0].candidates.items
        if _contains_positives(objective, batch):
            places = _places(shared, batch.items)
    if places is None:
        own.append(batch.items)
    for block in blocks if len(batch) else []:
        drawn = block.candidates
        own += [drawn.items] if shared is None else []
        own += [] if drawn.row_items is None else [drawn.row_items.clamp(min=0).reshape(-1)]
    return Lookups(shared, places, own)


def _rows_of_ranks(batch: Batch, ranks: Communicator) -> list[int]:
    """Return the number of rows of every rank."""
    if ranks.size == 1:
        return [len(batch)]
    if batch.sizes is not None:
        return list(batch.sizes)
    return ranks.sizes(len(batch), batch.items.device) if batch.total is None else ranks.shares(batch.total)


def _offer_of_rows(
    objective: Objective, batch: Batch, ranks: Communicator, sizes: list[int]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the groups and times of the rows of all ranks if the pool has a rule for eligible items."""
    if objective.pool.eligible is None:
        return None, None
    groups, times = (None if one is None else ranks.gather(one, sizes) for one in (batch.groups, batch.times))
    return groups, times


def _row_weights(batch: Batch, total: int) -> Tensor:
    """Return the weight of each of this rank's rows in the loss of a batch with `total` rows, float64 [B]."""
    if batch.weights is None:
        return torch.full((len(batch),), 1.0 / total, dtype=torch.float64, device=batch.items.device)
    return batch.weights.double() / (total * batch.mean_weight)


def _history(batch: Batch) -> Tensor:
    """Return the item codes that the query tower looks up."""
    return batch.history if batch.sequences is None else batch.sequences.tokens


def _contains_positives(objective: Objective, batch: Batch) -> bool:
    """Return whether the positives of the batch are always among its candidates."""
    members = objective.pool.members()
    if any(isinstance(member, Catalog) for member in members):
        return True
    windows = batch.windows
    return any(isinstance(member, InBatch) for member in members) and (windows is None or windows.drawn > 1)


def _places(items: Tensor, requested: Tensor) -> Tensor:
    """Return the position of each requested item in `items`, int64 [B]; every requested item must occur there."""
    ordered, order = torch.sort(items, stable=True)
    return order[torch.searchsorted(ordered, requested)]


def _loss_without_rows(
    towers: TwoTower, shared: Tensor | None, blocks: list[Block]
) -> tuple[Tensor, Embedded, Candidates]:
    """Return a loss of 0 with a graph for a rank without rows: other ranks may need the items that it embedded."""
    candidates = towers.log_temperature.new_empty(0, 0) if shared is None else shared
    held = {id(table.weight) for table in shared_tables_of(towers)}
    anchor = min((p for p in towers.parameters() if p.requires_grad and id(p) not in held), key=lambda p: p.numel())
    empty = candidates.new_empty(0, candidates.shape[1])
    return candidates.sum() * 0.0 + anchor.sum() * 0.0, Embedded(empty, empty, candidates), blocks[-1].candidates
