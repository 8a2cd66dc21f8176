"""Schemas of requests and responses, for validation and OpenAPI."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema
from pydantic_core import PydanticCustomError

from twotower.errors import InputError
from twotower.serving.http.settings import (
    LARGEST_K,
    LONGEST_FILTER,
    LONGEST_HISTORY,
    LONGEST_ID,
    MOST_COLUMNS,
    MOST_EXPLAINED,
)
from twotower.serving.queries import LONGEST_LIST, LONGEST_TEXT, require_flat


def _whole(value: Any) -> Any:
    """Convert 10.0 to 10, because JSON has one number type. Above 2^53 a double may differ from the number written."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


# An integer beyond 64 bits is an unknown id.
Id = (
    Annotated[int, Field(strict=True), BeforeValidator(_whole)]
    | Annotated[str, Field(strict=True, min_length=1, max_length=LONGEST_ID)]
)
History = Annotated[list[Id], Field(max_length=LONGEST_HISTORY)]
Times = Annotated[
    list[Annotated[float, Field(strict=True, allow_inf_nan=False)] | Annotated[str, Field(max_length=LONGEST_ID)]],
    Field(max_length=LONGEST_HISTORY),
]
Event = Annotated[str, Field(min_length=1, max_length=LONGEST_ID)]
HistoryEvents = Annotated[list[Event], Field(max_length=LONGEST_HISTORY)]
Condition = Annotated[str, Field(min_length=1, max_length=LONGEST_FILTER)]


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "expected words, found only blanks")
    return text


Words = Annotated[
    str,
    Field(strict=True, min_length=1, max_length=LONGEST_TEXT, json_schema_extra={"pattern": r"\S"}),
    AfterValidator(_not_blank),
]
K = Annotated[int, Field(strict=True, ge=1, le=LARGEST_K), BeforeValidator(_whole)]
Dial = Annotated[float, Field(strict=True, ge=0.0, le=2.0, allow_inf_nan=False)]


Time = (
    Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0.0, lt=1e17)]
    | Annotated[str, Field(min_length=1, max_length=LONGEST_ID)]
)
_GROUP = "Group (market) of the request, required by a model with groups; only items of the group are returned."
_TIME = "Time of the request, if items are available for a limited time: unix time, a date or ISO text. Default: now."


def _flat(row: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    try:
        require_flat(row, info.field_name or "values")
    except InputError as error:
        raise PydanticCustomError("flat", "{reason}", {"reason": str(error).partition(": ")[2]}) from None
    return row


_SCALARS: list[dict[str, Any]] = [
    {"type": "number", "minimum": -1e308, "maximum": 1e308},
    {"type": "string", "maxLength": LONGEST_TEXT},
    {"type": "boolean"},
    {"type": "null"},
]
Values = Annotated[
    dict[str, Any],
    Field(max_length=MOST_COLUMNS),
    AfterValidator(_flat),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": MOST_COLUMNS,
            "additionalProperties": {
                "anyOf": [*_SCALARS, {"type": "array", "maxItems": LONGEST_LIST, "items": {"anyOf": _SCALARS}}]
            },
        }
    ),
]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(max_length=LONGEST_ID)] | None = Field(
        default=None, description="Name of a served model; default: the first one."
    )


def _some_of(**kinds: dict[str, Any]) -> ConfigDict:
    """Require at least one of several fields in OpenAPI; `kinds` maps each field to the schema it must match."""
    return ConfigDict(
        json_schema_extra={"anyOf": [{"required": [name], "properties": {name: kind}} for name, kind in kinds.items()]}
    )


_QUERY: dict[str, dict[str, Any]] = {
    "query_id": {"type": ["integer", "string"]},
    "history": {"type": "array", "minItems": 1},
    "context": {"type": "object", "minProperties": 1},
}


_WORDS = {"type": "string", "minLength": 1, "pattern": r"\S"}
_TEXT = "Words to search for, if the model has data.query_text: alone, or in addition to a query_id and history."


class RecommendRequest(_Request):
    """Request for recommendations: a query known by id, or a new one by its text, history, features or context."""

    model_config = _some_of(**_QUERY, features={"type": "object"}, text=_WORDS)

    query_id: Id | None = Field(default=None, description="Id of a query in the training data; its history is known.")
    history: History | None = Field(
        default=None,
        description="Item ids, oldest first; with query_id, replaces its history. Unknown ids are ignored.",
    )
    text: Words | None = Field(default=None, description=_TEXT)
    features: Values | None = Field(
        default=None,
        description="Columns declared in query_tower.features: for a new query, or to replace known values.",
    )
    context: Values | None = Field(
        default=None,
        description="Columns declared in query_tower.context, for this request; missing columns count as unknown.",
    )
    event: Event | None = Field(
        default=None,
        description="Event type to recommend for, if the model has data.events; default: as in the context, or else "
        "the model's default.",
    )
    times: Times | None = Field(
        default=None, description="Timestamp of each item in history: unix time, dates or ISO text."
    )
    history_events: HistoryEvents | None = Field(
        default=None,
        description="Event type of each item in history, if the model has "
        "query_tower.history.event_weights; default: the model's default type.",
    )
    k: K = Field(default=10, description="Number of items.")
    exclude_seen: bool = Field(default=True, strict=True, description="Leave out items in the history.")
    filter: Condition | None = Field(
        default=None, description="Condition on the item table, such as: country = 'FR' and price < 20"
    )
    popularity: Dial = Field(default=1.0, description="Popularity dial: 0 for discovery, 1 as trained, at most 2.")
    group: Id | None = Field(default=None, description=_GROUP)
    time: Time | None = Field(default=None, description=_TIME)


class SimilarRequest(_Request):
    """Request for items similar to an item, by cosine of the item embeddings."""

    item: Id
    k: K = 10
    filter: Condition | None = None
    group: Id | None = Field(default=None, description=_GROUP)
    time: Time | None = Field(default=None, description=_TIME)


class ExplainRequest(_Request):
    """Request to explain items for a query."""

    model_config = _some_of(**_QUERY, text=_WORDS)

    query_id: Id | None = None
    history: History | None = None
    text: Words | None = Field(default=None, description="Words added to a query_id and history, as in /recommend.")
    context: Values | None = Field(default=None, description="Context of the request, as in /recommend.")
    event: Event | None = Field(default=None, description="Event type, as in /recommend.")
    times: Times | None = Field(default=None, description="Timestamps of the history, as in /recommend.")
    history_events: HistoryEvents | None = Field(
        default=None, description="Event type of each item in history, as in /recommend."
    )
    items: Annotated[list[Id], Field(min_length=1, max_length=MOST_EXPLAINED)]
    popularity: Dial = 1.0


class PlacesRequest(_Request):
    """Request for positions of items on the map."""

    items: Annotated[list[Id], Field(max_length=LONGEST_HISTORY)]


class Found(BaseModel):
    """One recommended or similar item."""

    rank: int
    item: int | str = Field(description="Id; an integer beyond 2^53 is text, because JSON parsers would round it.")
    score: float
    title: str | None = None
    interactions: int = Field(description="Interactions in the training data.")
    part: str = Field(
        description="Popularity bucket: head, mid or tail, each with a third of the training interactions."
    )


class Answer(BaseModel):
    """Items, best first."""

    model: str
    version: str = Field(description="Version of the model; changes when a new model is loaded.")
    items: list[Found]


class Listed(BaseModel):
    """One item of a list."""

    item: int | str = Field(description="Id; an integer beyond 2^53 is text, because JSON parsers would round it.")
    title: str | None = None
    interactions: int
    part: str


class Items(BaseModel):
    """A list of items."""

    items: list[Listed]


class HeldOutItem(Listed):
    """An item from the held-out rows of a query."""

    rank: int | None = Field(description="Rank in the whole catalog, from 1; null if larger than last_rank.")


class HeldOut(BaseModel):
    """The held-out items of a known query, with their ranks."""

    model: str
    version: str
    trained: int | None = Field(description="Number of the query's rows used in training; null if not recorded.")
    last_rank: int
    items: list[HeldOutItem] = Field(description="Oldest first.")


class Health(BaseModel):
    """State of the service: alive or ready."""

    status: str
    models: dict[str, str] = Field(default_factory=dict, description="Name and version of each model.")


class ContextField(BaseModel):
    """A context column that requests can set."""

    column: str
    kind: str = Field(description="As declared: categorical, multi, numeric, dense, timestamp or text.")
    values: list[str] | None = Field(description="Values seen in training, if there are few.")
    separator: str | None = Field(description="Separator of several values in one form field; null for a single value.")
    default: str | None = Field(
        description="Value for requests without one: the default event type; null for other columns."
    )


class ModelSummary(BaseModel):
    """A served model."""

    name: str
    version: str
    num_queries: int
    num_items: int
    most_interactions: int = Field(description="Largest number of interactions of an item.")
    has_titles: bool
    history_length: int
    columns: dict[str, str] = Field(description="Columns of the item table and their types.")
    context: list[ContextField] = Field(description="Columns declared in query_tower.context; empty if there are none.")
    groups: list[int | str] = Field(description="Groups; a request must name one of them. Empty if there are none.")
    text: str | None = Field(description="Data column of the texts that requests can search with; null for none.")
    texts_are_queries: bool = Field(description="Whether the queries of the model are texts.")
    has_intervals: bool = Field(description="Whether items are available for a limited time.")


class Models(BaseModel):
    """The served models; the first answers requests that name no model."""

    models: list[ModelSummary]


class Reloaded(BaseModel):
    """Result of a reload for each model folder."""

    models: dict[str, str] = Field(
        description="swapped, unchanged, missing or broken; unless swapped, the old model stays in use."
    )
