"""IVF-PQ (Jegou, Douze and Schmid, 2011) by inner product, using faiss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twotower.errors import InputError
from twotower.index.approximate.hnsw import faiss_module
from twotower.index.catalog import IntArray, Mask

#: Minimum number of training points per centroid that faiss recommends.
POINTS = 39
#: Dimensions per byte of code.
WIDTH = 4
#: Minimum number of items.
SMALLEST = 1000


class IVFPQ:
    """Items stored in clusters as a few bytes each; a query searches the nearest clusters.

    This is a small index: D / 4 + 8 bytes per item, less than `BinaryStore` below 64 dimensions. Its scores are coarse,
    so several candidates are fetched per result and scored with the exact embeddings. Vectors are padded with zeros to
    a multiple of 4.

    Args:
        vectors: item vectors, float32 [N, D], N at least 1,000; row = code.
        clusters: number of clusters; None for about 4 sqrt(N), but at most N / 39.
        effort: nprobe, number of clusters searched per query.

    Raises:
        InputError: fewer than 1,000 items, or faiss is not installed.
    """

    kind = "ivfpq"
    max_effort = 4096
    oversample = 4.0  # scores of product quantization are coarse

    def __init__(self, vectors: NDArray[np.float32], *, clusters: int | None = None, effort: int = 32) -> None:
        faiss = faiss_module()
        count = len(vectors)
        if count < SMALLEST:
            raise InputError(f"ivfpq: expected at least {SMALLEST:,} items, found {count:,}; use exact search")
        lists = clusters or max(1, min(round(4 * count**0.5), count // POINTS))
        bits = min(8, max(4, int(np.log2(count / POINTS))))
        rows = padded(vectors, -(-vectors.shape[1] // WIDTH) * WIDTH)
        quantizer = faiss.IndexFlatIP(rows.shape[1])
        self._ivf = faiss.IndexIVFPQ(
            quantizer, rows.shape[1], lists, rows.shape[1] // WIDTH, bits, faiss.METRIC_INNER_PRODUCT
        )
        self._ivf.cp.spherical = True  # cluster by direction: a centroid with a large norm would attract every query
        self.effort = min(effort, lists)
        self.max_effort = lists
        # faiss would draw a sample of this size too, but would need all vectors first.
        sample = np.random.default_rng(0).permutation(count)[: 256 * max(lists, 2**bits)]
        self._ivf.train(np.ascontiguousarray(rows[np.sort(sample)]))
        self._ivf.add_with_ids(rows, np.arange(count, dtype=np.int64))

    def candidates(self, queries: NDArray[np.float32], k: int, allowed: Mask | None, depth: float) -> IntArray:
        """Return candidates; see `Engine.candidates`."""
        faiss = faiss_module()
        settings: dict[str, Any] = {"nprobe": min(round(self.effort * depth), self._ivf.nlist)}
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")  # faiss keeps a pointer to these bits during the search
            settings["sel"] = faiss.IDSelectorBitmap(bits)
        _, codes = self._ivf.search(padded(queries, self._ivf.d), k, params=faiss.SearchParametersIVF(**settings))
        return np.asarray(codes, dtype=np.int64)

    def add(self, codes: IntArray, vectors: NDArray[np.float32]) -> None:
        """Add items without retraining clusters and codebooks; see `Engine.add`."""
        self._ivf.add_with_ids(padded(vectors, self._ivf.d), np.ascontiguousarray(codes))

    def remove(self, codes: IntArray) -> None:
        """Remove items; see `Engine.remove`."""
        if len(codes):
            self._ivf.remove_ids(np.ascontiguousarray(codes, dtype=np.int64))

    def count(self) -> int:
        """Return the number of items; see `Engine.count`."""
        return int(self._ivf.ntotal)

    def settings(self) -> dict[str, Any]:
        """Return the settings; see `Engine.settings`."""
        return {"clusters": self._ivf.nlist, "bits": self._ivf.pq.nbits, "effort": self.effort}

    def size(self) -> int:
        """Return the size in bytes of the codes, the ids and the centroids."""
        return int(self._ivf.ntotal * (self._ivf.code_size + 8) + 4 * self._ivf.d * (self._ivf.nlist + 2**8))

    def save(self, folder: Path) -> None:
        """Write the index; see `Engine.save`."""
        faiss_module().write_index(self._ivf, str(folder / "clusters.faiss"))

    @classmethod
    def load(cls, folder: Path, settings: dict[str, Any]) -> IVFPQ:
        """Load an index written by `save`."""
        engine = cls.__new__(cls)
        engine._ivf = faiss_module().read_index(str(folder / "clusters.faiss"))
        engine.effort = int(settings["effort"])
        engine.max_effort = engine._ivf.nlist
        return engine


def padded(vectors: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Append zeros to vectors, [N, D] -> float32 [N, width]."""
    if width == vectors.shape[1]:
        return np.ascontiguousarray(vectors, dtype=np.float32)
    wider = np.zeros((len(vectors), width), dtype=np.float32)
    wider[:, : vectors.shape[1]] = vectors
    return wider
