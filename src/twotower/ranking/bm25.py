"""BM25 over the texts of items, and reciprocal rank fusion of several rankings."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.errors import InputError

#: A word has two characters or more.
_WORD = re.compile(r"\w\w+")
#: Parameters of BM25.
K1, B = 1.5, 0.75
#: The constant of reciprocal rank fusion (Cormack et al. 2009).
RRF = 60


def words(text: str | None) -> list[str]:
    """Return the words of a text, in lower case."""
    return _WORD.findall((text or "").lower())


class BM25:
    """BM25 (Robertson & Zaragoza 2009) in Lucene's variant, computed by the package bm25s.

        score(q, j) = sum over the words w of q, repeats included, of idf(w) f_wj / (f_wj + k1 (1 - b + b l_j / mean l))
        idf(w) = log(1 + (N - n_w + 1/2) / (n_w + 1/2))

    with f_wj the number of times that w occurs in the text of item j, l_j the number of words of this text, and n_w the
    number of texts that contain w.

    Args:
        texts: the text of each item, [N]; null for none.
        k1: saturation of the term frequency f_wj.
        b: normalisation by length.

    Raises:
        InputError: bm25s is not installed, or no text has a word.
    """

    def __init__(self, texts: pl.Series, *, k1: float = K1, b: float = B) -> None:
        try:
            import bm25s  # noqa: PLC0415  # an optional extra
        except ModuleNotFoundError as error:
            raise InputError(f"BM25: needs the package {error.name!r}; run pip install 'twotower[text]'") from None
        corpus = [words(text) for text in texts.to_list()]
        if not any(corpus):
            raise InputError("BM25: no item has a text with a word of two characters or more")
        self.num_items = len(corpus)
        self._index = bm25s.BM25(method="lucene", k1=k1, b=b, backend="numpy", csc_backend="numpy")
        self._index.index(corpus, show_progress=False)

    def scores(self, text: str) -> NDArray[np.float32]:
        """Return the score of every item for a query, float32 [N]; 0 without a word in common."""
        known = [word for word in words(text) if word in self._index.vocab_dict]
        if not known:
            return np.zeros(self.num_items, dtype=np.float32)
        found: NDArray[np.float32] = self._index.get_scores(known)
        return found

    def rank(self, texts: Sequence[str], k: int, alive: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """Rank the items that have a word in common with each query.

        Args:
            texts: the queries, E of them.
            k: K, number of items per query.
            alive: bool [N], False for items that are not ranked; None for all.

        Returns:
            int64 [E, K], best first, ties in the order of the codes; -1 where fewer than K items match.
        """
        ranked = np.full((len(texts), k), -1, dtype=np.int64)
        for row, text in enumerate(texts):
            scores = self.scores(text)
            matches = np.flatnonzero(scores > 0 if alive is None else (scores > 0) & alive)
            best = matches[np.argsort(-scores[matches], kind="stable")][:k]
            ranked[row, : len(best)] = best
        return ranked


def fuse(rankings: Sequence[NDArray[np.int64]], k: int, *, constant: int = RRF) -> NDArray[np.int64]:
    """Fuse rankings by reciprocal rank: score(j) = sum over the rankings with j of 1 / (constant + rank of j).

    Args:
        rankings: int64 [E, any], best first, -1 at the end.
        k: K, number of items per query.
        constant: the constant of the formula; 60 in Cormack et al. (2009), "Reciprocal rank fusion outperforms
            Condorcet".

    Returns:
        int64 [E, K], best first; items with equal scores in the order of the first ranking, then of the next. -1 where
        fewer than K items are left.
    """
    rows = len(rankings[0])
    fused = np.full((rows, k), -1, dtype=np.int64)
    for row in range(rows):
        scores: dict[int, float] = {}
        for ranking in rankings:
            for rank, item in enumerate(ranking[row].tolist(), start=1):
                if item >= 0:
                    scores[item] = scores.get(item, 0.0) + 1.0 / (constant + rank)
        best = sorted(scores, key=lambda item: -round(scores[item], 12))[:k]  # stable: a dict keeps the order
        fused[row, : len(best)] = best
    return fused
