"""Conversion of tables, files and dicts to data frames with the declared feature columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.config.features import AnyFeature, DenseFeature
from twotower.data.io.readers import as_polars
from twotower.data.io.text_format import magic
from twotower.data.schema.vocabulary import Vocabulary, ids_of, listed
from twotower.errors import InputError
from twotower.system.filesystem import require_file

RowsLike = pl.DataFrame | Sequence[Mapping[str, Any]] | Any


def frame_of(rows: RowsLike, columns: Sequence[str], name: str) -> pl.DataFrame:
    """Convert rows to a frame: all columns of a data frame, or those of `columns` that occur in at least one dict.

    Args:
        rows: a data frame, or a list of dicts.
        columns: the columns to take from dicts.
        name: name of the rows in messages.

    Raises:
        InputError: there are no rows, or a column has mixed types.
    """
    if isinstance(rows, Sequence) and not isinstance(rows, str) and all(isinstance(row, Mapping) for row in rows):
        values = {column: [row.get(column) for row in rows] for column in columns if any(column in r for r in rows)}
        if not rows:
            raise InputError(f"{name}: no rows.")
        try:
            return pl.DataFrame([_series(column, given) for column, given in values.items()])
        except UnicodeEncodeError:
            raise InputError(f"{name}: text that is not valid Unicode; encode it as UTF-8.") from None
        except (TypeError, ValueError, pl.exceptions.PolarsError, OverflowError):
            raise InputError(
                f"{name}: values of mixed types; give all values of a column as numbers, all as text, or all as lists "
                "of one of these."
            ) from None
    return as_polars(rows, name)


def _series(column: str, values: list[Any]) -> pl.Series:
    try:
        return pl.Series(column, values, strict=True)
    except (TypeError, pl.exceptions.PolarsError):
        if any(isinstance(value, list | tuple | np.ndarray) for value in values):
            raise
        if all(value is None or isinstance(value, int | float) for value in values):
            return pl.Series(column, [None if value is None else float(value) for value in values], dtype=pl.Float64)
        # 3 in one row and "three" in another: use text, so that the encoder can report the invalid row.
        return pl.Series(column, [None if value is None else str(value) for value in values], dtype=pl.String)


def check_columns(frame: pl.DataFrame, declared: Sequence[AnyFeature], name: str, *, needs_table: bool) -> None:
    """Check that a frame has all declared columns.

    Args:
        frame: the rows.
        declared: the features.
        name: name of the rows in messages; its first word is the side.
        needs_table: whether this side has no table at all.

    Raises:
        InputError: a column is missing.
    """
    for one in declared:
        if one.column not in frame.columns:
            side = name.split(maxsplit=1)[0]
            if needs_table:
                raise InputError(
                    f"{side}_tower.features: column {one.column!r} needs the {side} table; give data.{_PLURAL[side]}."
                )
            setting = "query_tower.context" if side == "context" else f"{side}_tower.features"
            raise InputError(
                f"{name}: column {one.column!r}, declared in {setting}, does not exist. "
                f"Columns found: {listed(frame.columns)}."
            )


_PLURAL = {"item": "items", "query": "queries"}


def with_files(frame: pl.DataFrame, declared: Sequence[AnyFeature], ids: pl.Series) -> pl.DataFrame:
    """Add a column for each dense feature from a file, null where the id is not in the file.

    Raises:
        InputError: a file cannot be read, or has a different number of rows than ids.
    """
    for one in declared:
        if isinstance(one, DenseFeature) and one.file is not None:
            matrix, owners = _matrix(one)
            place = Vocabulary(owners).encode(ids)
            with np.errstate(over="ignore"):  # an infinite number is reported later, with its cell
                values = np.asarray(matrix[np.maximum(place, 0)], dtype=np.float32)
            column = pl.Series(one.column, values, dtype=pl.Array(pl.Float32, matrix.shape[1]))
            frame = frame.with_columns(pl.when(pl.lit(pl.Series(place >= 0))).then(pl.lit(column)).alias(one.column))
    return frame


def _matrix(one: DenseFeature) -> tuple[NDArray[Any], pl.Series]:
    """Memory-map the matrix of a .npy file, and read the ids of its rows."""
    file, ids_file = Path(one.file or ""), Path(one.ids or "")
    matrix = _array(file, "a matrix of numbers", mmap_mode="r")
    is_real = np.issubdtype(matrix.dtype, np.integer) or np.issubdtype(matrix.dtype, np.floating)
    if matrix.ndim != 2 or not matrix.size or not is_real:
        raise InputError(f"{file}: expected a matrix of numbers, found shape {matrix.shape} of {matrix.dtype}.")
    if ids_file.suffix == ".npy":
        values = _array(ids_file, "a list of ids")
        if values.ndim != 1:
            raise InputError(f"{ids_file}: expected a list of ids, found shape {values.shape} of {values.dtype}.")
        ids = ids_of(values, str(ids_file))
    else:
        ids = _lines(ids_file)
    if len(ids) != len(matrix):
        raise InputError(f"{ids_file}: {len(ids):,} ids, but {file} has {len(matrix):,} rows; expected one id per row.")
    if (copies := ids.is_duplicated()).any():
        raise InputError(f"{ids_file}: id {ids.filter(copies)[0]!r} occurs twice; expected one row per id.")
    return matrix, ids


def _array(file: Path, expected: str, **options: Any) -> NDArray[Any]:
    """Read a .npy file."""
    require_file(file)
    if file.is_file() and magic(file).startswith(b"PK"):  # NumPy would leave it open
        raise InputError(f"{file}: a zip archive, such as .npz; expected a .npy file with {expected}.")
    try:
        array: NDArray[Any] = np.load(file, allow_pickle=False, **options)
    except Exception as error:  # NumPy passes on errors of its parsers: TokenError, EOFError, MemoryError and others
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{file}: not a readable .npy file ({reason}); expected {expected}.") from None
    return array


def _lines(file: Path) -> pl.Series:
    """Read a text file with one id per line."""
    require_file(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not a readable list of ids ({str(error).splitlines()[0]}).") from None
    return pl.Series("id", text.removesuffix("\n").split("\n"))
