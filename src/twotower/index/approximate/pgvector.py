"""Items in PostgreSQL, searched with pgvector's HNSW index and its negative inner product operator `<#>`."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from twotower.errors import InputError
from twotower.index.catalog import IntArray, Mask

if TYPE_CHECKING:
    import psycopg


#: pgvector's limits: dimensions of an indexed vector, and hnsw.ef_search.
MAX_DIM, MAX_EFFORT = 2000, 1000
OLDEST = (0, 8)
#: Environment variable with the URL of the database that an index loaded from a model folder may connect to.
DATABASE = "TWOTOWER_DATABASE"


class PgVector:
    """One table in a database: item codes, and vectors with an HNSW index.

    The table is created in one transaction and replaces an existing table of the same name. A restricted search passes
    the allowed codes to the database, which scans the index until it has K of them or reaches its limit
    (`hnsw.iterative_scan`).

    Args:
        vectors: item vectors, float32 [N, D], D at most 2,000; row = code.
        url: database URL as libpq reads it: `postgresql://user@host/database`, or empty for the variables PGHOST,
            PGUSER, ... A password is not stored: set PGPASSWORD or use ~/.pgpass.
        table: name of the table: lower-case letters, digits and underscores.
        links: m, edges per node of the HNSW graph.
        build_effort: ef_construction, number of candidate neighbours when a node is inserted.
        effort: ef_search, size of the candidate list during search, at most 1,000.

    Raises:
        InputError: psycopg is not installed, the database cannot be reached, its pgvector extension is missing or older
            than 0.8, or the vectors are too wide.
    """

    kind = "pgvector"
    max_effort = MAX_EFFORT
    oversample = 1.0
    _connection: psycopg.Connection[tuple[Any, ...]] | None

    def __init__(
        self,
        vectors: NDArray[np.float32],
        *,
        url: str = "",
        table: str = "twotower_items",
        links: int = 16,
        build_effort: int = 64,
        effort: int = 100,
    ) -> None:
        if vectors.shape[1] > MAX_DIM:
            raise InputError(f"pgvector: an index has at most {MAX_DIM:,} dimensions, found {vectors.shape[1]:,}")
        self._start(url, table, {"links": links, "build_effort": build_effort}, effort)
        with self._cursor() as cursor:
            _require_extension(cursor)
            cursor.execute(f"DROP TABLE IF EXISTS {self._table}")
            cursor.execute(
                f"CREATE TABLE {self._table} (code bigint PRIMARY KEY, embedding vector({vectors.shape[1]}) NOT NULL)"
            )
            self._copy(cursor, np.arange(len(vectors), dtype=np.int64), vectors)
            cursor.execute(
                f"CREATE INDEX ON {self._table} USING hnsw (embedding vector_ip_ops) "
                f"WITH (m = {int(links)}, ef_construction = {int(build_effort)})"
            )
            cursor.execute(f"ANALYZE {self._table}")

    def candidates(self, queries: NDArray[np.float32], k: int, allowed: Mask | None, depth: float) -> IntArray:
        """Return candidates; see `Engine.candidates`."""
        codes_found = np.full((len(queries), k), -1, dtype=np.int64)
        effort = min(round(max(self.effort, k) * min(depth, 2.0)), MAX_EFFORT)
        where = ""
        parameters: tuple[list[int], ...] = ()
        if allowed is not None:
            where, parameters = "WHERE code = ANY(%s)", (np.flatnonzero(allowed).tolist(),)
        text = f"SELECT code FROM {self._table} {where} ORDER BY embedding <#> %s::vector LIMIT %s"
        with self._cursor() as cursor:
            cursor.execute(f"SET LOCAL hnsw.ef_search = {effort}")
            cursor.execute("SET LOCAL hnsw.iterative_scan = strict_order")
            for row, query in enumerate(queries):
                codes = cursor.execute(text, (*parameters, _literal(query), k)).fetchall()
                codes_found[row, : len(codes)] = [code for (code,) in codes]
        return codes_found

    def add(self, codes: IntArray, vectors: NDArray[np.float32]) -> None:
        """Add items; see `Engine.add`."""
        with self._cursor() as cursor:
            self._copy(cursor, codes, vectors)

    def remove(self, codes: IntArray) -> None:
        """Remove items; see `Engine.remove`."""
        with self._cursor() as cursor:
            cursor.execute(f"DELETE FROM {self._table} WHERE code = ANY(%s)", (codes.tolist(),))

    def count(self) -> int:
        """Return the number of items; see `Engine.count`."""
        with self._cursor() as cursor:
            row = cursor.execute(f"SELECT count(*) FROM {self._table}").fetchone()
            return int(row[0]) if row else 0

    def settings(self) -> dict[str, Any]:
        """Return the settings; see `Engine.settings`."""
        return {**self._settings, "effort": self.effort, "url": self._url, "table": self._table}

    def size(self) -> int:
        """Return the size in bytes of the table and its index in the database."""
        with self._cursor() as cursor:
            row = cursor.execute("SELECT pg_total_relation_size(%s::regclass)", (self._table,)).fetchone()
            return int(row[0]) if row else 0

    def save(self, folder: Path) -> None:
        """Do nothing; everything is in the database."""

    @classmethod
    def load(cls, folder: Path, settings: dict[str, Any]) -> PgVector:
        """Connect to the table named in the settings.

        A connection sends the user's name and password, and a model folder may come from an untrusted source. The
        database in the settings is therefore used only if the user has also named it, with `TWOTOWER_DATABASE`; without
        a URL in the settings, PGHOST and similar variables apply.

        Raises:
            InputError: the settings name a database other than `TWOTOWER_DATABASE`, the database cannot be reached, or
                the table does not exist.
        """
        del folder
        engine = cls.__new__(cls)
        names = ("links", "build_effort")
        url, own = _without_password(str(settings["url"])), os.environ.get(DATABASE, "")
        if url and _without_password(own) != url:
            raise InputError(
                f"pgvector: this index is in the database {url!r}; if you trust it, allow the connection with "
                f"{DATABASE}={url!r}"
            )
        numbers = {name: int(settings[name]) for name in names}
        engine._start(own if url else "", str(settings["table"]), numbers, int(settings["effort"]))
        with engine._cursor() as cursor:
            row = cursor.execute("SELECT to_regclass(%s)", (engine._table,)).fetchone()
            if row is None or row[0] is None:
                raise InputError(
                    f"{engine._where()}: no table {engine._table}; rebuild it: twotower index DIR --kind pgvector"
                )
        return engine

    def __del__(self) -> None:
        if getattr(self, "_connection", None) is not None:
            self.close()

    def close(self) -> None:
        """Close the connection; the next use opens a new one."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    def _start(self, url: str, table: str, settings: dict[str, int], effort: int) -> None:
        if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", table):
            raise InputError(f"pgvector: expected a table name of a-z, 0-9 and _, found {table!r}")
        self._settings = settings
        self._table = table
        self._full_url = url
        self._url = _without_password(url)
        self.effort = effort
        self._lock = threading.Lock()  # the threads share one connection, one transaction at a time
        self._connection = None

    @contextmanager
    def _cursor(self) -> Iterator[psycopg.Cursor[tuple[Any, ...]]]:
        """Open a cursor in its own transaction; reconnect if the connection broke since the last one."""
        import psycopg  # noqa: PLC0415  # an extra; _start would have raised an error if it were missing

        with self._lock:
            try:
                if self._connection is None or self._connection.closed or self._connection.broken:
                    self._connection = psycopg.connect(self._full_url, connect_timeout=10)
                with self._connection.transaction(), self._connection.cursor() as cursor:
                    yield cursor
            except psycopg.OperationalError as error:
                text = " ".join(str(error).split())
                raise InputError(f"{self._where()}: PostgreSQL request failed ({text})") from None

    def _copy(self, cursor: psycopg.Cursor[tuple[Any, ...]], codes: IntArray, vectors: NDArray[np.float32]) -> None:
        with cursor.copy(f"COPY {self._table} (code, embedding) FROM STDIN (FORMAT BINARY)") as copy:
            copy.write(_HEADER)
            for start in range(0, len(codes), 10_000):
                copy.write(_binary_rows(codes[start : start + 10_000], vectors[start : start + 10_000]))
            copy.write(b"\xff\xff")

    def _where(self) -> str:
        return f"pgvector at {self._url or 'the address in PGHOST'}"


#: The header of PostgreSQL's binary COPY format: signature, flags, length of the header extension.
_HEADER = b"PGCOPY\n\xff\r\n\x00" + b"\x00" * 8


def _binary_rows(codes: IntArray, vectors: NDArray[np.float32]) -> bytes:
    """Encode rows (bigint, vector) in PostgreSQL's binary COPY format, big-endian; a vector is width, 0, floats."""
    width = vectors.shape[1]
    row = np.dtype(
        [
            ("fields", ">i2"),
            ("code_size", ">i4"),
            ("code", ">i8"),
            ("vector_size", ">i4"),
            ("dim", ">i2"),
            ("unused", ">i2"),
            ("values", ">f4", (width,)),
        ]
    )
    rows = np.zeros(len(codes), dtype=row)
    rows["fields"], rows["code_size"], rows["code"] = 2, 8, codes
    rows["vector_size"], rows["dim"], rows["values"] = 4 + 4 * width, width, vectors
    return rows.tobytes()


def _literal(vector: NDArray[np.float32]) -> str:
    # repr of a float32 converted to float64 has more digits than needed, and is exact.
    return "[" + ",".join(map(repr, vector.tolist())) + "]"


def _without_password(url: str) -> str:
    try:
        from psycopg.conninfo import conninfo_to_dict, make_conninfo  # noqa: PLC0415
    except ImportError:
        raise InputError("pgvector: this index needs psycopg; pip install 'twotower[pgvector]'") from None
    import psycopg  # noqa: PLC0415

    try:
        parts = conninfo_to_dict(url)
    except psycopg.ProgrammingError as error:
        raise InputError(
            f"pgvector: not a database URL ({' '.join(str(error).split())}); "
            "expected something like postgresql://user@host/database"
        ) from None
    parts.pop("password", None)
    return make_conninfo("", **parts)


def _require_extension(cursor: psycopg.Cursor[tuple[Any, ...]]) -> None:
    query = "SELECT default_version, installed_version FROM pg_available_extensions WHERE name = 'vector'"
    row = cursor.execute(query).fetchone()
    if row is None:
        raise InputError(
            "pgvector: this PostgreSQL has no extension 'vector'; install the pgvector package for its version"
        )
    version = row[1] or row[0]
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise InputError(f"pgvector: expected version 0.8 or newer, found {version}; upgrade the extension")
    cursor.execute("CREATE EXTENSION IF NOT EXISTS vector")
