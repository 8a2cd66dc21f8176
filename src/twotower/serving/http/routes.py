"""Routes of the public API and of operations."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse

from twotower.serving.http.handlers import PendingRequest, RecommendKey, SimilarKey
from twotower.serving.http.models import known_code
from twotower.serving.http.problems import Problem, documented
from twotower.serving.http.schemas import Answer, Health, Items, Models, RecommendRequest, Reloaded, SimilarRequest
from twotower.serving.http.service import Service
from twotower.serving.http.settings import LONGEST_ID

ModelName = Annotated[str | None, Query(max_length=LONGEST_ID, description="Name of a served model.")]


def routes(service: Service) -> APIRouter:
    """Build the API routes of a service."""
    router = APIRouter(responses=documented(400, 401, 404, 421, 422))
    search_errors: dict[int | str, dict[str, Any]] = documented(408, 413, 415, 503)

    @router.post("/recommend", response_model=Answer, responses=search_errors, tags=["answers"])
    async def recommend(request: RecommendRequest) -> Response:
        """Recommend items for a known query (`query_id`) or a new one (`history`, `features` or `context`)."""
        inputs = (request.query_id, request.history, request.features, request.context)
        if all(one is None for one in inputs):
            raise Problem(422, "expected query_id, history or features, found none of them")
        model = service.models.model(request.model)
        exact = model.search.index.is_exact
        key = RecommendKey(
            "recommend",
            model,
            request.exclude_seen,
            request.filter,
            request.popularity,
            None if exact else request.k,
        )
        question = PendingRequest(
            request.k,
            request.query_id,
            request.history,
            features=request.features,
            context=request.context,
            times=request.times,
        )
        return _json(await service.ask(key, question))

    @router.post("/similar", response_model=Answer, responses=search_errors, tags=["answers"])
    async def similar(request: SimilarRequest) -> Response:
        """Find the items nearest to an item, by cosine of the item embeddings."""
        key = SimilarKey("similar", service.models.model(request.model), request.filter)
        return _json(await service.ask(key, PendingRequest(request.k, item=request.item)))

    @router.get("/items", response_model=Items, responses=documented(503), tags=["items"])
    async def search_items(
        text: Annotated[str, Query(min_length=1, max_length=LONGEST_ID)],
        k: Annotated[int, Query(ge=1, le=100)] = 10,
        model: ModelName = None,
    ) -> Response:
        """Search items whose title contains a text; without titles, the id."""
        served = service.models.model(model)

        def found() -> list[dict[str, Any]]:
            wanted = text.encode("utf-8", "replace").decode()
            ids = served.retriever.search_titles(wanted, k)["item"].to_list()
            return served.listed(served.item_codes(ids))

        return JSONResponse({"items": await service.aside(found)})

    @router.get("/items/{item_id:path}", responses=documented(503), tags=["items"])
    async def item(item_id: str, model: ModelName = None) -> dict[str, Any]:
        """Everything known about an item: title, interactions in training, and its columns in the item table."""
        served = service.models.model(model)
        codes = served.item_codes([item_id])
        if codes[0] < 0:
            raise Problem(404, "item: not an id that this model knows")
        return await service.aside(served.described, known_code(codes, "item"))

    @router.get("/models", response_model=Models, tags=["models"])
    async def models() -> Response:
        """List the served models."""
        return JSONResponse({"models": [model.summary() for model in service.models.models()]})

    @router.post("/reload", response_model=Reloaded, responses=documented(403, 408, 413, 415), tags=["models"])
    async def reload() -> Response:
        """Check the model folders for new models now. Only available if the service requires a token."""
        if service.settings.token is None:
            raise Problem(
                403,
                "reload: only with a token; start the service with --token-file, or send SIGHUP to the process",
            )
        return JSONResponse({"models": await service.reload()})

    return router


def operations(service: Service) -> APIRouter:
    """Build the routes for monitoring."""
    router = APIRouter(tags=["operations"], responses=documented(400, 421))

    @router.get("/healthz", response_model=Health)
    async def healthz() -> Response:
        """Report that the process is alive."""
        return JSONResponse({"status": "alive", "models": {}})

    @router.get("/readyz", response_model=Health, responses=documented(503))
    async def readyz() -> Response:
        """Report whether the models are loaded and requests are accepted."""
        if not service.ready:
            raise Problem(503, "not ready", {"Retry-After": "1"})
        models = {model.name: model.version for model in service.models.models()}
        return JSONResponse({"status": "ready", "models": models})

    @router.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **documented(401)})
    async def metrics() -> Response:
        """Metrics in the Prometheus text format."""
        return Response(service.metrics.text(), headers={"Content-Type": service.metrics.content_type})

    return router


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
