"""Construction of the guard: vectors of the texts of queries and items from a model that is not trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from torch import Tensor

from twotower.config.features import Features, TextFeature
from twotower.config.run import Config
from twotower.data import Interactions
from twotower.data.schema.vocabulary import listed, texts_of
from twotower.errors import InputError
from twotower.features.text import embed_texts
from twotower.negatives import Guard

#: Objective that a guard would make incorrect -> the reason, for error messages.
_REFUSED = {
    "refined-logq": "it normalises by the probability of the items that are not masked",
    "gbce": "its exponent is calibrated to the share of the items that are drawn",
    "nce": "it keeps drawn copies of the positive, which a guard masks",
}


def build_guard(config: Config, train: Interactions) -> Guard | None:
    """Build the guard of `objective.guard`; return None if it is not set.

    Raises:
        InputError: the objective cannot have a guard, a text belongs to a row and not to a query, or the model or the
            column of the texts is unknown.
    """
    settings = config.objective.guard
    if settings is None:
        return None
    if config.objective.name in _REFUSED:
        raise InputError(
            f"objective.guard: {config.objective.name}: {_REFUSED[config.objective.name]}; use expected-count, or "
            "sampled-logistic for a binary loss"
        )
    if config.data.query_text is not None and not config.data.texts_are_queries:
        raise InputError(
            "objective.guard: it compares the texts of queries, but with data.columns.query a text belongs to a row; "
            "make the texts the queries (data.columns.query: null)"
        )
    of_items, of_queries = _texts(config.item_tower.features), _texts(config.query_tower.features)
    columns = settings.items or list(of_items)
    column = settings.query or config.data.query_text or next(iter(of_queries), None)
    for side, missing in (("query", column is None), ("items", not columns)):
        if missing:
            raise InputError(f"objective.guard.{side}: the towers have no text feature; name the column of the texts")
    assert column is not None
    model = settings.model or next((one.model for one in of_items.values() if one.model != "words"), None)
    if model is None:
        raise InputError(
            "objective.guard.model: no text feature of the items has a model; name a sentence-transformers model"
        )

    def prompt(given: str | None, feature: TextFeature | None) -> str:
        return given if given is not None else feature.prompt if feature is not None and feature.model == model else ""

    return Guard(
        _vectors(train.query_table, [column], model, prompt(settings.query_prompt, of_queries.get(column)), "query"),
        _vectors(train.item_table, columns, model, prompt(settings.item_prompt, of_items.get(columns[0])), "item"),
        margin=settings.margin,
        relative_margin=settings.relative_margin,
    )


def _texts(features: Features) -> dict[str, TextFeature]:
    return {} if isinstance(features, str) else {one.column: one for one in features if isinstance(one, TextFeature)}


def _vectors(table: pl.DataFrame | None, columns: Sequence[str], model: str, prompt: str, side: str) -> Tensor:
    """Compute unit vectors of the joined texts of each row, float32 [rows, D]; zeros for a row without a text.

    Raises:
        InputError: there is no table, it lacks one of the columns, or no row has a text.
    """
    setting = "query" if side == "query" else "items"
    found = [] if table is None else table.columns
    missing = [name for name in columns if name not in found]
    if table is None or missing:
        raise InputError(
            f"objective.guard.{setting}: no column {missing[0]!r} in the {side} table; columns found: {listed(found)}"
        )
    parts = [texts_of(table[name], f"objective.guard.{setting}") for name in columns]
    texts = pl.select(
        pl.concat_str(parts, separator=" ", ignore_nulls=True).fill_null("").str.strip_chars()
    ).to_series()
    distinct = texts.filter(texts != "").unique().sort()
    if not len(distinct):
        raise InputError(f"objective.guard.{setting}: column {columns[0]!r} of the {side} table has no text")
    vectors = embed_texts(prompt + distinct if prompt else distinct, model)
    of_rows = np.zeros((len(texts), vectors.shape[1]), dtype=np.float32)
    has_text = (texts != "").to_numpy()
    of_rows[has_text] = vectors[distinct.search_sorted(texts.filter(texts != "")).to_numpy()]
    return torch.nn.functional.normalize(torch.from_numpy(of_rows), dim=1)
