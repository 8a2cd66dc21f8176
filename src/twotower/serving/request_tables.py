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

#: Usual names of a column with lists of item ids.
HISTORY_NAMES = ("history", "histories", "items", "itemids", "sequence")


@dataclass(frozen=True)
class RequestColumns:
    """The columns of a table of requests.

    Attributes:
        query: query ids, or None.
        history: lists of item ids, oldest first, or None.
        context: columns of the model's query_tower.context that the table has.
        features: columns of the model's query_tower.features that the table has.
        where: the table, for errors.
    """

    query: str | None
    history: str | None
    context: tuple[str, ...]
    features: tuple[str, ...]
    where: str

    @classmethod
    def of(
        cls, schema: pl.Schema, where: str, *, context: Sequence[str] = (), features: Sequence[str] = ()
    ) -> RequestColumns:
        """Find the columns of a table: query ids and histories by their usual names, the others by the model's names.

        Raises:
            InputError: two columns could be the query ids.
        """
        columns = list(schema)
        lists = [name for name in columns if _has_lists(schema[name]) and plain_name(name) in HISTORY_NAMES]
        others = [name for name in columns if not schema[name].is_nested()]
        query = usual_column(others, USUAL_NAMES["query"], "query", where)
        given = [name for name in columns if name != query]
        return cls(
            query,
            lists[0] if lists else None,
            tuple(name for name in context if name in given),
            tuple(name for name in features if name in given),
            where,
        )

    def require_ids_or_histories(self, columns: Sequence[str]) -> None:
        """Check that the table, with these columns, has query ids or histories.

        Raises:
            InputError: it has neither.
        """
        if self.query is None and self.history is None:
            raise InputError(
                f"{self.where}: expected a column of query ids (query, user_id, ...) or a column history with lists of "
                f"item ids; found {listed(columns)}"
            )

    @property
    def names(self) -> list[str]:
        """The names of all columns, each once."""
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
            first: number of the first row, the id of a query if the table has no ids.
            same: a context of all rows.

        Raises:
            InputError: ids have the wrong type.
        """
        count = len(rows)
        if self.query is None:
            ids = pl.Series("query", np.arange(first, first + count), dtype=pl.Int64)
            codes = np.full(count, -1, dtype=np.int64)
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
            # A list of items has no times, and the default type.
            marks = given_marks(artifact, len(owner)) if artifact.towers.history_marks == "events" else None
            sizes, items = np.bincount(owner, minlength=count), found[found >= 0].astype(np.int32)
        same = same or {}
        names = [*self.context, *same]
        context = rows.with_columns(pl.lit(value).alias(name) for name, value in same.items()).select(names)
        features = None
        if self.features:
            given = rows.select(self.features).to_dicts()
            features = [row if any(value is not None for value in row.values()) else None for row in given]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return QueryBatch(ids, codes, offsets, items, features, context=context if names else None, marks=marks)

    def encoded(self, vocabulary: Vocabulary, ids: pl.Series, column: str) -> Codes:
        """Encode the ids of a column; -1 if unknown.

        Raises:
            InputError: they have the wrong type.
        """
        try:
            return vocabulary.encode(ids)
        except InputError as error:
            raise InputError(f"{self.where}: column {column!r}: {error}") from None


def _has_lists(dtype: pl.DataType) -> bool:
    """Return whether a column has lists, or no value at all, as in a part of a table without any history."""
    return isinstance(dtype, pl.List | pl.Array | pl.Null)


def _as_lists(column: pl.Series) -> pl.Series:
    if isinstance(column.dtype, pl.Array):
        return column.arr.to_list()
    return column.cast(pl.List(pl.Int64)) if column.dtype == pl.Null else column
