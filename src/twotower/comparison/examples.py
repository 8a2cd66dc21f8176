"""Example queries on which the compared objectives disagree, with item titles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twotower.data import Holdout, Interactions
from twotower.data.schema.columns import title_column
from twotower.evaluation import SLICES, popularity_thirds

#: Number of history items and of recommended items shown.
HISTORY, LISTED = 4, 3
#: With more objectives than this, show one example from each popularity third, otherwise two.
MANY = 5


def disagreements(
    ranked: Mapping[str, NDArray[np.int32]], holdout: Holdout, train: Interactions, exclude_seen: bool
) -> list[dict[str, Any]]:
    """Select the queries on which the rank of the target differs most between objectives.

    For each popularity third of the target, select the queries for which the reciprocal rank of the first target has
    the largest standard deviation over objectives. The examples show how lists differ, not how often.

    Args:
        ranked: objective -> ranked item codes, [E, K].
        holdout: the queries.
        train: the training interactions, for counts and, if the item table has them, titles.
        exclude_seen: whether items of the history were excluded from the lists.

    Returns:
        For each query: `query` id, `third` of the target, `history` titles (newest last), `target` title and training
        count, and for each objective the `rank` of the target (None if not in the first K) and the titles of the first
        items.
    """
    targets = holdout.target_items[holdout.target_offsets[:-1]].astype(np.int64)
    gains = np.stack([_reciprocal_rank(lists, targets) for lists in ranked.values()])
    spread = gains.std(axis=0)
    if exclude_seen:
        for row in np.flatnonzero(spread > 0):
            if targets[row] in _history(holdout, int(row)):
                spread[row] = 0.0
    thirds = popularity_thirds(train.item_counts())[targets]
    counts, titles = train.item_counts(), _Titles(train)
    found = []
    for third, label in enumerate(SLICES):
        rows = np.flatnonzero((thirds == third) & (spread > 0))
        for row in rows[np.argsort(-spread[rows], kind="stable")][: 1 if len(ranked) > MANY else 2]:
            past = _history(holdout, int(row))
            found.append(
                {
                    "query": str(train.queries.decode([int(holdout.queries[row])])[0]),
                    "third": label,
                    "history": titles.of(past[-HISTORY:]),
                    "history_length": len(past),
                    "target": titles.of(targets[[row]])[0],
                    "target_count": int(counts[targets[row]]),
                    "lists": [
                        {
                            "model": name,
                            "rank": _rank(lists[row], int(targets[row])),
                            "items": titles.of(lists[row][:LISTED]),
                        }
                        for name, lists in ranked.items()
                    ],
                }
            )
    return found


class _Titles:
    """Titles of items, or ids where a title is missing."""

    def __init__(self, train: Interactions) -> None:
        self.train = train
        self.column = None if train.item_table is None else title_column(train.item_table)

    def of(self, codes: NDArray[np.integer]) -> list[str]:
        codes = codes[codes >= 0].astype(np.int64)
        ids = [str(item) for item in self.train.items.decode(codes)]
        if self.train.item_table is None or self.column is None:
            return ids
        found = self.train.item_table[self.column].gather(codes).to_list()
        return [ids[place] if title is None else str(title) for place, title in enumerate(found)]


def _reciprocal_rank(lists: NDArray[np.int32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    hit = lists == targets[:, None]
    return np.where(hit.any(axis=1), 1.0 / (hit.argmax(axis=1) + 1), 0.0)


def _rank(ranked: NDArray[np.int32], target: int) -> int | None:
    places = np.flatnonzero(ranked == target)
    return int(places[0]) + 1 if len(places) else None


def _history(holdout: Holdout, row: int) -> NDArray[np.int32]:
    return holdout.history_items[holdout.history_offsets[row] : holdout.history_offsets[row + 1]]
