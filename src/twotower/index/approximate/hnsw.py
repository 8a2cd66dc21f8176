"""HNSW (Malkov and Yashunin, 2018) by inner product, using faiss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from twotower.errors import InputError
from twotower.index.catalog import IntArray, Mask


def faiss_module() -> Any:
    """Import faiss on first use.

    Raises:
        InputError: faiss is not installed.
    """
    try:
        import faiss  # noqa: PLC0415  # an extra
    except ImportError:
        raise InputError("index: this kind needs faiss; pip install 'twotower[ann]'") from None
    return faiss


class HNSW:
    """A navigable graph over the items, searched from entry points to the neighbourhood of the query.

    Removed items remain in the graph as intermediate nodes and are filtered from the results; an updated item is
    removed and added again. After many removals, a rebuilt graph is smaller. A loaded graph is memory-mapped: pages are
    read on demand and shared by processes. The first addition after loading copies the whole graph into memory.

    Args:
        vectors: item vectors, float32 [N, D]; row = code.
        links: M, edges per node; 2 M on the lowest level. Each item takes 8 * M bytes for its links.
        build_effort: efConstruction, number of candidate neighbours when a node is inserted.
        effort: efSearch, size of the candidate list during search; at least the number of results.

    Raises:
        InputError: faiss is not installed.
    """

    kind = "hnsw"
    max_effort = 4096
    oversample = 1.0

    def __init__(
        self, vectors: NDArray[np.float32], *, links: int = 32, build_effort: int = 128, effort: int = 128
    ) -> None:
        faiss = faiss_module()
        self.effort = effort
        self._settings = {"links": links, "build_effort": build_effort}
        self._codes = np.empty(0, dtype=np.int64)
        self._live = np.empty(0, dtype=np.bool_)
        self._mapped = False
        self._graph = faiss.IndexHNSWFlat(vectors.shape[1], links, faiss.METRIC_INNER_PRODUCT)
        self._graph.hnsw.efConstruction = build_effort
        self.add(np.arange(len(vectors), dtype=np.int64), vectors)

    @property
    def codes(self) -> IntArray:
        """Codes of the rows of the graph, including removed items."""
        return self._codes

    def candidates(self, queries: NDArray[np.float32], k: int, allowed: Mask | None, depth: float) -> IntArray:
        """Return candidates; see `Engine.candidates`."""
        faiss = faiss_module()
        # efSearch is at least k, so it grows with the depth anyway; the extra factor keeps recall as high for the last
        # candidates as for the first.
        settings: dict[str, Any] = {"efSearch": round(max(self.effort, k) * min(depth, 2.0))}
        live = self._live if allowed is None else self._live & allowed[self._codes]
        bits = np.packbits(live, bitorder="little")  # faiss keeps a pointer to these bits during the search
        if not live.all():
            settings["sel"] = faiss.IDSelectorBitmap(bits)
        _, rows = self._graph.search(
            np.ascontiguousarray(queries), min(k, len(live)), params=faiss.SearchParametersHNSW(**settings)
        )
        codes = np.full((len(queries), k), -1, dtype=np.int64)
        codes[:, : rows.shape[1]] = np.where(rows >= 0, self._codes[rows], -1)
        return codes

    def add(self, codes: IntArray, vectors: NDArray[np.float32]) -> None:
        """Add items; see `Engine.add`."""
        if self._mapped:  # faiss aborts the process if an item is added to a mapped graph
            faiss = faiss_module()
            self._graph, self._mapped = faiss.deserialize_index(faiss.serialize_index(self._graph)), False
        self._graph.add(np.ascontiguousarray(vectors))
        self._codes = np.concatenate([self._codes, codes])
        self._live = np.concatenate([self._live, np.ones(len(codes), dtype=np.bool_)])

    def remove(self, codes: IntArray) -> None:
        """Remove items; see `Engine.remove`."""
        self._live &= ~np.isin(self._codes, codes)

    def count(self) -> int:
        """Return the number of items; see `Engine.count`."""
        return int(self._live.sum())

    def settings(self) -> dict[str, Any]:
        """Return the settings; see `Engine.settings`."""
        return {**self._settings, "effort": self.effort}

    def size(self) -> int:
        """Return the size in bytes of the graph and of its copy of the vectors."""
        return int(self._graph.ntotal * (4 * self._graph.d + 8 * self._settings["links"] + 9))

    def save(self, folder: Path) -> None:
        """Write the graph; see `Engine.save`."""
        faiss_module().write_index(self._graph, str(folder / "graph.faiss"))
        save_file({"codes": self._codes, "live": self._live}, folder / "rows.safetensors")

    @classmethod
    def load(cls, folder: Path, settings: dict[str, Any]) -> HNSW:
        """Load a graph written by `save`."""
        engine = cls.__new__(cls)
        engine.effort = int(settings["effort"])
        engine._settings = {name: int(settings[name]) for name in ("links", "build_effort")}
        faiss = faiss_module()
        engine._graph, engine._mapped = faiss.read_index(str(folder / "graph.faiss"), faiss.IO_FLAG_MMAP_IFC), True
        rows = load_file(folder / "rows.safetensors")
        engine._codes, engine._live = rows["codes"], rows["live"]
        shapes = {engine._codes.shape, engine._live.shape}
        if shapes != {(engine._graph.ntotal,)} or engine._codes.dtype != np.int64 or engine._live.dtype != np.bool_:
            raise InputError(f"{folder}: the rows do not match the graph; build the index again")
        return engine
