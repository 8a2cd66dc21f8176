"""Explanations of a recommendation: the contribution of each item in the history, and of popularity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from torch import Tensor

from twotower.index.popularity import PopularityDial
from twotower.serving.queries import QueryBatch
from twotower.serving.results import ResultTables

#: Computes u(x), [E, D], from query codes, histories, and the marks of the history items (`QueryBatch.marks`).
Embed = Callable[[NDArray[np.int64], tuple[NDArray[np.int64], NDArray[np.int32]], NDArray[np.int8] | None], Tensor]


@dataclass(frozen=True)
class Explanation:
    """Contributions to the logit of one recommended item; differences of logits are differences of log P(y|x).

    Attributes:
        item: id of the item.
        logit: `<u, v> / T + (b - 1) log p(y)`.
        lift: `logit` minus the mean logit over the catalog, for this query.
        popularity: the part of `lift` explained by popularity: the slope of this query's logits on log p over the
            catalog (least squares), times the item's log p minus the mean log p.
        popularity_share: `popularity / lift`; below 0 if the item ranks high although it is rare, above 1 if it ranks
            lower than its popularity alone predicts; None if the lift is not positive.
        history: columns `item`, `title` if the items have titles, and `contribution`: the logit with the whole history
            minus the logit without this item, largest first. Similar items have small contributions, because the others
            remain when one is left out; contributions need not sum to the lift.
    """

    item: Any
    logit: float
    lift: float
    popularity: float
    popularity_share: float | None
    history: pl.DataFrame

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return {**self.__dict__, "history": self.history.to_dicts()}


def explain(
    tables: ResultTables,
    embed: Embed,
    query: QueryBatch,
    code: int,
    *,
    length: int,
    dial: PopularityDial,
    popularity: float,
) -> Explanation:
    """Explain one item for one query.

    Args:
        tables: the model's tables.
        embed: function that embeds queries. When an item is left out, the marks of the other items stay the same.
        query: one query, a batch of size 1.
        code: code of the item.
        length: L, the number of recent items that the query tower reads.
        dial: temperature and log p.
        popularity: b, the setting of the dial.
    """
    artifact, temperature = tables.artifact, dial.temperature
    recent = query.items[max(len(query.items) - length, 0) :]
    count = len(recent)
    # Row 0 is the whole history; row i + 1 leaves out recent item i. Items before the last L are kept: the newest of
    # them takes the free place.
    kept = _without_each(query.items, count)
    marks = None if query.marks is None else np.concatenate(_without_each(query.marks, count))
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in kept])]).astype(np.int64)
    embedded = embed(np.repeat(query.codes, count + 1), (offsets, np.concatenate(kept).astype(np.int32)), marks).cpu()
    item = artifact.item_embeddings[code].double()
    own = (embedded.double() @ item) / temperature
    log_p = dial.log_probability
    logits = (artifact.item_embeddings @ embedded[0]).double() / temperature + (popularity - 1.0) * log_p
    centred = log_p - log_p.mean()
    spread = float((centred**2).sum())
    slope = float((centred * (logits - logits.mean())).sum()) / spread if spread > 0 else 0.0
    lift = float(logits[code] - logits.mean())
    popularity_part = slope * float(centred[code])
    history = tables.items(recent.astype(np.int64)).with_columns(
        pl.Series("contribution", (own[0] - own[1:]).numpy(), dtype=pl.Float64)
    )
    return Explanation(
        item=artifact.items.decode([code])[0],
        logit=float(logits[code]),
        lift=lift,
        popularity=popularity_part,
        popularity_share=popularity_part / lift if lift > 0 else None,
        history=history.sort("contribution", descending=True, maintain_order=True),
    )


def _without_each(values: NDArray[Any], count: int) -> list[NDArray[Any]]:
    """Return the values, followed by the values without each of the last `count`."""
    return [values, *(np.delete(values, len(values) - count + place) for place in range(count))]
