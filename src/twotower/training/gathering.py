"""The loss of a batch distributed over ranks: candidates of the global batch, rows of this rank."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower.data import Batch, KnownPositives
from twotower.losses import Embedded, Objective
from twotower.negatives import Candidates, InBatch
from twotower.ranks import Ranks
from twotower.towers import TwoTower
from twotower.towers.lookups import fetch_for, shared_tables_of
from twotower.training.embedding import embed_by_ranks, embed_once, embed_rows, share_of_items
from twotower.training.shared_draws import draw_by_blocks, loss_by_draws


def gathered_loss(
    towers: TwoTower,
    objective: Objective,
    batch: Batch,
    ranks: Ranks,
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


def _sizes(batch: Batch, ranks: Ranks) -> list[int]:
    """Return the number of rows of every rank."""
    if batch.sizes is not None:
        return list(batch.sizes)
    return ranks.sizes(len(batch), batch.items.device) if batch.total is None else ranks.shares(batch.total)


def _weights(batch: Batch, sizes: list[int], ranks: Ranks) -> Tensor:
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
