"""Evaluation of a model or of any other ranker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from twotower import evaluation
from twotower.data import Holdout, Interactions
from twotower.errors import InputError
from twotower.evaluation import Evaluation, Ranker
from twotower.evaluation.over_ranks import over_ranks
from twotower.ranks import Ranks
from twotower.run.fitting import Model


def evaluate(
    model: Ranker,
    holdout: Holdout,
    *,
    train: Interactions | None = None,
    ks: tuple[int, ...] = (10, 20),
    exclude_seen: bool = True,
    baselines: bool = True,
    empty: Literal["skip", "zero"] = "skip",
    slices: Sequence[str] = (),
) -> Evaluation:
    """Rank the full catalog for every query of a holdout, with the model and the baselines popularity and item-kNN.

    Args:
        model: a `Model`, or anything with `rank(holdout, k, exclude_seen)`.
        holdout: queries with histories and targets, such as `split.test`.
        train: the training interactions, for baselines and popularity slices; if None, those of the `Model`.
        ks: cut-offs K.
        exclude_seen: never rank items of the query's history.
        baselines: also measure popularity and item-kNN.
        empty: a query without targets is excluded from every mean (`"skip"`) or counts as 0 (`"zero"`).
        slices: columns to slice by, such as `"items.genres"` or `"queries.age"`.

    Raises:
        InputError: `train` is missing and `model` is not a `Model`, or no table has a column named in `slices`.
    """
    if train is None:
        if not isinstance(model, Model):
            raise InputError("evaluate: pass train=..., the training interactions, for baselines and popularity slices")
        train = model.split.train
    return evaluation.evaluate(
        model.ranker if isinstance(model, Model) else over_ranks(model, Ranks.current()),
        holdout,
        train=train,
        ks=ks,
        exclude_seen=exclude_seen,
        baselines=baselines,
        empty=empty,
        slices=slices,
    )
