"""Readers of id lists and item tables in files provided by the user; ids in text files remain text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from twotower.data.io.feature_tables import typed
from twotower.data.io.readers import ROW, SUFFIXES, SequenceSource, open_source, suffix_of
from twotower.data.io.text_format import read_head, text_blocks
from twotower.data.schema.columns import USUAL_NAMES, usual_column
from twotower.data.schema.vocabulary import Vocabulary, ids_of, listed
from twotower.errors import InputError
from twotower.system.filesystem import require_file


def read_ids(path: str | Path) -> pl.Series:
    """Read item ids from a file: Parquet, CSV or TSV with an id column, or, for all other suffixes, one id per line.

    Args:
        path: the file.

    Returns:
        Int64 if a Parquet file contains integers, otherwise String; text such as "007" keeps its leading zeros.

    Raises:
        InputError: the file is not readable, or has no id column.
    """
    file = Path(path)
    require_file(file)
    suffix = suffix_of(file)
    if suffix not in SUFFIXES or suffix == ".txt":
        try:
            empty = not file.stat().st_size
            lines = [] if empty else "".join(text_blocks(file, read_head(file).encoding)).split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read ({error}); expected text with one item id per line") from None
        return pl.Series("id", [line.strip() for line in lines if line.strip()], dtype=pl.String)
    source = open_source(file)
    name = usual_column(source.columns, (("id",), *USUAL_NAMES["item"]), "item", source.name)
    if name is None and len(source.columns) == 1:
        name = source.columns[0]
    if name is None:
        raise InputError(f"{file}: no item id column; found {listed(source.columns)}")
    ids = ids_of(pl.concat(source.chunks([name]))[name].drop_nulls(), f"{file}: column {name!r}")
    return (ids.str.strip_chars() if source.text else ids).alias("id")


def ids_like(ids: pl.Series, vocabulary: Vocabulary, where: str) -> pl.Series:
    """Convert ids to the id type of a vocabulary.

    Raises:
        InputError: the vocabulary contains integers, and an id is not an integer.
    """
    kind: Any = vocabulary.ids.dtype
    if ids.dtype == kind:
        return ids
    cast = ids.cast(kind, strict=False)
    wrong = cast.is_null() & ids.is_not_null()
    if wrong.any():
        row = int(wrong.arg_true()[0])
        raise InputError(f"{where}: row {row + 1}: {ids[row]!r} is not an integer, but this model has integer ids")
    return cast


def read_items(path: str | Path) -> pl.DataFrame:
    """Read an item table; in a text file, ids remain text, and the types of all other columns are inferred.

    Raises:
        InputError: the file is not readable, or has lines `query item item ...` without a header.
    """
    source = open_source(Path(path))
    if isinstance(source, SequenceSource):
        raise InputError(f"{path}: no header with column names, such as item_id,title; expected a table of items")
    frame = pl.concat(source.chunks(source.columns)).drop(ROW)
    if source.text:
        own = usual_column(source.columns, (("id",), *USUAL_NAMES["item"]), "item", source.name)
        frame = frame.with_columns(typed(frame[name]) for name in frame.columns if name != own)
        if own is not None:
            frame = frame.with_columns(pl.col(own).str.strip_chars())
    return frame
