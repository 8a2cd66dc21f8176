"""A catalog whose items come, change and go while it answers: one place for the model, its index and who is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import torch

from twotower.index import ApproximateIndex, PopularityDial
from twotower.serving.artifact import Artifact
from twotower.serving.changes import Changes, Codes, Mask, grown, with_rows
from twotower.serving.edits import Edit, leaving
from twotower.serving.search import Search


class LiveCatalog:
    """The items that are recommended: those of the training, and what became of them since.

    Items join, change and leave without a new index, whatever its kind. Not while another thread asks: a service is
    given the changed folder (`save_changes`) and swaps.

    Args:
        trained: the model as it was saved.
        index: an approximate index over its items, which has the changes already; None for exact search.
        changes: since training.

    Attributes:
        artifact: the model with its items as they are now.
        search: over them.
    """

    def __init__(self, trained: Artifact, index: ApproximateIndex | None, changes: Changes | None) -> None:
        self.trained = trained
        self.artifact, alive = (trained, None) if changes is None else changes.applied(trained)
        self.search = Search(self.artifact, index, alive)
        self._edited = np.empty(0, dtype=np.int64) if changes is None else changes.codes

    @property
    def alive(self) -> Mask:
        """Who is left: bool [N], False for items that are not."""
        alive = self.search.alive
        return np.ones(len(self.artifact.items), dtype=np.bool_) if alive is None else alive

    @property
    def is_as_trained(self) -> bool:
        """Whether no item has joined."""
        return len(self.artifact.items) == len(self.trained.items)

    @property
    def changes(self) -> Changes:
        """What became of the items since training."""
        return Changes.between(self.trained, self.artifact, self._edited, self.alive)

    def add(self, items: Any, embeddings: Any = None) -> None:
        """Items join; one that has left may come back.

        Args:
            items: a data frame or a list of dicts: a column of ids, and columns of the item table.
            embeddings: [n, D]; where None, the column `embedding`, or the item tower by the items' features. Of length
                1 where the model compares by cosine: others are brought to it.

        Raises:
            InputError: see `Edit.of`.
        """
        self._edit(Edit.of(self.artifact, self.alive, items, embeddings, join=True))

    def update(self, items: Any, embeddings: Any = None) -> None:
        """Items get other embeddings, and other columns in the item table; see `add`.

        What a history says through them is the query tower's, and stays.
        """
        self._edit(Edit.of(self.artifact, self.alive, items, embeddings, join=False))

    def remove(self, ids: Sequence[Any]) -> None:
        """Items leave and are in no answer any more; histories keep them.

        Raises:
            InputError: one is not in the catalog.
        """
        codes = leaving(self.artifact, self.alive, ids)
        self.search.index.remove(codes)
        alive = self.alive.copy()
        alive[codes] = False
        self.search = Search(self.artifact, self.search.approximate, alive)

    def _edit(self, edit: Edit) -> None:
        artifact, index, fresh = self.artifact, self.search.index, edit.codes < 0
        count, width = artifact.item_embeddings.shape
        codes = edit.codes.copy()
        codes[fresh] = count + np.arange(int(fresh.sum()))
        order = np.argsort(codes)  # those that were there before those that join
        codes, there = codes[order], int((~fresh).sum())
        vectors = edit.embeddings[torch.from_numpy(order)]
        if self.search.approximate is not None:
            vectors = torch.cat([vectors, self._coordinates(codes)[:, None]], 1)
        if there:
            index.update(codes[:there], vectors[:there])
        if there < len(codes):
            index.add(vectors[there:])
        table, joined = artifact.item_table, edit.ids.gather(order[there:])
        if table is not None and edit.rows is not None:
            table = with_rows(table, codes, edit.rows.select(pl.all().gather(order)))
        alive = np.concatenate([self.alive, np.ones(len(joined), dtype=np.bool_)])
        alive[codes] = True
        # The index's own tensor: the catalog is held once.
        self.artifact = grown(artifact, joined, index.vectors.items[:, :width], table)
        self.search = Search(self.artifact, self.search.approximate, alive)
        self._edited = np.union1d(self._edited, codes)

    def _coordinates(self, codes: Codes) -> torch.Tensor:
        """The dial's coordinate of items, [n]; nobody has interacted with those that join."""
        counts = self.artifact.item_counts
        more = max(int(codes.max()) + 1 - len(counts), 0)
        dial = PopularityDial(
            torch.cat([counts, counts.new_zeros(more)]), self.search.dial.temperature, len(self.trained.items)
        )
        return dial.coordinate()[torch.from_numpy(codes)]
