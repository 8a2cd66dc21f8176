"""The model folder: safetensors, Parquet and JSON, written atomically, verified when read, never unpickled.

metadata.json          schema version, config, data account and fingerprint, split, metrics, versions, checksums
SHA256SUMS             checksum of metadata.json (older versions wrote none)
towers.safetensors     weights of both towers
items.safetensors      item embeddings [N, D] float32, ready for an index, and training counts [N]
histories.safetensors  history of each query: offsets [Q+1], item codes, oldest first; codes of the gaps before them or
                       of their event types, if the query tower reads these
queries.parquet        query vocabulary, row = code
items.parquet          item vocabulary
item_table.parquet     features and titles of the items, row = code (if the data has any)
rows.safetensors       which rows were trained on, and their timestamps, to continue training; the web service reads
                       only the number of training rows of a query
item_features.json     fitted encoders of the declared features, with the encoded features of every item in
                       item_features.safetensors; query_features is the same for queries (if features are declared);
                       context_features has no rows
context.parquet        context of each row of the histories, to continue training (if context is declared), and
                       test_context.parquet, the context of a continued model's test rows followed by its validation
                       rows; neither is read for serving
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor

from twotower.config.run import Config
from twotower.data.eligibility import Eligibility
from twotower.data.loading.gaps import GAP_CODES
from twotower.data.schema.vocabulary import Vocabulary, read_vocabulary
from twotower.distributed.communicator import Communicator
from twotower.distributed.row_files import save_rows, stored_tensors, write_folder
from twotower.errors import InputError
from twotower.features.feature_set import EncodedTable
from twotower.hashing import file_sha256
from twotower.serving.folder_checks import (
    ADVICE,
    NEEDED,
    OPTIONAL,
    read_description,
    require_model_names,
    require_sizes,
    require_weights,
    write_description,
)
from twotower.system.filesystem import require_replaceable, whole_folder
from twotower.system.parquet import read_parquet
from twotower.towers import TwoTower, build_towers
from twotower.towers.sharded_lookup import shared_tables_of
from twotower.towers.tables import tables_without_memory

SCHEMA_VERSION = 1
FOLDER = "model"
#: Folders of a run with `training.refit`: the model that was evaluated, and checkpoints and logs of the refit.
VALIDATED, REFIT = "validated", "refit"
ROWS = "rows.safetensors"
ITEMS = "items.safetensors"
TOWERS = "towers.safetensors"


@dataclass(frozen=True)
class SavedModel:
    """A trained model: everything needed to serve it, and a record of its origin.

    Attributes:
        config: the settings that it was trained with.
        towers: both towers, in evaluation mode.
        item_embeddings: float32 [N, D], or wider if the score has additional coordinates (`TwoTower.width`); with
            sharded tables, only the rows of this rank's items.
        item_counts: training interactions of each item, int64 [N].
        queries, items: the vocabularies.
        history_offsets: start of each query's history in `history_items`, int64 [Q+1].
        history_items: item codes of all histories, int32 [n], oldest first within a query.
        history_gaps: int8 [n], code of the gap before each item (data/loading/gaps.py); None if the tower reads no
            gaps.
        history_events: int8 [n], event type of each item as an index into `TwoTower.event_types`, -1 if unknown; None
            if the tower does not read types.
        item_table: one row for each item code, or None.
        metadata: data account, fingerprint, split, metrics: JSON values.
        rows: columns of the history rows that continued training needs; `load` does not read them
            (incremental/saved_rows.py).
        contexts: context of the history rows and of the test queries, by file name; `load` does not read it.
    """

    config: Config
    towers: TwoTower
    item_embeddings: Tensor
    item_counts: Tensor
    queries: Vocabulary
    items: Vocabulary
    history_offsets: np.ndarray
    history_items: np.ndarray
    item_table: pl.DataFrame | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, np.ndarray] | None = None
    contexts: dict[str, pl.DataFrame] = field(default_factory=dict)
    history_gaps: np.ndarray | None = None
    history_events: np.ndarray | None = None

    @property
    def history_marks(self) -> np.ndarray | None:
        """Gap codes or event types of the history items, whichever the query tower reads; None if neither."""
        return self.history_gaps if self.history_events is None else self.history_events

    @property
    def directions(self) -> Tensor:
        """The first D coordinates of the item embeddings (`TwoTower.width`), [N, D], used to find similar items."""
        return self.item_embeddings[:, : self.config.item_tower.dimension]

    @cached_property
    def eligibility(self) -> Eligibility | None:
        """The rule for the items that may be offered, from the columns of the item table; None without a rule.

        Raises:
            InputError: the item table does not have the columns.
        """
        settings = self.config.data.eligibility
        if settings is None:
            return None
        names = self.metadata["data"].get("groups")
        if settings.item_groups is not None and names is None:
            raise InputError("metadata.json: lists no groups, but data.eligibility.item_groups is set; train again")
        groups = None if settings.item_groups is None else Vocabulary(names)
        return Eligibility.of_table(settings, self.item_table, len(self.items), groups)

    @property
    def is_shared(self) -> bool:
        """Whether the tables are sharded over several ranks."""
        return bool(shared_tables_of(self.towers))

    def save(self, directory: str | Path, ranks: Communicator | None = None) -> Path:
        """Write to a temporary folder next to `directory` and rename it, which replaces an existing model atomically.

        Args:
            directory: the model folder.
            ranks: the ranks over which tables are sharded. Each writes its own rows, to the same file system.

        Returns:
            The folder written.

        Raises:
            InputError: `directory` exists and is not a model folder, or the disk is full.
        """
        target = Path(directory)
        require_replaceable(target, TOWERS, "model")
        if ranks is None:
            with whole_folder(target) as folder:
                save_model(self.towers, str(folder / TOWERS))
                embeddings = self.item_embeddings.float().cpu().contiguous()
                save_file({"embeddings": embeddings, "counts": self.item_counts.cpu()}, folder / ITEMS)
                self._write(folder)
            return target
        rest = self._write if ranks.is_first else _nothing
        write_folder(target, ranks, lambda folder: self._write_rows(folder, ranks), rest)
        return target

    def _write_rows(self, folder: Path, ranks: Communicator) -> None:
        """Write the two large files. Every rank adds its own rows, so that no rank needs memory for all rows."""
        parts = {id(table.weight): table.part for table in shared_tables_of(self.towers)}
        names: dict[int, str] = {}
        others: dict[str, str] = {}  # a tensor with two names is saved under the first, as in `save_model`
        rows: dict[str, int] = {}
        state = self.towers.state_dict(keep_vars=True)
        for name, tensor in sorted(state.items()):
            first = names.setdefault(id(tensor), name)
            if first != name:
                others[name] = first
            elif (part := parts.get(id(tensor))) is not None:
                rows[name] = part.rows
        kept = {name: state[name].detach() for name in sorted(names.values())}
        save_rows(folder / TOWERS, kept, rows, ranks, others)
        items = {"embeddings": self.item_embeddings.float(), "counts": self.item_counts}
        save_rows(folder / ITEMS, items, {"embeddings": len(self.item_counts)}, ranks)

    def _write(self, folder: Path) -> None:
        histories = {
            "offsets": torch.from_numpy(np.array(self.history_offsets, dtype=np.int64)),
            "items": torch.from_numpy(np.array(self.history_items, dtype=np.int32)),
        }
        if self.history_gaps is not None:
            histories["gaps"] = torch.from_numpy(np.array(self.history_gaps, dtype=np.int8))
        if self.history_events is not None:
            histories["events"] = torch.from_numpy(np.array(self.history_events, dtype=np.int8))
        save_file(histories, folder / "histories.safetensors")
        for table in self.towers.feature_tables():
            table.write(folder)
        self.queries.write(folder / "queries.parquet")
        self.items.write(folder / "items.parquet")
        if self.item_table is not None:
            self.item_table.write_parquet(folder / "item_table.parquet")
        if self.rows is not None:
            save_arrays({name: np.ascontiguousarray(rows) for name, rows in self.rows.items()}, folder / ROWS)
        for name, frame in self.contexts.items():
            frame.write_parquet(folder / f"{name}.parquet")
        metadata = {
            "schema_version": SCHEMA_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": library_versions(),
            "config": self.config.model_dump(mode="json"),
            "num_queries": len(self.queries),
            "num_items": len(self.items),
            **self.metadata,
        }
        write_description(folder / "metadata.json", metadata)

    @classmethod
    def load(cls, directory: str | Path, *, weights: bool = True, verify: bool = True) -> SavedModel:
        """Read a model folder, or the run folder that contains it, and verify every file.

        Args:
            directory: the model folder or run folder.
            weights: load weights and item embeddings. If False, tables have the right shape but no memory, layers have
                random weights, and there are no item embeddings; for callers that read single rows of
                `towers.safetensors` themselves.
            verify: compare the checksums. If False, only the names and sizes of the files are checked.

        Raises:
            InputError: there is no model, it has a different schema version, a file is missing or is a link, a checksum
                differs, or the sizes of the files disagree.
        """
        folder = find_model(directory)
        metadata = read_metadata(folder)
        require_model_names(folder, metadata["checksums"])
        with _files_named(folder):
            config = Config.model_validate(metadata["config"])
            require_sizes(folder, metadata, config)
            tables: dict[str, Any] = {
                "item_features": EncodedTable.read(folder, "item"),
                "query_features": EncodedTable.read(folder, "query"),
                "context": EncodedTable.read(folder, "context"),
            }
            require_weights(folder, metadata, config, tables)
        # Checksums come after the sizes, so that no file larger than the model is read.
        for name in (*NEEDED, *OPTIONAL) if verify else ():
            if name in metadata["checksums"] and file_sha256(folder / name) != metadata["checksums"][name]:
                raise InputError(
                    f"{folder / name}: its checksum differs from metadata.json; copy the folder again or train again"
                )
        with _files_named(folder):
            sizes = {"num_queries": metadata["num_queries"], "num_items": metadata["num_items"]}
            with nullcontext() if weights else tables_without_memory():
                towers = build_towers(config, **sizes, **tables)
                if metadata.get("recent_prior"):
                    towers.set_recent(torch.zeros(metadata["num_items"]))
            if weights:
                load_model(towers, folder / TOWERS)
                _map(towers, folder / TOWERS)
                items = load_file(folder / ITEMS)
            else:
                counts = stored_tensors(folder / ITEMS)[0]["counts"][...]
                items = {"embeddings": torch.empty(0, towers.width), "counts": counts}
            histories = {name: one.numpy() for name, one in load_file(folder / "histories.safetensors").items()}
            queries, item_ids = read_vocabulary(folder / "queries.parquet"), read_vocabulary(folder / "items.parquet")
            _require_histories(histories, queries, item_ids, **sizes, num_types=len(towers.event_types))
            table = folder / "item_table.parquet"
            found = cls(
                config=config,
                towers=towers.eval(),
                item_embeddings=items["embeddings"],
                item_counts=items["counts"],
                queries=queries,
                items=item_ids,
                history_offsets=histories["offsets"],
                history_items=histories["items"],
                history_gaps=histories.get("gaps"),
                history_events=histories.get("events"),
                item_table=read_parquet(table) if table.name in metadata["checksums"] else None,
                metadata=metadata,
            )
            _ = found.eligibility  # fail now, not at the first request, if the rule cannot be applied
            return found


@contextmanager
def _files_named(folder: Path) -> Iterator[None]:
    """Convert any error while reading the files of a folder, which may be untrusted, to a one-line error.

    Raises:
        InputError: the block raised an exception.
    """
    try:
        yield
    except InputError as error:
        if str(error).startswith(str(folder)):
            raise
        raise InputError(f"{folder}: the files are inconsistent ({error}); train again") from error
    except (Exception, pl.exceptions.PanicException) as error:
        text = " ".join(f"{error if str(error) else type(error).__name__}".split())
        raise InputError(f"{folder}: the files are inconsistent ({text:.300}); train again") from error


def _require_histories(
    histories: dict[str, np.ndarray],
    queries: Vocabulary,
    items: Vocabulary,
    *,
    num_queries: int,
    num_items: int,
    num_types: int,
) -> None:
    """Check that every code in the histories is valid.

    Raises:
        ValueError: a code is out of range, or a vocabulary has a different size.
    """
    if (len(queries), len(items)) != (num_queries, num_items):
        raise ValueError(
            f"{len(queries):,} queries and {len(items):,} items, expected {num_queries:,} and {num_items:,}"
        )
    offsets, codes = histories["offsets"], histories["items"]
    if offsets[0] != 0 or offsets[-1] != len(codes) or bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError("histories.safetensors: the offsets do not match the items")
    if len(codes) and not 0 <= codes.min() <= codes.max() < num_items:
        raise ValueError("histories.safetensors: an item code is not in the catalog")
    for name, least, most in (("gaps", 0, GAP_CODES), ("events", -1, num_types)):
        marks = histories.get(name)
        if marks is not None and len(marks) and not least <= marks.min() <= marks.max() < most:
            raise ValueError(f"histories.safetensors: a code in {name} is out of range")


def _nothing(folder: Path) -> None:
    """Write nothing; used on every rank except 0, which writes the small files."""


def _map(towers: TwoTower, path: Path) -> None:
    """Memory-map the weights: pages are read on demand and shared by processes."""
    stored = load_file(path)
    for name, weight in towers.named_parameters():
        mapped = stored.get(name)
        if mapped is not None and mapped.dtype == weight.dtype and mapped.shape == weight.shape:
            weight.data = mapped


def find_model(directory: str | Path) -> Path:
    """Find the model folder: `directory` itself, or `model/` in a run folder.

    Raises:
        InputError: there is no model folder.
    """
    given = Path(directory)
    for folder in (given, given / FOLDER):
        if (folder / "metadata.json").is_file():
            return folder
    if not given.exists():
        raise InputError(f"{given}: no such folder; expected one written by `twotower train ... --out {given}`")
    if (given / "checkpoints").is_dir():
        raise InputError(
            f"{given}: no model in this folder, only an interrupted training run; the model is written at its end: "
            f"resume with `twotower train DATA --out {given} --resume`"
        )
    raise InputError(f"{given}: no model in this folder; expected metadata.json, as `twotower train` writes it")


def find_evaluated(directory: str | Path) -> Path:
    """Find the model folder that the metrics of a model belong to.

    A model refitted on all rows was trained on the test rows, so it cannot be evaluated on them. Its metrics belong to
    the validated model in the same run folder.

    Raises:
        InputError: there is no model folder, or the model was refitted and the validated model is missing.
    """
    folder = find_model(directory)
    if not read_metadata(folder).get("refit"):
        return folder
    validated = folder.parent / VALIDATED
    if not (validated / "metadata.json").is_file():
        raise InputError(
            f"{folder}: refitted on all rows, including the test rows, and {validated}, the model that was evaluated, "
            "is missing; copy the whole run folder"
        )
    return validated


def read_metadata(folder: Path) -> dict[str, Any]:
    """Read `metadata.json` of a model folder and check its schema version."""
    path = folder / "metadata.json"
    metadata = read_description(path, SCHEMA_VERSION, ADVICE)
    for name in ("data", "split", "training", "metrics"):
        if not isinstance(metadata.get(name, {}), dict):
            raise InputError(f"{path}: {name} is not an object; {ADVICE}")
    return metadata


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that results depend on."""
    names = ("twotower", "torch", "polars", "pytorch-lightning", "numpy", "safetensors", "pydantic")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
