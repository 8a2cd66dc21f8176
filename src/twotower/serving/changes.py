"""Items that join, change and leave a catalog after training: the model as it answers then, and what is kept of it.

model/changes/changes.json         schema version, how many joined, changed and left, checksums
model/changes/changes.safetensors  codes and embeddings [n, D] of items that joined or changed; codes of those that left
model/changes/joined.parquet       ids of the items that joined, in the order of their codes N, N + 1, ...
model/changes/item_table.parquet   rows of the item table of the items that joined or changed (where there is a table)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
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

from twotower.errors import InputError
from twotower.schema import IdValues, Vocabulary, ids_of
from twotower.serving.artifact import Artifact, library_versions

Codes = NDArray[np.int64]
Mask = NDArray[np.bool_]

FOLDER = "changes"
SCHEMA_VERSION = 1


class GrownVocabulary(Vocabulary):
    """A vocabulary with ids that joined later: their codes follow, and nobody else's code moves.

    Args:
        first: the ids that were there.
        later: ids that joined, none of them in `first`.

    Raises:
        InputError: an id is there already, or repeats.
    """

    def __init__(self, first: Vocabulary, later: IdValues) -> None:
        self._first, self._later = first, Vocabulary(_as(first, later))
        if bool((first.encode(self._later.ids) >= 0).any()):
            raise InputError("vocabulary: an id that joins is there already")
        self._ids = pl.concat([first.ids, self._later.ids]).rechunk()
        self._ascending = None

    def encode(self, ids: IdValues) -> Codes:
        """See `Vocabulary.encode`."""
        wanted = ids_of(ids, "ids")
        codes = np.array(self._first.encode(wanted))  # what comes back may not be written to
        missing = np.flatnonzero(codes < 0)
        if len(missing):
            later = self._later.encode(wanted.gather(missing))
            codes[missing] = np.where(later >= 0, later + len(self._first), -1)
        return codes


@dataclass(frozen=True)
class Changes:
    """What became of a catalog after training.

    Attributes:
        joined: ids of the items that joined, in the order of their codes, which follow the trained ones.
        codes: int64 [n], ascending: items that joined, and others with another embedding or other columns.
        embeddings: float32 [n, D], theirs.
        rows: theirs in the item table, or None where there is none.
        left: int64, codes of removed items.
    """

    joined: pl.Series
    codes: Codes
    embeddings: Tensor
    rows: pl.DataFrame | None
    left: Codes

    @classmethod
    def between(cls, trained: Artifact, now: Artifact, codes: Codes, alive: Mask) -> Changes:
        """What leads from a trained model to what it is now.

        Args:
            trained: the model as it was saved.
            now: with items that joined and changed.
            codes: those items.
            alive: bool [N], False for removed ones.
        """
        table = now.item_table
        return cls(
            joined=now.items.ids.slice(len(trained.items)),
            codes=codes,
            embeddings=now.item_embeddings[torch.from_numpy(codes)],
            rows=None if table is None else table.select(pl.all().gather(codes)),
            left=np.flatnonzero(~alive),
        )

    def applied(self, trained: Artifact) -> tuple[Artifact, Mask]:
        """The model as it is now, and bool [N], False for removed items."""
        count, joined = len(trained.items), len(self.joined)
        there = int(np.searchsorted(self.codes, count))  # before it: items that were there in training
        embeddings = trained.item_embeddings
        if there:
            embeddings = embeddings.index_copy(0, torch.from_numpy(self.codes[:there]), self.embeddings[:there])
        table = trained.item_table
        if table is not None and self.rows is not None:
            table = with_rows(table, self.codes, self.rows)
        alive = np.ones(count + joined, dtype=np.bool_)
        alive[self.left] = False
        if joined:
            embeddings = torch.cat([embeddings, self.embeddings[there:]])
        return grown(trained, self.joined, embeddings, table), alive

    def write(self, folder: Path) -> None:
        """Into an empty folder, what `read` reads."""
        tensors = {
            "codes": torch.from_numpy(self.codes),
            "embeddings": self.embeddings.float().contiguous(),
            "left": torch.from_numpy(self.left),
        }
        save_file(tensors, folder / "changes.safetensors")
        pl.DataFrame({"id": self.joined}).write_parquet(folder / "joined.parquet")
        if self.rows is not None:
            self.rows.write_parquet(folder / "item_table.parquet")
        told = {
            "schema_version": SCHEMA_VERSION,
            "changed_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": library_versions(),
            **self.to_dict(),
            "checksums": {path.name: checksum(path) for path in sorted(folder.iterdir())},
        }
        (folder / "changes.json").write_text(json.dumps(told, indent=1), encoding="utf-8")

    @classmethod
    def read(cls, model: Path) -> Changes | None:
        """The changes in a model folder, verified; None where there are none.

        Raises:
            InputError: damaged, or of another version.
        """
        folder = model / FOLDER
        path = folder / "changes.json"
        if not path.is_file():
            return None
        advice = f"take {folder} away and make the changes again"
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            version, checksums = told["schema_version"], told["checksums"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not readable ({error}); {advice}") from error
        if version != SCHEMA_VERSION:
            raise InputError(f"{path}: schema version {version}, this twotower reads {SCHEMA_VERSION}; {advice}")
        for name, expected in checksums.items():
            if not (folder / name).is_file() or checksum(folder / name) != expected:
                raise InputError(f"{folder / name}: missing, or its checksum differs; {advice}")
        try:
            tensors = load_file(folder / "changes.safetensors")
        except (OSError, SafetensorError) as error:
            raise InputError(f"{folder}: not readable ({error}); {advice}") from error
        table = folder / "item_table.parquet"
        return cls(
            joined=pl.read_parquet(folder / "joined.parquet")["id"],
            codes=tensors["codes"].numpy(),
            embeddings=tensors["embeddings"],
            rows=pl.read_parquet(table) if table.name in checksums else None,
            left=tensors["left"].numpy(),
        )

    def to_dict(self) -> dict[str, Any]:
        """How many, as JSON values."""
        return {"joined": len(self.joined), "changed": len(self.codes) - len(self.joined), "left": len(self.left)}


def grown(artifact: Artifact, joined: pl.Series, embeddings: Tensor, table: pl.DataFrame | None) -> Artifact:
    """The model with the items `joined` behind the others, which nobody has interacted with in training.

    Args:
        artifact: the model before.
        joined: their ids; may be none.
        embeddings: float32 [N + n, D], of all items.
        table: of all items, or None.
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


def new_embeddings(artifact: Artifact, codes: Codes, given: pl.DataFrame, vectors: Any, what: str) -> Tensor:
    """Embeddings of items that join or change, float32 [n, D]: given, or the item tower's by their features.

    A model that compares by cosine has all its embeddings at length 1, as its towers do.

    Args:
        artifact: the model.
        codes: int64 [n], -1 for items that join: the tower has no id vector for them.
        given: what is said of them, with the declared features.
        vectors: [n, D], or None.
        what: for messages.

    Raises:
        InputError: neither vectors nor features, or a wrong shape, or not finite.
    """
    width = artifact.item_embeddings.shape[1]
    tower = artifact.towers.item_tower
    if vectors is None:
        if tower.features is None:
            raise InputError(
                f"{what}: this model knows items by their id alone, so an embedding has to be given: a column "
                f"'embedding' with {width} numbers; or train with item_tower.features"
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
        raise InputError(f"{what}: row {int(bad.nonzero()[0]) + 1}: its embedding has no direction, or is not finite")
    return F.normalize(embeddings, dim=1) if artifact.config.objective.similarity == "cosine" else embeddings


def with_rows(table: pl.DataFrame, codes: Codes, rows: pl.DataFrame) -> pl.DataFrame:
    """The table with other rows at some codes, [N'] rows; those past its end join it. `rows` has its columns."""
    more = int((codes >= len(table)).sum())
    whole = pl.concat([table, pl.DataFrame(schema=table.schema).clear(more)]) if more else table
    place = np.arange(len(whole), dtype=np.int64)
    place[codes] = len(whole) + np.arange(len(codes))
    return pl.concat([whole, rows.select(table.columns)]).select(pl.all().gather(place))


def checksum(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _as(vocabulary: Vocabulary, ids: IdValues) -> pl.Series:
    """Ids in the type of a vocabulary.

    Raises:
        InputError: they cannot be.
    """
    found = ids_of(ids, "items")
    wanted = vocabulary.ids.dtype
    try:
        return found if found.dtype == wanted else found.cast(wanted)
    except pl.exceptions.InvalidOperationError:
        raise InputError(f"items: expected ids like {vocabulary.decode([0])[0]!r}, found {found[0]!r}") from None
