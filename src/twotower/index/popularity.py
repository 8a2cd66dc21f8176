"""The popularity dial: how much of an item's popularity counts, as one more dimension of any inner-product index."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from twotower.errors import InputError


class PopularityDial:
    """One more coordinate for items and queries, so that one index answers for every setting of the dial.

    A model trained with its candidates fully corrected estimates `log P(y|x)` by `s = <u, v> / T`. The dial b in
    [0, 2] asks instead for

        s_b(x, y) = <u(x), v(y)> / T + (b - 1) log p(y),        p(y) = (count_y + 1) / (sum_j count_j + N)

    with the training counts smoothed by one, so that items never seen have a finite place. b = 1 is the model as
    trained; b = 0 ranks by `log P(y|x) - log p(y)`, how much more likely the item is for this query than for anybody;
    above 1 popular items gain. An index holds scores before the temperature, so the query's coordinate times the
    item's has to be `(b - 1) T log p(y)`:

        item:   [v(y), T (log p(y) - m)]         query:  [u(x), b - 1],        m the mean of log p over the items

    The mean is the same for all items and changes no ranking; `score` is corrected for it. T stands on the items' side
    and the mean is taken off so that the coordinate is small beside the embeddings: a graph or a quantizer that is
    built on the longer vectors then serves the model as trained as well.

    Items that join after training change neither the total, nor N, nor m: those are of the items that were there, so
    that nobody's coordinate moves when others come.

    Args:
        counts: training interactions of each item, integers [N].
        temperature: T.
        trained: the first so many items were there in training; None for all.
    """

    def __init__(self, counts: Tensor, temperature: float, trained: int | None = None) -> None:
        self.temperature = temperature
        self.log_probability = log_popularity(counts, trained)
        known = self.log_probability[:trained]
        self.mean = float(known.mean()) if len(known) else 0.0

    def coordinate(self) -> Tensor:
        """The items' last coordinate, `T (log p - m)`, float32 [N]."""
        return (self.temperature * (self.log_probability - self.mean)).to(torch.float32)

    def items(self, embeddings: Tensor) -> Tensor:
        """Embeddings v [N, D] -> [N, D+1] float32."""
        return torch.cat([embeddings.float(), self.coordinate().to(embeddings.device)[:, None]], 1)

    def queries(self, embeddings: Tensor, popularity: float) -> Tensor:
        """Embeddings u [B, D] -> [B, D+1] float32 for a setting b."""
        return torch.cat([embeddings.float(), embeddings.new_full((len(embeddings), 1), popularity - 1.0).float()], 1)

    def offset(self, popularity: float) -> float:
        """What to add to an inner product of the longer vectors to get `<u, v> + (b - 1) T log p`."""
        return (popularity - 1.0) * self.temperature * self.mean


def log_popularity(counts: Tensor, trained: int | None = None) -> Tensor:
    """Of each item, log p(y) = log((count_y + 1) / (sum_j count_j + N)), float64 [N].

    Args:
        counts: integers [N'].
        trained: N, the sum is over the first so many items; None for all.
    """
    smoothed = counts.double().cpu() + 1.0
    return (smoothed / smoothed[:trained].sum()).log()


def checked_popularity(popularity: float) -> float:
    """b, a finite number in [0, 2].

    Raises:
        InputError: anything else.
    """
    if not (isinstance(popularity, int | float) and math.isfinite(popularity) and 0.0 <= popularity <= 2.0):
        raise InputError(
            f"popularity: expected a number from 0 (discovery) over 1 (as trained) to 2, found {popularity!r}"
        )
    return float(popularity)
