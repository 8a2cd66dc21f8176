"""Answers to batches of requests: the same ids as from `Retriever`, with errors per request.

Encoding of request contexts in the service: a batch in one call, with errors per request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from twotower.data.schema.vocabulary import Codes
from twotower.errors import InputError
from twotower.features.requests import EncodedContext, given_gaps
from twotower.serving.explain import Embed, explain
from twotower.serving.http.models import ServedModel, codes_of, known_code
from twotower.serving.http.problems import Problem
from twotower.serving.queries import (
    NO_HISTORY,
    Gaps,
    QueryBatch,
    no_training_row,
    reads_history,
    stored_gaps,
    stored_histories,
    told_by_id,
)
from twotower.serving.results import ResultTables
from twotower.serving.retriever import Retriever

Context = Mapping[str, Any]


def encode_batch(
    retriever: Retriever, given: Mapping[int, Context | None]
) -> tuple[EncodedContext | None, dict[int, Problem]]:
    """Encode the contexts of a batch of requests.

    The cost of encoding is per call, not per row, so all contexts are tried together. If one is invalid, the two halves
    are tried, recursively, until the invalid one is alone: the others still need few calls.

    Args:
        retriever: retriever of a model that takes a context.
        given: position of each request in the batch -> its context; None for a request without context.

    Returns:
        The valid contexts in order, or None if no request has one; and the error of each other request, by position.
    """
    if all(one is None for one in given.values()):
        return None, {}
    wrong: dict[int, Problem] = {}

    def encoded(places: list[int]) -> list[EncodedContext]:
        try:
            return [retriever.encode_context([given[place] for place in places])]
        except InputError as error:
            if len(places) == 1:
                wrong[places[0]] = refusal(retriever, given[places[0]] or {}, error)
                return []
        middle = len(places) // 2
        return [*encoded(places[:middle]), *encoded(places[middle:])]

    parts = encoded(list(given))
    return EncodedContext.joined(parts) if parts else None, wrong


def in_context(retriever: Retriever, context: Context | None) -> Embed:
    """Call `Retriever.in_context` and turn its error into a problem.

    Raises:
        Problem: 422, the context cannot be used.
    """
    try:
        return retriever.in_context(context)
    except InputError as error:
        raise refusal(retriever, context or {}, error) from None


def refusal(retriever: Retriever, context: Context, error: InputError) -> Problem:
    """Describe the error of a context and name the column at fault: the first that fails when encoded alone."""
    for name, value in context.items():
        try:
            retriever.encode_context([{name: value}])
        except InputError:
            return Problem(422, str(error), field=("context", name))
    return Problem(422, str(error))


class RecommendKey(NamedTuple):
    """Settings of one search. They include the model, so that a batch never mixes two models."""

    kind: str
    model: ServedModel
    exclude_seen: bool
    filter: str | None
    popularity: float
    k: int | None  # None for exact search, where the K best are a prefix of a longer list


class SimilarKey(NamedTuple):
    """Settings of one search for similar items."""

    kind: str
    model: ServedModel
    filter: str | None


@dataclass(frozen=True)
class PendingRequest:
    """One request: a query by id, history, features or context, or several of these; or an item for similar items."""

    k: int
    query: Any = None
    history: Sequence[Any] | None = None
    item: Any = None
    features: Mapping[str, Any] | None = None
    context: Mapping[str, Any] | None = None
    times: Sequence[Any] | None = None


def answer(key: RecommendKey | SimilarKey, questions: Sequence[PendingRequest]) -> list[bytes | Exception]:
    """Answer a batch: JSON for each request, or its error."""
    if isinstance(key, SimilarKey):
        return _similar(key, questions)
    return _recommend(key, questions)


def asked(model: ServedModel, question: PendingRequest) -> tuple[int, Codes, Gaps]:
    """Return the query code, the history and its gaps (all unknown without times) of one request.

    The values of its context are checked when they are encoded.

    Raises:
        InputError: the query is unknown, the model takes no features or no context, or nothing that the query tower
            reads is known.
    """
    query, history, times = question.query, question.history, question.times
    features, context = question.features, question.context
    if features is not None:
        model.retriever.check_features(features)
    if context is not None:
        model.retriever.ranker.context_features()
    described = features is not None or context is not None
    code = -1 if query is None else known_code(model.query_codes([query]), "query_id")
    if history is None:
        if times is not None:
            raise InputError("times: expected together with history, one for each of its items")
        if code < 0 and described:
            return code, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int8)
        if code < 0:
            raise InputError("expected query_id, history or features, found none of them")
        stored = stored_histories(model.artifact, np.array([code]))[1].astype(np.int64)
        _refuse_untrained(model, code, stored, described=described)
        gaps = stored_gaps(model.artifact, np.array([code]))
        return code, stored, np.zeros(len(stored), dtype=np.int8) if gaps is None else gaps
    codes = codes_of(model.artifact.items, history)
    gaps = given_gaps(times, len(codes))[codes >= 0]
    codes = codes[codes >= 0]
    if code < 0 and not described and not reads_history(model.artifact):
        raise InputError(f"history: {NO_HISTORY}")
    if code < 0 and not len(codes) and not described:
        raise InputError("history: none of its items is in the catalog; expected at least one known item id")
    _refuse_untrained(model, code, codes, described=described)
    return code, codes, gaps


def _refuse_untrained(model: ServedModel, code: int, history: Codes, *, described: bool) -> None:
    read = len(history) > 0 and reads_history(model.artifact)
    if code >= 0 and not described and not read and not told_by_id(model.artifact, np.array([code]))[0]:
        raise InputError(f"query_id: {no_training_row(model.artifact)}")


def explained(
    model: ServedModel, question: PendingRequest, items: Sequence[Any], popularity: float
) -> list[dict[str, Any]]:
    """Explain several items for one query, as JSON values; the query tower runs once.

    Raises:
        InputError: the query or an item is unknown, or nothing is known of the query.
        Problem: the context cannot be used.
    """
    code, seen, gaps = asked(model, question)
    codes = codes_of(model.artifact.items, items)
    if (codes < 0).any():
        raise InputError("items: at least one is not a known item id")
    one = QueryBatch(
        ids=model.artifact.items.ids.head(0),
        codes=np.array([code]),
        offsets=np.array([0, len(seen)]),
        items=seen.astype(np.int32),
        gaps=gaps,
    )
    cached: list[Tensor] = []
    embed_one = in_context(model.retriever, question.context)

    def embed(queries: Codes, histories: tuple[Codes, NDArray[np.int32]], gaps: Gaps | None) -> Tensor:
        # Every item needs the same rows: the whole history, then the history without each of its items.
        if not cached:
            cached.append(embed_one(queries, histories, gaps))
        return cached[0]

    answers = ResultTables(model.artifact)
    return [
        explain(
            answers,
            embed,
            one,
            int(item),
            length=model.retriever.ranker.history_length,
            dial=model.search.dial,
            popularity=popularity,
        ).to_dict()
        for item in codes
    ]


def _recommend(key: RecommendKey, questions: Sequence[PendingRequest]) -> list[bytes | Exception]:
    model, answers = key.model, list[bytes | Exception](b"" for _ in questions)
    good: dict[int, tuple[int, Codes, Gaps]] = {}
    for place, question in enumerate(questions):
        try:
            good[place] = asked(model, question)
        except InputError as error:
            answers[place] = error
    context, wrong = encode_batch(model.retriever, {place: questions[place].context for place in good})
    for place, refused in wrong.items():
        answers[place] = refused
        del good[place]
    if not good:
        return answers
    places, rows = list(good), list(good.values())
    offsets = np.concatenate([[0], np.cumsum([len(seen) for _, seen, _ in rows])]).astype(np.int64)
    items = np.concatenate([seen for _, seen, _ in rows]).astype(np.int32)
    features = [questions[place].features for place in places]
    embedded = model.retriever.embed(
        np.array([code for code, _, _ in rows], dtype=np.int64),
        (offsets, items),
        None if all(row is None for row in features) else features,
        context=context,
        gaps=np.concatenate([gaps for _, _, gaps in rows]),
    )
    scores, found = model.search.search(
        embedded,
        min(max(questions[place].k for place in places), max(len(model.counts), 1)),
        exclude=(offsets, items) if key.exclude_seen else None,
        allowed=model.condition(key.filter),
        popularity=key.popularity,
    )
    for place, body in zip(places, _bodies(model, [questions[p].k for p in places], scores, found), strict=True):
        answers[place] = body
    return answers


def _similar(key: SimilarKey, questions: Sequence[PendingRequest]) -> list[bytes | Exception]:
    model, answers = key.model, list[bytes | Exception](b"" for _ in questions)
    codes = codes_of(model.artifact.items, [question.item for question in questions])
    for place in np.flatnonzero(codes < 0).tolist():
        answers[place] = InputError("item: not an id that this model knows")
    places = np.flatnonzero(codes >= 0).tolist()
    if not places:
        return answers
    own = codes[places]
    scores, found = model.search.neighbours.search(
        F.normalize(model.artifact.directions[torch.from_numpy(own)], dim=1),
        min(max(questions[place].k for place in places), len(model.counts)),
        (np.arange(len(own) + 1, dtype=np.int64), own),
        allowed=model.condition(key.filter),
    )
    for place, body in zip(places, _bodies(model, [questions[p].k for p in places], scores, found), strict=True):
        answers[place] = body
    return answers


def _bodies(model: ServedModel, ks: Sequence[int], scores: Tensor, found: Tensor) -> list[bytes]:
    """Write the results of a search as JSON, each cut to its own K."""
    item_codes, values = found.numpy(), scores.numpy()
    sizes = [int((row[:k] >= 0).sum()) for row, k in zip(item_codes, ks, strict=True)]
    codes = np.concatenate([row[:size] for row, size in zip(item_codes, sizes, strict=True)])
    flat = np.concatenate([row[:size] for row, size in zip(values, sizes, strict=True)]).tolist()
    rows = model.listed(codes)
    answers, start = [], 0
    for size in sizes:
        listed = [
            {"rank": rank, **row, "score": score}
            for rank, row, score in zip(
                range(1, size + 1), rows[start : start + size], flat[start : start + size], strict=True
            )
        ]
        start += size
        body = {"model": model.name, "version": model.version, "items": listed}
        answers.append(json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace"))
    return answers
