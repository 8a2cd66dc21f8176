"""The settings of a run: completed from the data, read from a run folder, and compared on resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twotower import incremental
from twotower.config.run import Config
from twotower.data import Split
from twotower.errors import InputError
from twotower.features.from_config import with_features
from twotower.incremental import ParentModel
from twotower.run.question import resolve_question
from twotower.serving.model_folder import find_model, read_metadata

#: File of a run folder with the complete settings.
CONFIG = "config.yaml"
#: Settings that are paths: two paths to the same file are the same setting.
PATHS = ("data.items", "data.queries", "data.validation", "data.test", "data.feedback.file")
#: Settings that may change when a run is resumed: they determine when it stops, how it computes and
#: records steps, and how the model is evaluated.
APPLIED_ON_RESUME = (
    "data.workers",
    "evaluation",
    "training.accelerator",
    "training.checkpoint_every",
    "training.checkpoint_in_background",
    "training.exchange_timeout",
    "training.logger",
    "training.max_epochs",
    "training.micro_batch",
    "training.patience",
    "training.table_engine",
    "training.table_placement",
    "training.time_limit",
    "training.validate_every",
)


def complete_settings(
    config: Config,
    split: Split,
    parent: ParentModel | None = None,
    on_message: Callable[[object], None] | None = None,
) -> tuple[Config, NDArray[np.int64] | None]:
    """Fill in the settings that depend on the data, such as "auto" values, and select the rows of an incremental run.

    `on_message` receives the training question and the reason for it.

    Returns:
        The completed settings, and the rows of `split.train` to train on; None for all.

    Raises:
        InputError: split and parent do not match, or a setting does not fit the parent's weights.
    """
    config = _with_event_types(with_rule_of(config, split), split)
    _check_texts(config, split)
    config = resolve_question(config, split, on_message, parent=None if parent is None else parent.artifact.config)
    config = _with_event_share(config)
    rows = incremental.rows_to_learn(split, parent, config)
    if parent is not None:
        config = incremental.inherit_settings(parent.artifact.config, config)
    _require_types(config)
    return with_features(config.resolved(len(split.train) if rows is None else len(rows)), split.train), rows


def with_rule_of(config: Config, split: Split) -> Config:
    """Return the settings with the rule of the data (`data.eligibility`), which a served model applies too.

    Raises:
        InputError: the settings have a rule, but the data has none or a different one.
    """
    rule, wanted = split.data.eligibility, config.data.eligibility
    found = None if rule is None else rule.settings
    if wanted is not None and wanted != found:
        columns = ", ".join(f"{name}={value!r}" for name, value in wanted.model_dump(exclude_none=True).items())
        raise InputError(
            "data.eligibility: the split was made without this rule; read the data with "
            f"twotower.data.with_eligibility(Interactions.read(...), {columns}) and split it"
        )
    return config.model_copy(update={"data": config.data.model_copy(update={"eligibility": found})})


def _with_event_types(config: Config, split: Split) -> Config:
    """Fill in the weights of the event types, by default 1 for every type in the data.

    Raises:
        InputError: the event types of the rows do not come from the column `data.events.column`.
    """
    events, rows = config.data.events, split.data
    column = None if events is None else events.column
    own = None if rows.event is None else rows.event.column
    if own != column:
        raise InputError(
            f"data.events.column: {column!r}, but the types of the rows are in {own!r}; in Python pass the "
            "interactions through with_events(data, column, weights) with the same column"
        )
    if events is None or events.weights is not None:
        return config
    assert rows.context is not None
    assert events.column is not None
    weights = dict.fromkeys(rows.context[events.column].unique().sort().to_list(), 1.0)
    filled = events.model_copy(update={"weights": weights})
    return config.model_copy(update={"data": config.data.model_copy(update={"events": filled})})


def _check_texts(config: Config, split: Split) -> None:
    """Check that the query texts of the rows come from the column `data.query_text`.

    Raises:
        InputError: the rows were not passed through `with_query_text`.
    """
    column, table, alone = config.data.query_text, split.data.query_table, config.data.texts_are_queries
    wanted = None if alone else column
    if split.data.query_text != wanted or (alone and (table is None or column not in table.columns)):
        found = split.data.query_text
        raise InputError(
            f"data.query_text: {column!r}, but the texts of the rows are in {found!r}; in Python pass the interactions "
            "through with_query_text(data, column, texts_are_queries=...) with the same column"
        )


def _with_event_share(config: Config) -> Config:
    """Fill in `item_tower.event_share`, after the question or the parent model has determined the towers."""
    item = config.item_tower
    if config.data.events is None or item.event_share is not None:
        return config
    return config.model_copy(update={"item_tower": item.model_copy(update={"event_share": 1.0})})


def _require_types(config: Config) -> None:
    """Check that rows have event types if a setting of the towers needs them.

    Raises:
        InputError: such a setting is set, and the rows have no event types.
    """
    history, share = config.query_tower.history, config.item_tower.event_share
    by_type = {
        "query_tower.history.event_weights: true": history is not None and history.event_weights,
        f"item_tower.event_share: {share}": bool(share),
    }
    for setting, is_set in by_type.items():
        if is_set and config.data.events is None:
            raise InputError(f"{setting}: the rows have no event types; set data.events, or leave this out")


def settings_of(directory: str | Path) -> dict[str, Any]:
    """Return the settings of a saved model for a run that continues it, without those specific to the earlier run."""
    values: dict[str, Any] = read_metadata(find_model(directory))["config"]
    for name in ("batch_size", "warmup_steps", "horizon", "refit"):
        values.get("training", {}).pop(name, None)
    values.get("data", {}).pop("windows", None)
    return values


def differences(requested: Config, existing: Config, free: tuple[str, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ: name -> (requested, existing).

    Args:
        requested: the settings of this call.
        existing: the settings of an earlier run.
        free: names of settings and sections that may differ.
    """
    mine, other = (dict(_flat(config.model_dump(mode="json"))) for config in (requested, existing))
    unequal = {}
    for field in mine.keys() | other.keys():
        values = mine.get(field), other.get(field)
        same = _path(values[0]) == _path(values[1]) if field in PATHS else values[0] == values[1]
        if not same and not any(field == name or field.startswith(f"{name}.") for name in free):
            unequal[field] = values
    return dict(sorted(unequal.items()))


def require_same_settings(directory: Path, config: Config, rows: int) -> None:
    """Reject settings that a resumed run would not apply.

    The checkpoint determines the learning rate, the optimizer and the random state. Different settings would apply only
    to the rest of the run, and the resulting model would match no configuration.

    Args:
        directory: the run folder.
        config: the settings of this call, without "auto".
        rows: number of training rows.

    Raises:
        InputError: a setting differs from the interrupted run and is not in `APPLIED_ON_RESUME`.
    """
    written = directory / CONFIG
    if not written.is_file():
        return
    # A setting added by a newer version gets its default here, which may be "auto".
    existing = Config.load(written).resolved(rows)
    for field, (requested, found) in differences(config, existing, APPLIED_ON_RESUME).items():
        raise InputError(
            f"{written}: {field} is {found!r}, but {requested!r} was requested, and --resume would not apply it; "
            "resume without that setting, or start over with --force"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _path(value: object) -> object:
    return str(Path(value).resolve()) if isinstance(value, str) else value
