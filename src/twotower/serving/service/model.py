"""A model as the service holds it: the retriever beside what answers show of items, looked up by ids of any kind."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.errors import InputError
from twotower.evaluation.slices import SLICES, popularity_thirds
from twotower.ids import CodedIds, HashedIds
from twotower.schema import Vocabulary
from twotower.serving.artifact import find_model
from twotower.serving.filters import condition_mask
from twotower.serving.questions import seen_codes
from twotower.serving.retriever import Retriever
from twotower.serving.service.atlas import Atlas
from twotower.serving.service.fields import context_fields

Codes = NDArray[np.int64]
Mask = NDArray[np.bool_]

#: Files of a model folder that change with anything in it.
TELLING = ("metadata.json", "index/index.json", "changes/changes.json")

_INTEGER = re.compile(r"-?[0-9]{1,19}")
_INT64 = 2**63 - 1

#: Conditions whose items are remembered, N bytes each.
_KEPT_CONDITIONS = 16


class ServedModel:
    """One version of a model, from the moment it was loaded until its last request is answered.

    Args:
        name: what requests call it.
        version: changes with its files.
        retriever: answers; exact search, or the approximate index it was given.
        folder: where it was read, for what stands beside it.
    """

    def __init__(self, name: str, version: str, retriever: Retriever, folder: Path) -> None:
        self.name = name
        self.version = version
        self.retriever = retriever
        self.folder = folder
        self.artifact = retriever.artifact
        self.search = retriever.search
        self.counts: Codes = self.artifact.item_counts.numpy().astype(np.int64)
        self.parts = popularity_thirds(self.counts)
        column, table = retriever.title_column, self.artifact.item_table
        self.titles: pl.Series | None = None if column is None or table is None else table[column]
        self._masks: OrderedDict[str, Mask] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def load(cls, name: str, directory: Path) -> ServedModel:
        """Read a model folder and ask it once, so that what is made at first use is made before it answers.

        Raises:
            InputError: see `Artifact.load`.
        """
        folder = find_model(directory)
        files = [path for name in TELLING if (path := folder / name).is_file()]
        version = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
        made = cls(name, version, Retriever.load(folder), folder)
        made.warm_up()
        return made

    def warm_up(self) -> None:
        """Make the dialled catalog, if there are items to ask for."""
        if len(self.artifact.queries) and len(self.artifact.items):
            embedded = self.artifact.item_embeddings[:1]
            for popularity in (1.0, 0.5):
                self.search.search(embedded, 1, popularity=popularity)

    @cached_property
    def atlas(self) -> Atlas:
        """The map of the catalog."""
        with self._lock:
            return Atlas.draw(self.artifact.item_embeddings)

    def query_codes(self, ids: Sequence[Any]) -> Codes:
        """Codes of query ids; -1 where unknown."""
        return seen_codes(self.artifact, codes_of(self.artifact.queries, ids))

    def item_codes(self, ids: Sequence[Any]) -> Codes:
        """Codes of item ids; -1 where unknown."""
        return codes_of(self.artifact.items, ids)

    def condition(self, condition: str | None) -> Mask | None:
        """The items for which a condition holds, remembered.

        Raises:
            InputError: it cannot be understood.
        """
        if condition is None:
            return None
        with self._lock:
            found = self._masks.get(condition)
        if found is None:
            found = condition_mask(condition, self.artifact.item_table, len(self.artifact.items))
        with self._lock:
            self._masks[condition] = found
            self._masks.move_to_end(condition)
            while len(self._masks) > _KEPT_CONDITIONS:
                self._masks.popitem(last=False)
        return found

    def listed(self, codes: Codes) -> list[dict[str, Any]]:
        """Id, title, interactions and part of some items."""
        rows: list[dict[str, Any]] = [
            {"item": item, "interactions": count, "part": SLICES[part]}
            for item, count, part in zip(
                self.artifact.items.decode(codes).to_list(),
                self.counts[codes].tolist(),
                self.parts[codes].tolist(),
                strict=True,
            )
        ]
        if self.titles is not None:
            for row, title in zip(rows, self.titles.gather(codes).to_list(), strict=True):
                row["title"] = title
        return rows

    def described(self, code: int) -> dict[str, Any]:
        """Everything known of one item: `listed`, and the item table's columns under `columns`."""
        row = self.listed(np.array([code]))[0]
        table = self.artifact.item_table
        columns = {} if table is None else table.row(code, named=True)
        return {**row, "columns": {name: _plain(value) for name, value in columns.items()}}

    def summary(self) -> dict[str, Any]:
        """What the page shows in its list of models."""
        history = self.artifact.config.query_tower.history
        table, reader = self.artifact.item_table, self.retriever
        return {
            "name": self.name,
            "version": self.version,
            "num_queries": len(self.artifact.queries),
            "num_items": len(self.artifact.items),
            "most_interactions": int(self.counts.max()) if len(self.counts) else 0,
            "has_titles": self.titles is not None,
            "history_length": history.length if history else 0,
            "columns": {} if table is None else {name: str(dtype) for name, dtype in table.schema.items()},
            "context": context_fields(reader.ranker.context_features()) if reader.context_columns else [],
        }


def codes_of(vocabulary: Vocabulary, ids: Sequence[Any]) -> Codes:
    """Codes of ids, each an integer or text; -1 for any that cannot be one of this vocabulary's."""
    if isinstance(vocabulary, HashedIds):
        return vocabulary.encode(pl.Series("id", [str(one) for one in ids], dtype=pl.String))
    if isinstance(vocabulary, CodedIds) or vocabulary.ids.dtype == pl.Int64:
        known = [_integer(one) for one in ids]
        codes = vocabulary.encode(np.array([0 if one is None else one for one in known], dtype=np.int64))
        return np.where([one is None for one in known], -1, codes) if known else codes
    return vocabulary.encode(pl.Series("id", [str(one) for one in ids], dtype=pl.String))


def known_code(codes: Codes, side: str) -> int:
    """The only code of an array.

    Raises:
        InputError: it is -1. The message does not repeat the id.
    """
    if codes[0] < 0:
        raise InputError(f"{side}: not an id that this model knows")
    return int(codes[0])


def _integer(value: Any) -> int | None:
    if isinstance(value, str):
        if not _INTEGER.fullmatch(value):
            return None
        value = int(value)
    return value if -_INT64 <= value <= _INT64 else None


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, list | tuple | pl.Series):
        return [_plain(one) for one in value]
    return str(value)
