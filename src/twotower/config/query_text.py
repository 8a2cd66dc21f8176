"""The defaults that `data.query_text` implies, above all the text as an input of the query tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel


def with_query_text(values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the defaults for data with query texts filled in.

    The text becomes a feature of the query tower (`features` if the texts are the queries, `context` if rows have query
    ids too), as learned words unless it is declared. If the texts are the queries, whole texts are held out, the tower
    reads no history, because a new text has none, and items that a text was seen with may be recommended for it again.

    Args:
        values: the sections of a configuration, mappings or models, before validation.
    """
    data = _fields(values.get("data"))
    column = data.get("query_text")
    if column is None:
        return values
    column = str(column)
    alone = _fields(data.get("columns")).get("query") in (None, column)
    side = "features" if alone else "context"
    tower = _fields(values.get("query_tower"))
    declared = tower.get(side, "none")
    if declared == "none":
        declared = []
    if isinstance(declared, list) and not any(_is_text(one, column) for one in declared):
        declared = [*declared, {"kind": "text", "column": column}]
    tower = {**tower, side: declared}
    if alone:
        data = {"split": "held-out-queries", **data}
        tower = {"history": None, **tower}
        if data["split"] in ("held-out-queries", "time"):  # other splits hold out different items of the same texts
            values = {**values, "evaluation": {"exclude_seen": False, **_fields(values.get("evaluation"))}}
    return {**values, "data": data, "query_tower": tower}


def _is_text(declared: Any, column: str) -> bool:
    fields = _fields(declared)
    return fields.get("column") == column and getattr(declared, "kind", fields.get("kind")) == "text"


def _fields(section: Any) -> dict[str, Any]:
    """Return the fields of a section that are set; an invalid section is left for the validation to report."""
    if isinstance(section, BaseModel):
        return {name: getattr(section, name) for name in section.model_fields_set}
    return dict(section) if isinstance(section, Mapping) else {}
