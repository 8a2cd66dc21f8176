"""The evaluation of a saved model, BM25 and their fusion on judged queries (`twotower evaluate --qrels`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from twotower.config.features import TextFeature
from twotower.data.io.judgements import read_qrels, read_queries
from twotower.data.schema.columns import title_column
from twotower.data.schema.vocabulary import listed, texts_of
from twotower.errors import InputError, counted
from twotower.evaluation.judgements import JudgedEvaluation, measure_judged
from twotower.ranking.bm25 import BM25, fuse
from twotower.serving import Retriever, SavedModel
from twotower.serving.queries import QueryBatch, codes_of
from twotower.serving.text_input import with_texts

#: Length of the rankings.
DEPTH = 1000


def evaluate_judged(
    directory: str | Path,
    qrels: str | Path,
    queries: str | Path,
    *,
    columns: Sequence[str] | None = None,
    depth: int = DEPTH,
) -> JudgedEvaluation:
    """Rank the whole catalog for judged queries, by the model, by BM25, and by reciprocal rank fusion of both.

    Queries without a judgement and judged queries without a text are left out; notes count both.
    Relevant items outside the catalog count as targets that are never found. Nothing is excluded from the rankings.

    Args:
        directory: a run or model folder, of a model with `data.query_text`.
        qrels: the judgements; see `read_qrels`.
        queries: the texts; see `read_queries`. Columns of query_tower.context are the context of a query.
        columns: columns of the item table for BM25; None for the text features of the item tower, or the title.
        depth: length of the rankings.

    Raises:
        InputError: a file cannot be read, the model reads no text, the two files have no query in common, or the model
            has an eligibility rule (the judged queries have no group and time).
    """
    retriever = Retriever.load(directory, exact=True)
    artifact = retriever.artifact
    if retriever.text_input is None:
        raise InputError(
            f"{directory}: this model reads no text, so it cannot rank judged queries; train one with data.query_text"
        )
    if artifact.eligibility is not None:
        raise InputError(
            f"{directory}: trained under data.eligibility, and judged queries have no group and time; evaluate on its "
            "test queries with twotower evaluate DIR"
        )
    judgements, asked = read_qrels(qrels), read_queries(queries)
    notes, judged = [], _by_query(judgements, artifact)
    texts = asked.filter(pl.col("query").is_in(list(judged)))
    if not len(texts):
        raise InputError(
            f"{queries}: no query has a judgement in {qrels}: ids such as {asked['query'][0]!r} here, and "
            f"{judgements['query'][0]!r} there"
        )
    for total, what, why, fate in (
        (len(asked), "queries", "no judgement", "left out"),
        (len(judged), "judged queries", "no text", "left out"),
    ):
        if len(texts) < total:
            of = f"of {total:,} {what}"
            notes.append(
                counted(total - len(texts), f"{of} has {why} and was {fate}", f"{of} have {why} and were {fate}")
            )
    chosen = texts["query"].to_list()
    missing = {item for query in chosen for item in judged[query] if item < 0}
    if missing:
        absent = sum(item < 0 and grade >= 1 for query in chosen for item, grade in judged[query].items())
        notes.append(f"{absent:,} relevant judgements are of items outside the catalog, which cannot be found")
    words = texts["text"].to_list()
    k = min(depth, len(artifact.items))
    rankings = {"model": _ranked(retriever, texts, k)}
    try:
        lexical = BM25(item_texts(artifact, columns)).rank(words, k, retriever.search.alive)
    except InputError as error:
        if columns is not None:
            raise
        notes.append(f"BM25 left out: {str(error).removeprefix('BM25: ')}")
    else:
        rankings |= {"BM25": lexical, "hybrid": fuse([rankings["model"], lexical], k)}
        notes.append("hybrid: reciprocal rank fusion of model and BM25")
    return measure_judged(
        rankings, [(query, judged[query]) for query in chosen], num_items=len(artifact.items), notes=notes
    )


def item_texts(artifact: SavedModel, columns: Sequence[str] | None = None) -> pl.Series:
    """Return the text of each item for BM25, null for an item without a text.

    Args:
        artifact: the model.
        columns: columns of the item table; None for the columns of the item tower's text features, or the title.

    Raises:
        InputError: the model has no item table, or the table has no such column with text.
    """
    table, declared = artifact.item_table, artifact.config.item_tower.features
    if table is None:
        raise InputError("BM25: the model has no item table; train with --items FILE")
    if columns is None:
        found = [] if isinstance(declared, str) else [one.column for one in declared if isinstance(one, TextFeature)]
        title = title_column(table)
        columns = [name for name in dict.fromkeys(found) if name in table.columns] or ([title] if title else [])
    unknown = [name for name in columns if name not in table.columns or table.schema[name].is_nested()]
    if unknown or not columns:
        texts = [name for name in table.columns if table.schema[name] == pl.String]
        what = f"no text column {unknown[0]!r}" if unknown else "the items have no text feature and no title"
        raise InputError(f"BM25: {what}; name columns with --text-columns; text columns: {listed(texts) or 'none'}")
    parts = [texts_of(table[name], "BM25: the item table") for name in columns]
    return pl.select(pl.concat_str(parts, separator=" ", ignore_nulls=True)).to_series()


def _by_query(judgements: pl.DataFrame, artifact: SavedModel) -> dict[str, dict[int, int]]:
    """Return for each query the relevance of its judged items by code; items outside the catalog have codes below 0."""
    codes = codes_of(artifact.items, judgements["item"].to_list()).copy()
    outside = np.flatnonzero(codes < 0)
    codes[outside] = -1 - np.arange(len(outside))
    found: dict[str, dict[int, int]] = {}
    for query, code, grade in zip(judgements["query"], codes.tolist(), judgements["relevance"], strict=True):
        found.setdefault(query, {})[code] = grade
    return found


def _ranked(retriever: Retriever, texts: pl.DataFrame, k: int) -> np.ndarray:
    """Rank the catalog with the model; return item codes, int64 [E, k]."""
    contexts: list[dict[str, Any]] | None = None
    names = [name for name in retriever.context_columns if name in texts.columns]
    if names:
        contexts = texts.select(names).to_dicts()
    features, context, _ = with_texts(retriever.text_input, texts["text"].to_list(), context=contexts)
    batch = QueryBatch.of(retriever.artifact, None, None, features, context=context)
    embedded = retriever.embed(batch.codes, batch.histories, batch.features, context=batch.context)
    _, items = retriever.search.search(embedded, k)
    ranked: np.ndarray = items.cpu().numpy()
    return ranked
