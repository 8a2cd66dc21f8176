"""Codes of categorical values: a vocabulary fitted on training rows, or hash buckets."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.schema import Vocabulary

#: Codes of missing and unknown values. Hashing has no unknown values, so its buckets begin at UNKNOWN.
MISSING = 0
UNKNOWN = 1


@dataclass(frozen=True)
class Values:
    """Codes of texts: 0 where missing; then 1 for unknown and 2, 3, ... for the vocabulary, or 1, 2, ... for buckets.

    A bucket is the 64-bit BLAKE2b hash of the UTF-8 text modulo the number of buckets: the same in every process.

    Attributes:
        known: the values, in ascending order; None if they are hashed.
        buckets: number of buckets; None for a vocabulary.
    """

    known: Vocabulary | None = None
    buckets: int | None = None

    @classmethod
    def fit(cls, texts: pl.Series, *, buckets: int | None, min_count: int) -> Values:
        """Fit a vocabulary of the values that occur at least `min_count` times; buckets need no fitting."""
        if buckets is not None:
            return cls(buckets=buckets)
        counts = texts.drop_nulls().alias("value").value_counts(name="count")
        frequent = counts.filter(pl.col("count") >= min_count)["value"].sort()
        return cls(Vocabulary(frequent.cast(pl.String)))

    @property
    def size(self) -> int:
        """Number of codes, including 0."""
        return len(self.known) + 2 if self.known is not None else (self.buckets or 0) + 1

    def encode(self, texts: pl.Series) -> NDArray[np.int64]:
        """Encode texts, int64 [rows]."""
        if self.known is not None:
            codes = self.known.encode(texts.cast(pl.String)) + 2
            codes[codes == 1] = UNKNOWN
            codes[texts.is_null().to_numpy()] = MISSING
            return codes
        distinct = Vocabulary(texts.drop_nulls().unique().sort().cast(pl.String))
        bucket = np.array([1 + self._bucket(value) for value in distinct.ids] or [MISSING], dtype=np.int64)
        place = distinct.encode(texts.cast(pl.String))
        return np.where(place < 0, MISSING, bucket[np.maximum(place, 0)])

    def _bucket(self, value: str) -> int:
        return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little") % (self.buckets or 1)

    def told(self, texts: pl.Series) -> str:
        """Summarise the encoding of these texts in a line: the vocabulary size, or the share of bucket collisions."""
        distinct = texts.drop_nulls().unique()
        if self.known is not None:
            rare = len(distinct) - len(self.known)
            return f"{len(self.known):,} values" + (f", {rare:,} rarer values count as unknown" if rare else "")
        codes = self.encode(distinct)
        shared = int((np.bincount(codes)[codes] > 1).sum()) if len(codes) else 0
        rate = shared / max(len(codes), 1)
        return f"{len(distinct):,} values in {self.buckets:,} buckets, {rate:.1%} share a bucket with another value"

    def state(self) -> dict[str, Any]:
        """Return the fitted state as JSON values, for `restore`."""
        return {"values": None if self.known is None else self.known.ids.to_list(), "buckets": self.buckets}

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Values:
        """Restore from `state`."""
        if state["values"] is None:
            return cls(buckets=int(state["buckets"]))
        return cls(Vocabulary(pl.Series("value", state["values"], dtype=pl.String)))
