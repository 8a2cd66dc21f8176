"""Encoding of request contexts in the service: a batch in one call, with errors per request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twotower.data.given import EncodedContext
from twotower.errors import InputError
from twotower.serving.explain import Embed
from twotower.serving.retriever import Retriever
from twotower.serving.service.problems import Problem

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
