"""Why an item was recommended: which items of the history pulled it up, and how much is popularity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from torch import Tensor

from twotower.index.popularity import PopularityDial
from twotower.serving.answers import Answers
from twotower.serving.questions import Questions

#: u(x) of queries by codes, histories, and the gaps in them where they are known.
Embed = Callable[[NDArray[np.int64], tuple[NDArray[np.int64], NDArray[np.int32]], NDArray[np.int8] | None], Tensor]


@dataclass(frozen=True)
class Explanation:
    """What an item owes its place to, in logits: differences of log P(y|x).

    Attributes:
        item: its id.
        logit: `<u, v> / T + (b - 1) log p(y)`.
        lift: `logit` less the mean logit over the catalog, for this query: how far the item stands above the rest.
        popularity: the part of `lift` that goes with popularity: the slope of this query's logits on log p over the
            catalog (least squares), times how far the item's log p is above the mean.
        popularity_share: `popularity / lift`; below 0 where the item is rare for its place, above 1 where it stands
            lower than its popularity alone would put it; None where the lift is not positive.
        history: columns `item`, `title` where there is one, and `contribution`: the logit with the whole history less
            the logit without this one item. Largest first. Contributions of items that say the same are small, for
            without one the others still say it; they need not sum to the lift.
    """

    item: Any
    logit: float
    lift: float
    popularity: float
    popularity_share: float | None
    history: pl.DataFrame

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**self.__dict__, "history": self.history.to_dicts()}


def explain(
    answers: Answers, embed: Embed, asked: Questions, code: int, *, length: int, dial: PopularityDial, popularity: float
) -> Explanation:
    """Explain one item for one query.

    Args:
        answers: the model's tables.
        embed: u(x) of queries by codes and histories. Where an item is left out, the gaps before the others stay.
        asked: one query.
        code: the item.
        length: L, how many recent items the query tower looks at.
        dial: temperature and log p.
        popularity: b, the setting of the dial.
    """
    artifact, temperature = answers.artifact, dial.temperature
    recent = asked.items[max(len(asked.items) - length, 0) :]
    count = len(recent)
    # Row 0 has the whole history, row i + 1 all but item i. Items older than L stay: one of them moves up.
    kept = _without_each(asked.items, count)
    gaps = None if asked.gaps is None else np.concatenate(_without_each(asked.gaps, count))
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in kept])]).astype(np.int64)
    embedded = embed(np.repeat(asked.codes, count + 1), (offsets, np.concatenate(kept).astype(np.int32)), gaps).cpu()
    item = artifact.item_embeddings[code].double()
    own = (embedded.double() @ item) / temperature
    log_p = dial.log_probability
    logits = (artifact.item_embeddings @ embedded[0]).double() / temperature + (popularity - 1.0) * log_p
    centred = log_p - log_p.mean()
    spread = float((centred**2).sum())
    slope = float((centred * (logits - logits.mean())).sum()) / spread if spread > 0 else 0.0
    lift = float(logits[code] - logits.mean())
    due = slope * float(centred[code])
    history = answers.items(recent.astype(np.int64)).with_columns(
        pl.Series("contribution", (own[0] - own[1:]).numpy(), dtype=pl.Float64)
    )
    return Explanation(
        item=artifact.items.decode([code])[0],
        logit=float(logits[code]),
        lift=lift,
        popularity=due,
        popularity_share=due / lift if lift > 0 else None,
        history=history.sort("contribution", descending=True, maintain_order=True),
    )


def _without_each(values: NDArray[Any], count: int) -> list[NDArray[Any]]:
    """The values, then the values without each of their last `count`."""
    return [values, *(np.delete(values, len(values) - count + place) for place in range(count))]
