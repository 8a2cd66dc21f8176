"""Result tables, with ids and titles in place of item codes."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray
from torch import Tensor

from twotower.data.schema.columns import title_column
from twotower.data.schema.vocabulary import Codes
from twotower.serving.model_folder import SavedModel


class ResultTables:
    """Result tables of one model, with ids in place of codes.

    Args:
        artifact: the model, with its vocabularies and its item table.
        alive: bool [N], False for removed items; None if no item was removed.
    """

    def __init__(self, artifact: SavedModel, alive: NDArray[np.bool_] | None = None) -> None:
        self.artifact = artifact
        self.alive = alive
        self.title_column = None if artifact.item_table is None else title_column(artifact.item_table)

    def ranked(
        self, name: str, values: pl.Series, items: Tensor, scores: Tensor, *, titles: bool = True
    ) -> pl.DataFrame:
        """Make a table with one row for each item found.

        Args:
            name: name of the first column.
            values: the query id, item id or position of each of the B rows.
            items: item codes, int64 [B, K], -1 where no item was left.
            scores: scores of these items, [B, K].
            titles: add the column `title` if the items have titles.

        Returns:
            Columns `name`, `rank` from 1, `item`, `score`, and `title`.
        """
        count, k = items.shape
        codes = items.cpu().numpy().reshape(-1)
        found = codes >= 0
        described = self.items(codes[found], titles=titles)
        frame = pl.DataFrame(
            {
                name: values.gather(np.repeat(np.arange(count), k)[found]),  # a Series keeps the type of the ids
                "rank": np.tile(np.arange(1, k + 1), count)[found],
                "item": described["item"],
                "score": scores.cpu().numpy().reshape(-1)[found],
            }
        )
        return frame if "title" not in described.columns else frame.with_columns(described["title"])

    def items(self, codes: Codes, *, titles: bool = True) -> pl.DataFrame:
        """Make a table with the columns `item` and, if the items have titles, `title`."""
        frame = pl.DataFrame({"item": self.artifact.items.decode(codes)})
        if not titles or self.artifact.item_table is None or self.title_column is None:
            return frame
        return frame.with_columns(self.artifact.item_table[self.title_column].gather(codes).alias("title"))

    def described(self, codes: Codes) -> pl.DataFrame:
        """Make a table of everything known about items.

        Returns:
            Columns `item`, `title` if the items have titles, `interactions` in training, and the other columns of the
            item table.
        """
        frame = self.items(codes).with_columns(
            pl.Series("interactions", self.artifact.item_counts.numpy()[codes], dtype=pl.Int64)
        )
        table = self.artifact.item_table
        if table is None:
            return frame
        others = [name for name in table.columns if name not in (*frame.columns, self.title_column)]
        return frame.hstack(table.select(pl.col(others).gather(codes))) if others else frame

    def titled(self, text: str, k: int) -> Codes:
        """Find items whose title (or id, if there are no titles) contains `text`, ignoring case.

        Returns:
            At most K codes: first the titles that begin with the text, then the others, each group in descending order
            of training interactions.
        """
        wanted = text.strip().lower().encode("utf-8", "replace").decode()
        names = self.items(np.arange(len(self.artifact.items))).to_series(-1).cast(pl.String).str.to_lowercase()
        found = pl.DataFrame({"name": names, "count": self.artifact.item_counts.numpy()}).with_row_index("code")
        if self.alive is not None:
            found = found.filter(pl.Series(self.alive))
        best = (
            found.filter(pl.col("name").str.contains(wanted, literal=True))
            .with_columns(pl.col("name").str.starts_with(wanted).alias("first"))
            .sort("first", "count", "code", descending=[True, True, False])
        )
        return best["code"].head(k).cast(pl.Int64).to_numpy()
