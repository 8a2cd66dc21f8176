"""Settings of the first pass, common to all files of a data set: the columns to read, and how to read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from twotower.data.io.readers import ROW, FileSource
from twotower.data.io.validation import clean, is_list
from twotower.data.prepare.chunks import EncodedChunks, direct_column
from twotower.data.prepare.request_context import ContextColumns, context_columns
from twotower.data.schema.columns import ColumnRoles
from twotower.data.schema.vocabulary import Hashed, IdKind, listed
from twotower.errors import InputError


@dataclass(frozen=True)
class FileReader:
    """Reader of the rows of a file.

    Attributes:
        columns: the column of each role in the files.
        context: the context columns.
        query_ids: the conversion of query ids to codes.
        item_ids: the conversion of item ids to codes.
        optional: roles whose column is omitted if the values are unusable, because nothing needs these roles.
    """

    columns: ColumnRoles
    context: tuple[str, ...] = ()
    query_ids: IdKind = "vocabulary"
    item_ids: IdKind = "vocabulary"
    optional: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        sources: Sequence[FileSource],
        columns: ColumnRoles,
        *,
        labelled: float | None = None,
        context: ContextColumns = None,
        ids: Mapping[str, IdKind],
    ) -> FileReader:
        """Resolve the columns of all files.

        Args:
            sources: the files; the columns of the first file determine the roles.
            columns: the roles set by the caller.
            labelled: the smallest label of a positive; None if labels are not needed.
            context: the context columns.
            ids: `query_ids` and `item_ids`.

        Raises:
            InputError: a column is missing in a file.
        """
        found = columns.resolve(sources[0].columns, sources[0].name)
        named: list[str] = []
        for source in sources:
            missing = [name for name in found.roles().values() if name not in source.columns]
            if missing:
                raise InputError(
                    f"{source.name}: column {missing[0]!r} is missing, but {sources[0].name} has it. "
                    f"Columns found: {listed(source.columns)}."
                )
            if labelled is not None and found.label is None:
                raise InputError(
                    f"{source.name}: data.positive_label={labelled} needs a label column (rating, label, score). "
                    f"Columns found: {listed(source.columns)}."
                )
            lists = found.item in source.lists
            if source is sources[0]:
                named = context_columns(context, found, source.columns, source.name, lists=lists)
            others = [name for name in named if name != found.timestamp]
            context_columns(others, found, source.columns, source.name, lists=lists)
        optional = [role for role, needed in (("label", labelled), ("group", columns.group)) if needed is None]
        return cls(found, tuple(named), **ids, optional=tuple(optional))

    def empty(self, directory: Any) -> EncodedChunks:
        """Create an empty `EncodedChunks` that writes to a folder."""
        kinds = {"queries": self.query_ids, "items": self.item_ids}
        direct = {side: column for side, kind in kinds.items() if (column := direct_column(kind)) is not None}
        return EncodedChunks(directory, direct)

    def read(self, source: FileSource, collected: EncodedChunks) -> pl.DataFrame | None:
        """Add the rows of a file; if the file has item lists, return the scalar columns, which describe the queries."""
        columns, extras = self.columns, list[pl.DataFrame]()
        context = [name for name in self.context if name != columns.timestamp]
        lists = columns.item in source.lists
        for frame in source.chunks(
            list(dict.fromkeys([*columns.roles().values(), *context, *(source.columns if lists else [])]))
        ):
            if is_list(frame, columns.item or ""):
                described = [
                    name
                    for name in frame.columns
                    if name not in (ROW, *columns.roles().values(), *context) and not frame.schema[name].is_nested()
                ]
                if described:
                    extras.append(frame.select(columns.query or "", *described))
            collected.add(clean(frame, columns, source, context, self.optional), source.name, source.text, columns)
        collected.take_notes(source.notes)
        return pl.concat(extras, how="diagonal_relaxed") if extras else None

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values for `of_dict`."""
        return asdict(self)

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> FileReader:
        """Restore from the result of `to_dict`."""
        kinds = {
            name: Hashed(**values[name]) if isinstance(values[name], dict) else values[name]
            for name in ("query_ids", "item_ids")
        }
        context, optional = tuple(values["context"]), tuple(values["optional"])
        return cls(ColumnRoles(**values["columns"]), context, **kinds, optional=optional)
