"""Items in 8 bits or in 1 bit per dimension, all of which a query is compared with, using faiss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from twotower.errors import InputError
from twotower.index.approximate.hnsw import faiss_module
from twotower.index.approximate.ivfpq import padded
from twotower.index.catalog import IntArray, Mask

#: Items encoded at a time; bounds the memory of float32 copies.
BLOCK = 1 << 16
#: 8-bit stores have a multiple of this number of dimensions.
WIDTH = 16
FILE, SCALE = "codes.faiss", "scale.safetensors"


class CodeStore(ABC):
    """Short codes of all items; a query is compared with each code that is allowed, so filters lose no recall.

    Scores of codes are coarse: `effort` candidates per result are scored again with the float32 embeddings. Those can
    stay in a mapped file, of which a search reads only the rows of the candidates; so memory is that of the codes and
    of an id of 8 bytes per item. A loaded store is mapped too, until the catalog is changed.

    Args:
        store: a faiss index with ids, fitted to the items but empty.
        scale: float32 [D], multiplied into queries.
        vectors: float32 [N, D]; row = code.
        effort: candidates per result.

    Raises:
        InputError: the effort is out of range.
    """

    kind: str
    max_effort = 64

    def __init__(self, store: Any, scale: NDArray[np.float32], vectors: NDArray[np.float32], effort: int) -> None:
        self.effort = self._checked(effort)
        self._mapped = False
        self._store, self._scale = store, scale
        self.add(np.arange(len(vectors), dtype=np.int64), vectors)

    @property
    def oversample(self) -> float:
        """Candidates per result: the effort."""
        return float(self.effort)

    def candidates(self, queries: NDArray[np.float32], k: int, allowed: Mask | None, depth: float) -> IntArray:
        """Return the k items with the best codes; see `Engine.candidates`. Every search reads all codes."""
        del depth
        faiss = faiss_module()
        settings: dict[str, Any] = {}
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")  # faiss keeps a pointer to it while it searches
            settings["sel"] = faiss.IDSelectorBitmap(bits)
        scaled = padded(queries, self._store.d) * self._scale
        _, codes = self._store.search(scaled, k, params=faiss.SearchParameters(**settings))
        return np.asarray(codes, dtype=np.int64)

    @abstractmethod
    def add(self, codes: IntArray, vectors: NDArray[np.float32]) -> None:
        """Add items; see `Engine.add`."""

    def remove(self, codes: IntArray) -> None:
        """Remove items; see `Engine.remove`."""
        if len(codes):
            self._unmap()
            self._store.remove_ids(np.ascontiguousarray(codes, dtype=np.int64))

    def count(self) -> int:
        """Return the number of items; see `Engine.count`."""
        return int(self._store.ntotal)

    def settings(self) -> dict[str, Any]:
        """Return the settings; see `Engine.settings`."""
        return {"effort": self.effort}

    def size(self) -> int:
        """Return the size in bytes of the codes and the ids."""
        return int(self._store.ntotal * (self._store.index.sa_code_size() + 8))

    def save(self, folder: Path) -> None:
        """Write the codes and the scale; see `Engine.save`."""
        faiss_module().write_index(self._store, str(folder / FILE))
        save_file({"scale": self._scale}, folder / SCALE)

    @classmethod
    def load(cls, folder: Path, settings: dict[str, Any]) -> Self:
        """Load a store written by `save`; its codes are memory-mapped."""
        engine = cls.__new__(cls)
        engine.effort, engine._mapped = cls._checked(int(settings["effort"])), True
        faiss = faiss_module()
        engine._store = faiss.read_index(str(folder / FILE), faiss.IO_FLAG_MMAP_IFC)
        engine._scale = load_file(folder / SCALE)["scale"]
        if engine._scale.shape != (engine._store.d,) or engine._scale.dtype != np.float32:
            raise InputError(f"{folder}: the scale does not match the codes; build the index again")
        return engine

    @classmethod
    def _checked(cls, effort: int) -> int:
        if not 1 <= effort <= cls.max_effort:
            raise InputError(f"{cls.kind}: effort must be in 1 .. {cls.max_effort}, found {effort}")
        return effort

    def _unmap(self) -> None:
        if self._mapped:  # faiss cannot change mapped codes
            faiss = faiss_module()
            self._store, self._mapped = faiss.deserialize_index(faiss.serialize_index(self._store)), False


class Int8Store(CodeStore):
    """One byte per dimension, with a symmetric scale per dimension: D + 8 bytes per item, D a multiple of 16.

    With `s_d = max_j |v_jd| / 127` and codes `c_jd = round(v_jd / s_d)`, the score is `sum_d (s_d q_d) c_jd`: the
    scales are multiplied into the query. A scale per item would be one more product per score, which faiss does not
    have, and found at most 0.8 % more of the top 100 with one candidate per result, and the same with two. If an added
    item exceeds the range of a dimension, all codes of that dimension are rounded again to a wider scale. Vectors are
    padded with zeros to a multiple of 16, which faiss scans several times faster.

    Raises:
        InputError: as in `CodeStore`, or faiss is not installed.
    """

    kind = "int8"

    def __init__(self, vectors: NDArray[np.float32], *, effort: int = 2) -> None:
        rows = padded(vectors, -(-vectors.shape[1] // WIDTH) * WIDTH)
        super().__init__(_int8_store(rows.shape[1]), _scale(rows), rows, effort)

    def add(self, codes: IntArray, vectors: NDArray[np.float32]) -> None:
        """Add items; see `Engine.add`."""
        self._unmap()
        needed = _scale(padded(vectors, self._store.d))
        if (needed > self._scale).any():
            self._rescale(np.maximum(needed, self._scale))
        for start in range(0, len(codes), BLOCK):
            rows = slice(start, start + BLOCK)
            rounded = np.rint(padded(vectors[rows], self._store.d) / self._scale)
            self._store.add_with_ids(rounded, np.ascontiguousarray(codes[rows]))

    def _rescale(self, scale: NDArray[np.float32]) -> None:
        wider, faiss = _int8_store(len(scale)), faiss_module()
        ids = faiss.vector_to_array(self._store.id_map)
        for start in range(0, len(ids), BLOCK):
            count = min(BLOCK, len(ids) - start)
            rounded = np.rint(self._store.index.reconstruct_n(start, count) * (self._scale / scale))
            wider.add_with_ids(rounded, ids[start : start + count])
        self._store, self._scale = wider, scale


class BinaryStore(CodeStore):
    """One bit per dimension (RaBitQ; Gao and Long, 2024): about D / 8 + 16 bytes per item.

    Vectors are centred on their mean and rotated at random, so that every coordinate has about the same variance; a
    bit is the sign of a coordinate. Two numbers per item (its distance from the centre, and how well the signs
    represent its direction) turn the agreement of signs into an estimate of the inner product, also for items of
    different length.

    Raises:
        InputError: as in `CodeStore`, or faiss is not installed.
    """

    kind = "binary"

    def __init__(self, vectors: NDArray[np.float32], *, effort: int = 16) -> None:
        faiss = faiss_module()
        dim = vectors.shape[1]
        rotation = faiss.RandomRotationMatrix(dim, dim)
        rotation.init(0)
        codes = faiss.IndexRaBitQ(dim, faiss.METRIC_INNER_PRODUCT)
        codes.qb = 8  # bits per query coordinate: recall as with float32, at a tenth of the time
        store = faiss.IndexPreTransform(rotation, codes)
        store.train(np.ascontiguousarray(vectors[:: max(1, len(vectors) // BLOCK)]))  # the mean of a sample
        super().__init__(faiss.IndexIDMap(store), np.ones(dim, dtype=np.float32), vectors, effort)

    def add(self, codes: IntArray, vectors: NDArray[np.float32]) -> None:
        """Add items around the old centre; see `Engine.add`."""
        self._unmap()
        for start in range(0, len(codes), BLOCK):
            rows = slice(start, start + BLOCK)
            self._store.add_with_ids(np.ascontiguousarray(vectors[rows]), np.ascontiguousarray(codes[rows]))


def _int8_store(dim: int) -> Any:
    faiss = faiss_module()
    # faiss's `8bit_direct_signed` rounds the query to integers too if D is a multiple of 16. In the range +-127.5, the
    # code of this type is a rounded coordinate, and queries stay float32.
    codes = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_8bit_uniform, faiss.METRIC_INNER_PRODUCT)
    codes.train(np.repeat(np.array([[-127.5], [127.5]], dtype=np.float32), dim, 1))
    return faiss.IndexIDMap(codes)


def _scale(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the step of each dimension, float32 [D], which is positive."""
    widest = np.maximum(vectors.max(0, initial=0.0), -vectors.min(0, initial=0.0))
    return np.asarray(np.maximum(widest / 127, np.finfo(np.float32).tiny), dtype=np.float32)
