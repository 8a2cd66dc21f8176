"""The loss of a batch distributed over ranks: candidates of the global batch, rows of this rank.

The loss of a batch whose blocks of rows share candidates: more of the catalog is seen at the same cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.data import Batch, KnownPositives
from twotower.distributed.communicator import Communicator
from twotower.negatives import Candidates, InBatch
from twotower.objectives import Embedded, Objective
from twotower.towers import TwoTower
from twotower.towers.sharded_lookup import fetch_for, shared_tables_of
from twotower.training.embedding import embed_by_ranks, embed_once, embed_parts, embed_rows, share_of_items


@dataclass(frozen=True)
class BlockDraw:
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
) -> list[BlockDraw]:
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
        draws.append(BlockDraw(rows, candidates))
    return draws


def loss_by_draws(
    towers: TwoTower,
    objective: Objective,
    batch: Batch,
    draws: Sequence[BlockDraw],
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


def gathered_loss(
    towers: TwoTower,
    objective: Objective,
    batch: Batch,
    ranks: Communicator,
    known_positives: KnownPositives | None = None,
    *,
    generator: torch.Generator,
    micro_batch: int | None = None,
) -> tuple[Tensor, Embedded, Candidates]:
    """Compute this rank's share of the mean loss over the rows of all ranks; the shares add up to it.

    With rows b in B of all ranks and their weights w (1 without weights),

        share of a rank = sum of w_b loss_b over its own rows / sum of w_b over all rows,

    so gradients must be *summed* over ranks (`sum_gradients`), whatever number of rows each rank has. Every rank draws
    the candidates of the whole batch with the same generator: kappa is that of B - 1 other rows, not of the rank's
    own. A rank builds the masks of its own rows and embeds its share of the candidates. Rows of sharded tables are
    fetched first, once for all lookups; `GradientExchange` returns their gradients.

    If blocks of rows have separate draws (`objective.rows_per_draw`), a rank embeds the candidates of its own rows and
    nothing is gathered. With M candidates for r rows this is M b / r items for its b rows, plus those of at most two
    more blocks that cross its boundaries; sharing would move the embeddings of all B / r draws to every rank.

    Args:
        towers: the model, the same on every rank.
        objective: what is minimised, in the same state on every rank.
        batch: the rank's own rows, possibly none.
        ranks: the processes of the run.
        known_positives: items that are never negatives of a row.
        generator: of the draws, in the same state on every rank.
        micro_batch: rows that go through a tower at a time.

    Returns:
        The share, a scalar with a gradient on every rank; embeddings and candidates of this rank's rows.
    """
    sizes = _sizes(batch, ranks)
    windows = None if batch.sequences is None else batch.sequences.windows
    own = ranks.within(sizes)
    everyone = ranks.gather(batch.items, sizes)
    history = batch.history if batch.sequences is None else batch.sequences.tokens
    if objective.rows_per_draw is not None:
        draws = draw_by_blocks(objective, batch, known_positives, everyone=everyone, own=own, generator=generator)
        met = [codes for draw in draws if draw.rows.start < draw.rows.stop for codes in draw.looked_up]
        fetch_for(towers, items=torch.cat([batch.items, *met]), queries=batch.queries, history=history)
        weights = _weights(batch, sizes, ranks)
        if len(batch) == 0:
            none = towers.log_temperature.new_empty(0, 0)
            return _nothing(towers, none), _no_rows(none), draws[-1].candidates
        return loss_by_draws(towers, objective, batch, draws, weights, micro_batch=micro_batch)
    drawn = objective.draw(
        everyone,
        known_positives=None if known_positives is None else known_positives.pairs(batch.queries),
        queries=batch.queries,
        group=batch.group,
        generator=generator,
        rows=own,
        windows=windows,
    )
    # If the batch's own items are candidates, some rank embeds them already.
    holds_positives = _holds_positives(objective) and (windows is None or windows.drawn > 1)
    place = _places(drawn.items, batch.items) if holds_positives else None
    requested = [] if drawn.row_items is None else [drawn.row_items.clamp(min=0).reshape(-1)]
    if place is None:
        requested.append(batch.items)
    mine = share_of_items(drawn.items, ranks)[0] if len(drawn.items) else drawn.items
    fetch_for(towers, items=torch.cat([mine, *requested]), queries=batch.queries, history=history)
    candidates = embed_by_ranks(towers, drawn.items, ranks, chunk=micro_batch)
    weights = _weights(batch, sizes, ranks)
    if len(batch) == 0:
        return _nothing(towers, candidates), _no_rows(candidates), drawn
    query = embed_rows(towers, batch, chunk=micro_batch)
    vectors: list[Tensor] = []
    if requested:
        embedded = embed_once(towers, torch.cat(requested), chunk=micro_batch)
        vectors = list(torch.split(embedded, [len(part) for part in requested]))
    result = Embedded(
        query,
        vectors.pop() if place is None else candidates.index_select(0, place),
        candidates,
        None if drawn.row_items is None else vectors[0].reshape(*drawn.row_items.shape, -1),
    )
    return objective.mean(result, drawn, temperature=towers.temperature, weights=weights), result, drawn


def _sizes(batch: Batch, ranks: Communicator) -> list[int]:
    """Return the number of rows of every rank."""
    if batch.sizes is not None:
        return list(batch.sizes)
    return ranks.sizes(len(batch), batch.items.device) if batch.total is None else ranks.shares(batch.total)


def _weights(batch: Batch, sizes: list[int], ranks: Communicator) -> Tensor:
    """Return the weights of this rank's rows, [B], summing to one over all ranks; collective if rows have weights."""
    if batch.weights is None:
        return torch.full((len(batch),), 1.0 / sum(sizes), device=batch.items.device)
    return batch.weights / ranks.sum(batch.weights.sum())


def _holds_positives(objective: Objective) -> bool:
    return any(isinstance(member, InBatch) for member in objective.pool.members())


def _places(items: Tensor, requested: Tensor) -> Tensor:
    """Return the position of each requested item in `items`, int64 [B]; all of them must occur."""
    ordered, order = torch.sort(items, stable=True)
    return order[torch.searchsorted(ordered, requested)]


def _nothing(towers: TwoTower, candidates: Tensor) -> Tensor:
    """Return 0 with a graph, for a rank without rows: losses of other ranks may depend on the items embedded here."""
    held = {id(table.weight) for table in shared_tables_of(towers)}
    anchor = min((p for p in towers.parameters() if p.requires_grad and id(p) not in held), key=lambda p: p.numel())
    return candidates.sum() * 0.0 + anchor.sum() * 0.0


def _no_rows(candidates: Tensor) -> Embedded:
    empty = candidates.new_empty(0, candidates.shape[1] if candidates.ndim == 2 else 0)
    return Embedded(empty, empty, candidates)


def batch_loss(
    towers: TwoTower,
    objective: Objective,
    batch: Batch,
    known_positives: KnownPositives | None = None,
    *,
    micro_batch: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Embedded, Candidates]:
    """Compute the mean loss of a batch, weighted if its rows have weights, and return its embeddings and candidates.

    Rows that are positions of sequences are embedded in one pass over the sequences. If the objective draws more than
    once per batch, the returned embeddings and candidates are those of the last draw.

    The candidates are drawn first, so that the item tower embeds each distinct item once. With `micro_batch` the towers
    embed that many rows at a time and keep no activations; see gradient_cache.py.
    """
    weights = None if batch.weights is None else batch.weights / batch.weights.sum()
    if objective.rows_per_draw is not None:
        draws = draw_by_blocks(objective, batch, known_positives, generator=generator)
        if weights is None:
            weights = torch.full((len(batch),), 1.0 / len(batch), device=batch.items.device)
        return loss_by_draws(towers, objective, batch, draws, weights, micro_batch=micro_batch)
    drawn = objective.draw(
        batch.items,
        known_positives=None if known_positives is None else known_positives.pairs(batch.queries),
        queries=batch.queries,
        group=batch.group,
        generator=generator,
        windows=None if batch.sequences is None else batch.sequences.windows,
    )
    query = embed_rows(towers, batch, chunk=micro_batch)
    asked = [batch.items, drawn.items]
    if drawn.row_items is not None:
        asked.append(drawn.row_items.clamp(min=0).reshape(-1))
    vectors = embed_parts(towers, asked, chunk=micro_batch)
    embedded = Embedded(
        query,
        vectors[0],
        vectors[1],
        None if drawn.row_items is None else vectors[2].reshape(*drawn.row_items.shape, -1),
    )
    return objective.mean(embedded, drawn, temperature=towers.temperature, weights=weights), embedded, drawn
