"""Small fakes with the attributes that evaluation reads, and rankers with known rankings."""

from dataclasses import dataclass

import numpy as np
import torch

from twotower.index import tie_order, top_k


def compressed(rows):
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    offsets[1:] = np.cumsum([len(row) for row in rows])
    return offsets, np.array([item for row in rows for item in row], dtype=np.int32)


class Train:
    def __init__(self, rows, num_items):
        self.rows = rows
        self.offsets, self.item_codes = compressed(rows)
        self.num_items = num_items
        self.num_queries = len(rows)
        self.queries = self.item_table = self.query_table = self.timestamps = None

    def item_counts(self):
        return np.bincount(self.item_codes, minlength=self.num_items).astype(np.int64)


class FakeHoldout:
    """A holdout from lists of histories and targets."""

    name = "test"
    event = eligibility = eligible = query_text = history_events = None

    def __init__(self, histories, targets):
        self.histories, self.targets = histories, targets
        self.queries = np.arange(len(histories), dtype=np.int64) * 3 + 1
        self.history_offsets, self.history_items = compressed(histories)
        self.target_offsets, self.target_items = compressed(targets)

    def __len__(self):
        return len(self.queries)


@dataclass
class Scores:
    """A ranker by a given matrix of scores."""

    scores: torch.Tensor

    def rank(self, holdout, k, exclude_seen):
        order = tie_order(self.scores.shape[1])
        laid = self.scores[:, order]
        exclude = (holdout.history_offsets, holdout.history_items) if exclude_seen else None
        return top_k(lambda rows, columns: laid[rows, columns].clone(), len(laid), order, k, exclude)[1]


@dataclass
class Fixed:
    """A ranker that returns a given ranking."""

    ranked: object
    is_exact: bool = True

    def rank(self, holdout, k, exclude_seen):
        return self.ranked
