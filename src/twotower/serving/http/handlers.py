"""Answers to batches of requests: the same items as from `Retriever`, and an error for each invalid request."""

from __future__ import annotations

import hashlib
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
from twotower.features.requests import EncodedContext
from twotower.serving.explain import Embed, explain
from twotower.serving.filters import Offer
from twotower.serving.http.models import ServedModel, json_id
from twotower.serving.http.problems import Problem
from twotower.serving.queries import (
    NO_KNOWN_ITEM,
    UNKNOWN_ID,
    Marks,
    QueryBatch,
    ResolvedQuery,
    UnknownIdError,
    answerable,
    codes_of,
    require_something,
    resolve,
    unanswerable,
)
from twotower.serving.results import ResultTables
from twotower.serving.retriever import Retriever

Context = Mapping[str, Any]


def encode_batch(
    retriever: Retriever, given: Mapping[int, Context | None]
) -> tuple[EncodedContext | None, dict[int, Problem]]:
    """Encode the contexts of a batch of requests.

    The cost of encoding is per call, not per row, so all contexts are encoded together. If one is invalid, the batch is
    halved recursively until the invalid context is alone, so that the others still need few calls.

    Args:
        retriever: retriever of a model that takes a context.
        given: position of each request in the batch -> its context; None for a request without context.

    Returns:
        The valid contexts in order, or None if there are none; and the error of each invalid context, by position.
    """
    if all(one is None for one in given.values()):
        return None, {}
    errors: dict[int, Problem] = {}

    def encoded(places: list[int]) -> list[EncodedContext]:
        try:
            return [retriever.encode_context([given[place] for place in places])]
        except InputError as error:
            if len(places) == 1:
                errors[places[0]] = refusal(retriever, given[places[0]] or {}, error)
                return []
        middle = len(places) // 2
        return [*encoded(places[:middle]), *encoded(places[middle:])]

    parts = encoded(list(given))
    return EncodedContext.joined(parts) if parts else None, errors


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
    """Describe the error of a context and name the column at fault, the first one that fails when encoded alone."""
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
    k: int | None  # None for exact search, in which the K best are a prefix of any longer list
    offer: Offer | None = None


class SimilarKey(NamedTuple):
    """Settings of one search for similar items."""

    kind: str
    model: ServedModel
    filter: str | None
    offer: Offer | None


@dataclass(frozen=True)
class PendingRequest:
    """One request: a query (by id, history, features or context, or several of these), or an item for similar items."""

    k: int
    query: Any = None
    history: Sequence[Any] | None = None
    item: Any = None
    features: Mapping[str, Any] | None = None
    context: Mapping[str, Any] | None = None
    times: Sequence[Any] | None = None
    history_events: Sequence[Any] | None = None


def answer(key: RecommendKey | SimilarKey, requests: Sequence[PendingRequest]) -> list[bytes | Exception]:
    """Answer a batch: JSON for each request, or its error."""
    if isinstance(key, SimilarKey):
        return _similar(key, requests)
    return _recommend(key, requests)


def resolve_requests(
    model: ServedModel, requests: Sequence[PendingRequest]
) -> tuple[dict[int, ResolvedQuery], dict[int, InputError]]:
    """Turn the queries of requests into codes; the values of contexts are checked when they are encoded.

    Returns:
        By position, the queries that can be answered, and the errors of the others.
    """
    resolved: dict[int, ResolvedQuery] = {}
    errors: dict[int, InputError] = {}
    for place, one in enumerate(requests):
        try:
            if one.query is None and one.history is None:
                # A text was already put among the features or into the context.
                others = {"text": None, "features": one.features, "context": one.context}
                require_something({"query_id": None, "history": None, **others})
            if one.features is not None:
                model.retriever.check_features(one.features)
            if one.context is not None:
                model.retriever.ranker.context_features()
            resolved[place] = resolve(model.artifact, one.query, one.history, one.times, one.history_events)
        except InputError as error:
            errors[place] = error
    features = [requests[place].features for place in resolved]
    contexts = [requests[place].context for place in resolved]
    known = answerable(
        model.artifact,
        np.array([one.code for one in resolved.values()], dtype=np.int64),
        np.array([len(one.items) for one in resolved.values()], dtype=np.int64),
        features if any(one is not None for one in features) else None,
        contexts if any(one is not None for one in contexts) else None,
    )
    for place, is_known in zip(list(resolved), known.tolist(), strict=True):
        if not is_known:
            code = resolved.pop(place).code
            has_history = requests[place].history is not None
            subject = "query_id" if code >= 0 else "history" if has_history else "context"
            reason = unanswerable(model.artifact, code, has_history=has_history)
            unknown = reason == NO_KNOWN_ITEM and bool(requests[place].history)
            errors[place] = (UnknownIdError if unknown else InputError)(f"{subject}: {reason}")
    return resolved, errors


def explained(
    model: ServedModel, request: PendingRequest, items: Sequence[Any], popularity: float
) -> list[dict[str, Any]]:
    """Explain several items for one query, as JSON values; the query tower runs once.

    Raises:
        UnknownIdError: the query or an item is unknown.
        InputError: nothing is known about the query.
        Problem: the context cannot be used.
    """
    resolved, errors = resolve_requests(model, [request])
    if errors:
        raise errors[0]
    query = resolved[0]
    codes = codes_of(model.artifact.items, items)
    if (codes < 0).any():
        raise UnknownIdError(f"items: at least one is {UNKNOWN_ID}")
    one = QueryBatch(
        ids=model.artifact.items.ids.head(0),
        codes=np.array([query.code]),
        offsets=np.array([0, len(query.items)]),
        items=query.items.astype(np.int32),
        marks=query.marks,
    )
    cached: list[Tensor] = []
    embed_one = in_context(model.retriever, request.context)

    def embed(queries: Codes, histories: tuple[Codes, NDArray[np.int32]], marks: Marks | None) -> Tensor:
        # Every item needs the same rows: the whole history, then the history without each of its items.
        if not cached:
            cached.append(embed_one(queries, histories, marks))
        return cached[0]

    tables = ResultTables(model.artifact)
    found = [
        explain(
            tables,
            embed,
            one,
            int(item),
            length=model.retriever.ranker.history_length,
            dial=model.search.dial,
            popularity=popularity,
        ).to_dict()
        for item in codes
    ]
    for explanation in found:
        for row in (explanation, *explanation["history"]):
            row["item"] = json_id(row["item"])
    return found


def _recommend(key: RecommendKey, requests: Sequence[PendingRequest]) -> list[bytes | Exception]:
    model, answers = key.model, list[bytes | Exception](b"" for _ in requests)
    resolved, refused = resolve_requests(model, requests)
    embedded, invalid = _embed(model, requests, resolved)
    for place, error in {**refused, **invalid}.items():
        answers[place] = error
        resolved.pop(place, None)
    if not resolved:
        return answers
    places, rows = list(resolved), list(resolved.values())
    scores, found = model.search.search(
        torch.stack([embedded[place] for place in places]),
        min(max(requests[place].k for place in places), max(len(model.counts), 1)),
        exclude=_histories(rows) if key.exclude_seen else None,
        allowed=model.allowed(key.filter, key.offer),
        popularity=key.popularity,
    )
    for place, body in zip(places, _bodies(model, [requests[p].k for p in places], scores, found), strict=True):
        answers[place] = body
    return answers


def _embed(
    model: ServedModel, requests: Sequence[PendingRequest], resolved: Mapping[int, ResolvedQuery]
) -> tuple[dict[int, Tensor], dict[int, Problem]]:
    """Embed the queries of a batch; a query with a text is embedded once for all settings of dial, filters and K.

    Returns:
        By position, u(x) [D], or the error of the context.
    """
    asked = {place: _text_key(model, requests[place]) for place in resolved}
    first: dict[str | int, int] = {}  # keyed by digest (`_text_key`), or by position for a query without a text
    for place, key in asked.items():
        first.setdefault(place if key is None else key, place)
    found = {place: kept for key, place in first.items() if (kept := model.embedded_texts.get(key)) is not None}
    fresh = [place for place in first.values() if place not in found]
    context, errors = encode_batch(model.retriever, {place: requests[place].context for place in fresh})
    fresh = [place for place in fresh if place not in errors]
    if fresh:
        rows = [resolved[place] for place in fresh]
        features = [requests[place].features for place in fresh]
        embedded = model.retriever.embed(
            np.array([row.code for row in rows], dtype=np.int64),
            _histories(rows),
            None if all(row is None for row in features) else features,
            context=context,
            marks=np.concatenate([row.marks for row in rows]),
        )
        found.update(zip(fresh, embedded, strict=True))
    for place, key in asked.items():
        origin = first[place if key is None else key]
        if origin in errors:
            errors[place] = errors[origin]
        else:
            found[place] = found[origin]
            if key is not None:
                model.keep_embedded(key, found[place])
    return found, errors


def _histories(rows: Sequence[ResolvedQuery]) -> tuple[Codes, NDArray[np.int32]]:
    """Return the histories of queries as compressed rows."""
    offsets = np.concatenate([[0], np.cumsum([len(row.items) for row in rows])]).astype(np.int64)
    return offsets, np.concatenate([row.items for row in rows]).astype(np.int32)


def _text_key(model: ServedModel, request: PendingRequest) -> str | None:
    """Return a digest of all inputs that the query tower reads from a request with a text; None without a text."""
    text = model.retriever.text_input
    if text is None or not any((side or {}).get(text.column) for side in (request.features, request.context)):
        return None
    read = (request.query, request.history, request.features, request.context, request.times, request.history_events)
    return hashlib.blake2b(json.dumps(read, default=repr).encode(), digest_size=16).hexdigest()


def _similar(key: SimilarKey, requests: Sequence[PendingRequest]) -> list[bytes | Exception]:
    model, answers = key.model, list[bytes | Exception](b"" for _ in requests)
    codes = codes_of(model.artifact.items, [request.item for request in requests])
    for place in np.flatnonzero(codes < 0).tolist():
        answers[place] = UnknownIdError(f"item: {UNKNOWN_ID}")
    places = np.flatnonzero(codes >= 0).tolist()
    if not places:
        return answers
    own = codes[places]
    scores, found = model.search.neighbours.search(
        F.normalize(model.artifact.directions[torch.from_numpy(own)], dim=1),
        min(max(requests[place].k for place in places), len(model.counts)),
        (np.arange(len(own) + 1, dtype=np.int64), own),
        allowed=model.allowed(key.filter, key.offer),
    )
    for place, body in zip(places, _bodies(model, [requests[p].k for p in places], scores, found), strict=True):
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
