"""Texts as codes: a vocabulary fitted on training rows, or hashed buckets."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.schema import Vocabulary

#: Codes that are no value of the vocabulary. Hashing has no unknown values, so buckets begin at UNKNOWN.
MISSING = 0
UNKNOWN = 1


@dataclass(frozen=True)
class Values:
    """Codes of texts: 0 where missing; then 1 for unknown and 2, 3, ... for the vocabulary, or 1, 2, ... for buckets.

    A bucket is the first 64 bits of BLAKE2b of the UTF-8 text, modulo their number: the same in every process.

    Attributes:
        known: the values, in ascending order; None where they are hashed.
        buckets: how many; None for a vocabulary.
    """

    known: Vocabulary | None = None
    buckets: int | None = None

    @classmethod
    def fit(cls, texts: pl.Series, *, buckets: int | None, min_count: int) -> Values:
        """The values that occur at least `min_count` times among `texts`, or buckets, which need no fitting."""
        if buckets is not None:
            return cls(buckets=buckets)
        counts = texts.drop_nulls().alias("value").value_counts(name="count")
        kept = counts.filter(pl.col("count") >= min_count)["value"].sort()
        return cls(Vocabulary(kept.cast(pl.String)))

    @property
    def size(self) -> int:
        """Codes in use, 0 included."""
        return len(self.known) + 2 if self.known is not None else (self.buckets or 0) + 1

    def encode(self, texts: pl.Series) -> NDArray[np.int64]:
        """Codes of texts, int64 [rows]."""
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
        """One line on how these texts fare: the size of the vocabulary, or how many values share their bucket."""
        distinct = texts.drop_nulls().unique()
        if self.known is not None:
            rare = len(distinct) - len(self.known)
            return f"{len(self.known):,} values" + (f", {rare:,} rarer ones count as unknown" if rare else "")
        codes = self.encode(distinct)
        shared = int((np.bincount(codes)[codes] > 1).sum()) if len(codes) else 0
        rate = shared / max(len(codes), 1)
        return f"{len(distinct):,} values in {self.buckets:,} buckets, {rate:.1%} share theirs with another"

    def state(self) -> dict[str, Any]:
        """JSON values that `restore` takes."""
        return {"values": None if self.known is None else self.known.ids.to_list(), "buckets": self.buckets}

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Values:
        """What `state` was taken of."""
        if state["values"] is None:
            return cls(buckets=int(state["buckets"]))
        return cls(Vocabulary(pl.Series("value", state["values"], dtype=pl.String)))
