"""Synthetic catalogs for the reference study: Zipf popularity, a model that learnt its positives, random batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl
import torch
from torch import Tensor

from twotower.audit.gradients import AuditedRows
from twotower.data import Batch, Interactions
from twotower.negatives import Proposal, Weighted


def zipf_interactions(num_items: int, rarest: int) -> Interactions:
    """Generate interactions in which the item of rank r occurs round(rarest N / r) times.

    Args:
        num_items: N.
        rarest: number of occurrences of the last item.
    """
    counts = np.round(rarest * num_items / np.arange(1, num_items + 1)).astype(np.int64)
    items = np.repeat(np.arange(num_items), counts)
    starts = np.cumsum(counts) - counts
    return Interactions.from_frame(
        pl.DataFrame({"query_id": np.arange(len(items)) - np.repeat(starts, counts), "item_id": items})
    )


def learnt_rows(
    counts: Tensor,
    ranks: list[int],
    *,
    slope: float,
    noise: float,
    probability: float,
    generator: torch.Generator,
    shared: bool = False,
) -> AuditedRows:
    """Generate rows with logits s = slope log p + noise z, and s_y such that P(y|x) equals `probability`.

    Args:
        counts: training interactions of each item, [N].
        ranks: popularity rank of each row's positive, from 0.
        slope: how strongly the model follows popularity.
        noise: standard deviation of the part of the logits that is independent of popularity.
        probability: P(y|x).
        generator: random generator of z.
        shared: whether all rows have the same z and differ only in their positives.
    """
    log_p = counts.double().log() - counts.sum().double().log()
    z = torch.randn(1 if shared else len(ranks), len(counts), generator=generator, dtype=torch.float64)
    positives = torch.argsort(counts, descending=True, stable=True)[torch.tensor(ranks)]
    rows = torch.arange(len(ranks))
    logits = (slope * log_p + noise * z).repeat(len(ranks) if shared else 1, 1)
    logits[rows, positives] = -torch.inf
    logits[rows, positives] = torch.logsumexp(logits, 1) + np.log(probability / (1.0 - probability))
    return AuditedRows(logits, positives)


def head_mass(rows: AuditedRows, counts: Tensor, size: int) -> float:
    """Return the softmax mass of the `size` most frequent items among the negatives, mean over rows."""
    logits = rows.logits.scatter(1, rows.positives[:, None], -torch.inf)
    head = torch.argsort(counts, descending=True, stable=True)[:size]
    return float(torch.softmax(logits, 1)[:, head].sum(1).mean())


def random_batches(counts: Tensor, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Yield endless batches whose positives are drawn independently in proportion to `counts`."""
    proposal: Proposal = Weighted(counts)
    nothing = torch.zeros(size, dtype=torch.int64)
    while True:
        items = proposal.sample((size,), generator)
        yield Batch(rows=nothing, queries=nothing, items=items, history=nothing[:, None][:, :0])
