"""Metrics of ranked lists, as pure functions of arrays; metrics of single lists return one value per query.

Accuracy metrics depend only on which ranked items are targets, with binary relevance. Beyond-accuracy metrics
(coverage, novelty, diversity, Gini) depend only on the lists. No metric sees a score.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from twotower.errors import InputError

Hits = NDArray[np.bool_]
Values = NDArray[np.float64]


def hits(ranked: NDArray[np.int64], target_offsets: NDArray[np.int64], target_items: NDArray[np.integer]) -> Hits:
    """Mark which ranked items are targets of their query.

    Args:
        ranked: [E, K] item codes, -1 where nothing was ranked.
        target_offsets: [E+1] compressed rows: query e has targets `target_items[offsets[e]:offsets[e+1]]`.
        target_items: item codes, in any order, repeats allowed.

    Returns:
        [E, K] bool, False where `ranked` is -1.

    Raises:
        InputError: the shapes disagree, or there are too many queries and items for 64-bit pairs.
    """
    if ranked.ndim != 2 or target_offsets.shape != (len(ranked) + 1,):
        raise InputError(
            f"ranked must be [E, K] and target_offsets [E+1], got {ranked.shape} and {target_offsets.shape}"
        )
    if not ranked.size or not target_items.size:
        return np.zeros(ranked.shape, dtype=bool)
    rows = np.arange(len(ranked), dtype=np.int64)
    width = int(max(ranked.max(), target_items.max())) + 1
    if len(ranked) * width >= 2**63:
        raise InputError(f"{len(ranked)} queries by {width} items do not fit in 64 bits: evaluate in parts")
    # Encode (query, item) pairs as single integers, so that one search tests membership in all rows.
    target_keys = np.sort(np.repeat(rows, np.diff(target_offsets)) * width + target_items)
    pairs = rows[:, None] * width + ranked
    place = np.minimum(np.searchsorted(target_keys, pairs), len(target_keys) - 1)
    return np.asarray((target_keys[place] == pairs) & (ranked >= 0))


def recall_at(hit: Hits, num_targets: NDArray[np.int64], k: int) -> Values:
    """Compute Recall@K = (targets among the first K) / (number of targets).

    The divisor is the number of targets even if it exceeds K.

    Args:
        hit: [E, K'] from `hits`, K' >= k.
        num_targets: [E] number of targets of each query.
        k: K.

    Returns:
        [E] in [0, 1]; 0 for a query without targets.
    """
    hit_count = _first(hit, k).sum(axis=1)
    return np.asarray(hit_count / np.maximum(num_targets, 1), dtype=np.float64)


def ndcg_at(hit: Hits, num_targets: NDArray[np.int64], k: int) -> Values:
    """Compute NDCG@K with binary gain: DCG / IDCG.

        DCG  = sum_{r=1..K} hit_r / log2(r + 1)
        IDCG = sum_{r=1..min(K, targets)} 1 / log2(r + 1)

    (Järvelin & Kekäläinen 2002; with binary gain its variants are equal.)

    Args:
        hit: [E, K'] from `hits`, K' >= k.
        num_targets: [E] number of targets of each query.
        k: K.

    Returns:
        [E] in [0, 1]; 0 for a query without targets.
    """
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    ideal = np.concatenate([[1.0], np.cumsum(discount)])  # avoids 0 / 0 for queries without targets
    gained = np.asarray(_first(hit, k) @ discount, dtype=np.float64)
    return np.asarray(gained / ideal[np.minimum(num_targets, k)], dtype=np.float64)


def mrr_at(hit: Hits, k: int) -> Values:
    """Compute the reciprocal rank MRR@K = 1 / (rank of the first target), 0 if none is among the first K.

    Args:
        hit: [E, K'] from `hits`, K' >= k.
        k: K.

    Returns:
        [E] in [0, 1].
    """
    first = _first(hit, k)
    return np.asarray(np.where(first.any(axis=1), 1.0 / (first.argmax(axis=1) + 1), 0.0), dtype=np.float64)


def hit_rate_at(hit: Hits, k: int) -> Values:
    """Compute the hit rate HR@K, also called success: 1 if any target is among the first K, else 0.

    Args:
        hit: [E, K'] from `hits`, K' >= k.
        k: K.

    Returns:
        [E] of 0.0 and 1.0.
    """
    return np.asarray(_first(hit, k).any(axis=1), dtype=np.float64)


def coverage(ranked: NDArray[np.int64], num_items: int) -> float:
    """Compute catalog coverage: the share of the N items that appear in any list.

    Args:
        ranked: [E, K] item codes, -1 where nothing was ranked.
        num_items: N.

    Returns:
        A number in [0, 1].
    """
    shown = np.zeros(num_items, dtype=bool)
    shown[ranked[ranked >= 0]] = True
    return float(shown.sum() / max(num_items, 1))


def _first(hit: Hits, k: int) -> Hits:
    if not 1 <= k <= hit.shape[1]:
        raise InputError(f"k must be in 1 .. {hit.shape[1]} (the width of the ranking), got {k}")
    return hit[:, :k]


Ranked = NDArray[np.int64]

#: Number of elements of gathered embeddings in memory at a time, queries x K x D.
_BLOCK = 1 << 22


def exposure(ranked: Ranked, num_items: int) -> NDArray[np.int64]:
    """Count how often each item is recommended.

    Args:
        ranked: [E, K] item codes, -1 where nothing was ranked.
        num_items: N.

    Returns:
        [N] counts.
    """
    return np.bincount(ranked[ranked >= 0], minlength=num_items)


def gini(counts: ArrayLike) -> float:
    """Compute the Gini index of item exposure: 0 if all items are shown equally often, 1 - 1/N if only one is shown.

        G = sum_{i=1..N} (2 i - N - 1) x_i / (N sum_i x_i),   x_1 <= ... <= x_N

    over all N items, including those never shown (Gini 1912; for recommendation Shani & Gunawardana 2011).

    Args:
        counts: [N], how often each item is shown (`exposure`).

    Returns:
        A number in [0, 1 - 1/N]; NaN if nothing is shown.
    """
    x = np.sort(np.asarray(counts, dtype=np.float64))
    total = float(x.sum())
    if not total:
        return math.nan
    place = 2 * np.arange(1, len(x) + 1) - len(x) - 1
    return float(place @ x) / (len(x) * total)


def self_information(item_counts: NDArray[np.integer]) -> Values:
    """Compute how surprising each item is, in bits: -log2 p_j.

        p_j = (c_j + 1) / (n + N)

    is the share of item j among the n training interactions, with add-one smoothing over the N items, so that unseen
    items have a probability too and all probabilities sum to one.

    Args:
        item_counts: [N] c_j, training interactions of each item.

    Returns:
        [N] bits.
    """
    counts = np.asarray(item_counts, dtype=np.float64)
    return np.asarray(np.log2(counts.sum() + len(counts)) - np.log2(counts + 1))


def list_mean(ranked: Ranked, of_items: NDArray[np.number], k: int) -> Values:
    """Average a per-item number over the first K items of each list.

    With `self_information` this is novelty@K (Zhou et al. 2010; Vargas & Castells 2011 without rank discount); with
    training counts it is popularity@K.

    Args:
        ranked: [E, K'] item codes, -1 where nothing was ranked, K' >= k.
        of_items: [N] the value of each item.
        k: K.

    Returns:
        [E]; NaN for an empty list.
    """
    first = ranked[:, :k]
    shown = first >= 0
    sums = np.where(shown, np.asarray(of_items, dtype=np.float64)[first], 0.0).sum(axis=1)
    return _divided(sums, shown.sum(axis=1))


def diversity_at(ranked: Ranked, item_embeddings: NDArray[np.floating], ks: Sequence[int]) -> list[Values]:
    """Compute intra-list diversity: the mean of 1 - cosine over all pairs of different items of a list.

        diversity = 1 - sum_{i != j} <e_i, e_j> / (n (n - 1)) = 1 - (|sum_i e_i|^2 - sum_i |e_i|^2) / (n (n - 1))

    with e_i the item embeddings normalized to length 1 and n the number of items of the list (Ziegler et al. 2005 in
    the form of Smyth & McClave 2001). The second form needs one sum per list instead of one product per pair. The
    cosine with an embedding of length 0 counts as 0.

    Args:
        ranked: [E, K'] item codes, -1 where nothing was ranked.
        item_embeddings: [N, D].
        ks: the cut-offs, each at most K'.

    Returns:
        For each K an array [E] in [0, 2]; NaN if fewer than 2 items are ranked.
    """
    length = np.linalg.norm(item_embeddings, axis=1, keepdims=True)
    # An extra row of zeros for -1.
    unit = np.zeros((len(item_embeddings) + 1, item_embeddings.shape[1]), dtype=np.float32)
    np.divide(item_embeddings, length, out=unit[:-1], where=length > 0)
    squares = (unit.astype(np.float64) ** 2).sum(axis=1)
    widest = max(ks)
    result = [np.full(len(ranked), np.nan) for _ in ks]
    block = max(1, _BLOCK // (widest * unit.shape[1]))
    for start in range(0, len(ranked), block):
        lists = ranked[start : start + block, :widest]
        vectors = unit[lists]
        for place, k in enumerate(ks):
            count = (lists[:, :k] >= 0).sum(axis=1)
            together = vectors[:, :k].sum(axis=1, dtype=np.float64)
            pairs = (together**2).sum(axis=1) - squares[lists[:, :k]].sum(axis=1)
            result[place][start : start + block] = 1.0 - _divided(pairs, count * (count - 1))
    return result


def _divided(sums: Values, counts: NDArray[np.int64]) -> Values:
    """Divide sums by counts, [E]; NaN where the count is 0."""
    return np.asarray(np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0))
