"""Batches of questions answered: the same ids as `Retriever` gives, each question failing on its own."""

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

from twotower.data.gaps import given_gaps
from twotower.errors import InputError
from twotower.serving.answers import Answers
from twotower.serving.explain import explain
from twotower.serving.questions import (
    NO_HISTORY,
    Gaps,
    Questions,
    no_training_row,
    reads_history,
    stored_gaps,
    stored_histories,
    told_by_id,
)
from twotower.serving.service.contexts import encode_batch, in_context
from twotower.serving.service.model import Codes, ServedModel, codes_of, known_code


class RecommendKey(NamedTuple):
    """Settings that one search can have. The model is among them: a swap never mixes two in a batch."""

    kind: str
    model: ServedModel
    exclude_seen: bool
    filter: str | None
    popularity: float
    k: int | None  # None where any K is a prefix of a larger one: exact search


class SimilarKey(NamedTuple):
    """Settings of one search for neighbours."""

    kind: str
    model: ServedModel
    filter: str | None


@dataclass(frozen=True)
class Question:
    """One request: for a query by id, history, features, context, or several of them; for neighbours, an item id."""

    k: int
    query: Any = None
    history: Sequence[Any] | None = None
    item: Any = None
    features: Mapping[str, Any] | None = None
    context: Mapping[str, Any] | None = None
    times: Sequence[Any] | None = None


def answer(key: RecommendKey | SimilarKey, questions: Sequence[Question]) -> list[bytes | Exception]:
    """JSON for each question of a batch, or what is wrong with it."""
    if isinstance(key, SimilarKey):
        return _similar(key, questions)
    return _recommend(key, questions)


def asked(model: ServedModel, question: Question) -> tuple[int, Codes, Gaps]:
    """Query code, history, and the gaps in it (all unknown where no times are), of one question.

    What its context says is looked at where it is encoded.

    Raises:
        InputError: an unknown query, features or a context that the model does not take, or nothing known that the
            query tower reads.
    """
    query, history, times = question.query, question.history, question.times
    features, context = question.features, question.context
    if features is not None:
        model.retriever.check_features(features)
    if context is not None:
        model.retriever.ranker.context_features()
    told = features is not None or context is not None
    code = -1 if query is None else known_code(model.query_codes([query]), "query_id")
    if history is None:
        if times is not None:
            raise InputError("times: expected with history, whose items they belong to")
        if code < 0 and told:
            return code, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int8)
        if code < 0:
            raise InputError("expected query_id or history, or features, found none of them")
        stored = stored_histories(model.artifact, np.array([code]))[1].astype(np.int64)
        _refuse_untrained(model, code, stored, told=told)
        gaps = stored_gaps(model.artifact, np.array([code]))
        return code, stored, np.zeros(len(stored), dtype=np.int8) if gaps is None else gaps
    codes = codes_of(model.artifact.items, history)
    gaps = given_gaps(times, len(codes))[codes >= 0]
    codes = codes[codes >= 0]
    if code < 0 and not told and not reads_history(model.artifact):
        raise InputError(f"history: {NO_HISTORY}")
    if code < 0 and not len(codes) and not told:
        raise InputError("history: none of its items is in the catalog; expected at least one known item id")
    _refuse_untrained(model, code, codes, told=told)
    return code, codes, gaps


def _refuse_untrained(model: ServedModel, code: int, history: Codes, *, told: bool) -> None:
    read = len(history) > 0 and reads_history(model.artifact)
    if code >= 0 and not told and not read and not told_by_id(model.artifact, np.array([code]))[0]:
        raise InputError(f"query_id: {no_training_row(model.artifact)}")


def explained(model: ServedModel, question: Question, items: Sequence[Any], popularity: float) -> list[dict[str, Any]]:
    """What pulled each of some items up, as JSON values, the tower asked only once.

    Raises:
        InputError: an unknown query or item, or nothing known.
        Problem: a context that cannot be used.
    """
    code, seen, gaps = asked(model, question)
    codes = codes_of(model.artifact.items, items)
    if (codes < 0).any():
        raise InputError("items: not all are ids that this model knows")
    one = Questions(
        ids=model.artifact.items.ids.head(0),
        codes=np.array([code]),
        offsets=np.array([0, len(seen)]),
        items=seen.astype(np.int32),
        gaps=gaps,
    )
    kept: list[Tensor] = []
    embed_one = in_context(model.retriever, question.context)

    def embed(queries: Codes, histories: tuple[Codes, NDArray[np.int32]], gaps: Gaps | None) -> Tensor:
        # The same rows for every item: the history as it is, then without each of its items.
        if not kept:
            kept.append(embed_one(queries, histories, gaps))
        return kept[0]

    answers = Answers(model.artifact)
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


def _recommend(key: RecommendKey, questions: Sequence[Question]) -> list[bytes | Exception]:
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
    for place, told in zip(places, _told(model, [questions[p].k for p in places], scores, found), strict=True):
        answers[place] = told
    return answers


def _similar(key: SimilarKey, questions: Sequence[Question]) -> list[bytes | Exception]:
    model, answers = key.model, list[bytes | Exception](b"" for _ in questions)
    codes = codes_of(model.artifact.items, [question.item for question in questions])
    for place in np.flatnonzero(codes < 0).tolist():
        answers[place] = InputError("item: not an id that this model knows")
    places = np.flatnonzero(codes >= 0).tolist()
    if not places:
        return answers
    own = codes[places]
    scores, found = model.search.neighbours.search(
        F.normalize(model.artifact.item_embeddings[torch.from_numpy(own)], dim=1),
        min(max(questions[place].k for place in places), len(model.counts)),
        (np.arange(len(own) + 1, dtype=np.int64), own),
        allowed=model.condition(key.filter),
    )
    for place, told in zip(places, _told(model, [questions[p].k for p in places], scores, found), strict=True):
        answers[place] = told
    return answers


def _told(model: ServedModel, ks: Sequence[int], scores: Tensor, found: Tensor) -> list[bytes]:
    """Rows of a search as JSON, each cut to its own K."""
    kept, values = found.numpy(), scores.numpy()
    sizes = [int((row[:k] >= 0).sum()) for row, k in zip(kept, ks, strict=True)]
    codes = np.concatenate([row[:size] for row, size in zip(kept, sizes, strict=True)])
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
        told = {"model": model.name, "version": model.version, "items": listed}
        answers.append(json.dumps(told, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace"))
    return answers
