"""Reloading of model folders: a new model is loaded while the old one is in use, and replaces it between requests."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from twotower.errors import InputError
from twotower.serving.http.logs import log
from twotower.serving.http.metrics import Metrics
from twotower.serving.http.models import TELLING, ServedModel
from twotower.serving.http.problems import Problem
from twotower.serving.model_folder import find_model

Identity = tuple[tuple[int, int, int] | None, ...]

#: Attempts to read a folder that is replaced while it is read.
_TRIES = 5


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
            "swapped"; "unchanged"; "missing", if there is currently no model folder; or "broken". Unless swapped, the
            old model stays in use.
        """
        with self._lock:
            seen = identity(self.directory)
            if seen is None:
                return "missing"
            if seen == self._identity or (seen == self._broken and not again):
                return "unchanged"
            try:
                found, model = self._load()
            except Exception as error:  # whatever is wrong with the new model, keep the old one
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
        found = tuple(_stamp(folder / name) for name in TELLING)
        return found if found[0] is not None else None
    except (InputError, OSError):
        return None


def _stamp(path: Path) -> tuple[int, int, int] | None:
    if not path.exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


class ModelRegistry:
    """The models of a service by name; the first answers requests that name no model.

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
        """Return the model with a name; the first one for None.

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
