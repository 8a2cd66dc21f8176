"""Convert the films (title, year, genres) and users of MovieLens-1M to Parquet, for `--items` and `data.queries`.

Run: `python benchmarks/ml_1m_tables.py ../shared/data/ml-1m runs/ml-1m-tables`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl

AGES = {1: "under 18", 18: "18-24", 25: "25-34", 35: "35-44", 45: "45-49", 50: "50-55", 56: "56 and over"}


def lines(path: Path) -> list[list[str]]:
    """Read the fields of a `::` separated file in Latin-1."""
    return [line.split("::") for line in path.read_text(encoding="latin-1").splitlines() if line]


def items(source: Path) -> pl.DataFrame:
    """Build a table with one row per film."""
    rows = lines(source / "movies.dat")
    return pl.DataFrame(
        {
            "item_id": [int(row[0]) for row in rows],
            "title": [row[1].rsplit(" (", 1)[0] for row in rows],
            "year": [int(row[1].rsplit("(", 1)[1].rstrip(")")) for row in rows],
            "genres": [row[2].split("|") for row in rows],
        }
    )


def users(source: Path) -> pl.DataFrame:
    """Build a table with one row per user."""
    rows = lines(source / "users.dat")
    return pl.DataFrame(
        {
            "user_id": [int(row[0]) for row in rows],
            "gender": [row[1] for row in rows],
            "age": [AGES[int(row[2])] for row in rows],
            "occupation": [int(row[3]) for row in rows],
        }
    )


def main(source: Path, out: Path) -> None:
    """Write both tables."""
    out.mkdir(parents=True, exist_ok=True)
    for name, frame in (("items", items(source)), ("users", users(source))):
        frame.write_parquet(out / f"{name}.parquet")
        print(f"{out / name}.parquet: {len(frame):,} rows, columns {', '.join(frame.columns)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
