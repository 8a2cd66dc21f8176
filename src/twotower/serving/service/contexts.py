"""The context of requests in the service: a batch is encoded at once, and what is wrong with one is told of one."""

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
    """The contexts of a batch, each encoded once where all are good.

    Encoding costs by call, not by row, so all are tried together. Where one is wrong the halves are tried, so that
    the others are still encoded with few calls: a request alone is encoded alone, and so is one that is wrong.

    Args:
        retriever: of a model that takes a context.
        given: by the place of each question; None for a request that brings none.

    Returns:
        Those that are good in order, or None where nobody brings one; and what is wrong with the others, by place.
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
    """As `Retriever.in_context`.

    Raises:
        Problem: 422, the context cannot be used.
    """
    try:
        return retriever.in_context(context)
    except InputError as error:
        raise refusal(retriever, context or {}, error) from None


def refusal(retriever: Retriever, context: Context, error: InputError) -> Problem:
    """What is wrong with a context, and the column that it is wrong with: the first that cannot be used alone."""
    for name, value in context.items():
        try:
            retriever.encode_context([{name: value}])
        except InputError:
            return Problem(422, str(error), field=("context", name))
    return Problem(422, str(error))
