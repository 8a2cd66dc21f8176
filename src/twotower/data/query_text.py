"""Texts of queries: a column whose distinct values are the queries, or a context column with the text of each row."""

from __future__ import annotations

from dataclasses import replace

import polars as pl

from twotower.data.interactions import Interactions
from twotower.data.schema.vocabulary import texts_of
from twotower.errors import InputError


def with_query_text(data: Interactions, column: str, *, texts_are_queries: bool) -> Interactions:
    """Declare that a column has the text of the query, so that a held-out query is encoded with its own text.

    Args:
        data: the interactions; read with `columns={"query": column}` if the texts are the queries, else with the column
            as context.
        column: name of the column.
        texts_are_queries: whether the distinct texts are the queries. If so, the query table gets this column, with the
            text of each query. Otherwise a held-out query becomes one query for each text of its rows.

    Raises:
        InputError: the column was not read as context, or its values cannot be converted to text.
    """
    if texts_are_queries:
        texts = data.queries.ids.cast(pl.String).alias(column)
        table = pl.DataFrame([texts]) if data.query_table is None else data.query_table.with_columns(texts)
        return replace(data, query_table=table)
    if data.context is None or column not in data.context.columns:
        raise InputError(
            f"data.query_text: column {column!r} was not read with the interactions; in Python pass "
            f"context=[{column!r}] to Interactions.read or from_frame"
        )
    # Blank text counts as missing; numbers are converted to text.
    texts = texts_of(data.context[column], "data.query_text").str.strip_chars()
    texts = texts.set(texts == "", None)
    return replace(data, context=data.context.with_columns(texts), query_text=column)
