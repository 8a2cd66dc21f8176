"""Readers of the file formats: each source yields its rows in chunks, unchanged."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from twotower.data.schema.vocabulary import listed
from twotower.errors import InputError

LISTS = pl.List | pl.Array
ROW = "__row"  # 1-based data row of the file, carried for messages
CHUNK_ROWS = 8_000_000
TEXT_CHUNK_ROWS = 2_000_000
TAB_SUFFIXES = (".tsv", ".tab", ".inter", ".item", ".user")
SUFFIXES = (".parquet", ".pq", ".csv", ".txt", *TAB_SUFFIXES)


class FileSource(Protocol):
    """A file or data frame.

    Attributes:
        name: its name in messages.
        columns: its column names.
        text: whether every value is text, whose type is inferred from the content.
        lists: columns of lists, as far as they are known before reading.
    """

    name: str
    columns: list[str]
    text: bool
    lists: frozenset[str]

    def chunks(self, wanted: Sequence[str]) -> Iterator[pl.DataFrame]:
        """Yield frames with these columns and ROW, in file order."""
        ...


def suffix_of(path: Path) -> str:
    """Return the suffix of the file format, without ``.gz``."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def open_source(path: Path) -> FileSource:
    """Open the source for a file.

    Raises:
        InputError: the file is missing, empty, damaged, of an unknown format, or has no usable header.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a Parquet, CSV or TSV file, a folder, or a data set's name.")
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: unknown format {suffix!r}; expected one of {', '.join(SUFFIXES)} (also .csv.gz).")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty; expected a header and rows.")
    if suffix in (".parquet", ".pq"):
        return ParquetSource(path)
    if suffix == ".txt":
        first = first_lines(path, 1)[0]
        if "," not in first and (" " in first.strip() or "\t" not in first):
            return SequenceSource(path)
    return TextSource(path)


def first_lines(path: Path, count: int) -> list[str]:
    """Read the first lines of a text file, gzipped or not, without line ends."""
    try:
        with _open_text(path) as stream:
            lines = [line.rstrip("\r\n") for line in islice(stream, count)]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from None
    if not lines or not lines[0].strip():
        raise InputError(f"{path}: the file is empty; expected a header and rows.")
    return lines


def _open_text(path: Path) -> Any:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _damaged(path: Path, error: Exception) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, UnicodeDecodeError) or "utf-8" in reason:
        return InputError(f"{path}: not UTF-8 text; convert it, e.g. iconv -f latin1 -t utf-8.")
    what = "truncated or damaged gzip" if path.suffix.lower() == ".gz" else "truncated or damaged file"
    return InputError(f"{path}: {what} ({reason}); download or write it again.")


class ParquetSource:
    """A Parquet file, read in slices of the requested columns."""

    text = False

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        try:
            self._scan = pl.scan_parquet(path)
            schema = self._scan.collect_schema()
            self.columns, self.lists = schema.names(), _lists(schema)
            self._rows: int = self._scan.select(pl.len()).collect().item()
        except pl.exceptions.DuplicateError as error:
            raise InputError(f"{path}: duplicate column ({str(error).splitlines()[0]}); rename one.") from None
        except (pl.exceptions.PolarsError, OSError) as error:
            raise _damaged(path, error) from None
        if not self._rows:
            raise InputError(f"{path}: the file has columns but no rows.")

    def chunks(self, wanted: Sequence[str]) -> Iterator[pl.DataFrame]:
        """See `FileSource`."""
        for start in range(0, self._rows, CHUNK_ROWS):
            try:
                frame = self._scan.select(wanted).slice(start, CHUNK_ROWS).collect()
            except (pl.exceptions.PolarsError, OSError) as error:
                raise _damaged(self.path, error) from None
            yield frame.with_row_index(ROW, offset=start + 1)


class TextSource:
    """A CSV or TSV file, gzipped or not, with a header; the ``:type`` of typed headers is removed."""

    text = True
    lists: frozenset[str] = frozenset()

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        header = first_lines(path, 1)[0]
        tabs = suffix_of(path) in TAB_SUFFIXES
        self.separator = "\t" if tabs else next((s for s in (",", "\t", ";", "|") if s in header), ",")
        # Files with typed headers never quote, and in them a title may begin with a quotation mark.
        self.quote = None if tabs and ":" in header else '"'
        raw = header.split("\t") if self.quote is None else next(csv.reader([header], delimiter=self.separator))
        self.columns = [name.split(":", maxsplit=1)[0].strip() for name in raw]
        for name in self.columns:
            if self.columns.count(name) > 1:
                raise InputError(f"{path}: column {name!r} occurs twice in the header; rename one.")
            if not name:
                raise InputError(f"{path}: the header has a column without a name: {listed(raw)}.")

    def chunks(self, wanted: Sequence[str]) -> Iterator[pl.DataFrame]:
        """See `FileSource`. Parses every column, because only then does polars report rows with too many fields."""
        seen = 0
        try:
            scan = pl.scan_csv(
                self.path,
                separator=self.separator,
                quote_char=self.quote,
                infer_schema=False,
                has_header=True,
                new_columns=self.columns,
            )
            for batch in scan.collect_batches(chunk_size=TEXT_CHUNK_ROWS, maintain_order=True):
                frame = batch.with_row_index(ROW, offset=seen + 1)
                seen += len(batch)
                blank = pl.all_horizontal(pl.col(self.columns).is_null())
                yield frame.filter(~blank).select(ROW, *wanted)
        except (pl.exceptions.PolarsError, OSError) as error:
            if "more fields" in str(error):
                raise self._ragged() from None
            if "could not parse" in str(error) and "as dtype `str`" in str(error):
                raise InputError(f'{self.path}: a quotation mark (") is never closed.') from None
            raise _damaged(self.path, error) from None
        if not seen:
            raise InputError(f"{self.path}: the file has a header but no rows.")

    def _ragged(self) -> InputError:
        expected = len(self.columns)
        with _open_text(self.path) as stream:
            if self.quote is None:
                records: Iterator[list[str]] = (line.rstrip("\r\n").split(self.separator) for line in stream)
            else:
                records = iter(csv.reader(stream, delimiter=self.separator))
            next(records)
            for row, record in enumerate(records, start=1):
                if len(record) > expected:
                    return InputError(
                        f"{self.path}: row {row} has {len(record)} fields, expected "
                        f"{expected} as in the header ({listed(self.columns)})."
                    )
        return InputError(f"{self.path}: a row has more fields than the header's {expected}.")


class SequenceSource:
    """A file of ``query item item ...`` lines, each optionally followed by a TAB and one gap in seconds per item.

    The gaps have no origin, so they give only an order, which the line already has, and no timestamps.
    """

    text = True
    lists: frozenset[str] = frozenset()

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        self.columns = ["query", "items"]
        self.has_gaps = "\t" in first_lines(path, 1)[0]

    def chunks(self, wanted: Sequence[str]) -> Iterator[pl.DataFrame]:
        """See `FileSource`."""
        try:
            lines = pl.read_csv(
                self.path, has_header=False, separator="\x01", quote_char=None, infer_schema=False, new_columns=["line"]
            )
        except (pl.exceptions.PolarsError, OSError) as error:
            raise _damaged(self.path, error) from None
        frame = lines.with_row_index(ROW, offset=1).drop_nulls()
        parts = pl.col("line").str.strip_chars_end().str.splitn("\t", 2).struct
        frame = frame.select(
            ROW,
            parts.field("field_0").str.strip_chars().str.replace_all(" +", " ").str.split(" ").alias("tokens"),
            parts.field("field_1").str.strip_chars().str.replace_all(" +", " ").str.split(" ").alias("gaps"),
        )
        frame = frame.with_columns(query=pl.col("tokens").list.first(), items=pl.col("tokens").list.slice(1))
        uneven = frame.filter(pl.col("gaps").is_not_null() & (pl.col("gaps").list.len() != pl.col("items").list.len()))
        if len(uneven):
            row = uneven.row(0, named=True)
            raise InputError(
                f"{self.path}: row {row[ROW]} has {len(row['items'])} items but {len(row['gaps'])} gaps after the TAB; "
                "expected one gap per item."
            )
        yield frame.select(ROW, *wanted)


class FrameSource:
    """A data frame in memory: polars (also lazy), pandas, Arrow, or anything with an Arrow interface."""

    text = False

    def __init__(self, frame: Any, name: str = "data frame") -> None:
        self.name = name
        self._frame = as_polars(frame, name)
        self.columns, self.lists = self._frame.columns, _lists(self._frame.schema)
        if not len(self._frame):
            raise InputError(f"{name}: no rows.")

    def chunks(self, wanted: Sequence[str]) -> Iterator[pl.DataFrame]:
        """See `FileSource`."""
        for start in range(0, len(self._frame), CHUNK_ROWS):
            yield self._frame.select(wanted).slice(start, CHUNK_ROWS).with_row_index(ROW, offset=start + 1)


def _lists(schema: Mapping[str, pl.DataType]) -> frozenset[str]:
    return frozenset(name for name, kind in schema.items() if isinstance(kind, LISTS))


def as_polars(frame: Any, name: str) -> pl.DataFrame:
    """Convert to a polars DataFrame.

    Raises:
        InputError: not a data frame, duplicate columns, or a column of mixed types.
    """
    try:
        if isinstance(frame, pl.DataFrame):
            return frame
        if isinstance(frame, pl.LazyFrame):
            return frame.collect()
        if type(frame).__module__.split(".")[0] == "pandas":
            return pl.from_pandas(frame)
        if hasattr(frame, "__arrow_c_stream__") or type(frame).__module__.split(".")[0] == "pyarrow":
            converted = pl.from_arrow(frame)
            if isinstance(converted, pl.DataFrame):
                return converted
        if isinstance(frame, dict):
            return pl.DataFrame(frame)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{name}: a pandas frame needs the package {error.name!r}; install it or pass a polars frame."
        ) from None
    except Exception as error:  # the converters of three libraries raise many types
        reason = str(error).strip().splitlines()[0]
        if "unique" in reason or "more than one" in reason:
            raise InputError(f"{name}: duplicate column names ({reason}); rename them.") from None
        raise InputError(f"{name}: mixed types in a column ({reason}); convert each column to one type.") from None
    raise InputError(f"{name}: expected a polars, pandas or Arrow data frame, found {type(frame).__name__}.")
