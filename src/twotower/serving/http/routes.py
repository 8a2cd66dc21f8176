"""Routes of the public API and of operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse

from twotower.errors import InputError
from twotower.serving.events import with_event
from twotower.serving.http.handlers import PendingRequest, RecommendKey, SimilarKey
from twotower.serving.http.models import ServedModel
from twotower.serving.http.problems import Problem, documented
from twotower.serving.http.schemas import Answer, Health, Items, Models, RecommendRequest, Reloaded, SimilarRequest
from twotower.serving.http.service import Service
from twotower.serving.http.settings import LONGEST_ID
from twotower.serving.queries import UNKNOWN_ID
from twotower.serving.text_input import with_text


async def service_of(request: Request) -> Service:
    """Return the service that a request was sent to."""
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(service_of)]


async def model_of(
    service: TheService,
    model: Annotated[str | None, Query(max_length=LONGEST_ID, description="Name of a served model.")] = None,
) -> ServedModel:
    """Return the model named in the address of a request, by default the first."""
    return service.models.model(model)


NamedModel = Annotated[ServedModel, Depends(model_of)]

operations = APIRouter(tags=["operations"], responses=documented(400, 421))
api = APIRouter(responses=documented(400, 401, 404, 421, 422))
_SEARCH_ERRORS: dict[int | str, dict[str, Any]] = documented(408, 413, 415, 503)


@api.post("/recommend", response_model=Answer, responses=_SEARCH_ERRORS, tags=["answers"])
async def recommend(request: RecommendRequest, service: TheService) -> Response:
    """Recommend items for a known query (`query_id`) or a new one (`text`, `history`, `features` or `context`)."""
    model = service.models.model(request.model)
    key = RecommendKey(
        "recommend",
        model,
        request.exclude_seen,
        request.filter,
        request.popularity,
        None if model.search.index.is_exact else request.k,
        model.offer(request.group, request.time),
    )
    features, context = worded(model, request.text, request.query_id, request.features, request.context)
    query = PendingRequest(
        request.k,
        request.query_id,
        request.history,
        features=features,
        context=with_event(model.retriever.events, context, request.event),
        times=request.times,
        history_events=request.history_events,
    )
    return Response(await service.search(key, query), media_type="application/json")


def worded(
    model: ServedModel, text: str | None, query: Any, features: dict[str, Any] | None, context: dict[str, Any] | None
) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """Put the text of a request among its features or into its context.

    Raises:
        Problem: 422, the model reads no text, or the text is invalid.
    """
    try:
        return with_text(model.retriever.text_input, text, query=query, features=features, context=context)
    except InputError as error:
        raise Problem(422, str(error), field=("text",)) from None


@api.post("/similar", response_model=Answer, responses=_SEARCH_ERRORS, tags=["answers"])
async def similar(request: SimilarRequest, service: TheService) -> Response:
    """Find the items nearest to an item, by cosine of the item embeddings."""
    model = service.models.model(request.model)
    key = SimilarKey("similar", model, request.filter, model.offer(request.group, request.time))
    body = await service.search(key, PendingRequest(request.k, item=request.item))
    return Response(body, media_type="application/json")


@api.get("/items", response_model=Items, responses=documented(503), tags=["items"])
async def search_items(
    service: TheService,
    model: NamedModel,
    text: Annotated[str, Query(min_length=1, max_length=LONGEST_ID)],
    k: Annotated[int, Query(ge=1, le=100)] = 10,
) -> Response:
    """Search for items whose title contains the given text, or whose id does if the items have no titles."""
    return JSONResponse({"items": await service.aside(_titled, model, text, k)})


@api.get("/items/{item_id:path}", responses=documented(503), tags=["items"])
async def item(item_id: str, service: TheService, model: NamedModel) -> dict[str, Any]:
    """Return everything known about an item: title, interactions in training, and its columns in the item table."""
    code = int(model.item_codes([item_id])[0])
    if code < 0:
        raise Problem(404, f"item: {UNKNOWN_ID}")
    return await service.aside(model.described, code)


@api.get("/models", response_model=Models, tags=["models"])
async def models(service: TheService) -> Response:
    """List the served models."""
    return JSONResponse({"models": [model.summary() for model in service.models.models()]})


@api.post("/reload", response_model=Reloaded, responses=documented(403, 408, 413, 415), tags=["models"])
async def reload(service: TheService) -> Response:
    """Check the model folders for new models now. Only available if the service requires a token."""
    if service.settings.token is None:
        raise Problem(
            403, "reload: requires a token; start the service with --token-file, or send SIGHUP to the process"
        )
    return JSONResponse({"models": await service.reload()})


@operations.get("/healthz", response_model=Health)
async def healthz() -> Response:
    """Report that the process is alive."""
    return JSONResponse({"status": "alive", "models": {}})


@operations.get("/readyz", response_model=Health, responses=documented(503))
async def readyz(service: TheService) -> Response:
    """Report whether the models are loaded and requests are accepted."""
    if not service.ready:
        raise Problem(503, "not ready", {"Retry-After": "1"})
    versions = {model.name: model.version for model in service.models.models()}
    return JSONResponse({"status": "ready", "models": versions})


@operations.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **documented(401)})
async def metrics(service: TheService) -> Response:
    """Return metrics in the Prometheus text format."""
    return Response(service.metrics.text(), headers={"Content-Type": service.metrics.content_type})


def _titled(model: ServedModel, text: str, k: int) -> list[dict[str, Any]]:
    return model.listed(model.item_codes(model.retriever.search_titles(text, k)["item"].to_list()))
