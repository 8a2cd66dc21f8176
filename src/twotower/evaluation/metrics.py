"""Metrics of ranked lists: pure functions, one value per query, no reduction.

They depend only on which ranked items are targets, never on scores. Relevance is binary.
"""

import numpy as np
from numpy.typing import NDArray

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
        ValueError: the shapes disagree.
    """
    if ranked.ndim != 2 or target_offsets.shape != (len(ranked) + 1,):
        raise ValueError(
            f"ranked must be [E, K] and target_offsets [E+1], got {ranked.shape} and {target_offsets.shape}"
        )
    if not ranked.size or not target_items.size:
        return np.zeros(ranked.shape, dtype=bool)
    rows = np.arange(len(ranked), dtype=np.int64)
    width = int(max(ranked.max(), target_items.max())) + 1
    if len(ranked) * width >= 2**63:
        raise ValueError(f"{len(ranked)} queries by {width} items do not fit 64 bits: evaluate in parts")
    # (query, item) pairs as single integers, so that membership in all rows is a single search.
    wanted = np.sort(np.repeat(rows, np.diff(target_offsets)) * width + target_items)
    pairs = rows[:, None] * width + ranked
    place = np.minimum(np.searchsorted(wanted, pairs), len(wanted) - 1)
    return np.asarray((wanted[place] == pairs) & (ranked >= 0))


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
    found = _first(hit, k).sum(axis=1)
    return np.asarray(found / np.maximum(num_targets, 1), dtype=np.float64)


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
        raise ValueError(f"k must be in 1 .. {hit.shape[1]} (the width of the ranking), got {k}")
    return hit[:, :k]
