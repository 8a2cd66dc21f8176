"""What requests and answers look like: the schemas that requests are checked against and that OpenAPI shows."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from twotower.serving.service.settings import (
    LARGEST_K,
    LONGEST_FILTER,
    LONGEST_HISTORY,
    LONGEST_ID,
    MOST_EXPLAINED,
)

_INT64 = 2**63 - 1
Id = (
    Annotated[int, Field(strict=True, ge=-_INT64, le=_INT64)]
    | Annotated[str, Field(strict=True, min_length=1, max_length=LONGEST_ID)]
)
History = Annotated[list[Id], Field(max_length=LONGEST_HISTORY)]
Times = Annotated[
    list[Annotated[float, Field(strict=True, allow_inf_nan=False)] | Annotated[str, Field(max_length=LONGEST_ID)]],
    Field(max_length=LONGEST_HISTORY),
]
Condition = Annotated[str, Field(min_length=1, max_length=LONGEST_FILTER)]
K = Annotated[int, Field(strict=True, ge=1, le=LARGEST_K)]
Dial = Annotated[float, Field(strict=True, ge=0.0, le=2.0, allow_inf_nan=False)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(max_length=LONGEST_ID)] | None = Field(
        default=None, description="Name of one of the models served; the first where it is left out."
    )


class RecommendRequest(_Request):
    """Items for a query: one known by id, or a new one by its history or its features."""

    query_id: Id | None = Field(default=None, description="A query of the training data; its history is known.")
    history: History | None = Field(
        default=None, description="Item ids, oldest first; with query_id, in place of its own. Unknown ids are ignored."
    )
    features: dict[str, Any] | None = Field(
        default=None,
        description="The columns declared in query_tower.features: of a new query, or in place of known ones.",
    )
    context: dict[str, Any] | None = Field(
        default=None,
        description="The columns declared in query_tower.context, as this request has them; others are unknown.",
    )
    times: Times | None = Field(
        default=None, description="When the items of history were met, one for each: unix time, dates or ISO text."
    )
    k: K = Field(default=10, description="How many items.")
    exclude_seen: bool = Field(default=True, strict=True, description="Leave out the items of the history.")
    filter: Condition | None = Field(
        default=None, description="Condition on the item table in SQL, such as: country = 'FR' and price < 20"
    )
    popularity: Dial = Field(default=1.0, description="The popularity dial: 1 as trained, 0 discovery, up to 2.")


class SimilarRequest(_Request):
    """Items like an item, by cosine of the item embeddings."""

    item: Id
    k: K = 10
    filter: Condition | None = None


class ExplainRequest(_Request):
    """What pulled items up for a query."""

    query_id: Id | None = None
    history: History | None = None
    context: dict[str, Any] | None = Field(default=None, description="Of the request, as in /recommend.")
    times: Times | None = Field(default=None, description="Of the history, as in /recommend.")
    items: Annotated[list[Id], Field(min_length=1, max_length=MOST_EXPLAINED)]
    popularity: Dial = 1.0


class PlacesRequest(_Request):
    """Where items lie on the map."""

    items: Annotated[list[Id], Field(max_length=LONGEST_HISTORY)]


class Found(BaseModel):
    """One item of an answer."""

    rank: int
    item: int | str
    score: float
    title: str | None = None
    interactions: int = Field(description="In the training data.")
    part: str = Field(description="head, mid or tail: the third of all training interactions that the item is in.")


class Answer(BaseModel):
    """Items, best first."""

    model: str
    version: str = Field(description="Changes with every model that is swapped in.")
    items: list[Found]


class Listed(BaseModel):
    """One item as a list shows it."""

    item: int | str
    title: str | None = None
    interactions: int
    part: str


class Items(BaseModel):
    """A list of items."""

    items: list[Listed]


class Health(BaseModel):
    """Whether the service is alive or ready."""

    status: str
    models: dict[str, str] = Field(default_factory=dict, description="Name and version of each model.")


class ContextField(BaseModel):
    """A column that requests may bring as context."""

    column: str
    kind: str = Field(description="As declared: categorical, multi, numeric, dense, timestamp or text.")
    values: list[str] | None = Field(description="Those of training, where they are few.")
    separator: str | None = Field(description="Between several values in one field of a form; null for a single value.")


class ModelSummary(BaseModel):
    """One of the models served."""

    name: str
    version: str
    num_queries: int
    num_items: int
    most_interactions: int = Field(description="Of one item.")
    has_titles: bool
    history_length: int
    columns: dict[str, str] = Field(description="Columns of the item table and their types.")
    context: list[ContextField] = Field(
        description="Columns declared in query_tower.context; empty where there are none."
    )


class Models(BaseModel):
    """The models served, the first is asked where a request names none."""

    models: list[ModelSummary]


class Reloaded(BaseModel):
    """What became of each model folder."""

    models: dict[str, str] = Field(description="swapped, unchanged, missing, or broken: the old one goes on.")
