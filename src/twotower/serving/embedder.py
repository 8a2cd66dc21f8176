"""Embeddings of queries or items in Ray, Spark and process pools, computed by an object that is pickled as a path."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from twotower.data.io.readers import as_polars
from twotower.data.schema.columns import USUAL_NAMES, usual_column
from twotower.data.schema.vocabulary import listed
from twotower.errors import InputError
from twotower.index.prefix import require_width
from twotower.serving.catalog_changes import FOLDER, new_embeddings
from twotower.serving.model_folder import find_model
from twotower.serving.queries import unanswerable
from twotower.serving.request_tables import RequestColumns
from twotower.serving.retriever import Retriever

Side = Literal["queries", "items"]


class Embedder:
    """Embedder for queries or items of a saved model, one batch of rows at a time, without training code.

    It is called with a batch and returns the batch with one more column, for Ray Data's `map_batches`, Spark's
    `mapInPandas` and process pools. It is pickled as the path of the model folder, and every process opens the folder
    once, at its first batch. The folder must have the same path in all processes.

    A batch is a polars, pandas or pyarrow table, or a dict of columns. The columns of queries are found as in
    `recommend_file`: query ids (`query`, `user_id`, ...), `history` with lists of item ids, oldest first, and the
    columns of the model's query_tower.context and query_tower.features. Without a history, the history of a known id in
    the data is used; without values of its features, the values known from training are used.
    Columns of items are ids (`item`, `item_id`, ...) and, for items that are not in the catalog, the columns of
    item_tower.features.

    An embedding has D numbers, float32, or more if the score has additional coordinates, such as an item bias or a
    recent prior (`TwoTower.width`); the score is the inner product of the embeddings of a query and an item. The type
    of the column is `Array(Float32, D)` in polars, a fixed-size list in pyarrow, an array per row in pandas, and an
    array [rows, D] in a dict. Items of the catalog have exactly the embeddings of the model folder. A query has the
    embedding that `Retriever` searches with; between batches of different sizes it may differ in the last digits,
    because matrix products round differently.

    Args:
        model: a model folder, or the run folder that contains it.
        side: "queries" or "items".
        unknown: what to do with a row about which the model knows nothing: "null" for a null embedding (NaN in a dict),
            "error" for an `InputError`.
        column: name of the new column.
        width: number of coordinates, one of the widths that the model was trained at (`item_tower.nested`), for a
            vector database at this width; see `TwoTower.at_width`. None for all D.

    Raises:
        InputError: there is no model folder, or an argument is unknown.

    Example:
        embed = tt.serving.Embedder("my-model")
        embed(pl.DataFrame({"user_id": ["u1", "u2"]}))
        ray.data.read_parquet("users/").map_batches(embed, batch_format="pyarrow")
        spark_frame.mapInPandas(embed.each, "user_id string, embedding array<float>")
    """

    def __init__(
        self,
        model: str | Path,
        side: Side = "queries",
        *,
        unknown: Literal["null", "error"] = "null",
        column: str = "embedding",
        width: int | None = None,
    ) -> None:
        for name, value, expected in (
            ("side", side, ("queries", "items")),
            ("unknown", unknown, ("null", "error")),
        ):
            if value not in expected:
                raise InputError(f"{name}: {value!r}; expected {listed(list(expected))}")
        self.folder = str(find_model(model).resolve())
        self.side, self.unknown, self.column, self.width = side, unknown, column, width
        self._version = _version(self.folder)

    def __call__(self, batch: Any) -> Any:
        """Add the column of embeddings to a batch; return a table of the same kind, with the same rows.

        Raises:
            InputError: the batch is not a table, has no column that identifies its rows, or already has the new column;
                a value has the wrong type; a row is unknown and `unknown` is "error"; the model was not trained at the
                width; or the model folder was replaced after this object was made, so that different batches would have
                embeddings of different models.
        """
        frame = _frame(batch)
        if self.column in frame.columns:
            raise InputError(f"batch: already has a column {self.column!r}; give a different name with column=")
        retriever = _opened(self.folder, self._version)
        embed = _embed_queries if self.side == "queries" else _embed_items
        towers = retriever.artifact.towers
        if self.width is not None:
            require_width(self.width, towers.widths)
        embeddings, known = embed(retriever, frame, must_know=self.unknown == "error")
        if self.width is not None:
            embeddings = towers.at_width(torch.from_numpy(embeddings), self.width).numpy()
        return _with_column(batch, self.column, embeddings, known)

    def each(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Add the embeddings to each batch of an iterator, as Spark's `mapInPandas` and `mapInArrow` pass them."""
        for batch in batches:
            yield self(batch)


@lru_cache(maxsize=2)
def _opened(folder: str, version: str) -> Retriever:
    """Open a model once in a process; an engine may unpickle the embedder for every batch.

    Raises:
        InputError: the folder has a different version.
    """
    retriever = Retriever.load(folder, exact=True)
    # Compared after opening: a folder replaced before has a different version, and a later replacement does no harm.
    if _version(folder) != version:
        raise InputError(f"{folder}: the model was replaced after this Embedder was made; make a new Embedder")
    return retriever


def _version(folder: str) -> str:
    """Compute a checksum over the metadata of the model and of its catalog changes, which list the file checksums."""
    files = Path(folder) / "metadata.json", Path(folder) / FOLDER / "changes.json"
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files if path.is_file())).hexdigest()


def _embed_queries(
    retriever: Retriever, frame: pl.DataFrame, *, must_know: bool
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Embed the queries of a table, float32 [rows, D], with the mask of the rows that the model can answer."""
    artifact = retriever.artifact
    inputs = getattr(retriever.ranker.towers.query_tower, "features", None)
    columns = RequestColumns.of(
        frame.schema,
        "batch",
        context=retriever.context_columns,
        features=() if inputs is None else inputs.table.features.columns,
        text=retriever.text_input,
    )
    if not columns.names:
        columns.require_ids_or_histories(frame.columns, retriever.text_input)
    every = columns.queries(artifact, frame.select(columns.names))
    known = every.answerable(artifact)
    if must_know and not known.all():
        row = int(np.flatnonzero(~known)[0])
        reason = unanswerable(artifact, int(every.codes[row]), has_history=columns.history is not None)
        raise InputError(f"batch: row {row + 1} (query {every.ids[row]!r}): {reason}")
    batch = every.select(known)
    embeddings = np.full((len(frame), artifact.towers.width), np.nan, dtype=np.float32)
    embeddings[known] = retriever.embed(
        batch.codes, batch.histories, batch.features, context=batch.context, marks=batch.marks
    ).numpy()
    return embeddings, known


def _embed_items(
    retriever: Retriever, frame: pl.DataFrame, *, must_know: bool
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Embed the items of a table, float32 [rows, D], with the mask of the rows that have an embedding."""
    artifact = retriever.artifact
    features = artifact.towers.item_tower.features
    declared = [] if features is None else features.table.features.columns
    ids = usual_column([name for name in frame.columns if name not in declared], USUAL_NAMES["item"], "item", "batch")
    complete = bool(declared) and all(name in frame.columns for name in declared)
    if ids is None and not complete:
        raise InputError(
            f"batch: expected a column of item ids (item, item_id, ...){' or of item features' if declared else ''}; "
            f"found {listed(frame.columns)}"
        )
    codes = np.full(len(frame), -1, dtype=np.int64)
    if ids is not None:
        try:
            codes = artifact.items.encode(frame[ids])
        except InputError as error:
            raise InputError(f"batch: column {ids!r}: {error}") from None
    known = (codes >= 0) & retriever.catalog.alive[codes]
    embeddings = np.full((len(frame), artifact.item_embeddings.shape[1]), np.nan, dtype=np.float32)
    embeddings[known] = artifact.item_embeddings[codes[known]].numpy()
    new = codes < 0
    if complete and new.any():
        rows = frame.filter(pl.Series(new))
        embeddings[new] = new_embeddings(artifact, codes[new], rows, None, "batch").numpy()
        known |= new
    if must_know and not known.all():
        row = int(np.flatnonzero(~known)[0])
        hint = "give its features" if declared and not complete else "expected an item of the catalog"
        raise InputError(
            f"batch: row {row + 1} (item {frame[ids][row] if ids else None!r}): not in the catalog; {hint}"
        )
    return embeddings, known


def _frame(batch: Any) -> pl.DataFrame:
    """Convert a batch to a frame; columns of a dict may be lists, or arrays of numbers, text or lists."""
    if isinstance(batch, pl.LazyFrame):
        raise InputError("batch: expected a table, found a LazyFrame; collect it, or pass its slices")
    if isinstance(batch, Mapping):
        batch = {name: _listed(values) for name, values in batch.items()}
    return as_polars(batch, "batch")


def _listed(values: Any) -> Any:
    """Convert an array of Python objects, as engines pass text and lists, to a list."""
    if isinstance(values, np.ndarray) and (values.dtype == object or values.ndim > 1):
        return [one.tolist() if isinstance(one, np.ndarray) else one for one in values]
    return values


def _with_column(batch: Any, name: str, embeddings: NDArray[np.float32], known: NDArray[np.bool_]) -> Any:
    """Return a batch with one more column, of the same type as the given batch."""
    if isinstance(batch, Mapping):
        return {**batch, name: embeddings}
    if type(batch).__module__.split(".")[0] == "pandas":
        rows = [row if ok else None for row, ok in zip(embeddings, known.tolist(), strict=True)]
        # An object array, because pandas would treat a list of arrays of equal length as a table.
        cells = np.empty(len(rows), dtype=object)
        cells[:] = rows
        return batch.assign(**{name: cells})
    values = pl.Series(name, embeddings, dtype=pl.Array(pl.Float32, embeddings.shape[1]))
    if not known.all():
        values = pl.select(pl.when(pl.Series(known)).then(values).alias(name)).to_series()
    if isinstance(batch, pl.DataFrame):
        return batch.with_columns(values)
    return batch.append_column(name, values.to_arrow())
