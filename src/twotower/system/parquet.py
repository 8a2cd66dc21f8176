"""Reading Parquet files by their exact paths."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from twotower.system.filesystem import require_unicode

#: Errors raised on reading a damaged Parquet file. PanicException, from a failed assertion in Rust, does not derive
#: from Exception.
#: Worker threads print the assertion to file descriptor 2 before Python sees the exception, and polars cannot turn
#: this off. The text is not suppressed: redirecting the descriptor would affect all threads of the process, and would
#: hide the line that `report_bus_errors` writes there before the process ends, and messages of C libraries on abort.
READ_ERRORS = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)


def scan_parquet(*paths: str | Path) -> pl.LazyFrame:
    """Open Parquet files lazily as one frame, with their rows in the order of `paths`.

    Polars would read the path `data[1].parquet` as a pattern, and `~/data.parquet` as a file in the home directory.

    Raises:
        InputError: a path is not valid Unicode.
    """
    files = [Path(path).absolute() for path in paths]
    for file in files:
        require_unicode(file)
    return pl.scan_parquet(files, glob=False)


def read_parquet(path: str | Path) -> pl.DataFrame:
    """Read a Parquet file; see `scan_parquet`."""
    return scan_parquet(path).collect()
