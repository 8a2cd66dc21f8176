"""Settings in YAML, and readable messages for invalid ones, with the field, the expected value and the value found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from twotower.errors import InputError

#: Limits of a settings file: its size in bytes, the depth of nesting, and the number of values, aliases included.
MOST_YAML, MOST_LEVELS, MOST_VALUES = 1 << 20, 32, 100_000


class _BoundedLoader(yaml.SafeLoader):
    """A YAML loader that rejects deeply nested values, for which the scanner of PyYAML needs quadratic time."""

    levels = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.levels += 1
        if self.levels > MOST_LEVELS:
            raise yaml.YAMLError("the values are nested too deeply")
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node


def _size(value: Any, known: dict[int, int]) -> int:
    """Count the values nested in a value; a value with several aliases counts once for each."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = MOST_VALUES + 1  # until it is counted, so that a value that contains itself is rejected
        inside = value.values() if isinstance(value, dict) else value
        known[id(value)] = min(1 + sum(_size(one, known) for one in inside), MOST_VALUES + 1)
    return known[id(value)]


def parse_yaml(text: str) -> Any:
    """Parse YAML.

    Raises:
        yaml.YAMLError: the text is not YAML, or has too many or too deeply nested values.
    """
    loader = _BoundedLoader(text)
    try:
        value = loader.get_single_data()
        if _size(value, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"more than {MOST_VALUES:,} values, aliases included")
    except RecursionError:
        raise yaml.YAMLError("the values are nested too deeply") from None
    finally:
        loader.dispose()
    return value


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        InputError: the file cannot be read, is not YAML, or has more than `MOST_YAML` bytes.
    """
    try:
        size = path.stat().st_size
        if size > MOST_YAML or not path.is_file():  # a pipe may wait forever, and a device may never end
            found = f"{size:,} bytes" if path.is_file() else "a folder, a pipe or a device"
            raise InputError(f"{path}: {found}; expected a settings file of at most {MOST_YAML:,} bytes")
        return parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


def number_or_text(value: object) -> object:
    """Convert text that is a number, such as 1e-3, which YAML reads as text; other values are unchanged."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def first_fault(error: ValidationError, values: Mapping[str, Any], model: type[BaseModel]) -> str:
    """Describe the first invalid field, and count the others.

    For a field of union type, pydantic reports one error per member of the union, under a path that contains the
    member's name. This function merges these errors into one that lists what each member expected. If an error lies
    deeper in the value, such as at one key of a mapping, the message names that part.

    Args:
        error: the pydantic error.
        values: the validated input.
        model: the model that validated the input.
    """
    fields = [(_field(one, values), one) for one in error.errors()]
    top = fields[0][0]
    within = [(field, one) for field, one in fields if field[: len(top)] == top]
    field = max((field for field, _ in within), key=len)
    expected = " or ".join(dict.fromkeys(_expected(one) for path, one in within if path == field))
    found = next(one["input"] for path, one in within if path == field)
    others = len({path for path, _ in fields} - {path for path, _ in within})
    more = f" (and {others} more)" if others else ""
    if any(path == field and one["type"] == "extra_forbidden" for path, one in within):
        return f"field {'.'.join(field)}: no such setting{_instead(field, model)}{more}"
    return f"field {'.'.join(field) or '(top level)'}: {expected}, found {found!r}{more}"


def _expected(error: ErrorDetails) -> str:
    """Return what was expected, in the words of the validator."""
    return error["msg"].removeprefix("Value error, ")


def _instead(field: Sequence[str], model: type[BaseModel]) -> str:
    """Suggest replacements for an unknown field name: the closest name and all valid names."""
    section: Any = model
    *before, last = field
    for name in before:
        kind = getattr(getattr(section, "model_fields", {}).get(name), "annotation", None)
        sections = [one for one in (kind, *get_args(kind)) if hasattr(one, "model_fields")]
        section = sections[0] if len(sections) == 1 else None  # the members of a union have different fields
    names = getattr(section, "model_fields", None)
    if not names:
        return ""
    close = get_close_matches(last, names, 1)
    meant = f"; did you mean {'.'.join((*before, close[0]))}?" if close else "."
    return f"{meant} Expected one of {', '.join(names)}"


def _field(error: ErrorDetails, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the path of a field without the union members that pydantic inserts."""
    at: Any = values
    path = []
    *before, last = error["loc"] or ("",)
    for part in (*before, last):
        if isinstance(at, Mapping) and part in at:  # noqa: SIM114  # mappings and lists have different keys
            at = at[part]
        elif isinstance(at, list) and isinstance(part, int):
            at = at[part]
        elif not (error["type"] == "missing" and part == last):
            continue
        path.append(str(part))
    return tuple(path)
