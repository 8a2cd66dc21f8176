"""The parent model of an incremental run, and the joining of new data to the parent's training data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import polars as pl
import torch
from torch import Tensor

from twotower.config.run import Config
from twotower.data import Interactions, Split
from twotower.data.schema.vocabulary import IdValues, Vocabulary, ids_of
from twotower.distributed.communicator import Communicator
from twotower.distributed.launch import Launch
from twotower.distributed.row_files import RowSource, stored_tensors
from twotower.errors import InputError
from twotower.incremental.saved_rows import load_context, load_rows
from twotower.incremental.split import CARRIED, ContinuedSplit, PastData, continued
from twotower.serving.catalog_changes import CatalogChanges
from twotower.serving.model_folder import REFIT, TOWERS, SavedModel, find_model
from twotower.training.checkpoint.lazy import open_checkpoint
from twotower.training.checkpoint.paths import BEST

if TYPE_CHECKING:
    from twotower.training import FitResult

#: Number of table rows read at a time.
BLOCK_ROWS = 1 << 16


@dataclass(frozen=True)
class ParentModel:
    """The model that an incremental run continues.

    Attributes:
        artifact: the model.
        checkpoint: the checkpoint with the model's optimizer state, if it still exists.
        where: name of the model in messages and in the lineage.
        removed: ids that were removed from the model's catalog after training (`twotower items remove`).
        folder: the model folder, from which rows of weights are read when needed; None if `artifact` has the weights.
    """

    artifact: SavedModel
    checkpoint: Path | None
    where: str
    removed: pl.Series | None = None
    folder: Path | None = None

    @classmethod
    def load(cls, directory: str | Path) -> ParentModel:
        """Load a run folder, or only a model folder, which has no optimizer state.

        Weights are not read. On each machine, only the first process verifies the files.

        Raises:
            InputError: see `SavedModel.load`.
        """
        folder = find_model(directory)
        artifact = SavedModel.load(folder, weights=False, verify=Launch.of_environment().local_rank == 0)
        run = folder.parent / REFIT if artifact.metadata.get("refit") else folder.parent
        best = run / BEST
        changes = CatalogChanges.read(folder)
        left = np.zeros(0, dtype=np.int64) if changes is None else changes.left
        removed = artifact.items.decode(left[left < len(artifact.items)])
        return cls(
            replace(artifact, rows=load_rows(folder), contexts=_contexts(folder)),
            best if best.is_dir() else None,
            str(Path(directory).resolve()),
            removed if len(removed) else None,
            folder,
        )

    def weights(self) -> Mapping[str, RowSource]:
        """Return the state dict of the towers, by name; tensors of a folder are read lazily.

        Raises:
            InputError: the file is damaged, or the model in memory has tables sharded over several ranks.
        """
        if self.folder is None:
            if self.artifact.is_shared:
                raise InputError(
                    "warm_start: the model's tables are sharded over several ranks; save it, and pass its folder"
                )
            return _without_recent(self.artifact.towers.state_dict())
        path = self.folder / TOWERS
        try:
            found, named = stored_tensors(path)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path}: not readable ({error}); copy it again or train again") from error
        # A tensor with two names is stored under one name; the metadata maps the second name to the first.
        return _without_recent(found | {other: found[name] for other, name in named.items() if name in found})

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the model's data."""
        return str(self.artifact.metadata["data"]["fingerprint"])

    def past(self) -> PastData:
        """Return the training data; in models of older versions, all rows count as learnt."""
        model, rows = self.artifact, self.artifact.rows or {}
        times = rows.get("timestamps")
        names = model.metadata["data"].get("groups")
        return PastData(
            model.queries,
            model.items,
            np.asarray(model.history_offsets, dtype=np.int64),
            np.asarray(model.history_items),
            np.asarray(rows.get("learnt", np.diff(model.history_offsets))),
            {name: np.asarray(rows[name]) for name in CARRIED if name in rows},
            None if names is None else Vocabulary(names),
            model.item_table,
            self.fingerprint,
            None if times is None or not len(times) else int(np.max(times)),
            model.contexts.get("context"),
        )


def _without_recent(weights: Mapping[str, RowSource]) -> dict[str, RowSource]:
    """Omit the `recent` prior, which belongs to the parent's time and is chosen again on the new validation data."""
    return {name: value for name, value in weights.items() if name != "recent"}


def _contexts(folder: Path) -> dict[str, pl.DataFrame]:
    context = load_context(folder)
    return {} if context is None else {"context": context}


class Fitted(Protocol):
    """A model in memory, such as `twotower.Model`."""

    @property
    def artifact(self) -> SavedModel: ...  # noqa: D102
    @property
    def fit(self) -> FitResult: ...  # noqa: D102


def parent_of(start: Fitted | ParentModel | str | Path | None) -> ParentModel | None:
    """Return the parent for a model or its folder; None if `start` is None.

    Raises:
        InputError: see `ParentModel.load`.
    """
    if start is None or isinstance(start, ParentModel):
        return start
    if isinstance(start, str | Path):
        return ParentModel.load(start)
    return ParentModel(start.artifact, start.fit.checkpoint, "a model in memory")


def new_days(
    parent: ParentModel,
    data: Interactions,
    config: Config,
    split: Callable[[Interactions], Split],
    *,
    withdrawn: IdValues | None = None,
) -> ContinuedSplit:
    """Build the split for `fit(warm_start=...)` from past and new interactions; see `split.continued`."""
    if parent.removed is not None:
        given = parent.removed.head(0) if withdrawn is None else ids_of(pl.Series("id", withdrawn), "withdrawn")
        withdrawn = pl.concat([parent.removed.alias("id"), given.alias("id")]).unique()
    cold: Any = "keep" if config.data.split == "leave-last-out" else "drop"
    return continued(parent.past(), data, split, withdrawn=withdrawn, catalog=config.data.catalog, cold=cold)


def objective_state(artifact: SavedModel, checkpoint: Path) -> dict[str, Tensor]:
    """Read the state of a model's objective from a checkpoint; return {} if the checkpoint is of a different model.

    Args:
        artifact: the model, with its weights.
        checkpoint: folder of the checkpoint with the model's best weights; it need not exist.
    """
    if not checkpoint.is_dir():
        return {}
    state: Mapping[str, RowSource] = open_checkpoint(checkpoint)["state_dict"]
    parent = ParentModel(artifact, checkpoint, str(checkpoint))
    if not has_weights(state, parent.weights(), Communicator()):
        return {}
    prefix = "objective."
    return {name.removeprefix(prefix): value[...] for name, value in state.items() if name.startswith(prefix)}


def has_weights(state: Mapping[str, RowSource], weights: Mapping[str, RowSource], ranks: Communicator) -> bool:
    """Return whether a checkpoint has these weights, among its averaged weights if it has any; collective.

    Every rank must call it; all get the same result.
    """
    kind = "averaged" if any(name.startswith("averaged.") for name in state) else "towers"
    return not ranks.agree(any(not _same(state.get(f"{kind}.{name}"), own, ranks) for name, own in weights.items()))


def _same(saved: RowSource | None, own: RowSource, ranks: Communicator) -> bool:
    """Return whether two tensors are equal on the rows that this rank checks; ranks divide large tensors by rows."""
    if saved is None or saved.shape != own.shape or saved.dtype != own.dtype:
        return False
    if len(own.shape) < 2 or len(own) <= BLOCK_ROWS:
        return torch.equal(saved[...], own[...])
    part = ranks.part(len(own))
    blocks = (slice(start, min(start + BLOCK_ROWS, part.stop)) for start in range(part.start, part.stop, BLOCK_ROWS))
    return all(torch.equal(saved[block], own[block]) for block in blocks)
