"""Parsers of the original MovieLens files: latin-1 text without a header, fields separated by ``::``, ``|`` or tabs."""

from __future__ import annotations

import polars as pl

from twotower.errors import InputError

GENRES = (
    *(
        "unknown",
        "Action",
        "Adventure",
        "Animation",
        "Children's",
        "Comedy",
        "Crime",
        "Documentary",
        "Drama",
        "Fantasy",
    ),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
RATINGS = ("user_id", "movie_id", "rating", "timestamp")
USERS_1M = ("user_id", "gender", "age", "occupation", "zip_code")
USERS_100K = ("user_id", "age", "gender", "occupation", "zip_code")


def fields(raw: bytes, separator: str, names: tuple[str, ...], where: str) -> pl.DataFrame:
    """Parse a latin-1 file without a header into a frame of strings.

    Raises:
        InputError: a row has too few or too many fields.
    """
    rows = [line.split(separator) for line in raw.decode("latin-1").splitlines() if line.strip()]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise InputError(
                f"{where}: row {number} has {len(row)} fields, expected {len(names)} ({', '.join(names)})."
            )
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")


def ratings(raw: bytes, separator: str, where: str) -> pl.DataFrame:
    """Parse ratings.dat or u.data to integer columns: user_id, movie_id, rating, timestamp."""
    return fields(raw, separator, RATINGS, where).cast(pl.Int64)


def movies_1m(raw: bytes, where: str) -> pl.DataFrame:
    """Parse movies.dat to columns: movie_id, title, year, and genres (in one string, separated by spaces)."""
    frame = fields(raw, "::", ("movie_id", "title", "genres"), where)
    return _titled(frame.with_columns(pl.col("genres").str.replace_all("|", " ", literal=True)))


def users_1m(raw: bytes, where: str) -> pl.DataFrame:
    """Parse users.dat to columns: user_id, gender, age (lower bound of the age group), occupation (code), zip_code."""
    return fields(raw, "::", USERS_1M, where).with_columns(pl.col("user_id", "age", "occupation").cast(pl.Int64))


def movies_100k(raw: bytes, where: str) -> pl.DataFrame:
    """Parse u.item to columns: movie_id, title, year, and genres (in one string, separated by spaces)."""
    frame = fields(raw, "|", ("movie_id", "title", "released", "video", "url", *GENRES), where)
    flags = [pl.when(pl.col(g) == "1").then(pl.lit(g)) for g in GENRES]
    return _titled(frame.select("movie_id", "title", genres=pl.concat_str(flags, separator=" ", ignore_nulls=True)))


def users_100k(raw: bytes, where: str) -> pl.DataFrame:
    """Parse u.user to columns: user_id, age, gender, occupation, zip_code."""
    return fields(raw, "|", USERS_100K, where).with_columns(pl.col("user_id", "age").cast(pl.Int64))


def _titled(frame: pl.DataFrame) -> pl.DataFrame:
    """Move the year, in parentheses after the title, to its own column."""
    year = pl.col("title").str.extract(r"\((\d{4})\)\s*$").cast(pl.Int64)
    title = pl.col("title").str.replace(r"\s*\(\d{4}\)\s*$", "")
    return frame.select(pl.col("movie_id").cast(pl.Int64), title=title, year=year, genres="genres")
