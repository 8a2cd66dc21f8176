"""Items as codes of 8 bits or 1 bit per dimension, all compared with each query, using faiss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from twotower.distributed.communicator import Communicator
from twotower.distributed.partition import RowShard
from twotower.errors import InputError
from twotower.index.approximate.hnsw import faiss_module
from twotower.index.approximate.ivfpq import padded
from twotower.index.catalog import IntArray, Mask

#: Number of items encoded at a time; bounds the memory of float32 copies.
BLOCK = 1 << 16
#: Number of items in a part; bounds the memory needed to write a store.
PART = 1 << 20
#: The number of dimensions of an 8-bit store is a multiple of this.
WIDTH = 16
#: Maximum number of parts in a store; each part is a file that is mapped.
MOST_PARTS = 10_000
FILE, SCALE = "codes.faiss", "scale.safetensors"

#: Function that returns rows of the catalog, float32 [n, D].
Rows = Callable[[slice], NDArray[np.float32]]


class CodeStore(ABC):
    """Short codes of all items; a query is compared with every allowed code, so filters lose no recall.

    Scores of codes are coarse: `effort` candidates per result are scored again with the float32 embeddings. The
    embeddings can stay in a mapped file, from which a search reads only the rows of the candidates, while it reads the
    codes of all items. A loaded store, with its 8-byte id per item, is mapped too, until the catalog is changed.

    The codes are in one or more parts of consecutive items. `write` writes one part at a time, so it needs memory for
    one part only, and several ranks can divide the parts.

    Args:
        vectors: item vectors, float32 [N, D]; row = code.
        effort: candidates per result; None for the default of the kind.

    Raises:
        InputError: the effort is out of range, or faiss is not installed.
    """

    kind: str
    default_effort: int
    _scale: NDArray[np.float32]
    max_effort = 64

    def __init__(self, vectors: NDArray[np.float32], *, effort: int | None = None) -> None:
        self.effort = self._checked(self.default_effort if effort is None else effort)
        self._mapped = False
        shape = vectors.shape[0], vectors.shape[1]
        self._fit(lambda rows: vectors[rows], shape, Communicator())
        self._stores = [self._encoded(lambda rows: vectors[rows], part) for part in _parts(len(vectors))]

    @classmethod
    def write(
        cls, folder: Path, rows: Rows, shape: tuple[int, int], ranks: Communicator, *, effort: int | None = None
    ) -> dict[str, Any]:
        """Write the files of a store without holding all its codes in memory; each rank writes a share of the parts.

        Args:
            folder: an existing folder to which all ranks have access.
            rows: returns the vectors of a range of items, the same on every rank.
            shape: N and D.
            ranks: the processes that write; all of them call this.
            effort: as for the class.

        Returns:
            The settings for `load`, which can open the files once all ranks have returned.
        """
        writer = cls.__new__(cls)
        writer.effort, writer._mapped = cls._checked(cls.default_effort if effort is None else effort), False
        writer._fit(rows, shape, ranks)
        parts = _parts(shape[0])
        for number in range(ranks.rank, len(parts), ranks.size):
            _write(writer._encoded(rows, parts[number]), folder / _name(number, len(parts)))
        if ranks.is_first:
            save_file({"scale": writer._scale}, folder / SCALE)
        return {"effort": writer.effort, **({"parts": len(parts)} if len(parts) > 1 else {})}

    @abstractmethod
    def _fit(self, rows: Rows, shape: tuple[int, int], ranks: Communicator) -> None:
        """Set `_scale`, float32 [D], by which queries are multiplied, and the state for `_empty`; collective."""

    @abstractmethod
    def _empty(self) -> Any:
        """Return an empty faiss index with ids."""

    @abstractmethod
    def _coded(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Convert vectors to the numbers that are added to the faiss index (`_empty`)."""

    def _encoded(self, rows: Rows, part: range) -> Any:
        """Return a faiss index of the items of a part."""
        store = self._empty()
        for start in range(part.start, part.stop, BLOCK):
            stop = min(start + BLOCK, part.stop)
            store.add_with_ids(self._coded(rows(slice(start, stop))), np.arange(start, stop, dtype=np.int64))
        return store

    @property
    def dim(self) -> int:
        """Width of the stored vectors."""
        return int(self._stores[0].d)

    @property
    def oversample(self) -> float:
        """Candidates per result: the effort."""
        return float(self.effort)

    def candidates(self, queries: NDArray[np.float32], k: int, allowed: Mask | None, depth: float) -> IntArray:
        """Return the k items whose codes score highest; see `Engine.candidates`. Every search reads all codes."""
        del depth
        faiss = faiss_module()
        settings: dict[str, Any] = {}
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")  # faiss keeps a pointer to these bits during the search
            settings["sel"] = faiss.IDSelectorBitmap(bits)
        scaled, parameters = padded(queries, self.dim) * self._scale, faiss.SearchParameters(**settings)
        found = None
        for store in self._stores:
            scores, codes = store.search(scaled, k, params=parameters)
            if found is not None:
                scores, codes = (np.concatenate(pair, axis=1) for pair in zip(found, (scores, codes), strict=True))
                best = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # empty slots have the lowest score
                scores, codes = (np.take_along_axis(one, best, axis=1) for one in (scores, codes))
            found = scores, codes
        assert found is not None
        return np.asarray(found[1], dtype=np.int64)

    def add(self, codes: IntArray, vectors: NDArray[np.float32]) -> None:
        """Add items; see `Engine.add`."""
        self._unmap()
        for start in range(0, len(codes), BLOCK):
            rows = slice(start, start + BLOCK)
            self._stores[-1].add_with_ids(self._coded(vectors[rows]), np.ascontiguousarray(codes[rows]))

    def remove(self, codes: IntArray) -> None:
        """Remove items; see `Engine.remove`."""
        if len(codes):
            self._unmap()
            for store in self._stores:
                store.remove_ids(np.ascontiguousarray(codes, dtype=np.int64))

    def count(self) -> int:
        """Return the number of items; see `Engine.count`."""
        return sum(int(store.ntotal) for store in self._stores)

    def settings(self) -> dict[str, Any]:
        """Return the settings; see `Engine.settings`."""
        return {"effort": self.effort, **({"parts": len(self._stores)} if len(self._stores) > 1 else {})}

    def size(self) -> int:
        """Return the size in bytes of the codes and the ids."""
        return sum(int(store.ntotal * (store.index.sa_code_size() + 8)) for store in self._stores)

    def save(self, folder: Path) -> None:
        """Write the codes and the scale; see `Engine.save`."""
        for number, store in enumerate(self._stores):
            _write(store, folder / _name(number, len(self._stores)))
        save_file({"scale": self._scale}, folder / SCALE)

    @classmethod
    def load(cls, folder: Path, settings: dict[str, Any]) -> Self:
        """Load a store written by `save`; its codes are memory-mapped."""
        engine = cls.__new__(cls)
        engine.effort, engine._mapped = cls._checked(int(settings["effort"])), True
        faiss, count = faiss_module(), int(settings.get("parts", 1))
        if not 1 <= count <= MOST_PARTS:
            raise InputError(f"{folder}: parts must be in 1 .. {MOST_PARTS}, found {count}; build the index again")
        files = (str(folder / _name(number, count)) for number in range(count))
        engine._stores = [faiss.read_index(file, faiss.IO_FLAG_MMAP_IFC) for file in files]
        engine._scale = load_file(folder / SCALE)["scale"]
        widths = {(store.d,) for store in engine._stores}
        if widths != {engine._scale.shape} or engine._scale.dtype != np.float32:
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
            for number, store in enumerate(self._stores):
                self._stores[number] = faiss.deserialize_index(faiss.serialize_index(store))
            self._mapped = False


class Int8Store(CodeStore):
    """One byte per dimension, with a symmetric scale per dimension: D + 8 bytes per item, D a multiple of 16.

    With `s_d = max_j |v_jd| / 127` and codes `c_jd = round(v_jd / s_d)`, the score is `sum_d (s_d q_d) c_jd`: the
    scales are multiplied into the query. A scale per item would need one more product per score, which faiss does not
    support; such scales found at most 0.8 % more of the top 100 with one candidate per result, and no more with two. If
    an added item exceeds the range of a dimension, all codes of that dimension are rounded again to a wider scale.
    Vectors are padded with zeros to a multiple of 16, which faiss scans several times faster.

    Raises:
        InputError: as in `CodeStore`.
    """

    kind = "int8"

    default_effort = 2

    def _fit(self, rows: Rows, shape: tuple[int, int], ranks: Communicator) -> None:
        count, dim = shape
        widest, own = np.zeros(dim, dtype=np.float32), RowShard(ranks, count).own
        for start in range(own.start, own.stop, BLOCK):
            widest = np.maximum(widest, np.abs(rows(slice(start, min(start + BLOCK, own.stop)))).max(0))
        every = ranks.gather(torch.from_numpy(widest)[None])
        self._scale = _steps(padded(every.numpy().max(0)[None], -(-dim // WIDTH) * WIDTH)[0])

    def _empty(self) -> Any:
        faiss, dim = faiss_module(), len(self._scale)
        # faiss's `8bit_direct_signed` rounds the query to integers too if D is a multiple of 16. `8bit_uniform` keeps
        # queries in float32, and its codes, trained on the range +-127.5, are rounded coordinates as well.
        codes = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_8bit_uniform, faiss.METRIC_INNER_PRODUCT)
        codes.train(np.repeat(np.array([[-127.5], [127.5]], dtype=np.float32), dim, 1))
        return faiss.IndexIDMap(codes)

    def _coded(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(np.rint(padded(vectors, len(self._scale)) / self._scale))

    def add(self, codes: IntArray, vectors: NDArray[np.float32]) -> None:
        """Add items; see `Engine.add`."""
        self._unmap()
        needed = _steps(np.abs(padded(vectors, self.dim)).max(0, initial=0.0))
        if (needed > self._scale).any():
            self._rescale(np.maximum(needed, self._scale))
        super().add(codes, vectors)

    def _rescale(self, scale: NDArray[np.float32]) -> None:
        faiss, before = faiss_module(), self._scale
        self._scale = scale
        for number, store in enumerate(self._stores):
            wider, ids = self._empty(), faiss.vector_to_array(store.id_map)
            for start in range(0, len(ids), BLOCK):
                count = min(BLOCK, len(ids) - start)
                rounded = np.rint(store.index.reconstruct_n(start, count) * (before / scale))
                wider.add_with_ids(rounded, ids[start : start + count])
            self._stores[number] = wider


class BinaryStore(CodeStore):
    """One bit per dimension (RaBitQ; Gao and Long, 2024): about D / 8 + 16 bytes per item.

    Vectors are centred on their mean and rotated at random, so that every coordinate has about the same variance; a
    bit is the sign of a coordinate. Two numbers per item (its distance from the centre, and how well the signs
    represent its direction) turn the agreement of signs into an estimate of the inner product, also for items of
    different length.

    Raises:
        InputError: as in `CodeStore`.
    """

    kind = "binary"

    default_effort = 16

    def _fit(self, rows: Rows, shape: tuple[int, int], ranks: Communicator) -> None:
        del ranks  # every rank has the same sample
        faiss, (count, dim) = faiss_module(), shape
        rotation = faiss.RandomRotationMatrix(dim, dim)
        rotation.init(0)
        codes = faiss.IndexRaBitQ(dim, faiss.METRIC_INNER_PRODUCT)
        codes.qb = 8  # bits per query coordinate: recall as with float32, at a tenth of the time
        store = faiss.IndexPreTransform(rotation, codes)
        store.train(np.ascontiguousarray(rows(slice(0, count, max(1, count // BLOCK)))))  # the mean of a sample
        self._scale, self._fitted = np.ones(dim, dtype=np.float32), faiss.serialize_index(faiss.IndexIDMap(store))

    def _empty(self) -> Any:
        return faiss_module().deserialize_index(self._fitted)

    def _coded(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.ascontiguousarray(vectors)


def _steps(widest: NDArray[np.float32]) -> NDArray[np.float32]:
    """Compute the positive step of each dimension from its largest absolute value, float32 [D]."""
    return np.asarray(np.maximum(widest / 127, np.finfo(np.float32).tiny), dtype=np.float32)


def _parts(count: int) -> list[range]:
    """Divide the items into parts of `PART`, in the same way for any number of ranks."""
    return [range(start, min(start + PART, count)) for start in range(0, max(count, 1), PART)]


def _name(number: int, count: int) -> str:
    """Return the name of a part's file; a single part has the name that older versions read."""
    return FILE if count == 1 else f"codes-{number:05d}.faiss"


def _write(store: Any, path: Path) -> None:
    """Write a faiss index; a process that has mapped an older file of this name keeps the old codes."""
    beside = path.with_name(f"{path.name}.new")
    faiss_module().write_index(store, str(beside))
    beside.replace(path)
