"""Routes of the web page, and routes that only the page uses."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Annotated, Any

import numpy as np
import polars as pl
from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import JSONResponse

from twotower.data.schema.vocabulary import HashedIds
from twotower.serving.events import with_event
from twotower.serving.http.handlers import PendingRequest, explained
from twotower.serving.http.held_out import held_out
from twotower.serving.http.model_card import card
from twotower.serving.http.models import ServedModel, json_id
from twotower.serving.http.problems import Problem, documented
from twotower.serving.http.routes import NamedModel, TheService, worded
from twotower.serving.http.schemas import ExplainRequest, HeldOut, Items, PlacesRequest
from twotower.serving.http.settings import LONGEST_ID
from twotower.serving.queries import UNKNOWN_ID, stored_history

_KINDS = {
    "index.html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}

#: Maximum number of distinct values of a column that can colour the map.
_MOST_GROUPS = 40


_PAGE = files("twotower.serving.http") / "page"
_STATIC = {one.name: one.read_bytes() for one in _PAGE.iterdir() if one.name.rpartition(".")[2] in _KINDS}
_INDEX = (_PAGE / "index.html").read_bytes()

page = APIRouter()
data = APIRouter(tags=["page"], responses=documented(400, 401, 404, 421, 422, 503))
_BODY_ERRORS = documented(408, 413, 415)


@page.get("/", include_in_schema=False)
async def home() -> Response:
    """Return the page."""
    return Response(_INDEX, headers={"Content-Type": _KINDS["index.html"], "Cache-Control": "no-cache"})


@page.get("/static/{name}", include_in_schema=False)
async def asset(name: str) -> Response:
    """Return a file of the page."""
    if name not in _STATIC:
        raise Problem(404, "no such file")
    kind = _KINDS[name.rpartition(".")[2]]
    return Response(_STATIC[name], headers={"Content-Type": kind, "Cache-Control": "no-cache"})


@data.post("/explain", responses=_BODY_ERRORS)
async def explain(request: ExplainRequest, service: TheService) -> Response:
    """Explain recommended items: the contribution of each item in the history, and of popularity."""
    model = service.models.model(request.model)
    features, context = worded(model, request.text, request.query_id, None, request.context)
    if features is not None:
        raise Problem(
            422,
            "text: this model's queries are texts; only recommendations from a history can be explained",
            field=("text",),
        )
    context = with_event(model.retriever.events, context, request.event)
    query = PendingRequest(
        len(request.items),
        request.query_id,
        request.history,
        context=context,
        times=request.times,
        history_events=request.history_events,
    )
    explanations = await service.aside(explained, model, query, request.items, request.popularity)
    return JSONResponse({"model": model.name, "version": model.version, "items": explanations})


def known_query(model: NamedModel, query_id: Annotated[str, Query(min_length=1, max_length=LONGEST_ID)]) -> int:
    """Return the code of the query with this id."""
    code = int(model.query_codes([query_id])[0])
    if code < 0:
        raise Problem(404, f"query_id: {UNKNOWN_ID}")
    return code


KnownQuery = Annotated[int, Depends(known_query)]


@data.get("/page/history", response_model=Items)
async def history(
    service: TheService,
    model: NamedModel,
    code: KnownQuery,
) -> Response:
    """Return the history of a query in the training data: its latest 500 items, oldest first."""
    items = stored_history(model.artifact, code)[-500:]
    return JSONResponse({"items": await service.aside(model.listed, items)})


@data.get("/page/held-out", response_model=HeldOut)
async def held_out_(
    service: TheService,
    model: NamedModel,
    code: KnownQuery,
    group: Annotated[str | None, Query(max_length=LONGEST_ID)] = None,
    time: Annotated[str | None, Query(max_length=LONGEST_ID)] = None,
) -> Response:
    """Return the held-out items of a known query, with the ranks that the model gives them."""
    found = await service.aside(held_out, model, code, model.offer(group, time))
    return JSONResponse({"model": model.name, "version": model.version, **found})


@data.get("/page/queries")
async def queries(
    service: TheService,
    model: NamedModel,
    text: Annotated[str, Query(max_length=LONGEST_ID)] = "",
    k: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Response:
    """Return query ids that begin with the given text, or a random selection if the text is empty."""
    found = await service.aside(_queries, model, text, k)
    return JSONResponse({"queries": [json_id(one) for one in found]})


@data.get("/page/map")
async def map_(service: TheService, model: NamedModel) -> Response:
    """Return the map of the catalog: positions, colour groups and titles of items."""
    return JSONResponse(await service.aside(_map, model))


@data.post("/page/places", responses=_BODY_ERRORS)
async def places(request: PlacesRequest, service: TheService) -> Response:
    """Return the positions of items on the map; null for unknown items."""
    model = service.models.model(request.model)
    return JSONResponse({"version": model.version, "places": await service.aside(_places, model, request.items)})


@data.get("/page/card")
async def card_(service: TheService, model: NamedModel) -> Response:
    """Return the model card: account of the data, training, metrics by slice, and the audit if there is one."""
    return JSONResponse(await service.aside(card, model))


page.include_router(data)


def _places(model: ServedModel, items: Sequence[int | str]) -> list[list[float] | None]:
    codes = model.item_codes(items)
    found = model.atlas.place(np.maximum(codes, 0)).round(4).tolist() if len(codes) else []
    return [place if code >= 0 else None for place, code in zip(found, codes.tolist(), strict=True)]


def _queries(model: ServedModel, text: str, k: int) -> list[int | str]:
    wanted = text.strip().encode("utf-8", "replace").decode()
    if isinstance(model.artifact.queries, HashedIds):  # there is no list of hashed ids to search
        return [wanted] if wanted and model.query_codes([wanted])[0] >= 0 else []
    ids = model.artifact.queries.ids
    if wanted:
        exact = model.query_codes([wanted])
        first = ids.gather(exact[exact >= 0]).to_list()
        begins = ids.filter(ids.cast(pl.String).str.starts_with(wanted)).head(k).to_list()
        return [*first, *(one for one in begins if one not in first)][:k]
    sizes = np.diff(model.artifact.history_offsets)
    busy = np.flatnonzero(sizes >= min(5, int(sizes.max()) if len(sizes) else 0))
    rng = np.random.default_rng()
    chosen: list[int | str] = ids.gather(rng.choice(busy, min(k, len(busy)), replace=False)).to_list()
    return chosen


def _map(model: ServedModel) -> dict[str, Any]:
    atlas = model.atlas
    rows = model.listed(atlas.sample)
    return {
        "version": model.version,
        "num_items": len(model.counts),
        "x": atlas.places[:, 0].round(4).tolist(),
        "y": atlas.places[:, 1].round(4).tolist(),
        "items": [row["item"] for row in rows],
        "titles": [row.get("title") for row in rows],
        "interactions": [row["interactions"] for row in rows],
        "parts": [row["part"] for row in rows],
        "groups": _groups(model, atlas.sample),
    }


def _groups(model: ServedModel, codes: np.ndarray) -> dict[str, list[str | None]]:
    """Find the columns that can colour the map: text with few distinct values, or first elements of text lists."""
    table = model.artifact.item_table
    found: dict[str, list[str | None]] = {}
    if table is None:
        return found
    for name, dtype in table.schema.items():
        column = table[name]
        if dtype == pl.List(pl.String):
            column = column.list.first()
        elif dtype != pl.String:
            continue
        if 2 <= column.n_unique() <= _MOST_GROUPS:
            found[name] = column.gather(codes).to_list()
    return found
