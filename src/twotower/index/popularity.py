"""The popularity dial: the weight of item popularity, as one extra dimension of any inner-product index."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from twotower.errors import InputError


class PopularityDial:
    """An extra coordinate for items and queries, so that one index serves every setting of the dial.

    A model trained with fully corrected candidates estimates `log P(y|x)` by `s = <u, v> / T`. With the dial at b in
    [0, 2], items are ranked instead by

        s_b(x, y) = <u(x), v(y)> / T + (b - 1) log p(y),        p(y) = (count_y + 1) / (sum_j count_j + N)

    with training counts smoothed by one, so that items never seen have a finite score. b = 1 is the model as trained;
    b = 0 ranks by `log P(y|x) - log p(y)`, how much more likely the item is for this query than on average; b > 1
    favours popular items. An index computes scores without the temperature, so the product of the extra coordinates of
    query and item must be `(b - 1) T log p(y)`:

        item:   [v(y), T (log p(y) - m)]         query:  [u(x), b - 1],        m the mean of log p over the items

    The mean is the same for all items and does not change the ranking; `offset` corrects the score for it. T is on the
    item side, and the mean is subtracted, so that the coordinate is small compared with the embeddings. A graph or a
    quantizer built on the extended vectors then also works for the model as trained.

    The total, N and m are computed from the trained items only, so no coordinate changes when items are added later.

    Args:
        counts: training interactions of each item, integers [N].
        temperature: T, the temperature of the trained model.
        trained: number of items at the time of training, which have the first codes; None for all.
    """

    def __init__(self, counts: Tensor, temperature: float, trained: int | None = None) -> None:
        self.temperature = temperature
        self.log_probability = log_popularity(counts, trained)
        known = self.log_probability[:trained]
        self.mean = float(known.mean()) if len(known) else 0.0

    def coordinate(self) -> Tensor:
        """Return the items' extra coordinate, `T (log p - m)`, float32 [N]."""
        return (self.temperature * (self.log_probability - self.mean)).to(torch.float32)

    def items(self, embeddings: Tensor) -> Tensor:
        """Extend item embeddings v, [N, D] -> [N, D+1] float32."""
        return torch.cat([embeddings.float(), self.coordinate().to(embeddings.device)[:, None]], 1)

    def queries(self, embeddings: Tensor, popularity: float) -> Tensor:
        """Extend query embeddings u for a setting b, [B, D] -> [B, D+1] float32."""
        return torch.cat([embeddings.float(), embeddings.new_full((len(embeddings), 1), popularity - 1.0).float()], 1)

    def offset(self, popularity: float) -> float:
        """Return the constant to add to inner products of extended vectors to get `<u, v> + (b - 1) T log p`."""
        return (popularity - 1.0) * self.temperature * self.mean


def log_popularity(counts: Tensor, trained: int | None = None) -> Tensor:
    """Compute log p(y) = log((count_y + 1) / (sum_j count_j + N)) of each item, float64 [N'].

    Args:
        counts: training interactions of each item, integers [N'].
        trained: N; the sum runs over the first N items. None for all.
    """
    smoothed = counts.double().cpu() + 1.0
    return (smoothed / smoothed[:trained].sum()).log()


def checked_popularity(popularity: float) -> float:
    """Return b as a float after checking that it is a finite number in [0, 2].

    Raises:
        InputError: b is not such a number.
    """
    if not (isinstance(popularity, int | float) and math.isfinite(popularity) and 0.0 <= popularity <= 2.0):
        raise InputError(
            f"popularity: expected a number from 0 (discovery) through 1 (as trained) to 2, found {popularity!r}"
        )
    return float(popularity)
