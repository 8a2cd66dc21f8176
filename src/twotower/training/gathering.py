"""The loss of a batch whose rows are spread over ranks: the candidates of all, the rows of one."""

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
    """This rank's share of the mean loss over the rows of all ranks: the shares of all ranks add up to it.

    With rows b in B of all ranks and their weights w (1 where there are none),

        share of a rank = sum of w_b loss_b over its own rows / sum of w_b over all rows,

    so that gradients are to be *summed* over ranks (`sum_gradients`), whatever number of rows each rank has. Every
    rank draws the candidates of the whole batch, with the same generator: kappa is that of B - 1 other rows, not of
    the rank's own. It makes the masks of its own rows, and embeds its share of the candidates. Rows of shared tables
    are fetched first, once for all that looks them up; `GradientExchange` hands their gradients back.

    Where blocks of rows have draws of their own (`objective.rows_per_draw`), a rank embeds what its own rows meet and
    nothing is gathered: with M candidates for r rows that is M b / r items for its b rows and those of two more blocks
    at most, which the ends of its rows cut, where sharing would move the embeddings of all B / r draws to every rank.

    Args:
        towers: the model, the same on every rank.
        objective: what is minimised, in the same state on every rank.
        batch: the rank's own rows; there may be none.
        ranks: the processes of the run.
        known_positives: what a row must not be pushed away from.
        generator: of the draws, in the same state on every rank.
        micro_batch: rows that go through a tower at a time.

    Returns:
        The share, a scalar with a gradient on every rank; embeddings and candidates of the rank's rows.
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
    # Where the batch's own items are candidates they are embedded already, by whichever rank.
    holds_positives = _holds_positives(objective) and (windows is None or windows.drawn > 1)
    place = _places(drawn.items, batch.items) if holds_positives else None
    asked = [] if drawn.row_items is None else [drawn.row_items.clamp(min=0).reshape(-1)]
    if place is None:
        asked.append(batch.items)
    mine = share_of_items(drawn.items, ranks)[0] if len(drawn.items) else drawn.items
    fetch_for(towers, items=torch.cat([mine, *asked]), queries=batch.queries, history=history)
    candidates = embed_by_ranks(towers, drawn.items, ranks, chunk=micro_batch)
    weights = _weights(batch, sizes, ranks)
    if len(batch) == 0:
        return _nothing(towers, candidates), _no_rows(candidates), drawn
    query = embed_rows(towers, batch, chunk=micro_batch)
    vectors: list[Tensor] = []
    if asked:
        embedded = embed_once(towers, torch.cat(asked), chunk=micro_batch)
        vectors = list(torch.split(embedded, [len(part) for part in asked]))
    result = Embedded(
        query,
        vectors.pop() if place is None else candidates.index_select(0, place),
        candidates,
        None if drawn.row_items is None else vectors[0].reshape(*drawn.row_items.shape, -1),
    )
    return objective.mean(result, drawn, temperature=towers.temperature, weights=weights), result, drawn


def _sizes(batch: Batch, ranks: Ranks) -> list[int]:
    """Rows of every rank."""
    if batch.sizes is not None:
        return list(batch.sizes)
    return ranks.sizes(len(batch), batch.items.device) if batch.total is None else ranks.shares(batch.total)


def _weights(batch: Batch, sizes: list[int], ranks: Ranks) -> Tensor:
    """Weights of this rank's rows, [B]: those of all ranks sum to one; collective where rows carry some."""
    if batch.weights is None:
        return torch.full((len(batch),), 1.0 / sum(sizes), device=batch.items.device)
    return batch.weights / ranks.sum(batch.weights.sum())


def _holds_positives(objective: Objective) -> bool:
    return any(isinstance(member, InBatch) for member in objective.pool.members())


def _places(items: Tensor, asked: Tensor) -> Tensor:
    """Where each asked item stands among the items, int64 [B]; every one does."""
    ordered, order = torch.sort(items, stable=True)
    return order[torch.searchsorted(ordered, asked)]


def _nothing(towers: TwoTower, candidates: Tensor) -> Tensor:
    """The share of a rank without rows: 0, with a graph, for others may have losses by the items embedded here."""
    held = {id(table.weight) for table in shared_tables_of(towers)}
    anchor = min((p for p in towers.parameters() if p.requires_grad and id(p) not in held), key=lambda p: p.numel())
    return candidates.sum() * 0.0 + anchor.sum() * 0.0


def _no_rows(candidates: Tensor) -> Embedded:
    empty = candidates.new_empty(0, candidates.shape[1] if candidates.ndim == 2 else 0)
    return Embedded(empty, empty, candidates)
