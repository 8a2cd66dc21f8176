"""Detection of text formats: compression, encoding, line ends, separator, header and quotation marks.

polars reads UTF-8 text with one-character separators, line feeds, one header line and quotation marks as in RFC 4180.
A file in a different format is rewritten to a temporary copy; an ambiguous file is rejected with the row number.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from twotower.data.schema.columns import header_hint, is_usual
from twotower.errors import InputError
from twotower.system.filesystem import is_full_disk

HEAD_BYTES = 1 << 18
BLOCK_BYTES = 1 << 24
#: Maximum length of a record in a rewritten file, in characters: a quotation mark that is open for longer is an error.
LONGEST_RECORD = 1 << 24
#: A gzip file may unpack to this many bytes, or to this many times its own size if that is more. Tables of ids and
#: numbers compress by a factor of 3 to 20; only repeated bytes compress by more than 200.
UNPACKED_BYTES, UNPACKED_RATIO = 1 << 26, 200
SAMPLE_LINES = 200
SEPARATORS = (",", "\t", ";", "|", "\x01", "::", " ")
#: Separator of a rewritten file if the original separator has two characters.
UNIT = "\x1f"
QUOTE = '"'
_LINE_END = re.compile(r"\r\n|\n|\r")
_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?([eE][+-]?\d+)?")
_UNPACK, _EXPORT = "unpack it", "export it as CSV or Parquet"
#: For contents that are neither text tables nor Parquet: the first bytes, a description, and what to do.
_OTHER_CONTENTS = (
    (b"PK\x03\x04", "a zip archive or a workbook", f"{_UNPACK}, or {_EXPORT}"),
    (b"\x1f\x8b", "gzip inside gzip, or a Parquet file in gzip", _UNPACK),
    (b"BZh", "bzip2", _UNPACK),
    (b"\xfd7zXZ", "xz", _UNPACK),
    (b"7z\xbc\xaf", "7z", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "zstd", _UNPACK),
    (b"\x04\x22\x4d\x18", "lz4", _UNPACK),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel workbook", _EXPORT),
    (b"PAR1", "Parquet inside gzip", _UNPACK),
    (b"ARROW1", "Arrow or Feather", "convert it in Python: polars.read_ipc(FILE).write_parquet('data.parquet')"),
    (b"SQLite format 3", "an SQLite database", _EXPORT),
    (b"\x89HDF", "HDF5", _EXPORT),
    (b"\x93NUMPY", "a NumPy array", _EXPORT),
    (b"Obj\x01", "Avro", _EXPORT),
    (b"ORC", "ORC", _EXPORT),
    (b"%PDF-", "PDF", _EXPORT),
    (b"version https://git-lfs", "a Git LFS pointer", "run: git lfs pull"),
    (b"<!doctype", "an HTML page, perhaps a sign-in or error page", "download the file again"),
    (b"<html", "an HTML page, perhaps a sign-in or error page", "download the file again"),
    (b'{"', "JSON", "convert it in Python: polars.read_ndjson(FILE).write_parquet('data.parquet')"),
    (b"[{", "JSON", "convert it in Python: polars.read_json(FILE).write_parquet('data.parquet')"),
)


def damaged(path: Path, error: BaseException) -> InputError:
    """Return the error for a file that cannot be read."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, UnicodeDecodeError) and error.encoding.startswith("utf-") and error.encoding != "utf-8":
        return InputError(f"{path}: truncated or damaged {error.encoding.upper()} text; download or write it again.")
    if isinstance(error, UnicodeDecodeError) or "utf-8" in reason:
        return InputError(f"{path}: not UTF-8 text; convert it, e.g. iconv -f latin1 -t utf-8.")
    what = "truncated or damaged gzip" if path.suffix.lower() == ".gz" or is_gzip(path) else "truncated or damaged file"
    return InputError(f"{path}: {what} ({reason}); download or write it again.")


def magic(path: Path) -> bytes:
    """Read the first bytes of a file."""
    with path.open("rb") as stream:
        return stream.read(64)


def refuse_other_content(path: Path, start: bytes, *, allow_json: bool = False) -> None:
    """Reject content of a known kind that cannot be read.

    Args:
        path: the file.
        start: the first bytes of the content.
        allow_json: whether the content may be JSON.

    Raises:
        InputError: the content is, for example, a workbook or an HTML page.
    """
    plain = b"".join(start[:256].removeprefix(codecs.BOM_UTF8).split()).lower()
    for mark, what, advice in _OTHER_CONTENTS:
        found = start.startswith(mark) or (mark[:1] in b"<{[" and plain.startswith(mark))
        if found and not (allow_json and what == "JSON"):
            raise InputError(f"{path}: the content is {what}, not a table; {advice}.")
    if start and not start.strip(b"\0"):
        raise InputError(
            f"{path}: the file has only zero bytes, perhaps because writing it was interrupted; write it again."
        )


def is_gzip(path: Path) -> bool:
    """Return whether the content is gzip, regardless of the file name."""
    return magic(path).startswith(b"\x1f\x8b")


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading, and decompress gzip content."""
    return io.BufferedReader(_Unpacked(path)) if is_gzip(path) else path.open("rb")


class _Unpacked(io.RawIOBase):
    """The content of a gzip file, up to a limit: a file of 1 MB may unpack to 1 GB of blank lines.

    Raises:
        InputError: more than the limit is read.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._count = path, 0
        self._stream = gzip.open(path, "rb")  # noqa: SIM115  # closed by `close`
        self._most = max(UNPACKED_BYTES, UNPACKED_RATIO * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._count += count
        if self._count > self._most:
            raise InputError(
                f"{self._path}: unpacks to more than {UNPACKED_RATIO} times its size (over {self._most >> 20:,} MiB), "
                "which is not a table of ids but repeated bytes; check the file, or unpack it yourself to read it."
            )
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


@dataclass(frozen=True)
class TextHead:
    """The beginning of a text file.

    Attributes:
        encoding: name of the codec; "utf-8-sig" for UTF-8 with or without a byte order mark.
        text: the decoded characters.
        complete: whether `text` is the whole file.
    """

    encoding: str
    text: str
    complete: bool

    @property
    def cr(self) -> bool:
        """Whether lines end with a carriage return only."""
        return "\n" not in self.text and "\r" in self.text.rstrip("\r")

    @property
    def cut(self) -> bool:
        """Whether the first line is longer than the head."""
        return not self.complete and not _LINE_END.search(self.text)

    @property
    def lines(self) -> list[str]:
        """The first lines, without line ends and without a possibly incomplete last line."""
        lines = _LINE_END.split(self.text)
        if len(lines) > 1 and (not self.complete or not lines[-1]):
            lines.pop()
        return lines[:SAMPLE_LINES]


def read_head(path: Path, *, allow_json: bool = False) -> TextHead:
    """Read the beginning of a text file and detect the encoding.

    Args:
        path: the file.
        allow_json: whether the content may be JSON.

    Raises:
        InputError: the file is empty, an archive, a damaged gzip file, or not text.
    """
    try:
        with open_bytes(path) as stream:
            raw = stream.read(HEAD_BYTES)
            complete = not stream.read(1)
        refuse_other_content(path, raw, allow_json=allow_json)
        encoding = _encoding(raw, latin=path.name.lower().endswith(".dat"))
        text = codecs.getincrementaldecoder(encoding)().decode(raw, final=complete)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise damaged(path, error) from None
    head = TextHead(encoding, text, complete)
    if not head.lines or not head.lines[0].strip():
        raise InputError(f"{path}: the file is empty; expected a header and rows.")
    return head


def _encoding(raw: bytes, *, latin: bool) -> str:
    for mark, name in (
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if raw.startswith(mark):
            return name
    zeros = np.flatnonzero(np.frombuffer(raw, dtype=np.uint8) == 0)
    if len(zeros) > len(raw) // 4:  # mostly ASCII characters of two bytes each, without a byte order mark
        return "utf-16-le" if np.mean(zeros % 2) > 0.5 else "utf-16-be"
    if latin:
        try:
            codecs.getincrementaldecoder("utf-8")().decode(raw)
        except UnicodeDecodeError:
            return "latin-1"
    return "utf-8-sig"


@dataclass(frozen=True)
class TextFormat:
    """The format of a text table.

    Attributes:
        encoding: name of the codec.
        separator: the one or two characters between fields.
        quote: the quotation mark; None if the file has no quoted fields.
        columns: names of the columns; "" for a column without a name.
        first: number of lines before the header: 1 in a file that begins with a line such as ``sep=;``, else 0.
        has_header: whether the file has a header.
        transcoded: whether polars needs a copy because of the encoding, line ends, separator or header.
        requoted: whether polars needs a copy with different quotation marks, even if the original ones are valid.
    """

    encoding: str
    separator: str
    quote: str | None
    columns: tuple[str, ...]
    first: int = 0
    has_header: bool = True
    transcoded: bool = False
    requoted: bool = False


#: Columns of MovieLens files without a header, by the file name up to the first dot and the number of fields.
HEADLESS = {
    ("movies", 3): ("movie_id", "title", "genres"),
    ("items", 3): ("item_id", "title", "genres"),
    ("users", 5): ("user_id", "gender", "age", "occupation", "zip_code"),
}


def text_format(path: Path, head: TextHead, *, tabs: bool) -> TextFormat:
    """Detect the format of a text table.

    Args:
        path: the file.
        head: the beginning of the file.
        tabs: whether the file name implies tabs.

    Raises:
        InputError: a column name occurs twice, or the header is missing or longer than `HEAD_BYTES`.
    """
    if head.cut:
        raise InputError(
            f"{path}: the first line has more than {HEAD_BYTES:,} bytes ({head.text[:60]!r}...); expected a header "
            "line and rows. Leave out columns that are not needed."
        )
    lines, first, declared = head.lines, 0, None
    if found := re.fullmatch(r'"?sep=(.)"?', lines[0].strip("\r\n ")):  # written by Excel
        declared, first, lines = found[1], 1, lines[1:]
        if not lines:
            raise InputError(f"{path}: the file has a header but no rows.")
    separator = declared or find_separator(lines, prefer="\t" if tabs else None)
    # Files with typed headers never quote fields, and a title in such a file may begin with a quotation mark.
    quote = None if (separator == "\t" and tabs and ":" in lines[0]) or separator == "::" else QUOTE
    names = lines[0].split(separator)
    spread = False
    if quote and QUOTE in lines[0]:
        text = head.text if not first else _LINE_END.split(head.text, maxsplit=first)[first]
        try:
            names = next(records(iter([text.replace("\r\n", "\n")]), separator, backslash=False))[0]
            spread = any("\n" in name for name in names)
        except (StrayQuoteError, StopIteration):
            pass
    names = [" ".join(name.split(":", maxsplit=1)[0].split()).strip("\ufeff") for name in names]
    has_header = True
    if separator == "::" and not any(is_usual(name) for name in names):
        names, has_header = _headless(path, lines, len(names)), False
    refuse_repeated(path, names)
    transcoded = head.encoding != "utf-8-sig" or head.cr or len(separator) > 1 or first > 0
    return TextFormat(
        head.encoding, separator, quote, tuple(names), first, has_header, transcoded=transcoded, requoted=spread
    )


def _headless(path: Path, lines: Sequence[str], count: int) -> list[str]:
    """Name the columns of a file without a header whose separator is ``::``."""
    stem = path.name.split(".", maxsplit=1)[0].lower()
    if (stem, count) in HEADLESS:
        return list(HEADLESS[stem, count])
    rows = [line.split("::") for line in lines]
    numeric = all(len(row) == count and all(_NUMBER.fullmatch(value) for value in row[2:]) for row in rows)
    if numeric and count in (3, 4):
        timed = all(float(row[-1]) >= 1e8 for row in rows)
        if count == 4 and timed:
            return ["user_id", "item_id", "rating", "timestamp"]
        if count == 3:
            return ["user_id", "item_id", "timestamp" if timed else "rating"]
    raise InputError(
        f"{path}: no header, and {count} columns with unknown meaning ({lines[0][:60]!r}); add a header line such as "
        "user_id::item_id::rating::timestamp."
    )


def refuse_repeated(path: Path, names: Sequence[str]) -> None:
    """Check that no column name occurs twice.

    Raises:
        InputError: a name is repeated.
    """
    for name, count in Counter(names).items():
        if name and count > 1:
            raise InputError(
                f"{path}: column {name[:60]!r} occurs twice in the header; rename one.{header_hint(names)}"
            )


def find_separator(lines: Sequence[str], prefer: str | None = None) -> str:
    """Find the separator that splits every line into the same number of fields.

    Args:
        lines: the first lines of the file, the header first.
        prefer: the separator implied by the file name.

    Returns:
        `prefer` if the header contains it. Otherwise, among separators that split all lines into the same number of
        fields, the separator with the most fields; failing that, the separator that splits the most lines into as many
        fields as the header. A comma if the header contains no separator.
    """
    if prefer is not None and prefer in lines[0]:
        return prefer
    bare = [re.sub(r'"[^"]*"', "", line) for line in lines if line.strip()]
    best, most = ",", (0.0, 0, 0)
    for place, separator in enumerate(SEPARATORS):
        count = bare[0].count(separator) if bare else 0
        if not count:
            continue
        agreement = sum(line.count(separator) == count for line in bare) / len(bare)
        if separator in ("::", " ") and agreement < 1:
            continue
        # A blank separates fields only if nothing else does; "::" is never text.
        rank = -1 if separator == " " else 1 if separator == "::" else 0
        key = (agreement + rank if agreement == 1 else min(agreement, 0.999), count, -place)
        if key > most:
            best, most = separator, key
    return best


@dataclass
class LineCounts:
    """Line ends and quotation marks of a file.

    Attributes:
        outside: number of lines that end outside quotation marks, including the header.
        inside: number of line feeds inside quotation marks.
        valid: whether all quotation marks conform to RFC 4180.
    """

    outside: int = 0
    inside: int = 0
    valid: bool = True


def count_lines(path: Path, separator: str, *, quoted: bool) -> LineCounts:
    """Count the lines of a file and check the quotation marks.

    In RFC 4180 every odd-numbered quotation mark follows a separator, a line end, or the other mark of a doubled pair,
    and every even-numbered quotation mark precedes one of these.
    """
    found, parity, left, last = LineCounts(), 0, b"\n", b"\n"
    allowed = np.zeros(256, dtype=np.bool_)
    allowed[[ord(separator), 10, 13, 34]] = True
    with open_bytes(path) as stream:
        mark: bytes | None = codecs.BOM_UTF8
        while left:
            block = stream.read(BLOCK_BYTES)
            if mark is not None:
                block, mark = block.removeprefix(mark), None
            ends = not block
            if ends:
                last = left[-1:]
            window = left + (block or b"\n")
            left = b"" if ends else window[-2:]
            lines = window.count(b"\n", 1, len(window) - 1)
            if not quoted or (not parity and window.find(b'"', 1, len(window) - 1) < 0):
                found.outside += lines
                continue
            values = np.frombuffer(window, dtype=np.uint8)
            marks = np.flatnonzero(values[1:-1] == 34) + 1
            odd = (np.arange(len(marks)) + parity) % 2 == 0
            found.valid &= bool(allowed[values[marks[odd] - 1]].all() and allowed[values[marks[~odd] + 1]].all())
            breaks = np.flatnonzero(values[1:-1] == 10) + 1
            inside = int(((np.searchsorted(marks, breaks) + parity) % 2).sum())
            found.inside += inside
            found.outside += lines - inside
            parity = (parity + len(marks)) % 2
    found.valid &= not parity
    found.outside += last != b"\n"
    return found


class StrayQuoteError(Exception):
    """A record whose quotation marks cannot be parsed; the message gives the reason."""


def records(blocks: Iterator[str], separator: str, *, backslash: bool) -> Iterator[tuple[list[str], list[bool]]]:
    """Split text into records of fields.

    Blanks around the quotation marks of a field are allowed. Inside an unquoted field, a quotation mark is text.

    Args:
        blocks: the text in pieces of any length, with line feeds as line ends.
        separator: the separator between fields.
        backslash: whether a backslash inside quotation marks escapes the next character, as in Spark and MySQL.

    Yields:
        The fields, and whether each field was in quotation marks.

    Raises:
        StrayQuoteError: a field begins with a quotation mark, but the closing mark is not at the end of the field.
    """
    end = rf"(?={re.escape(separator)}|\n|\Z)"
    blank = "" if separator == " " else " *"
    body = r'(?:[^"\\]|\\.|"")*+' if backslash else r'(?:[^"]|"")*+'
    quoted = re.compile(rf'{blank}"({body})"{blank}{end}', re.DOTALL)
    opened = re.compile(rf'{blank}"')
    bare = re.compile(rf"(?:(?!{re.escape(separator)})[^\n])*+")
    escape = re.compile(r'""|\\(["\\\n])') if backslash else re.compile('""')

    def plain(found: re.Match[str]) -> str:
        return found[1] if backslash and found[1] is not None else QUOTE

    buffer, position, ended = "", 0, False
    while True:
        fields, marks, at, complete = list[str](), list[bool](), position, False
        while True:
            field = quoted.match(buffer, at)
            if field is None and opened.match(buffer, at):
                if ended or len(buffer) - position > LONGEST_RECORD:
                    rest = buffer[at:].lstrip(" ")
                    if QUOTE not in rest[1:] or len(rest) > LONGEST_RECORD:
                        raise StrayQuoteError('a quotation mark (") is never closed')
                    raise StrayQuoteError(f"a stray quotation mark in {rest.split(chr(10))[0][:60]!r}")
                break
            if field is not None:
                fields.append(escape.sub(plain, field[1]))
            else:
                field = bare.match(buffer, at)
                assert field is not None
                fields.append(field[0])
            marks.append(field.re is quoted)
            at = field.end()
            if at + len(separator) > len(buffer) and not ended:
                break
            if buffer.startswith(separator, at):
                at += len(separator)
                continue
            complete = at < len(buffer) or ended
            break
        if not complete:
            block = next(blocks, None)
            ended = block is None
            buffer, position = buffer[position:] + (block or ""), 0
            continue
        if at >= len(buffer) and fields == [""] and not marks[0]:
            return
        yield fields, marks
        position = at + 1
        if position >= len(buffer) and ended:
            return


def text_blocks(path: Path, encoding: str) -> Iterator[str]:
    """Yield the decoded text of a file, with line feeds as line ends."""
    with open_bytes(path) as raw:
        decoder = codecs.getincrementaldecoder(encoding)()
        held = ""
        while True:
            block = raw.read(BLOCK_BYTES // 4)
            text = held + decoder.decode(block, final=not block)
            held = ""
            if block and text.endswith("\r"):
                text, held = text[:-1], "\r"
            yield _LINE_END.sub("\n", text) if "\r" in text else text
            if not block:
                return


def transcode(path: Path, form: TextFormat, target: Path) -> None:
    """Write a copy in UTF-8 with line feeds, a single-character separator, and a header in the first line."""
    blocks = _after_lines(text_blocks(path, form.encoding), form.first)
    with target.open("w", encoding="utf-8", newline="") as out:
        if not form.has_header:
            out.write(UNIT.join(form.columns) + "\n")
        for block in _whole_lines(blocks):
            out.write(block if len(form.separator) == 1 else block.replace(form.separator, UNIT))


def requote(path: Path, form: TextFormat, target: Path, *, backslash: bool) -> None:
    """Write a copy of a UTF-8 file with quotation marks as in RFC 4180; see `records` for `backslash`.

    Raises:
        StrayQuoteError: the quotation marks cannot be parsed in this way; the message begins with the row number.
    """
    special = re.compile(f'["\n{re.escape(form.separator)}]')
    found = records(text_blocks(path, "utf-8-sig"), form.separator, backslash=backslash)
    row = -1
    with target.open("w", encoding="utf-8", newline="") as out:
        while True:
            row += 1
            try:
                fields, marks = next(found)
            except StopIteration:
                return
            except StrayQuoteError as error:
                raise StrayQuoteError(f"row {max(row, 1)}: {error}") from None
            if len(fields) > len(form.columns):
                raise StrayQuoteError(f"row {row} has {len(fields)} fields, expected {len(form.columns)}")
            if not row:
                fields, marks = [f"c{place}" for place in range(len(form.columns))], [False] * len(form.columns)
            out.write(
                form.separator.join(
                    f'"{text.replace(QUOTE, QUOTE * 2)}"' if mark or special.search(text) else text
                    for text, mark in zip(fields, marks, strict=True)
                )
                + "\n"
            )


def _after_lines(blocks: Iterator[str], count: int) -> Iterator[str]:
    """Yield the text after the first `count` lines."""
    for block in blocks:
        text = block
        while count and "\n" in text:
            text, count = text.split("\n", 1)[1], count - 1
        if not count:
            yield text


def _whole_lines(blocks: Iterator[str]) -> Iterator[str]:
    """Cut the blocks at line ends, so that no separator is split."""
    held = ""
    for block in blocks:
        text = held + block
        cut = text.rfind("\n") + 1
        held = text[cut:]
        yield text[:cut]
    yield held


@dataclass(frozen=True)
class PlainFile:
    """A text file that polars can read.

    Attributes:
        path: the file.
        separator: a single character.
        quote: the quotation mark, or None.
        lines: the line counts of the file.
    """

    path: Path
    separator: str
    quote: str | None
    lines: LineCounts


def plain_file(path: Path, form: TextFormat, folder: Path) -> PlainFile:
    """Return a file from which polars can read the rows of `path`: either `path` or a copy in `folder`.

    Raises:
        InputError: the quotation marks cannot be parsed; the message names the row.
    """
    try:
        plain = path
        if form.transcoded:
            plain = folder / "plain"
            transcode(path, form, plain)
            form = replace(form, separator=form.separator if len(form.separator) == 1 else UNIT)
        lines = count_lines(plain, form.separator, quoted=form.quote is not None)
        if lines.valid and not form.requoted:
            return PlainFile(plain, form.separator, form.quote, lines)
        if form.separator == "\t" and _split_alike(plain, form):  # in such files quotation marks are text
            return PlainFile(plain, "\t", None, count_lines(plain, "\t", quoted=False))
        faults: list[str] = []
        for backslash in (False, True):
            target = folder / f"quotes-{backslash}"
            try:
                requote(plain, form, target, backslash=backslash)
            except StrayQuoteError as error:
                faults.append(str(error))
                target.unlink(missing_ok=True)
                continue
            return PlainFile(target, form.separator, QUOTE, count_lines(target, form.separator, quoted=True))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        if is_full_disk(error):
            raise
        raise damaged(path, error) from None
    raise InputError(f'{path}: {faults[0]}; inside quotation marks, write a quotation mark twice ("").')


def _split_alike(path: Path, form: TextFormat) -> bool:
    """Return whether every line has as many separators as the header."""
    expected = len(form.columns) - 1
    with open_bytes(path) as stream:
        return all(line.count(b"\t") == expected for line in stream if line.strip())
