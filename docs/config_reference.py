"""A hook of mkdocs: puts tables of every setting, read from the settings themselves, in place of a marker."""

from __future__ import annotations

import json
import re
import typing
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

MARKER = "<!-- every setting -->"
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with its marker replaced; other pages as they are."""
    if MARKER not in markdown:
        return markdown
    from twotower.config.run import Config  # noqa: PLC0415 - only the page that needs it pays for the import

    return markdown.replace(MARKER, "\n\n".join([*sections(Config), *features()]))


def features() -> list[str]:
    """One part for each kind of feature."""
    from twotower.config.features import KINDS  # noqa: PLC0415

    parts = [
        "## Features",
        "Entries of `item_tower.features`, `query_tower.features` and `query_tower.context`: "
        "mappings with `kind` and `column`.",
    ]
    for kind in KINDS:
        rows = [
            f"| `{name}` | {'needed' if field.is_required() else _default(field)} | {_kind(field)} "
            f"| {_cell(field.description or '')} |"
            for name, field in kind.model_fields.items()
            if name != "kind"
        ]
        parts += [f"### `kind: {kind.model_fields['kind'].default}`", " ".join((kind.__doc__ or "").split())]
        parts.append("\n".join(["| setting | default | takes | what it does |", "|---|---|---|---|", *rows]))
    return parts


def sections(model: type[BaseModel], path: str = "") -> list[str]:
    """One part for each section: heading, what the section is, a table of its fields; then the sections inside."""
    rows, inner = [], []
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is None:
            rows.append(f"| `{path}{name}` | {_default(field)} | {_kind(field)} | {_cell(field.description or '')} |")
        else:
            inner += sections(section, f"{path}{name}.")
            plain = [kind for kind in typing.get_args(field.annotation) if kind not in (section, type(None))]
            if plain:
                taken = " or ".join(_cell(_named(kind)) for kind in plain)
                rows.append(
                    f"| `{path}{name}` | {_default(field)} | {taken} or a section | {_cell(field.description or '')} |"
                )
            elif type(None) in typing.get_args(field.annotation):
                rows.append(f"| `{path}{name}` | see below | a section, or null | {_cell(field.description or '')} |")
    parts = []
    if path:
        parts += [f"## `{path.rstrip('.')}`", " ".join((model.__doc__ or "").split())]
    if rows:
        parts.append("\n".join(["| setting | default | takes | what it does |", "|---|---|---|---|", *rows]))
    return [*parts, *inner]


def _section(annotation: Any) -> type[BaseModel] | None:
    for kind in (annotation, *typing.get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    text = json.dumps(value, ensure_ascii=False)
    return f"`{text}`"


def _kind(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in BOUNDS.items()
        if getattr(rule, name, None) is not None
    ]
    return _cell(", ".join([_named(field.annotation), *bounds]))


def _named(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, type(int | str)) and "feature_config" not in str(annotation):
        return " or ".join(_named(kind) for kind in typing.get_args(annotation))
    if annotation is type(None):
        return "null"
    plain = (
        getattr(annotation, "__name__", "")
        if not typing.get_args(annotation)
        else re.sub(r"typing\.|Annotated\[(\w+), [^\]]*\]\)?\]?", r"\1", str(annotation))
    )
    if "feature_config" in str(annotation):
        plain = "`none`, `auto`, or a list of features, see below"
    names = {"str": "text", "bool": "true or false", "int": "whole number", "float": "number"}
    if plain.startswith("list[dict"):
        return "list of `{name: {setting: value}}`"
    if plain.startswith("list["):
        return "list of " + ("names" if "Literal" in plain else "texts" if annotation == list[str] else "whole numbers")
    return "mapping" if plain.startswith("dict[") else names.get(plain, plain)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
