"""Form fields of the page for a model's context: one per column, with the values seen in training."""

from __future__ import annotations

from typing import Any

from twotower.config.features import MultiFeature
from twotower.features.categorical import CategoryEncoder, MultiCategory
from twotower.features.feature_set import FeatureSet
from twotower.serving.events import EventTypes

#: Largest vocabulary offered as a list to choose from.
MOST_VALUES = 60

#: Separator of several values in one field, unless the declaration names another.
SEPARATOR = ","


def context_fields(features: FeatureSet, events: EventTypes | None = None) -> list[dict[str, Any]]:
    """Describe one field for each declared column, in the order of declaration.

    Args:
        features: fitted on the context of the training rows.
        events: the event types of the model, or None.

    Returns:
        `column`; `kind`, from the first declaration if the column is declared twice; `values`, those seen in training
        in ascending order, if there are at most `MOST_VALUES`; `separator`, if the field takes several values; and
        `default`, the default event type, if the field is the event type.
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
            "default": events.default if events is not None and events.column == declared.column else None,
        }
        fields.setdefault(declared.column, field)
    return list(fields.values())
