"""Approximate index in the model folder: building, loading, and saving with the changes of the catalog.

model/index/index.json    kind, settings, recall against exact search, and checksums of these files and of the items
model/index/...           files of the kind: a graph or clusters; none if a database stores the index
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twotower.distributed.communicator import Communicator
from twotower.distributed.launch import Coordinator
from twotower.errors import InputError
from twotower.hashing import file_sha256
from twotower.index.approximate.build import KINDS, IndexReport, build_index, load_index
from twotower.index.approximate.index import ApproximateIndex
from twotower.index.prefix import Prefix, require_width
from twotower.serving.catalog_changes import FOLDER as CHANGES
from twotower.serving.catalog_changes import CatalogChanges
from twotower.serving.folder_checks import read_description, require_names, write_description
from twotower.serving.live_catalog import LiveCatalog
from twotower.serving.model_folder import SavedModel, find_model, library_versions, read_metadata
from twotower.serving.queries import stored_histories, stored_marks
from twotower.serving.search import dial_of, ranker_of
from twotower.system.filesystem import whole_folder

FOLDER = "index"
SCHEMA_VERSION = 1
#: Largest size of an index per item, without the embedding: the links of an item at all levels of a graph.
MOST_ITEM_BYTES = 1 << 16
ADVICE = "build the index again with `twotower index`"

#: Settings of the dial at which recall is measured: as trained, and full discovery.
MEASURED_AT = {"popularity 1": 1.0, "popularity 0": 0.0}


def build_stored_index(
    directory: str | Path,
    kind: str,
    *,
    k: int = 100,
    min_recall: float | None = None,
    queries: int = 500,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    width: int | None = None,
    team: Coordinator | None = None,
) -> IndexReport | None:
    """Build an index for a model and save it in the model folder, replacing an existing one.

    Recall is measured on known queries with their histories, with the popularity dial at 1 and at 0; both must reach
    `min_recall`.

    Args:
        directory: a model folder, or the run folder that contains it.
        kind: exact, hnsw, ivfpq, int8, binary or pgvector; exact removes an approximate index.
        k: K of the recall.
        min_recall: smallest accepted recall; if it is not reached, the model folder is not changed.
        queries: number of known queries to draw.
        seed: seed of the draw.
        settings: settings of the index kind, such as `effort`.
        width: width of the vectors in the index, one of `TwoTower.widths`; its candidates are scored again at the full
            width, and recall is measured against exact search at the full width. None for the full width.
        team: the processes that build the index together, with access to the same folder; see `build_index`. None for a
            single process.

    Returns:
        Report of the index; None for exact search, which needs no index.

    Raises:
        InputError: as in `build_index` and `SavedModel.load`; the model was not trained at the width; or the kind is
            exact and the width is not the full one.
    """
    if kind not in KINDS:
        raise InputError(f"index: unknown kind {kind!r}; expected one of {', '.join(KINDS)}")
    folder, team = find_model(directory), team or Coordinator(Communicator())
    ranks = team.ranks
    if kind == "exact":
        if width is not None and width != (full := read_metadata(folder)["config"]["item_tower"]["dimension"]):
            raise InputError(
                f"index: exact search uses all {full} coordinates; for an index at width {width}, choose int8, hnsw or "
                "another kind"
            )
        if ranks.is_first:
            shutil.rmtree(folder / FOLDER, ignore_errors=True)
        return None
    if kind == "pgvector" and ranks.size > 1:
        raise InputError("torchrun: a pgvector index is built by the database; start `twotower index` without torchrun")
    team.require_shared(folder)
    artifact, changes = SavedModel.load(folder), CatalogChanges.read(folder)
    alive = None
    if changes is not None:
        artifact, alive = changes.applied(artifact)
    prefix = None if width is None else _prefix(artifact, width)
    drawn = _drawn_queries(artifact, queries, seed)
    embedded = ranker_of(artifact).embed(drawn, stored_histories(artifact, drawn), marks=stored_marks(artifact, drawn))
    dial = dial_of(artifact)
    items = artifact.metadata["checksums"]["items.safetensors"]
    given = dict(settings or {})
    if kind == "pgvector":
        given.setdefault("table", f"twotower_{items[:16]}{'' if prefix is None else f'_{prefix.width}'}")

    def build(target: Path) -> tuple[ApproximateIndex, IndexReport]:
        return build_index(
            kind,
            artifact.item_embeddings,
            {name: dial.queries(embedded, popularity) for name, popularity in MEASURED_AT.items()},
            k=k,
            min_recall=min_recall,
            settings=given,
            prefix=prefix,
            last=dial.coordinate(),
            folder=target,
            team=team,
        )

    if not ranks.is_first:
        _, report = build(Path(team.broadcast_text("index folder", "")))
        team.broadcast_text("index", "written")
        return report
    with whole_folder(folder / FOLDER) as target:
        index, report = build(Path(team.broadcast_text("index folder", str(target.resolve()))))
        if alive is not None and not alive.all():
            index.remove(np.flatnonzero(~alive))
            index.engine.save(target)
        metadata = {
            "schema_version": SCHEMA_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": library_versions(),
            "items": items,
            "changes": None if changes is None else file_sha256(folder / CHANGES / "changes.json"),
            "min_recall": min_recall,
            **report.to_dict(),
        }
        write_description(target / "index.json", metadata)
    team.broadcast_text("index", "written")
    return report


def read_index_report(folder: Path) -> dict[str, Any] | None:
    """Read `index.json` of a model folder; None if the model has no approximate index.

    Raises:
        InputError: the file is damaged or has a different schema version.
    """
    where = folder / FOLDER
    path = where / "index.json"
    if not path.is_file():
        return None
    metadata = read_description(path, SCHEMA_VERSION, ADVICE)
    if not isinstance(metadata.get("kind"), str) or not isinstance(metadata.get("settings"), dict):
        raise InputError(f"{path}: expected a kind and settings; {ADVICE}")
    require_names(where, metadata["checksums"], (), ADVICE)
    return metadata


def load_stored_index(
    folder: Path, artifact: SavedModel, changes: CatalogChanges | None = None
) -> ApproximateIndex | None:
    """Load and verify the index in a model folder; None if the model has no approximate index.

    Args:
        folder: the model folder.
        artifact: the model as it was trained.
        changes: changes of its catalog since training.

    Raises:
        InputError: the index is damaged, was built for different embeddings, or needs a package that is not installed.
    """
    metadata = read_index_report(folder)
    if metadata is None:
        return None
    where = folder / FOLDER
    if metadata.get("items") != artifact.metadata["checksums"]["items.safetensors"]:
        raise InputError(f"{where}: built for different item embeddings than this model's; build it again")
    if metadata.get("changes") != (None if changes is None else file_sha256(folder / CHANGES / "changes.json")):
        raise InputError(f"{where}: built for a different state of the catalog; build it again with `twotower index`")
    most = MOST_ITEM_BYTES + len(artifact.items) * (MOST_ITEM_BYTES + 8 * artifact.item_embeddings.shape[1])
    for name, expected in metadata["checksums"].items():
        if (where / name).stat().st_size > most:
            raise InputError(f"{where / name}: larger than an index of {len(artifact.items):,} items; {ADVICE}")
        if file_sha256(where / name) != expected:
            raise InputError(f"{where / name}: its checksum differs; {ADVICE}")
    alive = None
    if changes is not None:
        artifact, alive = changes.applied(artifact)
    width = metadata["settings"].get("width")
    try:
        prefix = None if width is None else _prefix(artifact, width)
        index = load_index(
            metadata, artifact.item_embeddings, where, alive, last=dial_of(artifact).coordinate(), prefix=prefix
        )
        found = index.engine.count()
        index.search(torch.zeros(1, index.vectors.dim), 1)  # fails if codes or widths do not match the items
    except InputError:
        raise
    except Exception as error:  # faiss raises errors of many types for untrusted files
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{where}: not readable ({text:.200}); {ADVICE}") from error
    if found != int(index.vectors.alive.sum()):
        raise InputError(
            f"{where}: the index has {found:,} items, the model {index.vectors.alive.sum():,}; build it again"
        )
    return index


def save_changes(catalog: LiveCatalog, directory: str | Path) -> dict[str, Any]:
    """Save the changes of a catalog and its index in the model folder that it was loaded from.

    The folder is replaced atomically, so a service that watches it swaps to the new catalog. Unchanged files are hard
    links to the old files. An index in a database already has the changes.

    Args:
        catalog: catalog of a retriever that was loaded from the folder with its index, and changed since.
        directory: the model folder, or the run folder that contains it.

    Returns:
        Counts of items added, changed and removed since training.

    Raises:
        InputError: the folder now has a different model, or an index that the catalog was loaded without.
    """
    folder = find_model(directory)
    metadata = read_index_report(folder)
    if read_metadata(folder)["checksums"] != catalog.trained.metadata.get("checksums"):
        raise InputError(f"{folder}: the folder now contains a different model; load it and make the changes again")
    approximate = catalog.search.approximate
    if metadata is not None and approximate is None:
        raise InputError(f"{folder / FOLDER}: this index would not include the changes; load the model with its index")
    changes = catalog.changes
    with whole_folder(folder) as target:
        for path in folder.iterdir():
            if path.name not in (FOLDER, CHANGES):
                _link(path, target / path.name)
        (target / CHANGES).mkdir()
        changes.write(target / CHANGES)
        if metadata is not None and approximate is not None:
            (target / FOLDER).mkdir()
            approximate.engine.save(target / FOLDER)
            metadata["changes"] = file_sha256(target / CHANGES / "changes.json")
            write_description(target / FOLDER / "index.json", metadata)
    return changes.to_dict()


def _link(path: Path, other: Path) -> None:
    """Link a file under another name; copy it if the file system has no hard links."""
    if path.is_dir():
        shutil.copytree(path, other)
        return
    try:
        os.link(path, other)
    except OSError:
        shutil.copy2(path, other)


def _prefix(artifact: SavedModel, width: object) -> Prefix | None:
    """Return the `Prefix` that shortens the model's embeddings to a width; None for the full width.

    Raises:
        InputError: the model was not trained at this width.
    """
    if isinstance(width, bool) or not isinstance(width, int):
        raise InputError(f"width: expected an integer, found {width!r:.40}")
    towers = artifact.towers
    require_width(width, towers.widths)
    dimension = towers.item_tower.dimension
    return None if width == dimension else Prefix(width, dimension, towers.cosine)


def _drawn_queries(artifact: SavedModel, count: int, seed: int) -> np.ndarray:
    """Draw known queries with a history, int64 [at most count], ascending."""
    known = np.flatnonzero(np.diff(artifact.history_offsets) > 0)
    if not len(known):
        raise InputError("index: the model has no query with a history, so recall cannot be measured; use --kind exact")
    return np.sort(np.random.default_rng(seed).choice(known, size=min(count, len(known)), replace=False))
