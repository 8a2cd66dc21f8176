"""Readers of id columns without a vocabulary: ids that are codes, and hashed ids; chunk by chunk."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.account import Account
from twotower.errors import InputError
from twotower.ids import MOST_ROWS, CodedIds, Hashed, HashedIds, IdKind, expected_shared, hash_ids, rows_of
from twotower.schema import Vocabulary

#: Maximum number of distinct hashes stored to measure collisions; 8 bytes each.
SAMPLE = 4_000_000

#: Codes of at least SMALL and at least SPARSE times the number of rows are ids mistaken for codes.
SPARSE, SMALL = 1000, 10_000_000

_ONE = np.uint64(1)


class CodeColumn:
    """A column whose integers are codes: N is the largest plus one."""

    def __init__(self) -> None:
        self._largest, self._rows = -1, 0

    def take(self, ids: pl.Series, where: str, column: str) -> NDArray[np.int32]:
        """Validate the codes of a chunk.

        Raises:
            InputError: text, or integers out of range.
        """
        if ids.dtype != pl.Int64:
            raise InputError(f"{where}: column {column!r}: text such as {ids[0]!r}; codes are integers from 0 upwards.")
        codes = ids.to_numpy()
        wrong = np.flatnonzero((codes < 0) | (codes >= MOST_ROWS))
        if wrong.size:
            raise InputError(
                f"{where}: column {column!r}: {codes[wrong[0]]}; codes are integers from 0 to {MOST_ROWS - 1:,}. "
                "Use a vocabulary or hashing for ids that are not codes."
            )
        self._largest, self._rows = max(self._largest, int(codes.max())), self._rows + len(codes)
        return codes.astype(np.int32)

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the state for `join`."""
        return {"largest": np.array(self._largest), "rows": np.array(self._rows)}

    def join(self, state: dict[str, NDArray[Any]]) -> None:
        """Add the state of another column."""
        self._largest = max(self._largest, int(state["largest"]))
        self._rows += int(state["rows"])

    def vocabulary(self, where: str, column: str) -> Vocabulary:
        """Return the vocabulary of the codes.

        Raises:
            InputError: far more codes than rows.
        """
        if self._largest >= max(SMALL, SPARSE * self._rows):
            raise InputError(
                f"{where}: column {column!r}: largest code {self._largest} in {self._rows:,} rows; codes must be "
                "dense, these look like ids. Use a vocabulary."
            )
        return CodedIds(self._largest + 1)

    def tell(self, account: Account, side: str, seen: int) -> None:
        """Add a line on how many of the codes occur."""
        unseen = self._largest + 1 - seen
        account.add(f"{side} ids are codes", seen, f"{unseen:,} of 0 to {self._largest:,} occur in no row")


class HashColumn:
    """A column that is hashed to rows, with a measurement of collisions.

    The ids are not stored. Collisions are counted on a sample of the rows: those whose number is a multiple of 2^s,
    with s as small as memory allows. All ids of a sampled row are known, and a collision concerns only one row, so the
    count is exact on the sample and an unbiased estimate for all rows.

    Args:
        kind: the number of rows.
    """

    def __init__(self, kind: Hashed) -> None:
        self._rows, self._halvings = kind.rows, 0
        self._hashes = np.zeros(0, dtype=np.uint64)

    def take(self, ids: pl.Series, where: str, column: str) -> NDArray[np.int32]:
        """Hash the ids of a chunk to rows."""
        del where, column
        hashes = hash_ids(ids)
        self._keep(np.unique(hashes))
        return rows_of(hashes, self._rows).astype(np.int32)

    def _keep(self, hashes: NDArray[np.uint64]) -> None:
        self._hashes = np.union1d(self._hashes, self._sampled(hashes))
        while len(self._hashes) > SAMPLE:
            self._halvings += 1
            self._hashes = self._sampled(self._hashes)

    def _sampled(self, hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
        row = hashes % np.uint64(self._rows)
        kept: NDArray[np.uint64] = hashes[row & ((_ONE << np.uint64(self._halvings)) - _ONE) == 0]
        return kept

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the state for `join`."""
        return {"hashes": self._hashes, "halvings": np.array(self._halvings)}

    def join(self, state: dict[str, NDArray[Any]]) -> None:
        """Add the state of another column."""
        self._halvings = max(self._halvings, int(state["halvings"]))
        self._hashes = self._sampled(self._hashes)
        self._keep(state["hashes"])

    def vocabulary(self, where: str, column: str) -> Vocabulary:
        """Return the vocabulary of the rows."""
        del where, column
        return HashedIds(Hashed(self._rows))

    def collisions(self) -> tuple[int, float]:
        """Estimate the number of distinct ids, and the fraction of them that share their row with another id."""
        _, counts = np.unique(rows_of(self._hashes, self._rows), return_counts=True)
        ids = int(counts.sum())
        return ids << self._halvings, float(counts[counts > 1].sum() / max(ids, 1))

    def tell(self, account: Account, side: str, seen: int) -> None:
        """Add a line with the measured and the expected collision rate."""
        ids, shared = self.collisions()
        part = f", measured on one of {1 << self._halvings} rows" if self._halvings else ""
        account.add(
            f"{side} ids hashed",
            ids,
            f"to {self._rows:,} rows, of which {seen:,} are used; {shared:.2%} of the ids share a row with another id "
            f"({expected_shared(ids, self._rows):.2%} expected){part}",
        )


def direct_column(kind: IdKind) -> CodeColumn | HashColumn | None:
    """Return the reader for this kind of ids; None if they need a vocabulary."""
    if isinstance(kind, Hashed):
        return HashColumn(kind)
    return CodeColumn() if kind == "codes" else None
