"""Embeddings that were trained at several widths, shortened to one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from twotower.errors import InputError


@dataclass(frozen=True)
class Prefix:
    """The first coordinates of nested embeddings (Matryoshka; Kusupati et al. 2022).

    With cosine similarity the first coordinates are scaled to length 1 again, as in training. Coordinates after the
    first D (item bias, popularity, recent prior, dial) belong to the score at every width and are kept unchanged.

    Args:
        width: number of coordinates to keep, in 1 .. D.
        dimension: D, the width of the full embeddings without additional coordinates.
        cosine: whether the embeddings have length 1.

    Raises:
        InputError: the width is not in 1 .. D.

    Example:
        >>> import torch
        >>> from twotower.index.prefix import Prefix
        >>> Prefix(2, 3, cosine=True)(torch.tensor([[0.0, 0.6, 0.8, 5.0]]))
        tensor([[0., 1., 5.]])
    """

    width: int
    dimension: int
    cosine: bool

    def __post_init__(self) -> None:
        if not 1 <= self.width <= self.dimension:
            raise InputError(
                f"width: expected a number from 1 to {self.dimension}, the width of the embeddings; found {self.width}"
            )

    def __call__(self, embedded: Tensor) -> Tensor:
        """Shorten embeddings, [..., D + c] -> [..., width + c]; unchanged if the width is D."""
        if self.width == self.dimension:
            return embedded
        first, others = embedded[..., : self.width], embedded[..., self.dimension :]
        if self.cosine:
            first = F.normalize(first, dim=-1)
        return torch.cat([first, others], -1) if others.shape[-1] else first


def require_width(width: int, widths: Sequence[int]) -> None:
    """Check that embeddings were trained at a width.

    Raises:
        InputError: the model was not trained at this width.
    """
    if width not in widths:
        raise InputError(
            f"width: the model was not trained at width {width}, only at {', '.join(map(str, widths))}; choose one of "
            "these, or train with item_tower.nested"
        )
