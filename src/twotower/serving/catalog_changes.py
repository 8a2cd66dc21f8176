"""Items added, changed or removed after training: checked edits, their codes and table rows, and the files.

model/changes/changes.json         schema version, counts of added, changed and removed items, checksums
model/changes/changes.safetensors  codes and embeddings [n, D] of added and changed items; codes of removed items
model/changes/joined.parquet       ids of the added items, in the order of their codes N, N + 1, ...
model/changes/item_table.parquet   rows of the item table of added and changed items (if there is a table)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from twotower.data.io.id_lists import ids_like
from twotower.data.io.readers import as_polars
from twotower.data.schema.columns import USUAL_NAMES, usual_column
from twotower.data.schema.vocabulary import Codes, IdValues, Vocabulary, ids_of
from twotower.distributed.row_files import stored_shapes
from twotower.errors import InputError
from twotower.hashing import file_sha256
from twotower.serving.folder_checks import parquet_rows, read_description, require_names, write_description
from twotower.serving.model_folder import SavedModel, library_versions
from twotower.system.parquet import read_parquet

Mask = NDArray[np.bool_]

FOLDER = "changes"
SCHEMA_VERSION = 1


class GrownVocabulary(Vocabulary):
    """A vocabulary with ids added later: their codes follow the existing codes, which stay the same.

    Args:
        first: the existing ids.
        later: the added ids, none of them in `first`.

    Raises:
        InputError: an added id already exists or is repeated.
    """

    def __init__(self, first: Vocabulary, later: IdValues) -> None:
        self._first, self._later = first, Vocabulary(_as(first, later))
        if bool((first.encode(self._later.ids) >= 0).any()):
            raise InputError("vocabulary: an added id already exists")
        self._ids = pl.concat([first.ids, self._later.ids]).rechunk()
        self._ascending = None

    def encode(self, ids: IdValues) -> Codes:
        """Convert ids to codes; see `Vocabulary.encode`."""
        wanted = ids_of(ids, "ids")
        codes = np.array(self._first.encode(wanted))  # the result may be read-only
        missing = np.flatnonzero(codes < 0)
        if len(missing):
            later = self._later.encode(wanted.gather(missing))
            codes[missing] = np.where(later >= 0, later + len(self._first), -1)
        return codes


@dataclass(frozen=True)
class CatalogChanges:
    """Changes of a catalog since training.

    Attributes:
        joined: ids of added items, in the order of their codes, which follow the codes of the trained items.
        codes: codes of added items, and of items whose embedding or columns changed, int64 [n], ascending.
        embeddings: embeddings of these items, float32 [n, D].
        rows: rows of these items in the item table, or None if there is no table.
        left: int64, codes of removed items.
    """

    joined: pl.Series
    codes: Codes
    embeddings: Tensor
    rows: pl.DataFrame | None
    left: Codes

    @classmethod
    def between(cls, trained: SavedModel, now: SavedModel, codes: Codes, alive: Mask) -> CatalogChanges:
        """Compute the changes from a trained model to its current state.

        Args:
            trained: the model as it was saved.
            now: the model with added and changed items.
            codes: codes of the added and changed items.
            alive: bool [N], False for removed items.
        """
        table = now.item_table
        return cls(
            joined=now.items.ids.slice(len(trained.items)),
            codes=codes,
            embeddings=now.item_embeddings[torch.from_numpy(codes)],
            rows=None if table is None else table.select(pl.all().gather(codes)),
            left=np.flatnonzero(~alive),
        )

    def applied(self, trained: SavedModel) -> tuple[SavedModel, Mask]:
        """Return the changed model, and a mask bool [N] that is False for removed items.

        Raises:
            InputError: the changes belong to a different model.
        """
        count, joined = len(trained.items), len(self.joined)
        added = self.codes[self.codes >= count]
        if (
            not np.array_equal(added, np.arange(count, count + joined))
            or (len(self.left) and int(self.left.max()) >= count + joined)
            or self.embeddings.shape[1] != trained.item_embeddings.shape[1]
            or (self.rows is not None) != (trained.item_table is not None)
            or (
                self.rows is not None
                and trained.item_table is not None
                and self.rows.schema != trained.item_table.schema
            )
        ):
            raise InputError(f"{FOLDER}: changes of a different model; delete the folder and make the changes again")
        split = int(np.searchsorted(self.codes, count))  # codes before it are trained items
        embeddings = trained.item_embeddings
        if split:
            embeddings = embeddings.index_copy(0, torch.from_numpy(self.codes[:split]), self.embeddings[:split])
        table = trained.item_table
        if table is not None and self.rows is not None:
            table = with_rows(table, self.codes, self.rows)
        alive = np.ones(count + joined, dtype=np.bool_)
        alive[self.left] = False
        if joined:
            embeddings = torch.cat([embeddings, self.embeddings[split:]])
        return with_added_items(trained, self.joined, embeddings, table), alive

    def write(self, folder: Path) -> None:
        """Write, into an empty folder, the files that `read` reads."""
        tensors = {
            "codes": torch.from_numpy(self.codes),
            "embeddings": self.embeddings.float().contiguous(),
            "left": torch.from_numpy(self.left),
        }
        save_file(tensors, folder / "changes.safetensors")
        pl.DataFrame({"id": self.joined}).write_parquet(folder / "joined.parquet")
        if self.rows is not None:
            self.rows.write_parquet(folder / "item_table.parquet")
        metadata = {
            "schema_version": SCHEMA_VERSION,
            "changed_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": library_versions(),
            **self.to_dict(),
        }
        write_description(folder / "changes.json", metadata)

    @classmethod
    def read(cls, model: Path) -> CatalogChanges | None:
        """Read and verify the changes in a model folder; None if there are no changes.

        Raises:
            InputError: a file is damaged or has a different schema version.
        """
        folder = model / FOLDER
        path = folder / "changes.json"
        if not path.is_file():
            return None
        advice = f"delete {folder} and make the changes again"
        checksums = read_description(path, SCHEMA_VERSION, advice)["checksums"]
        needed = ("changes.safetensors", "joined.parquet")
        require_names(folder, checksums, needed, advice)
        for name, expected in checksums.items():
            if file_sha256(folder / name) != expected:
                raise InputError(f"{folder / name}: its checksum differs; {advice}")
        try:
            return cls._loaded(folder, has_table="item_table.parquet" in checksums)
        except (
            *(OSError, ValueError, KeyError, IndexError, TypeError, SafetensorError),
            *(pl.exceptions.PolarsError, pl.exceptions.PanicException),
        ) as error:
            text = " ".join(str(error).split())
            raise InputError(f"{folder}: not readable ({text:.200}); {advice}") from error

    @classmethod
    def _loaded(cls, folder: Path, *, has_table: bool) -> CatalogChanges:
        """Check that the sizes of the files agree, then read them."""
        joined, table = folder / "joined.parquet", folder / "item_table.parquet"
        count = stored_shapes(folder / "changes.safetensors")[0]["codes"].shape[0]
        if parquet_rows(joined) > count or (has_table and parquet_rows(table) != count):
            raise ValueError(f"expected {count:,} rows in {table.name}, and at most as many in {joined.name}")
        tensors = load_file(folder / "changes.safetensors")
        found = cls(
            joined=read_parquet(joined)["id"],
            codes=tensors["codes"].numpy(),
            embeddings=tensors["embeddings"],
            rows=read_parquet(table) if has_table else None,
            left=tensors["left"].numpy(),
        )
        found.require_consistent()
        return found

    def require_consistent(self) -> None:
        """Check that the codes ascend, and that every code has an embedding.

        Raises:
            ValueError: the codes or the embeddings are inconsistent.
        """
        codes, left = self.codes, self.left
        if codes.dtype != np.int64 or left.dtype != np.int64 or self.embeddings.dtype != torch.float32:
            raise ValueError("changes.safetensors: expected int64 codes and float32 embeddings")
        if self.embeddings.ndim != 2 or codes.ndim != 1 or left.ndim != 1 or len(self.embeddings) != len(codes):
            raise ValueError("changes.safetensors: expected one embedding for each code")
        if bool((codes[1:] <= codes[:-1]).any()) or (len(codes) and codes[0] < 0) or (len(left) and left.min() < 0):
            raise ValueError("changes.safetensors: expected ascending, non-negative codes")

    def to_dict(self) -> dict[str, Any]:
        """Count added, changed and removed items, as JSON values."""
        return {"joined": len(self.joined), "changed": len(self.codes) - len(self.joined), "left": len(self.left)}


def with_added_items(
    artifact: SavedModel, joined: pl.Series, embeddings: Tensor, table: pl.DataFrame | None
) -> SavedModel:
    """Append items to a model; their training count is 0.

    Args:
        artifact: the model to extend.
        joined: ids of the added items; may be empty.
        embeddings: embeddings of all items, float32 [N + n, D].
        table: item table of all items, or None.
    """
    if not len(joined):
        return dataclasses.replace(artifact, item_embeddings=embeddings, item_table=table)
    return dataclasses.replace(
        artifact,
        items=GrownVocabulary(artifact.items, joined),
        item_embeddings=embeddings,
        item_counts=torch.cat([artifact.item_counts, artifact.item_counts.new_zeros(len(joined))]),
        item_table=table,
    )


def new_embeddings(artifact: SavedModel, codes: Codes, given: pl.DataFrame, vectors: Any, what: str) -> Tensor:
    """Return embeddings of added or changed items, float32 [n, D], as given or computed by the item tower.

    If the model uses cosine similarity, embeddings are normalised to length 1, as in the towers.

    Args:
        artifact: the model.
        codes: int64 [n], -1 for added items, for which the tower has no id vector.
        given: columns of the items, with the declared features.
        vectors: embeddings [n, D]; None to compute them from the features. If the model has no features, known items
            keep their embeddings, which do not depend on columns.
        what: subject of error messages.

    Raises:
        InputError: vectors and features are both missing, a shape is wrong, or a value is not finite.
    """
    width = artifact.item_embeddings.shape[1]
    tower = artifact.towers.item_tower
    if vectors is None:
        if tower.features is None and bool((codes >= 0).all()):
            return artifact.item_embeddings[torch.from_numpy(np.array(codes, dtype=np.int64))].float()
        if tower.features is None:
            raise InputError(
                f"{what}: this model represents items by their id alone, so give embeddings: a column 'embedding' "
                f"with {width} numbers; or train with item_tower.features"
            )
        known = torch.from_numpy(np.where(codes < tower.num_items, codes, -1))
        return artifact.towers.embed_new_items(given, known)
    try:
        embeddings = torch.as_tensor(np.array(vectors, dtype=np.float32))
    except (ValueError, TypeError) as error:
        raise InputError(f"{what}: embeddings: expected {width} numbers for each item ({error})") from None
    if embeddings.shape != (len(given), width):
        raise InputError(f"{what}: embeddings: expected shape [{len(given)}, {width}], found {list(embeddings.shape)}")
    bad = ~embeddings.isfinite().all(1)
    if artifact.config.objective.similarity == "cosine":
        bad |= embeddings.norm(dim=1) == 0
    if bool(bad.any()):
        raise InputError(f"{what}: row {int(bad.nonzero()[0]) + 1}: its embedding is zero, or not finite")
    return F.normalize(embeddings, dim=1) if artifact.config.objective.similarity == "cosine" else embeddings


def with_rows(table: pl.DataFrame, codes: Codes, rows: pl.DataFrame) -> pl.DataFrame:
    """Replace the rows of a table at some codes, and append rows with codes past its end; columns must match."""
    more = int((codes >= len(table)).sum())
    extended = pl.concat([table, pl.DataFrame(schema=table.schema).clear(more)]) if more else table
    place = np.arange(len(extended), dtype=np.int64)
    place[codes] = len(extended) + np.arange(len(codes))
    return pl.concat([extended, rows.select(table.columns)]).select(pl.all().gather(place))


def _as(vocabulary: Vocabulary, ids: IdValues) -> pl.Series:
    """Cast ids to the type of a vocabulary's ids.

    Raises:
        InputError: the ids cannot be cast.
    """
    found = ids_of(ids, "items")
    wanted = vocabulary.ids.dtype
    try:
        return found if found.dtype == wanted else found.cast(wanted)
    except pl.exceptions.InvalidOperationError:
        raise InputError(f"items: expected ids like {vocabulary.decode([0])[0]!r}, found {found[0]!r}") from None


#: Name of the column with embeddings, in a frame or file.
EMBEDDING = "embedding"


@dataclass(frozen=True)
class CatalogEdit:
    """Checked items to add or change.

    Attributes:
        ids: ids of the items.
        codes: int64 [n], their codes; -1 for an id that is new to the vocabulary.
        embeddings: embeddings of the items, float32 [n, D].
        rows: rows of the items in the item table, or None if there is no table.
    """

    ids: pl.Series
    codes: Codes
    embeddings: Tensor
    rows: pl.DataFrame | None

    @classmethod
    def of(cls, artifact: SavedModel, alive: Mask, items: Any, embeddings: Any, *, join: bool) -> CatalogEdit:
        """Check items given as a frame or as rows.

        Args:
            artifact: the model in its current state.
            alive: bool [N], the items that are now in the catalog.
            items: a data frame or a list of dicts with ids and columns of the item table.
            embeddings: [n, D]; None to take them from the column `embedding` or, without this column, to compute them
                from the items' features.
            join: True to add items, False to change existing ones.

        Raises:
            InputError: there are no ids; an id is repeated, already exists (add) or does not exist (change); a value
                does not fit its column; embeddings are missing or have the wrong shape.
        """
        what = "items to add" if join else "items to change"
        frame = _as_frame(items, what)
        column = _id_column(frame, what)
        ids = ids_like(ids_of(frame[column], what), artifact.items, f"{what}: column {column!r}")
        if ids.null_count() or ids.n_unique() < len(ids):
            raise InputError(f"{what}: column {column!r}: expected every id once, found a null or repeated id")
        codes = artifact.items.encode(ids)
        exists = (codes >= 0) & alive[np.maximum(codes, 0)]
        if bool((exists if join else ~exists).any()):
            wrong = ids[int(np.flatnonzero(exists if join else ~exists)[0])]
            raise InputError(
                f"{what}: {wrong!r} is in the catalog already; update it instead"
                if join
                else f"{what}: {wrong!r} is not in the catalog; add it instead"
            )
        if embeddings is None and EMBEDDING in frame.columns:
            embeddings = frame[EMBEDDING].to_list()
        rows = None if artifact.item_table is None else _rows(artifact.item_table, frame, codes, ids, what)
        completed = frame if rows is None else _overlaid(frame, rows)
        return cls(ids, codes, new_embeddings(artifact, codes, completed, embeddings, what), rows)


def leaving(artifact: SavedModel, alive: Mask, ids: Sequence[Any]) -> Codes:
    """Return the codes of items to remove, each once.

    Raises:
        InputError: `ids` is empty or a single id, or an id is not in the catalog.
    """
    if isinstance(ids, str) or not len(ids):
        raise InputError(f"items to remove: expected a list of item ids, found {ids!r}")
    codes = artifact.items.encode(list(ids))
    gone = (codes < 0) | ~alive[np.maximum(codes, 0)]
    if bool(gone.any()):
        raise InputError(f"items to remove: {list(ids)[int(np.flatnonzero(gone)[0])]!r} is not in the catalog")
    return np.unique(codes)


def _as_frame(items: Any, what: str) -> pl.DataFrame:
    if isinstance(items, Sequence) and not isinstance(items, str) and all(isinstance(row, Mapping) for row in items):
        try:
            items = pl.DataFrame(list(items), infer_schema_length=None)
        except (TypeError, ValueError, pl.exceptions.PolarsError) as error:
            raise InputError(f"{what}: the rows cannot form one table ({str(error).splitlines()[0]})") from None
    frame = as_polars(items, what)
    if not len(frame):
        raise InputError(f"{what}: expected at least one item, found none")
    return frame


def _id_column(frame: pl.DataFrame, what: str) -> str:
    column = usual_column(frame.columns, (("id",), *USUAL_NAMES["item"]), "item", what)
    if column is None:
        raise InputError(f"{what}: expected a column of item ids (item_id, item, id), found {', '.join(frame.columns)}")
    return column


def _rows(table: pl.DataFrame, frame: pl.DataFrame, codes: Codes, ids: pl.Series, what: str) -> pl.DataFrame:
    """Build rows of the item table: each value is from the frame, else from the table, else null."""
    # New items read row 0 as a placeholder; `known` then replaces its values with null.
    known = pl.Series(codes >= 0)
    held = table.select(pl.all().gather(np.where(codes >= 0, codes, 0)))
    columns = []
    for name, dtype in table.schema.items():
        before = held.select(pl.when(known).then(pl.col(name)).alias(name)).to_series()
        if name in frame.columns:
            try:
                columns.append(frame[name].cast(dtype, strict=True).alias(name))
            except pl.exceptions.PolarsError as error:
                reason = str(error).splitlines()[0]
                raise InputError(f"{what}: column {name!r}: expected {dtype} ({reason})") from None
        elif usual_column([name], USUAL_NAMES["item"], "item", what) and dtype == ids.dtype:
            columns.append(ids.alias(name))
        else:
            columns.append(before)
    return pl.DataFrame(columns)


def _overlaid(frame: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """Complete the frame with the columns of the item table."""
    return frame.with_columns(rows[name] for name in rows.columns)
