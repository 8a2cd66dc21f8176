"""Held-out items of known queries: the ranks that a model gives to the items of rows that it was not trained on."""

from __future__ import annotations

from typing import Any

import numpy as np

from twotower.serving.filters import Offer
from twotower.serving.http.models import ServedModel
from twotower.serving.queries import answerable, stored_history, stored_marks

#: Largest rank that is determined; held-out items that rank lower get None.
LAST_RANK = 1000

#: Maximum number of held-out items of one query; the earliest ones are kept.
_MOST = 200


def held_out(model: ServedModel, code: int, offer: Offer | None = None) -> dict[str, Any]:
    """Rank the items in the held-out rows of a known query, with its training rows as the history.

    The whole catalog is searched exactly, with the popularity dial at 1. Items of the history are excluded if the
    model's evaluation excluded them (`evaluation.exclude_seen`). All context values are unknown.

    Args:
        model: the model.
        code: code of a known query.
        offer: the group and time of the request, for which only some items may be offered and ranked; None if the model
            has no eligibility rule.

    Returns:
        JSON values: `trained`, the number of training rows, or None if the folder does not record it; `last_rank`; and
        `items`, oldest first, each with `rank` from 1, or None if the rank is larger than `last_rank`.
    """
    whole, trained = stored_history(model.artifact, code), model.trained_rows.count(code)
    found: dict[str, Any] = {"trained": trained, "last_rank": LAST_RANK, "items": []}
    if trained is None:
        return found
    history = whole[:trained]
    targets = list(dict.fromkeys(whole[trained:].tolist()))[:_MOST]
    codes = np.array([code], dtype=np.int64)
    if not targets or not answerable(model.artifact, codes, np.array([len(history)]))[0]:
        return found
    marks = stored_marks(model.artifact, codes)
    rows = np.array([0, len(history)], dtype=np.int64), history.astype(np.int32)
    _, ranked = model.search.search(
        model.retriever.embed(codes, rows, marks=None if marks is None else marks[:trained]),
        min(LAST_RANK, len(model.counts)),
        exclude=rows if model.artifact.config.evaluation.exclude_seen else None,
        allowed=model.allowed(None, offer),
        exactly=True,
    )
    ranks = {item: rank for rank, item in enumerate(ranked[0].tolist(), 1) if item >= 0}
    listed = model.listed(np.array(targets, dtype=np.int64))
    found["items"] = [{**row, "rank": ranks.get(item)} for row, item in zip(listed, targets, strict=True)]
    return found
