"""The models of a service: each with its item data for responses, replaced between requests when its folder changes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors import SafetensorError, safe_open
from torch import Tensor

from twotower.data.schema.vocabulary import Codes
from twotower.errors import InputError
from twotower.evaluation.slices import SLICES, popularity_thirds
from twotower.serving.conditions import Mask, condition_mask
from twotower.serving.filters import Offer, both
from twotower.serving.http.catalog_map import Atlas
from twotower.serving.http.form_fields import context_fields
from twotower.serving.http.logs import log
from twotower.serving.http.metrics import Metrics
from twotower.serving.http.problems import Problem
from twotower.serving.model_folder import ROWS, find_model
from twotower.serving.queries import codes_of, seen_codes
from twotower.serving.retriever import Retriever
from twotower.serving.text_input import with_text

#: Whenever a model folder changes, one of these files changes.
VERSION_FILES = ("metadata.json", "index/index.json", "changes/changes.json")

#: Largest integer that JavaScript and many JSON parsers read exactly.
LARGEST_EXACT = 2**53 - 1

Identity = tuple[tuple[int, int, int] | None, ...]

#: Maximum number of attempts to read a folder that is replaced while it is read.
_TRIES = 5

#: Maximum number of conditions and offers whose item masks are cached, N bytes each.
_CACHED_CONDITIONS = 16

#: Maximum number of requests with a text whose embeddings are kept, D numbers each.
MOST_TEXTS = 64


class TrainedRows:
    """The number of training rows of each query, read from the model folder on demand.

    The file stays open, so that the numbers still belong to this model after its folder is replaced.

    Args:
        folder: the model folder.
    """

    def __init__(self, folder: Path) -> None:
        self._learnt = None
        with contextlib.suppress(OSError, SafetensorError):  # models of older versions have no such file
            file = safe_open(folder / ROWS, "numpy")
            self._learnt = file.get_slice("learnt")  # type: ignore[no-untyped-call]

    def count(self, code: int) -> int | None:
        """Return the number of training rows of a query, or None if the folder does not record it."""
        if self._learnt is None or code >= self._learnt.get_shape()[0]:
            return None
        return int(self._learnt[code : code + 1][0])


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
        self.trained_rows = TrainedRows(folder)
        self.counts: Codes = self.artifact.item_counts.numpy().astype(np.int64)
        self.parts = popularity_thirds(self.counts)
        column, table = retriever.title_column, self.artifact.item_table
        self.titles: pl.Series | None = None if column is None or table is None else table[column]
        self._masks: OrderedDict[str | Offer, Mask] = OrderedDict()
        #: u(x) of the latest requests with a text, by a digest of the request; used only in the search thread.
        self.embedded_texts: OrderedDict[str | int, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def load(cls, name: str, directory: Path) -> ServedModel:
        """Read a model folder, and warm it up, so that the first requests are not slower than later ones.

        Raises:
            InputError: as in `SavedModel.load`.
        """
        folder = find_model(directory)
        files = [path for name in VERSION_FILES if (path := folder / name).is_file()]
        version = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
        model = cls(name, version, Retriever.load(folder), folder)
        model.warm_up()
        return model

    def warm_up(self) -> None:
        """Search with the dial at 1 and at 0.5, which builds both catalogs, and load the encoder of texts."""
        text = self.retriever.text_input
        if text is not None:
            features, context = with_text(text, "a text")
            nothing = np.zeros(2, dtype=np.int64), np.zeros(0, dtype=np.int32)
            self.retriever.embed(
                np.array([-1]),
                nothing,
                None if features is None else [features],
                context=None if context is None else [context],
            )
        if len(self.artifact.queries) and len(self.artifact.items):
            embedded = self.artifact.item_embeddings[:1]
            for popularity in (1.0, 0.5):
                self.search.search(embedded, 1, popularity=popularity)

    def keep_embedded(self, key: str, embedded: Tensor) -> None:
        """Keep the embedding of a request with a text, because the page needs it at every setting of the dial."""
        self.embedded_texts[key] = embedded
        self.embedded_texts.move_to_end(key)
        while len(self.embedded_texts) > MOST_TEXTS:
            self.embedded_texts.popitem(last=False)

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
        return self._cached(
            condition, lambda: condition_mask(condition, self.artifact.item_table, len(self.artifact.items))
        )

    def offer(self, group: Any, time: Any) -> Offer | None:
        """Return the checked group and time of a request; None if the model has no eligibility rule.

        Raises:
            Problem: 422, the group is missing or unknown, or the time cannot be read.
        """
        rule = self.artifact.eligibility
        try:
            return Offer.of(rule, group, time)
        except InputError as error:
            field = "time" if str(error).startswith("time") else "group"
            raise Problem(422, str(error), field=(field,)) from None

    def allowed(self, condition: str | None, offer: Offer | None) -> Mask | None:
        """Return the items that a condition and the rule of the model allow, bool [N]; None for all."""
        rule = self.artifact.eligibility
        if rule is None or offer is None:
            return self.condition(condition)
        return both(self._cached(offer, lambda: offer.mask(rule)), self.condition(condition))

    def _cached(self, key: str | Offer, make: Callable[[], Mask]) -> Mask:
        with self._lock:
            found = self._masks.get(key)
        if found is None:
            found = make()
        with self._lock:
            self._masks[key] = found
            self._masks.move_to_end(key)
            while len(self._masks) > _CACHED_CONDITIONS:
                self._masks.popitem(last=False)
        return found

    def listed(self, codes: Codes) -> list[dict[str, Any]]:
        """Return id, title, interactions and popularity bucket of items."""
        rows: list[dict[str, Any]] = [
            {"item": item, "interactions": count, "part": SLICES[part]}
            for item, count, part in zip(
                self._json_ids(codes),
                self.counts[codes].tolist(),
                self.parts[codes].tolist(),
                strict=True,
            )
        ]
        if self.titles is not None:
            for row, title in zip(rows, self.titles.gather(codes).to_list(), strict=True):
                row["title"] = title
        return rows

    def _json_ids(self, codes: Codes) -> list[int | str]:
        ids = self.artifact.items.decode(codes).to_list()
        return [json_id(one) for one in ids] if self._has_large_ids else ids

    @cached_property
    def _has_large_ids(self) -> bool:
        ids = self.artifact.items.ids
        largest = ids.abs().max() if ids.dtype == pl.Int64 else None
        return isinstance(largest, int) and largest > LARGEST_EXACT

    def described(self, code: int) -> dict[str, Any]:
        """Return everything known about one item: `listed`, and its columns of the item table under `columns`."""
        row = self.listed(np.array([code]))[0]
        table = self.artifact.item_table
        columns = {} if table is None else table.row(code, named=True)
        return {**row, "columns": {name: _plain(value) for name, value in columns.items()}}

    def summary(self) -> dict[str, Any]:
        """Summarise the model for the list of models."""
        history = self.artifact.config.query_tower.history
        table, retriever = self.artifact.item_table, self.retriever
        return {
            "name": self.name,
            "version": self.version,
            "num_queries": len(self.artifact.queries),
            "num_items": len(self.artifact.items),
            "most_interactions": int(self.counts.max()) if len(self.counts) else 0,
            "has_titles": self.titles is not None,
            "history_length": history.length if history else 0,
            "columns": {} if table is None else {name: str(dtype) for name, dtype in table.schema.items()},
            "context": context_fields(retriever.ranker.context_features(), retriever.events)
            if retriever.context_columns
            else [],
            "text": None if retriever.text_input is None else retriever.text_input.column,
            "texts_are_queries": retriever.text_input is not None and retriever.text_input.is_query,
            **self._rule_summary(),
        }

    def _rule_summary(self) -> dict[str, Any]:
        rule = self.artifact.eligibility
        names = None if rule is None else rule.names
        return {
            "groups": [] if names is None else [json_id(one) for one in names.ids.to_list()],
            "has_intervals": rule is not None and rule.start is not None,
        }


def json_id(value: int | str) -> int | str:
    """Return an id for JSON: an integer beyond 2^53 as text, because many parsers would round it."""
    return str(value) if isinstance(value, int) and abs(value) > LARGEST_EXACT else value


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, int) and not isinstance(value, bool):
        return json_id(value)
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, list | tuple | pl.Series):
        return [_plain(one) for one in value]
    return str(value)


class ModelSlot:
    """A model folder and the model loaded from it.

    `current` is replaced by one assignment. A request reads it once and keeps the reference, so an old model is freed
    when its last request is answered.

    Args:
        name: name of the model in requests.
        directory: a model or run folder.
        metrics: metrics that count reloads.

    Raises:
        InputError: no model can be read.
    """

    def __init__(self, name: str, directory: Path, metrics: Metrics) -> None:
        self.name = name
        self.directory = directory
        self._metrics = metrics
        self._lock = threading.Lock()
        self._broken: Identity | None = None
        self._identity, self.current = self._load()
        metrics.swapped(name, None, self.current.version)

    def refresh(self, *, again: bool = False) -> str:
        """Check the folder, and load a new model if there is one.

        Args:
            again: also retry a model that was broken at the last check.

        Returns:
            "swapped"; "unchanged"; "missing", if there is currently no model folder; or "broken". The old model stays
            in use unless the result is "swapped".
        """
        with self._lock:
            seen = identity(self.directory)
            if seen is None:
                return "missing"
            if seen == self._identity or (seen == self._broken and not again):
                return "unchanged"
            try:
                found, model = self._load()
            except Exception as error:  # keep the old model for any error in the new one
                self._broken = seen
                self._metrics.swaps.labels(self.name, "broken").inc()
                log("model broken, keeping the old one", level=logging.ERROR, error=error, model=self.name)
                return "broken"
            old = self.current.version
            self.current, self._identity, self._broken = model, found, None
            self._metrics.swapped(self.name, old, model.version)
            self._metrics.swaps.labels(self.name, "swapped").inc()
            log("model swapped", model=self.name, old=old, new=model.version)
            return "swapped"

    def _load(self) -> tuple[Identity | None, ServedModel]:
        """Load the model, and check that all files belong to one model: the folder may be replaced during reading."""
        for left in reversed(range(_TRIES)):
            before = identity(self.directory)
            try:
                model = ServedModel.load(self.name, self.directory)
            except Exception:
                if identity(self.directory) == before or not left:
                    raise
                continue
            if identity(self.directory) == before:
                return before, model
        raise InputError(f"{self.directory}: replaced repeatedly while it was read")


def identity(directory: Path) -> Identity | None:
    """Identify the model in a folder by inode, time and size of its main files; None if there is no model."""
    try:
        folder = find_model(directory)
        found = tuple(_stamp(folder / name) for name in VERSION_FILES)
        return found if found[0] is not None else None
    except (InputError, OSError):
        return None


def _stamp(path: Path) -> tuple[int, int, int] | None:
    if not path.exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


class ModelRegistry:
    """The models of a service by name; the first model answers requests that do not name one.

    Args:
        directories: model or run folders, all different.
        metrics: metrics that count reloads.

    Raises:
        InputError: no directory is given, one is given twice, or one cannot be read.
    """

    def __init__(self, directories: Sequence[Path], metrics: Metrics) -> None:
        if not directories:
            raise InputError("serve: expected at least one model folder, found none")
        if len({directory.resolve() for directory in directories}) < len(directories):
            raise InputError("serve: the same folder is given twice; expected different models")
        self._slots = {
            name: ModelSlot(name, directory, metrics)
            for name, directory in zip(_names(directories), directories, strict=True)
        }

    def models(self) -> list[ServedModel]:
        """Return the models in use."""
        return [slot.current for slot in self._slots.values()]

    def model(self, name: str | None) -> ServedModel:
        """Return the model with this name; None selects the first model.

        Raises:
            Problem: 404, there is no such model.
        """
        if name is None:
            return next(iter(self._slots.values())).current
        if name not in self._slots:
            raise Problem(404, f"model: expected one of {', '.join(self._slots)}")
        return self._slots[name].current

    def refresh(self, *, again: bool = False) -> dict[str, str]:
        """Check every folder; return the result of each by name."""
        return {name: slot.refresh(again=again) for name, slot in self._slots.items()}


def _names(directories: Sequence[Path]) -> list[str]:
    """Name models after their folders, or after the run folder of a `model/` folder; number equal names."""
    names: list[str] = []
    for directory in directories:
        path = directory.resolve()
        name = path.parent.name if path.name == "model" else path.name
        names.append(name or "model")
    return [
        name if names.count(name) == 1 else f"{name}-{names[: place + 1].count(name)}"
        for place, name in enumerate(names)
    ]
