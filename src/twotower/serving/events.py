"""The event type of a request: given by the request or in its context, or else the model's default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from twotower.config.run import EventsConfig
from twotower.data.schema.vocabulary import listed, texts_of
from twotower.errors import InputError
from twotower.features.requests import ContextRows


@dataclass(frozen=True)
class EventTypes:
    """The event types that a model was trained for.

    Attributes:
        column: the context column with the event type of a request.
        names: the types.
        default: the type used for a request without one.
    """

    column: str
    names: tuple[str, ...]
    default: str

    @classmethod
    def of(cls, settings: EventsConfig | None) -> EventTypes | None:
        """Return the event types in these settings, where every type has a weight; None if there are no types."""
        if settings is None or settings.column is None or settings.weights is None:
            return None
        return cls(settings.column, tuple(settings.weights), settings.asked)

    def check(self, name: Any, where: str = "event") -> str:
        """Check the name of a type and return it; `where` is the name of the input in the message.

        Raises:
            InputError: the model was not trained for this type.
        """
        if name not in self.names:
            raise InputError(f"{where}: {name!r:.80}; expected {listed(list(self.names))}")
        return str(name)

    def completed(self, context: ContextRows | None, count: int) -> ContextRows:
        """Fill in the default type for every request whose context has no type.

        Args:
            context: see `TowerRanker.embed`; None if no request has a context.
            count: number of requests.

        Raises:
            InputError: a type is unknown.
        """
        if isinstance(context, pl.DataFrame):
            types = context[self.column] if self.column in context.columns else pl.Series([None] * len(context))
            filled = texts_of(types, "context").fill_null(self.default).alias(self.column)
            for name in filled.unique():
                self.check(name)
            return context.with_columns(filled)
        rows: Sequence[Mapping[str, Any] | None] = [None] * count if context is None else context
        return [self._with(row) for row in rows]

    def _with(self, row: Mapping[str, Any] | None) -> dict[str, Any]:
        given = dict(row or {})
        name = given.get(self.column)
        return {**given, self.column: self.default if name is None else self.check(name)}


def with_event(
    events: EventTypes | None, context: Mapping[str, Any] | None, event: str | None
) -> Mapping[str, Any] | None:
    """Put the event type of a request into its context; without a type, the context is unchanged.

    Raises:
        InputError: the model has no event types or does not know this one, or the context has a different type.
    """
    if event is None:
        return context
    if events is None:
        raise InputError("event: this model has no event types; set data.events and train again")
    given = dict(context or {})
    if given.setdefault(events.column, events.check(event)) != event:
        raise InputError(
            f"event: {event!r}, but the context has {events.column}={given[events.column]!r}; give only one of the two"
        )
    return given
