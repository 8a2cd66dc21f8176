"""Tables with one request per row: their columns, found by name, and their rows as a batch of queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from twotower.data.schema.columns import USUAL_NAMES, plain_name, usual_column
from twotower.data.schema.vocabulary import Codes, Vocabulary, listed
from twotower.errors import InputError
from twotower.serving.model_folder import SavedModel
from twotower.serving.queries import QueryBatch, given_marks, seen_codes, stored_histories, stored_marks
from twotower.serving.text_input import TextInput

#: Usual names of a column with lists of item ids.
HISTORY_NAMES = ("history", "histories", "items", "itemids", "sequence")


@dataclass(frozen=True)
class RequestColumns:
    """The columns of a table of requests.

    Attributes:
        query: the column of query ids, or None.
        history: the column with lists of item ids, oldest first, or None.
        context: columns of the model's query_tower.context that the table has.
        features: columns of the model's query_tower.features that the table has.
        where: name of the table, for errors.
        text: the text input of a model whose queries are texts, if the table has the texts; ids only label the rows.
    """

    query: str | None
    history: str | None
    context: tuple[str, ...]
    features: tuple[str, ...]
    where: str
    text: TextInput | None = None

    @classmethod
    def of(
        cls,
        schema: pl.Schema,
        where: str,
        *,
        context: Sequence[str] = (),
        features: Sequence[str] = (),
        text: TextInput | None = None,
    ) -> RequestColumns:
        """Find the columns of a table: query ids and histories by their usual names, the others by the model's names.

        Raises:
            InputError: two columns could be the query ids.
        """
        columns = list(schema)
        lists = [name for name in columns if _has_lists(schema[name]) and plain_name(name) in HISTORY_NAMES]
        others = [name for name in columns if not schema[name].is_nested()]
        asked = text if text is not None and text.is_query and text.column in others else None
        if asked is not None:
            others.remove(asked.column)
            features = list(dict.fromkeys([*features, asked.column]))
        query = usual_column(others, USUAL_NAMES["query"], "query", where)
        given = [name for name in columns if name != query]
        return cls(
            query,
            lists[0] if lists else None,
            tuple(name for name in context if name in given),
            tuple(name for name in features if name in given),
            where,
            asked,
        )

    def require_ids_or_histories(self, columns: Sequence[str], text: TextInput | None = None) -> None:
        """Check that the table, with these columns, has query ids, histories or the texts of queries.

        Raises:
            InputError: it has none of them.
        """
        if self.query is None and self.history is None and self.text is None:
            if text is not None and text.is_query:
                raise InputError(
                    f"{self.where}: expected a column {text.column!r} with the texts of the queries; found "
                    f"{listed(columns)}"
                )
            raise InputError(
                f"{self.where}: expected a column of query ids (query, user_id, ...) or a column history with lists of "
                f"item ids; found {listed(columns)}"
            )

    @property
    def names(self) -> list[str]:
        """The names of the columns that are read, each once."""
        every = (self.query, self.history, *self.context, *self.features)
        return list(dict.fromkeys(name for name in every if name is not None))

    def queries(
        self, artifact: SavedModel, rows: pl.DataFrame, *, first: int = 0, same: Mapping[str, Any] | None = None
    ) -> QueryBatch:
        """Return the rows as a batch of queries, including queries that cannot be answered.

        A row without a value in any column of features has the features from training, if its id is known.

        Args:
            artifact: the model.
            rows: some rows of the table, with the columns `names`.
            first: number of the first row; row numbers serve as ids if the table has none.
            same: a context shared by all rows.

        Raises:
            InputError: ids have the wrong type.
        """
        count = len(rows)
        if self.query is None:
            ids = pl.Series("query", np.arange(first, first + count), dtype=pl.Int64)
            codes = np.full(count, -1, dtype=np.int64)
        elif self.text is not None:
            ids, codes = rows[self.query], np.full(count, -1, dtype=np.int64)
        else:
            ids = rows[self.query]
            codes = seen_codes(artifact, self.encoded(artifact.queries, ids, self.query))
        if self.history is None:
            known = codes >= 0
            offsets, items = stored_histories(artifact, codes[known])
            sizes = np.zeros(count, dtype=np.int64)
            sizes[known] = np.diff(offsets)
            marks = stored_marks(artifact, codes[known])
        else:
            column = _as_lists(rows[self.history])
            lengths = column.list.len().fill_null(0).cast(pl.Int64).to_numpy()
            flat = column.filter(pl.Series(lengths > 0, dtype=pl.Boolean)).explode()
            found = self.encoded(artifact.items, flat, self.history)
            owner = np.repeat(np.arange(count), lengths)[found >= 0]
            # A table gives neither times nor event types: gaps are unknown, and every item has the default type.
            marks = given_marks(artifact, len(owner)) if artifact.towers.history_marks == "events" else None
            sizes, items = np.bincount(owner, minlength=count), found[found >= 0].astype(np.int32)
        same = same or {}
        names = [*self.context, *same]
        context = rows.with_columns(pl.lit(value).alias(name) for name, value in same.items()).select(names)
        features = None
        if self.features:
            given = rows.select(self.features).to_dicts()
            features = [row if any(not _is_blank(value) for value in row.values()) else None for row in given]
            if self.text is not None:
                text = self.text
                features = [None if row is None else text.features(row[text.column], row) for row in features]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return QueryBatch(ids, codes, offsets, items, features, context=context if names else None, marks=marks)

    def encoded(self, vocabulary: Vocabulary, ids: pl.Series, column: str) -> Codes:
        """Encode the ids of a column; -1 if unknown.

        Raises:
            InputError: the ids have the wrong type.
        """
        try:
            return vocabulary.encode(ids)
        except InputError as error:
            raise InputError(f"{self.where}: column {column!r}: {error}") from None


def _has_lists(dtype: pl.DataType) -> bool:
    """Return whether a column has lists, or no value at all, as in a part of a table without any history."""
    return isinstance(dtype, pl.List | pl.Array | pl.Null)


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _as_lists(column: pl.Series) -> pl.Series:
    if isinstance(column.dtype, pl.Array):
        return column.arr.to_list()
    return column.cast(pl.List(pl.Int64)) if column.dtype == pl.Null else column
