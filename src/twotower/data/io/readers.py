"""Readers of file formats and data frames; each source yields its rows, unchanged, in chunks."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from twotower.data.io.text_format import (
    SAMPLE_LINES,
    UNPACKED_BYTES,
    UNPACKED_RATIO,
    StrayQuoteError,
    TextFormat,
    TextHead,
    damaged,
    find_separator,
    magic,
    plain_file,
    read_head,
    records,
    refuse_other_content,
    text_blocks,
    text_format,
)
from twotower.data.schema.columns import is_usual, plain_name
from twotower.data.schema.vocabulary import listed
from twotower.errors import InputError
from twotower.system.filesystem import require_file
from twotower.system.parquet import READ_ERRORS, scan_parquet

LISTS = pl.List | pl.Array
ROW = "__row"  # 1-based number of the data row in the file, kept for messages
CHUNK_ROWS = 8_000_000
TEXT_CHUNK_ROWS = 2_000_000
TAB_SUFFIXES = (".tsv", ".tab", ".inter", ".item", ".user")
SUFFIXES = (".parquet", ".pq", ".csv", ".txt", ".dat", *TAB_SUFFIXES)
#: Names of list columns in a text file: lists of items, and lists of one value per item.
ITEM_LIST_NAMES = ("items", "itemids", "sequence", "itemsequence")
VALUE_LIST_NAMES = ("timestamps", "times", "ratings", "weights")
BLANKS = r"\s+"
_PARTITION = re.compile(r"([A-Za-z_]\w*)=(.+)")


class EmptyFileError(InputError):
    """A file without rows; it is skipped if other files have rows."""


class FileSource(Protocol):
    """A file or data frame.

    Attributes:
        name: name of the source in messages.
        columns: the column names.
        text: whether all values are text; their types are inferred from the content.
        lists: the list columns that are known before reading.
        notes: counts for the account, by label (`build.NOTES`); complete after reading.
    """

    name: str
    columns: list[str]
    text: bool
    lists: frozenset[str]
    notes: dict[str, int]

    def chunks(self, wanted: Sequence[str]) -> Iterator[pl.DataFrame]:
        """Yield frames with these columns and ROW, in file order."""
        ...


#: How to convert files of other formats, by suffix.
_CONVERT = {
    (".jsonl", ".ndjson"): " Convert JSON lines in Python: polars.read_ndjson(FILE).write_parquet('data.parquet').",
    (".json",): " Convert JSON in Python: polars.read_json(FILE).write_parquet('data.parquet').",
    (".feather", ".arrow", ".ipc"): " Convert Arrow in Python: polars.read_ipc(FILE).write_parquet('data.parquet').",
    (".xlsx", ".xls", ".ods"): " Export the sheet as CSV.",
    (".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"): " Unpack the file; only gzip is read as is.",
}


def suffix_of(path: Path) -> str:
    """Return the suffix of the file format, without ``.gz``."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def open_source(path: Path, *, interactions: bool = False) -> FileSource:
    """Open a file as a source.

    Parquet and gzip are recognised by their content, whatever the name. The name determines the kind of text; a file
    named ``.parquet`` or ``.pq`` must be Parquet.

    Args:
        path: the file.
        interactions: whether the file contains interactions: then folders named ``column=value`` in the path add
            columns, and text cells with several items are read as lists.

    Raises:
        EmptyFileError: the file has no rows.
        InputError: the file is missing or damaged, has an unknown format, or has no usable header.
    """
    require_file(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a Parquet, CSV or TSV file, a folder, or a data set's name.")
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        convert = next((text for suffixes, text in _CONVERT.items() if suffix in suffixes), "")
        raise InputError(
            f"{path}: unknown format {suffix!r}; expected one of {', '.join(SUFFIXES)} (also .csv.gz).{convert}"
        )
    if path.stat().st_size == 0:
        raise EmptyFileError(f"{path}: the file is empty; expected a header and rows.")
    source = _open(path, suffix, interactions=interactions)
    values = {found[1]: found[2] for part in path.parent.parts if (found := _PARTITION.fullmatch(part))}
    if interactions and any(name not in source.columns for name in values):
        return PartitionSource(source, values)
    return source


def _open(path: Path, suffix: str, *, interactions: bool) -> FileSource:
    if suffix in (".parquet", ".pq") or magic(path).startswith(b"PAR1"):
        return ParquetSource(path)
    head = read_head(path)
    if suffix == ".txt" and not _is_table(head.lines):
        return SequenceSource(path, head)
    return TextSource(path, head, interactions=interactions)


def _is_table(lines: Sequence[str]) -> bool:
    """Return whether a ``.txt`` file is a table rather than lines of ``query item item ...``."""
    first = lines[0]
    if any(is_usual(name) for name in first.split(find_separator(lines))):
        return True
    if any(mark in first for mark in ",;|\x01") or first.count("\t") > 1:
        return True
    before, tab, after = first.strip().partition("\t")
    if not tab:
        return False
    return " " not in before + after or not all(re.fullmatch(r"-?\d+(\.\d+)?", gap) for gap in after.split())


class ParquetSource:
    """A Parquet file whose requested columns are read in slices."""

    text = False

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.notes = path, str(path), dict[str, int]()
        if not (start := magic(path)).startswith(b"PAR"):
            refuse_other_content(path, start)
        try:
            self._scan = unnested(scan_parquet(path))
            schema = self._scan.collect_schema()
            self.columns, self.lists = schema.names(), _lists(schema)
            self._rows: int = self._scan.select(pl.len()).collect().item()
        except pl.exceptions.DuplicateError as error:
            raise InputError(f"{path}: duplicate column ({str(error).splitlines()[0]}); rename one.") from None
        except READ_ERRORS as error:
            raise damaged(path, error) from None
        self.columns = _named(self.columns, self.notes, self.name)
        if not self._rows:
            raise EmptyFileError(f"{path}: the file has columns but no rows.")
        if self._rows > max(UNPACKED_BYTES, UNPACKED_RATIO * path.stat().st_size):
            raise InputError(
                f"{path}: {self._rows:,} rows in {path.stat().st_size:,} bytes, which is not a table of ids but "
                "repeated values; check the file, or write it as several files."
            )

    def chunks(self, wanted: Sequence[str]) -> Iterator[pl.DataFrame]:
        """See `FileSource`."""
        for start in range(0, self._rows, CHUNK_ROWS):
            try:
                frame = self._scan.select(wanted).slice(start, CHUNK_ROWS).collect()
            except READ_ERRORS as error:
                raise damaged(self.path, error) from None
            yield frame.with_row_index(ROW, offset=start + 1)


class TextSource:
    """A text table, possibly compressed; the ``:type`` of typed headers is removed."""

    text = True

    def __init__(self, path: Path, head: TextHead | None = None, *, interactions: bool = False) -> None:
        self.path, self.name, self.notes = path, str(path), dict[str, int]()
        head = head or read_head(path)
        self.form = text_format(path, head, tabs=suffix_of(path) in TAB_SUFFIXES)
        self.separator, self.quote = self.form.separator, self.form.quote
        if head.complete and self.form.has_header and not any(x.strip() for x in head.lines[self.form.first + 1 :]):
            raise EmptyFileError(f"{path}: the file has a header but no rows.")
        self._all = [name or f"__unnamed_{place}" for place, name in enumerate(self.form.columns)]
        self.columns = _named(list(self.form.columns), self.notes, self.name)
        self._split, self._unclear = _list_columns(self.form, head) if interactions else ({}, {})
        self.lists = frozenset(self._split)
        if not self.form.has_header:
            self.notes["no header"] = 1

    def chunks(self, wanted: Sequence[str]) -> Iterator[pl.DataFrame]:
        """Parse every column, because only then does polars report rows with too many fields; see `FileSource`.

        Raises:
            InputError: a column such as "items" has cells of several words, which may be one id or a list.
        """
        for name in wanted:
            if name in self._unclear:
                raise InputError(
                    f"{self.path}: column {name!r}: {self._unclear[name]!r} may be one id or a list of ids; write "
                    "lists as 'a,b,c' in quotation marks or as Parquet lists; if it is one id, name the column item_id."
                )
        with tempfile.TemporaryDirectory(prefix="twotower-text-") as folder:
            plain = plain_file(self.path, self.form, Path(folder))
            if plain.lines.inside:
                self.notes["line breaks in fields"] = plain.lines.inside
            seen = 0
            try:
                scan = pl.scan_csv(
                    plain.path.absolute(),  # polars would read a leading ~ as the home directory
                    separator=plain.separator,
                    quote_char=plain.quote,
                    infer_schema=False,
                    has_header=True,
                    new_columns=self._all,
                    glob=False,
                )
                for batch in scan.collect_batches(chunk_size=TEXT_CHUNK_ROWS, maintain_order=True):
                    frame = batch.with_row_index(ROW, offset=seen + 1)
                    seen += len(batch)
                    blank = pl.all_horizontal(pl.col(self._all).is_null())
                    yield self._with_lists(frame.filter(~blank).select(ROW, *wanted))
            except (pl.exceptions.PolarsError, OSError) as error:
                if "more fields" in str(error):
                    raise self._ragged() from None
                if "could not parse" in str(error) and "as dtype `str`" in str(error):
                    raise InputError(f'{self.path}: a quotation mark (") is never closed.') from None
                raise damaged(self.path, error) from None
        if not seen:
            raise InputError(f"{self.path}: the file has a header but no rows.")
        if seen != plain.lines.outside - 1:
            raise InputError(
                f"{self.path}: {plain.lines.outside - 1:,} lines after the header, but {seen:,} rows; "
                "check the quotation marks and line ends, or write the table as Parquet."
            )

    def _with_lists(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Split the cells of list columns."""
        return frame.with_columns(
            split_cells(frame[name], separator) for name, separator in self._split.items() if name in frame.columns
        )

    def _ragged(self) -> InputError:
        expected = len(self._all)
        blocks = text_blocks(self.path, self.form.encoding)
        if self.quote is None:
            lines = "".join(blocks).split("\n")
            found: Iterator[list[str]] = (line.split(self.separator) for line in lines)
        else:
            found = (fields for fields, _ in records(blocks, self.separator, backslash=False))
        try:
            for row, fields in enumerate(found, start=-self.form.first):
                if len(fields) > expected and row > 0:
                    return InputError(
                        f"{self.path}: row {row} has {len(fields)} fields, expected "
                        f"{expected} as in the header ({listed(self.columns)})."
                    )
        except StrayQuoteError:
            pass
        return InputError(f"{self.path}: a row has more fields than the header, which has {expected}.")


def _named(columns: list[str], notes: dict[str, int], where: str) -> list[str]:
    """Omit columns without a name, which pandas and Excel write and which have no role."""
    if ROW in columns:
        raise InputError(f"{where}: the column name {ROW!r} is reserved; rename the column.")
    named = [name for name in columns if name]
    if len(named) < len(columns):
        notes["columns without a name"] = len(columns) - len(named)
    return named


def _list_columns(form: TextFormat, head: TextHead) -> tuple[dict[str, str], dict[str, str]]:
    """Find the list columns of a text table and the separators inside their cells.

    Returns:
        Two mappings from column name: to the separator of a list column (`BLANKS`, a regular expression, for blanks);
        and to an example cell of an item column whose cells have several words, which may be one id or a list.
    """
    if not any(plain_name(name) in ITEM_LIST_NAMES for name in form.columns):
        return {}, {}
    text = head.text.replace("\r\n", "\n").replace("\r", "\n")
    rows: list[list[str]] = []
    with suppress(StrayQuoteError):
        for fields, _ in records(iter([text]), form.separator, backslash=False):
            rows.append(fields)
            if len(rows) > form.first + SAMPLE_LINES:
                break
    rows = rows[form.first + form.has_header : None if head.complete else -1]
    found, unclear = dict[str, str](), dict[str, str]()
    for place, name in enumerate(form.columns):
        items = plain_name(name) in ITEM_LIST_NAMES
        if items or plain_name(name) in VALUE_LIST_NAMES:
            cells = [row[place].strip() for row in rows if place < len(row)]
            separator = _cell_separator(cells)
            words = [word for cell in cells for word in cell.split()]
            if separator == BLANKS and not all(any(c.isdigit() for c in word) for word in words):
                if items:
                    unclear[name] = next(cell for cell in cells if " " in cell)[:60]
            elif separator is not None:
                found[name] = separator
    return (found if any(plain_name(name) in ITEM_LIST_NAMES for name in found) else {}), unclear


def _cell_separator(cells: Sequence[str]) -> str | None:
    """Find the separator of the items in the cells; return None if no cell has brackets or several items."""
    brackets = any(cell.startswith(("[", "(")) and cell.endswith(("]", ")")) for cell in cells)
    inner = [cell.strip("[]() ") for cell in cells]
    for separator in ("|", ";", ","):
        if any(separator in cell for cell in inner):
            return separator
    if any(" " in cell for cell in inner):
        return BLANKS
    return "," if brackets else None


def split_cells(cells: pl.Series, separator: str | None = None) -> pl.Series:
    """Split text cells with several ids, such as "a,b,c" or "[1 2 3]", into lists of text without blanks.

    Args:
        cells: the cells; null for no ids.
        separator: the separator, which is a regular expression if it is `BLANKS`; None to detect it.
    """
    plain = cells.fill_null("").str.replace_all(r"""^\s*[\[(]|[\])]\s*$|["']""", "")
    if separator is None:
        separator = next((mark for mark in "|;," if plain.str.contains(mark, literal=True).any()), BLANKS)
    if separator == BLANKS:
        plain, separator = plain.str.replace_all(BLANKS, " "), " "
    element = pl.element().str.strip_chars()
    return plain.str.split(separator).list.eval(element.filter(element != ""))


class SequenceSource:
    """A file of ``query item item ...`` lines, each optionally followed by a TAB and one gap in seconds per item.

    The gaps have no origin, so they provide no timestamps, only the order that the line already has.
    """

    text = True
    lists: frozenset[str] = frozenset()

    def __init__(self, path: Path, head: TextHead | None = None) -> None:
        self.path, self.name, self.notes = path, str(path), dict[str, int]()
        head = head or read_head(path)
        self.columns = ["query", "items"]
        self.has_gaps = "\t" in head.lines[0]
        self._form = TextFormat(
            head.encoding, "\x01", None, ("line",), transcoded=head.cr or head.encoding != "utf-8-sig"
        )

    def chunks(self, wanted: Sequence[str]) -> Iterator[pl.DataFrame]:
        """See `FileSource`."""
        with tempfile.TemporaryDirectory(prefix="twotower-text-") as folder:
            plain = plain_file(self.path, self._form, Path(folder))
            try:
                lines = pl.read_csv(
                    plain.path.absolute(),
                    has_header=False,
                    separator="\x01",
                    quote_char=None,
                    infer_schema=False,
                    new_columns=["line"],
                    glob=False,
                )
            except (pl.exceptions.PolarsError, OSError) as error:
                raise damaged(self.path, error) from None
        frame = lines.with_row_index(ROW, offset=1).drop_nulls()
        parts = pl.col("line").str.strip_chars_end().str.splitn("\t", 2).struct
        frame = frame.select(
            ROW,
            parts.field("field_0").str.strip_chars().str.replace_all(" +", " ").str.split(" ").alias("tokens"),
            parts.field("field_1").str.strip_chars().str.replace_all(" +", " ").str.split(" ").alias("gaps"),
        )
        self._refuse_triples(frame)
        frame = frame.with_columns(query=pl.col("tokens").list.first(), items=pl.col("tokens").list.slice(1))
        uneven = frame.filter(pl.col("gaps").is_not_null() & (pl.col("gaps").list.len() != pl.col("items").list.len()))
        if len(uneven):
            row = uneven.row(0, named=True)
            raise InputError(
                f"{self.path}: row {row[ROW]} has {len(row['items'])} items but {len(row['gaps'])} gaps after the TAB; "
                "expected one gap per item."
            )
        yield frame.select(ROW, *wanted)

    def _refuse_triples(self, frame: pl.DataFrame) -> None:
        """Reject a table of ``user item timestamp`` without a header, whose times and ratings would become items."""
        count = int(frame["tokens"].list.len().max() or 0)  # type: ignore[arg-type]
        same_width = bool((frame["tokens"].list.len() == count).all()) and not frame["gaps"].is_not_null().any()
        if len(frame) < 2 or not same_width or count not in (3, 4, 5):
            return
        tokens = frame["tokens"]
        repeated = tokens.list.first().n_unique() <= 0.7 * len(frame)
        last = tokens.list.last().cast(pl.Float64, strict=False)
        item = tokens.list.get(1).cast(pl.Float64, strict=False).fill_null(0)
        timed = not last.null_count() and bool((last >= 1e8).all()) and not bool((item >= 1e8).any())
        if repeated or timed:
            example = " ".join(tokens[0].to_list())
            raise InputError(
                f"{self.path}: every line has {count} values, such as {example!r}"
                + (", and the same query is on several lines" if repeated else ", the last of which looks like a time")
                + ": a table without a header? Add a header line such as 'user_id item_id timestamp', or put all items "
                "of a query on one line."
            )


class PartitionSource:
    """A file in folders named ``column=value``, as in Hive and Spark; each adds a column with its value in all rows."""

    def __init__(self, source: FileSource, values: Mapping[str, str]) -> None:
        self._source = source
        self.name, self.text, self.lists, self.notes = source.name, source.text, source.lists, source.notes
        self._values = {name: value for name, value in values.items() if name not in source.columns}
        self.columns = [*source.columns, *self._values]

    def chunks(self, wanted: Sequence[str]) -> Iterator[pl.DataFrame]:
        """See `FileSource`."""
        for frame in self._source.chunks([name for name in wanted if name not in self._values]):
            added = [pl.lit(self._literal(value)).alias(name) for name, value in self._values.items()]
            yield frame.with_columns(added).select(ROW, *wanted)

    def _literal(self, value: str) -> str | int | None:
        if value == "__HIVE_DEFAULT_PARTITION__":
            return None
        plain = not self.text and re.fullmatch(r"0|-?[1-9]\d{0,17}", value)
        return int(value) if plain else value


class FrameSource:
    """A data frame in memory: polars (also lazy), pandas, Arrow, or anything with an Arrow interface."""

    text = False

    def __init__(self, frame: Any, name: str = "data frame") -> None:
        self.name, self.notes = name, dict[str, int]()
        try:
            self._frame = unnested(as_polars(frame, name).lazy()).collect()
        except pl.exceptions.DuplicateError as error:
            raise InputError(f"{name}: duplicate column ({str(error).splitlines()[0]}); rename one.") from None
        self.columns, self.lists = _named(self._frame.columns, self.notes, name), _lists(self._frame.schema)
        if not len(self._frame):
            raise InputError(f"{name}: no rows.")

    def chunks(self, wanted: Sequence[str]) -> Iterator[pl.DataFrame]:
        """See `FileSource`."""
        for start in range(0, len(self._frame), CHUNK_ROWS):
            yield self._frame.select(wanted).slice(start, CHUNK_ROWS).with_row_index(ROW, offset=start + 1)


def _lists(schema: Mapping[str, pl.DataType]) -> frozenset[str]:
    return frozenset(name for name, kind in schema.items() if isinstance(kind, LISTS))


def unnested(table: pl.LazyFrame) -> pl.LazyFrame:
    """Replace nested columns by their fields, at any depth: column `user` with a field `id` becomes `user.id`.

    Raises:
        polars.exceptions.DuplicateError: a new name is already the name of a different column.
    """
    while nested := [name for name, kind in table.collect_schema().items() if isinstance(kind, pl.Struct)]:
        table = table.unnest(nested, separator=".")
    return table


def as_polars(frame: Any, name: str) -> pl.DataFrame:
    """Convert to a polars DataFrame.

    Raises:
        InputError: the value is not a data frame, a column name is repeated, or a column has mixed types.
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
    except Exception as error:  # the converters of three libraries raise many types of errors
        reason = str(error).strip().splitlines()[0]
        if "unique" in reason or "more than one" in reason:
            raise InputError(f"{name}: duplicate column names ({reason}); rename them.") from None
        raise InputError(f"{name}: mixed types in a column ({reason}); convert each column to one type.") from None
    raise InputError(f"{name}: expected a polars, pandas or Arrow data frame, found {type(frame).__name__}.")
