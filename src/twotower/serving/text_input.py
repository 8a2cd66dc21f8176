"""Text of a query: the column that a model reads it from, and where it enters the query tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twotower.errors import InputError
from twotower.serving.model_folder import SavedModel
from twotower.serving.queries import LONGEST_TEXT, is_list

Row = Mapping[str, Any] | None


@dataclass(frozen=True)
class TextInput:
    """The text input of a model with `data.query_text`.

    Attributes:
        column: the column of the data with the text, a declared input of the query tower.
        is_query: True if the texts are the queries, so that the text is a feature; False if the text is part of the
            context of a query with an id.
        others: the other columns of query_tower.features, which are missing for a new text.
    """

    column: str
    is_query: bool
    others: tuple[str, ...] = ()

    @classmethod
    def of(cls, artifact: SavedModel) -> TextInput | None:
        """Return the text input of a model; None if its queries have no texts."""
        data = artifact.config.data
        if data.query_text is None:
            return None
        others: tuple[str, ...] = ()
        inputs = getattr(artifact.towers.query_tower, "features", None)
        if data.texts_are_queries and inputs is not None:
            others = tuple(name for name in inputs.table.features.columns if name != data.query_text)
        return cls(data.query_text, data.texts_are_queries, others)

    def features(self, text: Any, given: Row = None) -> dict[str, Any]:
        """Return the features of a query that is a text; other columns are missing unless given."""
        return {**dict.fromkeys(self.others), **(given or {}), self.column: text}


def check_text(text: Any) -> str:
    """Check the text of a query and return it.

    Raises:
        InputError: `text` is not text, is blank, is too long, or is not valid Unicode.
    """
    if not isinstance(text, str):
        raise InputError(f"text: expected text, found {text!r:.80}")
    if not text.strip():
        raise InputError("text: expected words, found a blank text")
    if len(text) > LONGEST_TEXT:
        raise InputError(f"text: expected at most {LONGEST_TEXT:,} characters, found {len(text):,}")
    if not text.isascii() and text != text.encode("utf-8", "replace").decode():
        raise InputError("text: expected valid Unicode")
    return text


def with_text(
    model: TextInput | None, text: Any, *, query: Any = None, features: Row = None, context: Row = None
) -> tuple[Row, Row]:
    """Put the text of a request among its features or into its context; without a text, both are unchanged.

    Args:
        model: the text input of the model.
        text: the text, or None.
        query: the id of the query, or None.
        features: the given features, or None.
        context: the given context, or None.

    Returns:
        The features and the context.

    Raises:
        InputError: the model reads no text, the text is invalid, or the same column is given twice.
    """
    if text is None:
        return features, context
    if model is None:
        raise InputError("text: this model reads no text; train one with data.query_text, the column of the texts")
    text = check_text(text)
    side = "features" if model.is_query else "context"
    given: Any = features if model.is_query else context  # not validated yet
    if given is not None and not isinstance(given, Mapping):
        return features, context  # rejected later, when the query is built
    if given is not None and given.get(model.column) not in (None, text):
        raise InputError(f"text: {side} also has {model.column!r}; give only one of the two")
    if not model.is_query:
        return features, {**(context or {}), model.column: text}
    if query is not None:
        raise InputError("text: the queries of this model are texts; give a text or the id of a known query, not both")
    return model.features(text, features), context


def with_texts(
    model: TextInput | None,
    text: str | Sequence[str | None] | None,
    *,
    queries: Sequence[Any] | None = None,
    histories: Sequence[Any] | None = None,
    features: Sequence[Row] | None = None,
    context: Row | Sequence[Row] = None,
) -> tuple[Sequence[Row] | None, Row | Sequence[Row], list[str | None] | None]:
    """Put the texts of several requests among their features or into their contexts; see `with_text`.

    Args:
        model: the text input of the model.
        text: one text for all requests, or one for each; None for requests without text.
        queries: ids, or None.
        histories: the history of each query, or None.
        features: the features of each request, or None.
        context: the context of each request, or one for all, or None.

    Returns:
        Features, context, and the text of each request.

    Raises:
        InputError: as in `with_text`, or the numbers of texts and requests differ.
    """
    if text is None:
        return features, context, None
    if not isinstance(text, str) and not is_list(text):
        raise InputError(f"text: expected a text, or a list with one for each query, found {text!r:.80}")
    if any(rows is not None and not isinstance(rows, Mapping) and not is_list(rows) for rows in (features, context)):
        return features, context, None  # rejected later, when the query is built
    count = next((len(rows) for rows in (queries, histories, features) if rows is not None and is_list(rows)), None)
    texts: list[str | None] = [text] * (count or 1) if isinstance(text, str) else list(text)
    if count is not None and len(texts) != count:
        raise InputError(f"text: expected one text, or one for each query, {count}; found {len(texts)}")
    contexts = [context] * len(texts) if context is None or isinstance(context, Mapping) else list(context)
    rows = [None] * len(texts) if features is None else list(features)
    if len(contexts) != len(texts) or len(rows) != len(texts):
        raise InputError(f"text: expected one row of features and context for each text, {len(texts)}")
    placed = [
        with_text(model, one, query=None if queries is None else one, features=row, context=request)
        for one, row, request in zip(texts, rows, contexts, strict=True)
    ]
    both = [row for row, _ in placed], [request for _, request in placed]
    found, requests = (None if all(one is None for one in side) else side for side in both)
    return found, requests, texts
