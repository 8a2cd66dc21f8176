"""An engine over nested embeddings of a smaller width; its candidates are scored again at the full width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from twotower.errors import InputError
from twotower.index.approximate.index import Engine
from twotower.index.catalog import IntArray, Mask
from twotower.index.prefix import Prefix

#: Default number of candidates per result at a smaller width, relative to the same engine at width D.
FETCH = 4.0
MOST_FETCH = 4096.0


class NarrowEngine:
    """An engine that works on the first coordinates of items and queries; see `Prefix`.

    The engine stores and compares `width` numbers per item instead of D. `ApproximateIndex` scores its candidates with
    all D coordinates ("adaptive retrieval" in the source), so the width decides which items are found, not their order.
    The best items at a smaller width differ from those at D, so more candidates are fetched per result: `fetch` times
    as many as the same engine fetches at D. If the effort is raised and the engine does not fetch more by itself,
    `fetch` is raised in the same proportion.

    Source: Kusupati et al. 2022, "Matryoshka Representation Learning", section 4.3.1.

    Args:
        engine: an engine that was built on `prefix` of the items.
        prefix: shortens embeddings to the width of the engine.
        fetch: candidates per result, as a multiple of the number that the engine alone would fetch.

    Raises:
        InputError: `fetch` is not a number in 1 .. 4,096.
    """

    def __init__(self, engine: Engine, prefix: Prefix, *, fetch: Any = FETCH) -> None:
        if isinstance(fetch, bool) or not isinstance(fetch, int | float) or not 1.0 <= fetch <= MOST_FETCH:
            raise InputError(f"index: fetch must be a number in 1 .. {MOST_FETCH:,.0f}, found {fetch!r}")
        self.engine, self.prefix, self.fetch = engine, prefix, float(fetch)
        self.kind, self.max_effort = engine.kind, engine.max_effort

    @property
    def effort(self) -> int:
        """The effort of the engine."""
        return self.engine.effort

    @effort.setter
    def effort(self, value: int) -> None:
        before, fetched = self.engine.effort, self.engine.oversample
        self.engine.effort = value
        if self.engine.oversample == fetched:
            self.fetch = min(max(self.fetch * value / before, 1.0), MOST_FETCH)

    @property
    def oversample(self) -> float:
        """Candidates to fetch per result."""
        return self.fetch * self.engine.oversample

    def candidates(self, queries: NDArray[np.float32], k: int, allowed: Mask | None, depth: float) -> IntArray:
        """Return the k best candidates at the engine's width; see `Engine.candidates`."""
        return self.engine.candidates(self._shorten(queries), k, allowed, depth)

    def add(self, codes: IntArray, vectors: NDArray[np.float32]) -> None:
        """Add items; see `Engine.add`."""
        self.engine.add(codes, self._shorten(vectors))

    def remove(self, codes: IntArray) -> None:
        """Remove items; see `Engine.remove`."""
        self.engine.remove(codes)

    def count(self) -> int:
        """Return the number of items; see `Engine.count`."""
        return self.engine.count()

    def settings(self) -> dict[str, Any]:
        """Return the settings of the engine, the width and `fetch`."""
        return {**self.engine.settings(), "width": self.prefix.width, "fetch": self.fetch}

    def size(self) -> int:
        """Return the size of the engine in bytes."""
        return self.engine.size()

    def save(self, folder: Path) -> None:
        """Write the files of the engine; see `Engine.save`."""
        self.engine.save(folder)

    def _shorten(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.ascontiguousarray(self.prefix(torch.from_numpy(np.ascontiguousarray(vectors))).numpy())
