"""An approximate index beside the model it answers for: built, kept in the model folder, found again.

model/index/index.json    kind, settings, recall against exact search, and checksums; of these files and of the items
model/index/...           what the kind keeps: a graph, clusters; nothing where a database has it
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from twotower.errors import InputError
from twotower.files import whole_folder
from twotower.index.ann import ApproximateIndex
from twotower.index.build import KINDS, IndexReport, build_index, load_index
from twotower.serving.artifact import Artifact, find_model, library_versions
from twotower.serving.questions import stored_histories
from twotower.serving.search import dial_of, ranker_of

FOLDER = "index"
SCHEMA_VERSION = 1

#: Settings of the dial at which recall is measured: as trained, and all the way to discovery.
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
) -> IndexReport | None:
    """Build an index for a model and keep it in its folder, in place of an older one.

    Recall is measured on known queries with the histories they have, with the popularity dial at 1 and at 0; the floor
    holds for both.

    Args:
        directory: a model folder, or the run folder around it.
        kind: exact, hnsw, ivfpq or pgvector; exact removes an approximate index.
        k: K of the recall.
        min_recall: the floor; nothing is written below it.
        queries: how many known queries are drawn.
        seed: of the draw.
        settings: of the kind, such as `effort`.

    Returns:
        What was built; None for exact search, which needs nothing.

    Raises:
        InputError: see `build_index` and `Artifact.load`.
    """
    if kind not in KINDS:
        raise InputError(f"index: unknown kind {kind!r}; expected one of {', '.join(KINDS)}")
    folder = find_model(directory)
    if kind == "exact":
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        return None
    artifact = Artifact.load(folder)
    drawn = _drawn_queries(artifact, queries, seed)
    embedded = ranker_of(artifact).embed(drawn, stored_histories(artifact, drawn))
    dial = dial_of(artifact)
    checksum = artifact.metadata["checksums"]["items.safetensors"]
    given = dict(settings or {})
    if kind == "pgvector":
        given.setdefault("table", f"twotower_{checksum[:16]}")
    index, report = build_index(
        kind,
        dial.items(artifact.item_embeddings),
        {name: dial.queries(embedded, popularity) for name, popularity in MEASURED_AT.items()},
        k=k,
        min_recall=min_recall,
        settings=given,
    )
    with whole_folder(folder / FOLDER) as target:
        index.engine.save(target)
        told = {
            "schema_version": SCHEMA_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": library_versions(),
            "items": checksum,
            "min_recall": min_recall,
            **report.to_dict(),
            "checksums": {path.name: _sha256(path) for path in sorted(target.iterdir())},
        }
        (target / "index.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    return report


def read_index_report(folder: Path) -> dict[str, Any] | None:
    """`index.json` of a model folder; None where the model has no approximate index.

    Raises:
        InputError: it is damaged, or of another version.
    """
    path = folder / FOLDER / "index.json"
    if not path.is_file():
        return None
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = told["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not readable ({error}); build it again with `twotower index`") from error
    if version != SCHEMA_VERSION:
        raise InputError(f"{path}: schema version {version}, this twotower reads {SCHEMA_VERSION}; build it again")
    return told


def load_stored_index(folder: Path, artifact: Artifact) -> ApproximateIndex | None:
    """The index in a model folder, verified; None where there is none.

    Raises:
        InputError: it is damaged, was built for other embeddings, or needs what is not installed.
    """
    told = read_index_report(folder)
    if told is None:
        return None
    where = folder / FOLDER
    if told.get("items") != artifact.metadata["checksums"]["items.safetensors"]:
        raise InputError(f"{where}: built for other item embeddings than this model's; build it again")
    for name, checksum in told["checksums"].items():
        if not (where / name).is_file() or _sha256(where / name) != checksum:
            raise InputError(f"{where / name}: missing, or its checksum differs; build it again with `twotower index`")
    return load_index(told, dial_of(artifact).items(artifact.item_embeddings), where)


def _drawn_queries(artifact: Artifact, count: int, seed: int) -> np.ndarray:
    """Known queries that have a history, int64 [at most count], ascending."""
    known = np.flatnonzero(np.diff(artifact.history_offsets) > 0)
    if not len(known):
        raise InputError("index: the model knows no query with a history, so recall cannot be measured; use exact")
    return np.sort(np.random.default_rng(seed).choice(known, size=min(count, len(known)), replace=False))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
