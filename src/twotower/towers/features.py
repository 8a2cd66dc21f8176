"""Declared features inside a tower: tables of vectors for codes, averages for bags, numbers as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twotower.data.encoders import Encoder
from twotower.data.encoding import EncodedTable, FeatureSet
from twotower.data.feature_frames import RowsLike, check_columns
from twotower.data.given import encode_apart
from twotower.data.values import MISSING, UNKNOWN
from twotower.towers.tables import EmbeddingTable


class FeatureInputs(nn.Module):
    """All features of one side side by side, [rows, width].

    The encoded table of the whole side lies in buffers, so that a batch needs only codes, and the lookup runs where
    the model is. The buffers are not part of the state dict: a checkpoint every epoch need not hold what never changes.

    Args:
        table: fitted encoders, and the features of every code.
        dimension: D, the largest width that `auto` chooses.

    Attributes:
        table: as given, with the widths that were chosen where it had none: a vocabulary that grows keeps them.
        width: of the output.
    """

    def __init__(self, table: EncodedTable, dimension: int) -> None:
        super().__init__()
        widths = _widths(table.features, dimension)
        self.table = replace(table, features=replace(table.features, widths=widths))
        self.embeddings = nn.ModuleDict()
        nothing = table.features.missing()
        for place, (own, encoder) in enumerate(zip(widths, table.features.encoders, strict=True)):
            # The last row stands for a code nobody has seen: -1 finds it without a special case.
            rows = _under(table.arrays[place], nothing[place])
            if encoder.form != "numbers":
                self.embeddings[str(place)] = _vectors(encoder, own)
                rows = rows.astype(np.int32)
            self.register_buffer(f"rows{place}", torch.from_numpy(rows), persistent=False)
        self.width = sum(widths)

    @property
    def encoders(self) -> list[Encoder]:
        """The fitted encoders, in the order of the declaration."""
        return self.table.features.encoders

    def forward(self, codes: Tensor) -> Tensor:
        """Codes int64 [M], -1 for one of which nothing is known -> [M, width]."""
        return self.embed([self.get_buffer(f"rows{place}")[codes] for place in range(len(self.encoders))])

    def embed(self, encoded: list[Tensor]) -> Tensor:
        """Encoded rows, one tensor for each feature, as `encode` gives them -> [M, width]."""
        parts = []
        for place, (encoder, rows) in enumerate(zip(self.encoders, encoded, strict=True)):
            if encoder.form == "numbers":
                parts.append(rows)
            elif encoder.form == "codes":
                parts.append(self.embeddings[str(place)](rows))
            else:
                parts.append(_mean(rows, self.embeddings[str(place)]))
        return torch.cat(parts, 1)

    def encode(self, rows: RowsLike) -> list[Tensor]:
        """New rows, a frame or dicts, as `embed` takes them; errors as those of `FeatureSet.encode`."""
        device = self.get_buffer("rows0").device
        return [torch.from_numpy(array).to(device) for array in self.table.features.encode(rows)]

    def encode_some(self, codes: Tensor, rows: Sequence[Mapping[str, Any] | None]) -> list[Tensor]:
        """The features of codes, those that are given in their place; as `embed` takes them.

        Args:
            codes: int64 [B], -1 for one of which nothing is known.
            rows: for each of them the declared columns, or None for what training knew of it.

        Raises:
            InputError: as those of `FeatureSet.encode`.
        """
        known = [self.get_buffer(f"rows{place}")[codes] for place in range(len(self.encoders))]
        places = [place for place, row in enumerate(rows) if row is not None]
        if not places:
            return known
        given = self._encode_apart([row for row in rows if row is not None])
        mixed = []
        for own, new in zip(known, given, strict=True):
            if own.ndim == 2:  # bags are as wide as the fullest of them
                width = max(own.shape[1], new.shape[1])
                own, new = F.pad(own, (0, width - own.shape[1])), F.pad(new, (0, width - new.shape[1]))  # noqa: PLW2901
            joined = own.clone()
            joined[places] = new.to(own.dtype)
            mixed.append(joined)
        return mixed

    def _encode_apart(self, rows: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """Rows that came in different requests: what one means by a value is nothing to the others."""
        features = self.table.features
        name = f"{features.side} features"
        present: dict[str, list[Any]] = {
            column: [] for column in features.columns if any(column in row for row in rows)
        }
        check_columns(pl.DataFrame(present), features.declared, name, needs_table=False)
        device = self.get_buffer("rows0").device
        return [torch.from_numpy(array).to(device) for array in encode_apart(features, rows, name)]


def _mean(bags: Tensor, table: nn.Module) -> Tensor:
    """Mean of the vectors of each bag, zeros for an empty one; no array of bag by width by D is made."""
    assert isinstance(table, nn.Embedding)
    # int64, since an exported tower is called with codes of queries or items in int64, and ONNX does not mix the two.
    return F.embedding_bag(bags.long(), table.weight, mode="mean", padding_idx=MISSING, sparse=table.sparse).float()


def auto_width(size: int, dimension: int) -> int:
    """Width of the vectors of a table with `size` rows: 2 sqrt(size), 4 at least, D at most."""
    return min(dimension, max(4, math.ceil(2 * math.sqrt(size))))


def _widths(features: FeatureSet, dimension: int) -> list[int]:
    """What each feature is wide: as it was once chosen, as declared, or by its number of values today."""
    if features.widths is not None:
        return features.widths
    widths = []
    for declared, encoder in zip(features.declared, features.encoders, strict=True):
        asked = getattr(declared, "width", "auto")
        if encoder.form == "numbers":
            widths.append(encoder.size)
        else:
            widths.append(auto_width(encoder.size, dimension) if asked == "auto" else int(asked))
    return widths


def _vectors(encoder: Encoder, width: int) -> EmbeddingTable:
    """A table whose missing and unknown rows start at zero: what training never shows must say nothing."""
    table = EmbeddingTable(encoder.size, width)
    with torch.no_grad():
        table.weight[MISSING] = 0.0
        if getattr(getattr(encoder, "values", None), "known", None) is not None:
            table.weight[UNKNOWN] = 0.0
    return table


def _under(rows: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Rows with one more row below them, filled up to their width."""
    if rows.ndim == 1:
        return np.concatenate([rows, last])
    filled = np.zeros((1, rows.shape[1]), dtype=rows.dtype)
    filled[:, : last.shape[1]] = last
    return np.concatenate([rows, filled])
