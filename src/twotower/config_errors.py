"""What is wrong with settings, in the words of one who wrote them: the field, what was expected, what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails


def first_fault(error: ValidationError, values: Mapping[str, Any], model: type[BaseModel]) -> str:
    """The first field that is wrong, and how many others are.

    A field that may be one of several kinds is told by pydantic once for each kind, under a name that has the kind in
    it. Here it is one field, with what each kind expected of it; where one of the kinds got as far as a part of the
    value, as with one word of a mapping, it is that part.

    Args:
        error: of pydantic.
        values: what it has looked at.
        model: what it has compared them with.
    """
    fields = [(_field(one, values), one) for one in error.errors()]
    top = fields[0][0]
    within = [(field, one) for field, one in fields if field[: len(top)] == top]
    field = max((field for field, _ in within), key=len)
    expected = " or ".join(dict.fromkeys(one["msg"] for path, one in within if path == field))
    found = next(one["input"] for path, one in within if path == field)
    others = len({path for path, _ in fields} - {path for path, _ in within})
    more = f" (and {others} more)" if others else ""
    if any(path == field and one["type"] == "extra_forbidden" for path, one in within):
        return f"field {'.'.join(field)}: no such setting{_instead(field, model)}{more}"
    return f"field {'.'.join(field) or '(top level)'}: {expected}, found {found!r}{more}"


def _instead(field: Sequence[str], model: type[BaseModel]) -> str:
    """What may stand in place of the last name of a field: the one that looks like it, and all there are."""
    section: Any = model
    *before, last = field
    for name in before:
        kind = getattr(getattr(section, "model_fields", {}).get(name), "annotation", None)
        sections = [one for one in (kind, *get_args(kind)) if hasattr(one, "model_fields")]
        section = sections[0] if len(sections) == 1 else None  # several kinds have names of their own each
    names = getattr(section, "model_fields", None)
    if not names:
        return ""
    close = get_close_matches(last, names, 1)
    meant = f"; did you mean {'.'.join((*before, close[0]))}?" if close else "."
    return f"{meant} Expected one of {', '.join(names)}"


def _field(error: ErrorDetails, values: Mapping[str, Any]) -> tuple[str, ...]:
    """The path of a field without the kinds that pydantic has tried on the way."""
    at: Any = values
    path = []
    *before, last = error["loc"] or ("",)
    for part in (*before, last):
        if isinstance(at, Mapping) and part in at:  # noqa: SIM114  # each kind has its own type of key
            at = at[part]
        elif isinstance(at, list) and isinstance(part, int):
            at = at[part]
        elif not (error["type"] == "missing" and part == last):
            continue
        path.append(str(part))
    return tuple(path)
