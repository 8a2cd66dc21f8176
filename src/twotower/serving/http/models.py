"""A model in the service: its retriever, and lookups of the item data that responses show.

Form fields of the page for a model's context: one per column, with the values it accepts.
"""

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

from twotower.config.features import MultiFeature
from twotower.data.schema.vocabulary import CodedIds, Codes, HashedIds, Vocabulary
from twotower.errors import InputError
from twotower.evaluation.slices import SLICES, popularity_thirds
from twotower.features.categorical import CategoryEncoder, MultiCategory
from twotower.features.feature_set import FeatureSet
from twotower.serving.filters import condition_mask
from twotower.serving.http.catalog_map import Atlas
from twotower.serving.model_folder import find_model
from twotower.serving.queries import seen_codes
from twotower.serving.retriever import Retriever

#: Largest vocabulary offered as a list to choose from.
MOST_VALUES = 60

#: Separator of several values in one field, unless the declaration names another.
SEPARATOR = ","


def context_fields(features: FeatureSet) -> list[dict[str, Any]]:
    """Describe one field for each declared column, in the order of declaration.

    Args:
        features: fitted on the context of the training rows.

    Returns:
        `column`, `kind` (of its first declaration, if it is declared twice), `values` seen in training in ascending
        order, if the vocabulary has at most `MOST_VALUES`, and `separator`, if a field takes several values.
    """
    fields: dict[str, dict[str, Any]] = {}
    for declared, encoder in zip(features.declared, features.encoders, strict=True):
        given = declared.separator if isinstance(declared, MultiFeature) else None
        known = (
            encoder.values.known
            if isinstance(encoder, CategoryEncoder | MultiCategory) and declared.kind != "text"
            else None
        )
        field = {
            "column": declared.column,
            "kind": declared.kind,
            "values": None if known is None or len(known) > MOST_VALUES else known.ids.to_list(),
            "separator": (given or SEPARATOR) if declared.kind in ("multi", "dense") else None,
        }
        fields.setdefault(declared.column, field)
    return list(fields.values())


Mask = NDArray[np.bool_]

#: Files of a model folder; whenever the folder changes, one of these changes.
TELLING = ("metadata.json", "index/index.json", "changes/changes.json")

_INTEGER = re.compile(r"-?[0-9]{1,19}")
_INT64 = 2**63 - 1

#: Number of conditions whose item masks are cached, N bytes each.
_CACHED_CONDITIONS = 16


class ServedModel:
    """One version of a model, used from loading until its last request is answered.

    Args:
        name: name of the model in requests.
        version: hash that changes with the model files.
        retriever: retriever of the model, with exact search or its approximate index.
        folder: model folder that it was read from.
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
        """Read a model folder and run a first search, so that everything built on first use is ready.

        Raises:
            InputError: see `SavedModel.load`.
        """
        folder = find_model(directory)
        files = [path for name in TELLING if (path := folder / name).is_file()]
        version = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
        model = cls(name, version, Retriever.load(folder), folder)
        model.warm_up()
        return model

    def warm_up(self) -> None:
        """Search with the dial at 1 and at 0.5, which builds both catalogs, if there are queries and items."""
        if len(self.artifact.queries) and len(self.artifact.items):
            embedded = self.artifact.item_embeddings[:1]
            for popularity in (1.0, 0.5):
                self.search.search(embedded, 1, popularity=popularity)

    @cached_property
    def atlas(self) -> Atlas:
        """The map of the catalog."""
        with self._lock:
            return Atlas.draw(self.artifact.directions)

    def query_codes(self, ids: Sequence[Any]) -> Codes:
        """Return codes of query ids; -1 for unknown ids."""
        return seen_codes(self.artifact, codes_of(self.artifact.queries, ids))

    def item_codes(self, ids: Sequence[Any]) -> Codes:
        """Return codes of item ids; -1 for unknown ids."""
        return codes_of(self.artifact.items, ids)

    def condition(self, condition: str | None) -> Mask | None:
        """Return the items for which a condition holds, bool [N]; results are cached.

        Raises:
            InputError: the condition is invalid.
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
            while len(self._masks) > _CACHED_CONDITIONS:
                self._masks.popitem(last=False)
        return found

    def listed(self, codes: Codes) -> list[dict[str, Any]]:
        """Return id, title, interactions and popularity bucket of items."""
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
        """Return everything known about one item: `listed`, and its columns of the item table under `columns`."""
        row = self.listed(np.array([code]))[0]
        table = self.artifact.item_table
        columns = {} if table is None else table.row(code, named=True)
        return {**row, "columns": {name: _plain(value) for name, value in columns.items()}}

    def summary(self) -> dict[str, Any]:
        """Summarise the model for the list of models."""
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
    """Return codes of ids, each an integer or text; -1 for ids that are not in the vocabulary."""
    if isinstance(vocabulary, HashedIds):
        return vocabulary.encode(pl.Series("id", [str(one) for one in ids], dtype=pl.String))
    if isinstance(vocabulary, CodedIds) or vocabulary.ids.dtype == pl.Int64:
        known = [_integer(one) for one in ids]
        codes = vocabulary.encode(np.array([0 if one is None else one for one in known], dtype=np.int64))
        return np.where([one is None for one in known], -1, codes) if known else codes
    return vocabulary.encode(pl.Series("id", [str(one) for one in ids], dtype=pl.String))


def known_code(codes: Codes, side: str) -> int:
    """Return the single code of an array.

    Raises:
        InputError: the code is -1. The message does not repeat the id.
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
