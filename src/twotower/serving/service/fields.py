"""The fields that the page shows for a model's context: a column each, with what may be put into it."""

from __future__ import annotations

from typing import Any

from twotower.data.encoders import Bag, Category
from twotower.data.encoding import FeatureSet
from twotower.feature_config import MultiFeature

#: Values of a vocabulary that are offered as a list to choose from.
MOST_VALUES = 60

#: Between several values in one field, where the declaration names no other sign.
SEPARATOR = ","


def context_fields(features: FeatureSet) -> list[dict[str, Any]]:
    """One field for each declared column, in the order of the declaration.

    Args:
        features: fitted on the context of the training rows.

    Returns:
        `column`, `kind` (of its first declaration, where it is declared twice), `values` of training in ascending
        order where there is a vocabulary of at most `MOST_VALUES`, and `separator` where a field holds several values.
    """
    fields: dict[str, dict[str, Any]] = {}
    for declared, encoder in zip(features.declared, features.encoders, strict=True):
        given = declared.separator if isinstance(declared, MultiFeature) else None
        known = encoder.values.known if isinstance(encoder, Category | Bag) and declared.kind != "text" else None
        field = {
            "column": declared.column,
            "kind": declared.kind,
            "values": None if known is None or len(known) > MOST_VALUES else known.ids.to_list(),
            "separator": (given or SEPARATOR) if declared.kind in ("multi", "dense") else None,
        }
        fields.setdefault(declared.column, field)
    return list(fields.values())
