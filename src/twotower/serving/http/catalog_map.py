"""A map of the catalog: items in two dimensions, with similar items close together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

#: Maximum number of items in the layout; larger catalogs are sampled, and other items are placed among their nearest
#: neighbours.
SAMPLE = 4000

#: Number of nearest neighbours that attract an item.
NEIGHBOURS = 12

#: Number of random items that repel an item, for each neighbour that attracts it.
PUSHES = 4

STEPS = 250

Places = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Atlas:
    """Positions of items in the square [-1, 1] x [-1, 1].

    Attributes:
        sample: codes of the items in the layout, ascending.
        places: positions of these items, [len(sample), 2].
        embeddings: the catalog's embeddings [N, D], compared by cosine.
    """

    sample: NDArray[np.int64]
    places: Places
    embeddings: Tensor

    @classmethod
    def draw(cls, embeddings: Tensor, seed: int = 0) -> Atlas:
        """Lay out a catalog; takes a few seconds for `SAMPLE` items.

        Nearest neighbours by cosine attract each other and random items repel each other, with the gradients of UMAP
        (McInnes, Healy and Melville 2018, section 3.2) for the kernel 1 / (1 + d^2), starting from the first two
        principal components. The same embeddings always yield the same map.

        Args:
            embeddings: item embeddings of the catalog, [N, D].
            seed: seed of the sample and of the repelling items.
        """
        rng = np.random.default_rng(seed)
        count = len(embeddings)
        sample = np.arange(count) if count <= SAMPLE else np.sort(rng.choice(count, SAMPLE, replace=False))
        chosen = _directions(embeddings, sample)
        start = principal(chosen)
        positions = start if len(sample) <= NEIGHBOURS + 1 else _spread_by_forces(start, _edges(chosen), rng)
        return cls(sample.astype(np.int64), _in_square(positions), embeddings)

    def place(self, codes: NDArray[np.int64]) -> Places:
        """Return positions of items [n, 2]: their own, or the weighted mean of the five nearest items in the sample."""
        at = np.minimum(np.searchsorted(self.sample, codes), max(len(self.sample) - 1, 0))
        found = self.places[at].copy()
        missing = np.flatnonzero(self.sample[at] != codes)
        if len(missing):
            near = _directions(self.embeddings, codes[missing]) @ _directions(self.embeddings, self.sample).T
            best = near.topk(min(5, near.shape[1]), dim=1)
            weight = torch.softmax(10.0 * best.values, 1).double().numpy()
            found[missing] = (weight[:, :, None] * self.places[best.indices.numpy()]).sum(1)
        return found


def _directions(embeddings: Tensor, codes: NDArray[np.int64]) -> Tensor:
    """Return embeddings of items, normalised to length 1."""
    return F.normalize(embeddings[torch.from_numpy(codes)].float(), dim=1)


def principal(rows: Tensor) -> Places:
    """Project rows [n, D] on their first two principal components, scaled so that the larger spread is 1; [n, 2]."""
    centred = (rows - rows.mean(0)).double()
    _, directions = torch.linalg.eigh(centred.T @ centred)
    axes = directions[:, -2:].flip(1)
    # The sign of an eigenvector is arbitrary; fix it, so that the same items yield the same map.
    axes = axes * torch.where(axes.sum(0) < 0, -1.0, 1.0)
    flat = centred @ axes
    if flat.shape[1] < 2:
        flat = F.pad(flat, (0, 2 - flat.shape[1]))
    flat = flat / flat.std(0, correction=0).max().clamp(min=1e-12)
    places: Places = flat.numpy()
    return places


def _edges(unit: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """List the pairs of an item and one of its nearest neighbours by cosine."""
    near = unit @ unit.T
    near.fill_diagonal_(-torch.inf)
    nearest = near.topk(NEIGHBOURS, dim=1).indices.numpy()
    return np.repeat(np.arange(len(unit)), NEIGHBOURS), nearest.reshape(-1)


def _spread_by_forces(
    start: Places, edges: tuple[NDArray[np.int64], NDArray[np.int64]], rng: np.random.Generator
) -> Places:
    positions, count = 10.0 * start, len(start)
    ones, others = edges
    for step in range(STEPS):
        rate = 1.0 - step / STEPS
        # A random fraction of the edges per step, as in stochastic gradient descent; all edges together would
        # overshoot.
        drawn = rng.random(len(ones)) < 0.25
        a, b = ones[drawn], others[drawn]
        difference = positions[a] - positions[b]
        square = (difference**2).sum(1, keepdims=True)
        pull = np.clip(-2.0 / (1.0 + square) * difference, -4.0, 4.0)
        from_ = np.repeat(a, PUSHES)
        offset = positions[from_] - positions[rng.integers(0, count, len(from_))]
        square = (offset**2).sum(1, keepdims=True)
        push = np.clip(2.0 / ((0.01 + square) * (1.0 + square)) * offset, -4.0, 4.0)
        for axis in (0, 1):
            positions[:, axis] += rate * (
                np.bincount(a, pull[:, axis], count)
                - np.bincount(b, pull[:, axis], count)
                + np.bincount(from_, push[:, axis], count)
            )
    return positions


def _in_square(positions: Places) -> Places:
    """Centre and scale to the square, with one factor for both axes to keep proportions."""
    if not len(positions):
        return positions
    middle = (positions.max(0) + positions.min(0)) / 2.0
    largest = float(np.abs(positions - middle).max())
    placed: Places = (positions - middle) / (largest or 1.0)
    return placed
