"""Allowed settings and training rows of an incremental run."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from twotower.config.run import Config
from twotower.data import Split
from twotower.errors import InputError
from twotower.incremental.parent import ParentModel
from twotower.incremental.split import ContinuedSplit

#: Settings of the towers that may change between runs, because no tensor depends on them.
FREE = ("dropout", "id_dropout", "context_dropout", "nested", "nested_weights")


def require_continued(split: Split) -> ContinuedSplit:
    """Narrow the type of a split that is known to be a `ContinuedSplit`."""
    assert isinstance(split, ContinuedSplit)
    return split


def rows_to_learn(split: Split, parent: ParentModel | None, settings: Config) -> NDArray[np.int64] | None:
    """Return the rows of `split.train` that an incremental run trains on; None for training from scratch.

    Raises:
        InputError: the split and the parent do not match.
    """
    if parent is None and not isinstance(split, ContinuedSplit):
        return None
    if parent is None or not isinstance(split, ContinuedSplit) or split.parent != parent.fingerprint:
        raise InputError(
            "fit: to continue a model, pass warm_start=MODEL and the split returned by continue_with(MODEL, data)"
        )
    history = settings.query_tower.history
    whole = history is not None and history.sequence is not None
    return split.rows_to_learn(settings.training.replay, settings.training.seed, whole=whole)


def inherit_settings(parent: Config, config: Config) -> Config:
    """Complete the settings of an incremental run: features and context set to "auto" are taken from the parent.

    Raises:
        InputError: a setting would need weights different from the parent's; the message names the setting.
    """
    old_events, new_events = parent.data.events, config.data.events
    for field in ("column", "weights"):
        before, after = (None if events is None else getattr(events, field) for events in (old_events, new_events))
        if before != after:
            raise InputError(
                f"data.events.{field}: {before!r} in the model, {after!r} here; it cannot be changed when continuing a "
                "model, because the model's rows already have these types and weights"
            )
    changed = {}
    for section in ("query_tower", "item_tower"):
        own, theirs = getattr(config, section), getattr(parent, section)
        if own.features == "auto":
            taken: dict[str, Any] = {"features": theirs.features}
            if section == "item_tower" and theirs.features == "none":
                taken["id_dropout"] = 0.0
            changed[section] = own.model_copy(update=taken)
    if config.query_tower.context == "auto":
        section = changed.get("query_tower", config.query_tower)
        changed["query_tower"] = section.model_copy(update={"context": parent.query_tower.context})
    config = config.model_copy(update=changed)
    if config.reads_feedback and config.data.feedback.column is None:
        raise InputError(
            "objective.feedback: a model folder does not store the feedback of its rows, and a continued model trains "
            "on some of them again; use data.feedback.column, train from scratch, or set objective.feedback to null"
        )
    old, new = parent.model_dump(mode="json"), config.model_dump(mode="json")
    for section in ("query_tower", "item_tower"):
        found = _difference(old[section], new[section], section)
        if found is not None:
            raise InputError(f"{found}; the structure of the towers cannot be changed when continuing a model")
    first, second = old["objective"], new["objective"]
    if first["similarity"] != second["similarity"]:
        raise InputError(
            f"objective.similarity: {first['similarity']} in the model, {second['similarity']} here; it cannot be "
            "changed when continuing a model"
        )
    if (first["temperature"] == "learned") != (second["temperature"] == "learned"):
        raise InputError(
            f"objective.temperature: {first['temperature']} in the model, {second['temperature']} here; a learned "
            "temperature must stay learned, and a fixed one fixed"
        )
    return config


def _difference(old: Any, new: Any, name: str) -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old | new:
            if key not in FREE:
                found = _difference(old.get(key), new.get(key), f"{name}.{key}")
                if found is not None:
                    return found
        return None
    return None if old == new else f"{name}: {old!r} in the model, {new!r} here"
