"""Declared features inside a tower: embeddings of codes, means of bags, encoded texts, and unchanged numbers."""

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

from twotower.errors import InputError
from twotower.features.categorical import MISSING, UNKNOWN, FeatureEncoder
from twotower.features.feature_set import EncodedTable, FeatureSet
from twotower.features.frames import RowsLike, check_columns
from twotower.features.numeric import DenseEncoder
from twotower.features.requests import encode_apart
from twotower.features.text import TextEncoder
from twotower.features.tokens import TokenEncoder
from twotower.towers.tables import EmbeddingTable
from twotower.towers.text import TextTransformer, text_encoder_for


class FeatureInputs(nn.Module):
    """The concatenated features of one tower, [rows, width].

    The encoded features of all codes are in buffers, so that a batch needs only codes, and the lookup runs on the
    model's device. The buffers are not part of the state dict, because they never change and a checkpoint is written
    every epoch.

    Args:
        table: fitted encoders, and the features of every code.
        dimension: D, the maximum width that `auto` chooses.
        texts: the text encoders created so far, for sharing between the towers; changed in place. None to share
            nothing.

    Attributes:
        table: the table with the chosen widths filled in, so that they stay the same when a vocabulary grows.
        width: width of the output.
    """

    def __init__(self, table: EncodedTable, dimension: int, texts: dict[Any, TextTransformer] | None = None) -> None:
        super().__init__()
        widths = _widths(table.features, dimension)
        self.table = replace(table, features=replace(table.features, widths=widths))
        self.embeddings = nn.ModuleDict()
        self.texts = nn.ModuleDict()
        made = {} if texts is None else texts
        nothing = table.features.missing()
        for place, (own, encoder) in enumerate(zip(widths, table.features.encoders, strict=True)):
            # The last row is for an unknown code: index -1 finds it without a special case.
            rows = _under(table.arrays[place], nothing[place])
            if isinstance(encoder, TokenEncoder):
                self.texts[str(place)] = text_encoder_for(encoder, made)
            elif encoder.form != "numbers":
                self.embeddings[str(place)] = _vectors(encoder, own)
            if encoder.form != "numbers":
                rows = rows.astype(np.int32)
            self.register_buffer(f"rows{place}", torch.from_numpy(rows), persistent=False)
        self.width = sum(widths)

    @property
    def encoders(self) -> list[FeatureEncoder]:
        """The fitted encoders, in the order of declaration."""
        return self.table.features.encoders

    def forward(self, codes: Tensor) -> Tensor:
        """Look up and embed the features of codes int64 [M], -1 if unknown -> [M, width]."""
        return self.embed([self.get_buffer(f"rows{place}")[codes] for place in range(len(self.encoders))])

    def embed(self, encoded: list[Tensor]) -> Tensor:
        """Embed encoded rows, one tensor per feature, as returned by `encode` -> [M, width]."""
        parts = []
        for place, (encoder, rows) in enumerate(zip(self.encoders, encoded, strict=True)):
            if encoder.form == "numbers":
                parts.append(rows)
            elif encoder.form == "tokens":
                vectors = self.texts[str(place)](rows)
                parts.append(torch.cat([vectors, (rows == 0).all(1, keepdim=True).to(vectors.dtype)], 1))
            elif encoder.form == "codes":
                parts.append(self.embeddings[str(place)](rows))
            else:
                parts.append(_mean(rows, self.embeddings[str(place)]))
        return torch.cat(parts, 1)

    def summed(self, embedded: Tensor) -> Tensor:
        """Sum the vectors of all features, without their columns for missing values, [M, width] -> [M, D]."""
        parts = torch.split(embedded, self.widths, 1)
        return torch.stack([part[:, :-1] for part in parts]).sum(0) if len(parts) > 1 else parts[0][:, :-1]

    def require_vectors(self, dimension: int) -> None:
        """Check that every feature is a vector of width D, so that the features can be summed.

        Raises:
            InputError: a feature is of another kind or width.
        """
        features = self.table.features
        section = "query_tower.context" if features.side == "context" else f"{features.side}_tower.features"
        for one, encoder, width in zip(features.declared, self.encoders, self.widths, strict=True):
            if not isinstance(encoder, TokenEncoder | TextEncoder | DenseEncoder):
                raise InputError(
                    f"{section}: column {one.column!r} of kind {one.kind} has no vector, which projection: false "
                    "needs; use a text feature with a model, or a dense feature, or projection: true"
                )
            if width != dimension + 1:
                raise InputError(
                    f"{section}: column {one.column!r} has vectors of width {width - 1}, but item_tower.dimension is "
                    f"{dimension}; with projection: false they must be equal"
                )

    @property
    def widths(self) -> list[int]:
        """The width of each feature."""
        assert self.table.features.widths is not None
        return self.table.features.widths

    def encode(self, rows: RowsLike) -> list[Tensor]:
        """Encode new rows, given as a data frame or dicts, for `embed`; raises the errors of `FeatureSet.encode`."""
        device = self.get_buffer("rows0").device
        return [torch.from_numpy(array).to(device) for array in self.table.features.encode(rows)]

    def encode_some(self, codes: Tensor, rows: Sequence[Mapping[str, Any] | None]) -> list[Tensor]:
        """Return the encoded features of codes, for `embed`, replaced by new rows where given.

        Args:
            codes: int64 [B], -1 if unknown.
            rows: for each code the declared columns, or None to use the stored features.

        Raises:
            InputError: the errors of `FeatureSet.encode`.
        """
        known = [self.get_buffer(f"rows{place}")[codes] for place in range(len(self.encoders))]
        places = [place for place, row in enumerate(rows) if row is not None]
        if not places:
            return known
        given = self._encode_apart([row for row in rows if row is not None])
        mixed = []
        for own, new in zip(known, given, strict=True):
            if own.ndim == 2:  # bags are padded to the width of the largest one
                width = max(own.shape[1], new.shape[1])
                own, new = F.pad(own, (0, width - own.shape[1])), F.pad(new, (0, width - new.shape[1]))  # noqa: PLW2901
            joined = own.clone()
            joined[places] = new.to(own.dtype)
            mixed.append(joined)
        return mixed

    def _encode_apart(self, rows: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """Encode rows of different requests independently: the types in one row do not affect the others."""
        features = self.table.features
        name = f"{features.side} features"
        present: dict[str, list[Any]] = {
            column: [] for column in features.columns if any(column in row for row in rows)
        }
        check_columns(pl.DataFrame(present), features.declared, name, needs_table=False)
        device = self.get_buffer("rows0").device
        return [torch.from_numpy(array).to(device) for array in encode_apart(features, rows, name)]


def _mean(bags: Tensor, table: nn.Module) -> Tensor:
    """Average the vectors of each bag, zeros for an empty one, without an array of [bags, bag width, D]."""
    assert isinstance(table, nn.Embedding)
    # int64, because an exported tower is called with int64 codes, and ONNX does not mix integer types.
    return F.embedding_bag(bags.long(), table.weight, mode="mean", padding_idx=MISSING, sparse=table.sparse).float()


def auto_width(size: int, dimension: int) -> int:
    """Choose the width of a table with `size` rows: 2 sqrt(size), at least 4, at most D."""
    return min(dimension, max(4, math.ceil(2 * math.sqrt(size))))


def _widths(features: FeatureSet, dimension: int) -> list[int]:
    """Return the width of each feature: stored, declared, or chosen from its current number of values."""
    if features.widths is not None:
        return features.widths
    widths = []
    for declared, encoder in zip(features.declared, features.encoders, strict=True):
        width = getattr(declared, "width", "auto")
        if encoder.form == "numbers":
            widths.append(encoder.size)
        elif isinstance(encoder, TokenEncoder):
            widths.append(encoder.model.width + 1)
        else:
            widths.append(auto_width(encoder.size, dimension) if width == "auto" else int(width))
    return widths


def _vectors(encoder: FeatureEncoder, width: int) -> EmbeddingTable:
    """Make a table whose missing and unknown rows start at zero: values never trained must have no effect."""
    table = EmbeddingTable(encoder.size, width)
    with torch.no_grad():
        table.weight[MISSING] = 0.0
        if getattr(getattr(encoder, "values", None), "known", None) is not None:
            table.weight[UNKNOWN] = 0.0
    return table


def _under(rows: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Append one row, padded to the width of the others."""
    if rows.ndim == 1:
        return np.concatenate([rows, last])
    filled = np.zeros((1, rows.shape[1]), dtype=rows.dtype)
    filled[:, : last.shape[1]] = last
    return np.concatenate([rows, filled])
