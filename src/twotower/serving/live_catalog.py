"""A catalog whose items can be added, changed and removed after training, with its index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import torch

from twotower.data.schema.vocabulary import Codes
from twotower.index import ApproximateIndex, PopularityDial
from twotower.serving.catalog_changes import CatalogChanges, CatalogEdit, Mask, leaving, with_added_items, with_rows
from twotower.serving.model_folder import SavedModel
from twotower.serving.search import Search


class LiveCatalog:
    """The items that can be recommended: the trained items with all changes since training.

    Items are added, changed and removed without rebuilding an approximate index of any kind. This is not safe while
    another thread searches. For a running service, save the changed folder (`save_changes`); the service swaps to it.

    Args:
        trained: the model as it was saved.
        index: an approximate index over its items that already includes the changes; None for exact search.
        changes: changes since training.

    Attributes:
        artifact: the model with the current items.
        search: search over the current items.
    """

    def __init__(self, trained: SavedModel, index: ApproximateIndex | None, changes: CatalogChanges | None) -> None:
        self.trained = trained
        self.artifact, alive = (trained, None) if changes is None else changes.applied(trained)
        self.search = Search(self.artifact, index, alive)
        self._edited = np.empty(0, dtype=np.int64) if changes is None else changes.codes

    @property
    def alive(self) -> Mask:
        """Mask of the current items, bool [N], False for removed items."""
        alive = self.search.alive
        return np.ones(len(self.artifact.items), dtype=np.bool_) if alive is None else alive

    @property
    def is_as_trained(self) -> bool:
        """Whether the catalog is unchanged since training: no item was added, changed or removed."""
        return self.search.alive is None and len(self.artifact.items) == len(self.trained.items)

    @property
    def changes(self) -> CatalogChanges:
        """All changes since training."""
        return CatalogChanges.between(self.trained, self.artifact, self._edited, self.alive)

    def add(self, items: Any, embeddings: Any = None) -> None:
        """Add items; removed items may be added again.

        Args:
            items: a data frame or a list of dicts with a column of ids and columns of the item table.
            embeddings: [n, D]; None to take them from the column `embedding` or, without this column, to compute them
                from the items' features. They are normalised to length 1 if the model uses cosine similarity.

        Raises:
            InputError: as in `CatalogEdit.of`.
        """
        self._edit(CatalogEdit.of(self.artifact, self.alive, items, embeddings, join=True))

    def update(self, items: Any, embeddings: Any = None) -> None:
        """Change embeddings of items and their columns in the item table; see `add`.

        The vectors with which the query tower reads these items in histories do not change.
        """
        self._edit(CatalogEdit.of(self.artifact, self.alive, items, embeddings, join=False))

    def remove(self, ids: Sequence[Any]) -> None:
        """Remove items from all results; they remain in histories.

        Raises:
            InputError: `ids` is empty or a single id, or an id is not in the catalog.
        """
        codes = leaving(self.artifact, self.alive, ids)
        self.search.index.remove(codes)
        alive = self.alive.copy()
        alive[codes] = False
        self.search = Search(self.artifact, self.search.approximate, alive)

    def _edit(self, edit: CatalogEdit) -> None:
        artifact, index, fresh = self.artifact, self.search.index, edit.codes < 0
        count, width = artifact.item_embeddings.shape
        codes = edit.codes.copy()
        codes[fresh] = count + np.arange(int(fresh.sum()))
        order = np.argsort(codes)  # existing items first, then added items
        codes, existing = codes[order], int((~fresh).sum())
        vectors = edit.embeddings[torch.from_numpy(order)]
        if self.search.approximate is not None:
            vectors = torch.cat([vectors, self._coordinates(codes)[:, None]], 1)
        if existing:
            index.update(codes[:existing], vectors[:existing])
        if existing < len(codes):
            index.add(vectors[existing:])
        table, joined = artifact.item_table, edit.ids.gather(order[existing:])
        if table is not None and edit.rows is not None:
            table = with_rows(table, codes, edit.rows.select(pl.all().gather(order)))
        alive = np.concatenate([self.alive, np.ones(len(joined), dtype=np.bool_)])
        alive[codes] = True
        # Share the index's tensor, so that the embeddings are in memory only once.
        self.artifact = with_added_items(artifact, joined, index.vectors.items[:, :width], table)
        self.search = Search(self.artifact, self.search.approximate, alive)
        self._edited = np.union1d(self._edited, codes)

    def _coordinates(self, codes: Codes) -> torch.Tensor:
        """Compute the popularity coordinate of items, [n]; added items have a training count of 0."""
        counts = self.artifact.item_counts
        more = max(int(codes.max()) + 1 - len(counts), 0)
        dial = PopularityDial(
            torch.cat([counts, counts.new_zeros(more)]), self.search.dial.temperature, len(self.trained.items)
        )
        return dial.coordinate()[torch.from_numpy(codes)]
