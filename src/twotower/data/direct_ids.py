"""Ids of a column that become codes without a vocabulary, while the column is read piece by piece."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.account import Account
from twotower.errors import InputError
from twotower.ids import MOST_ROWS, CodedIds, Hashed, HashedIds, IdKind, expected_shared, hash_ids, rows_of
from twotower.schema import Vocabulary

#: Distinct hashes that are kept to measure collisions; 8 bytes each.
SAMPLE = 4_000_000

#: Codes this far apart from the number of rows are raw ids that somebody has taken for codes.
SPARSE, SMALL = 1000, 10_000_000

_ONE = np.uint64(1)


class CodeColumn:
    """A column whose integers are codes: N is the largest of them and one."""

    def __init__(self) -> None:
        self._largest, self._rows = -1, 0

    def take(self, ids: pl.Series, where: str, column: str) -> NDArray[np.int32]:
        """The codes of some rows.

        Raises:
            InputError: text, or integers out of range.
        """
        if ids.dtype != pl.Int64:
            raise InputError(f"{where}: column {column!r}: text such as {ids[0]!r}; codes are integers from 0 on.")
        codes = ids.to_numpy()
        wrong = np.flatnonzero((codes < 0) | (codes >= MOST_ROWS))
        if wrong.size:
            raise InputError(
                f"{where}: column {column!r}: {codes[wrong[0]]}; codes are integers from 0 to {MOST_ROWS - 1:,}. "
                "Ids that are not encoded need a vocabulary, or are hashed."
            )
        self._largest, self._rows = max(self._largest, int(codes.max())), self._rows + len(codes)
        return codes.astype(np.int32)

    def state(self) -> dict[str, NDArray[Any]]:
        """What `join` takes."""
        return {"largest": np.array(self._largest), "rows": np.array(self._rows)}

    def join(self, state: dict[str, NDArray[Any]]) -> None:
        """Add what another column has taken."""
        self._largest = max(self._largest, int(state["largest"]))
        self._rows += int(state["rows"])

    def vocabulary(self, where: str, column: str) -> Vocabulary:
        """The codes.

        Raises:
            InputError: far more codes than rows.
        """
        if self._largest >= max(SMALL, SPARSE * self._rows):
            raise InputError(
                f"{where}: column {column!r}: {self._largest} among {self._rows:,} rows; codes are dense, these look "
                "like ids. Use a vocabulary."
            )
        return CodedIds(self._largest + 1)

    def tell(self, account: Account, side: str, seen: int) -> None:
        """How many of the codes occur."""
        unseen = self._largest + 1 - seen
        account.add(f"{side} ids are codes", seen, f"{unseen:,} of 0 to {self._largest:,} occur in no row")


class HashColumn:
    """A column that is hashed to rows, and how often ids share one.

    Which ids there are is not kept. Collisions are counted on a part of the rows: those whose number is a multiple of
    2^s, with s as small as memory allows. On these rows all ids are known, and whether ids share a row is a matter of
    that row alone, so the count is exact for them, and an unbiased estimate for all.

    Args:
        kind: how many rows.
    """

    def __init__(self, kind: Hashed) -> None:
        self._rows, self._halvings = kind.rows, 0
        self._hashes = np.zeros(0, dtype=np.uint64)

    def take(self, ids: pl.Series, where: str, column: str) -> NDArray[np.int32]:
        """The rows of some ids."""
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
        """What `join` takes."""
        return {"hashes": self._hashes, "halvings": np.array(self._halvings)}

    def join(self, state: dict[str, NDArray[Any]]) -> None:
        """Add what another column has taken."""
        self._halvings = max(self._halvings, int(state["halvings"]))
        self._hashes = self._sampled(self._hashes)
        self._keep(state["hashes"])

    def vocabulary(self, where: str, column: str) -> Vocabulary:
        """The rows."""
        del where, column
        return HashedIds(Hashed(self._rows))

    def collisions(self) -> tuple[int, float]:
        """How many distinct ids there are, and the share of them that share their row with another."""
        _, counts = np.unique(rows_of(self._hashes, self._rows), return_counts=True)
        ids = int(counts.sum())
        return ids << self._halvings, float(counts[counts > 1].sum() / max(ids, 1))

    def tell(self, account: Account, side: str, seen: int) -> None:
        """The collision rate, beside the one to be expected of so many ids."""
        ids, shared = self.collisions()
        part = f", measured on one of {1 << self._halvings} rows" if self._halvings else ""
        account.add(
            f"{side} ids hashed",
            ids,
            f"to {self._rows:,} rows, of which {seen:,} are taken; {shared:.2%} of the ids share theirs with another "
            f"({expected_shared(ids, self._rows):.2%} expected){part}",
        )


def direct_column(kind: IdKind) -> CodeColumn | HashColumn | None:
    """What reads a column of such ids; None where they need a vocabulary."""
    if isinstance(kind, Hashed):
        return HashColumn(kind)
    return CodeColumn() if kind == "codes" else None
