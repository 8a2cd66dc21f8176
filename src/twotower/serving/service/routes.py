"""The routes that programs use."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse

from twotower.serving.service.answering import Question, RecommendKey, SimilarKey
from twotower.serving.service.model import known_code
from twotower.serving.service.problems import Problem, documented
from twotower.serving.service.schemas import (
    Answer,
    Health,
    Items,
    Models,
    RecommendRequest,
    Reloaded,
    SimilarRequest,
)
from twotower.serving.service.settings import LONGEST_ID
from twotower.serving.service.state import Service

ModelName = Annotated[str | None, Query(max_length=LONGEST_ID, description="Name of one of the models served.")]


def routes(service: Service) -> APIRouter:
    """The routes over a service."""
    router = APIRouter(responses=documented(400, 401, 404, 421, 422))
    asking: dict[int | str, dict[str, Any]] = documented(408, 413, 415, 503)

    @router.post("/recommend", response_model=Answer, responses=asking, tags=["answers"])
    async def recommend(request: RecommendRequest) -> Response:
        """The best items for a query: known by `query_id`, or a new one by `history`, `features`, `context`."""
        told = (request.query_id, request.history, request.features, request.context)
        if all(one is None for one in told):
            raise Problem(422, "expected query_id or history, or features, found none of them")
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
        question = Question(
            request.k,
            request.query_id,
            request.history,
            features=request.features,
            context=request.context,
            times=request.times,
        )
        return _json(await service.ask(key, question))

    @router.post("/similar", response_model=Answer, responses=asking, tags=["answers"])
    async def similar(request: SimilarRequest) -> Response:
        """The items nearest to an item, by cosine of the item embeddings."""
        key = SimilarKey("similar", service.models.model(request.model), request.filter)
        return _json(await service.ask(key, Question(request.k, item=request.item)))

    @router.get("/items", response_model=Items, responses=documented(503), tags=["items"])
    async def search_items(
        text: Annotated[str, Query(min_length=1, max_length=LONGEST_ID)],
        k: Annotated[int, Query(ge=1, le=100)] = 10,
        model: ModelName = None,
    ) -> Response:
        """Items whose title contains a text; their ids, where there are no titles."""
        served = service.models.model(model)

        def found() -> list[dict[str, Any]]:
            wanted = text.encode("utf-8", "replace").decode()
            ids = served.retriever.search_titles(wanted, k)["item"].to_list()
            return served.listed(served.item_codes(ids))

        return JSONResponse({"items": await service.aside(found)})

    @router.get("/items/{item_id:path}", responses=documented(503), tags=["items"])
    async def item(item_id: str, model: ModelName = None) -> dict[str, Any]:
        """What is known of an item: title, interactions in training, and its columns in the item table."""
        served = service.models.model(model)
        codes = served.item_codes([item_id])
        if codes[0] < 0:
            raise Problem(404, "item: not an id that this model knows")
        return await service.aside(served.described, known_code(codes, "item"))

    @router.get("/models", response_model=Models, tags=["models"])
    async def models() -> Response:
        """The models served."""
        return JSONResponse({"models": [model.summary() for model in service.models.models()]})

    @router.post("/reload", response_model=Reloaded, responses=documented(403, 408, 413, 415), tags=["models"])
    async def reload() -> Response:
        """Look at the model folders now, instead of at the next turn. Only where a token is asked for."""
        if service.settings.token is None:
            raise Problem(403, "reload: only with a token; start with --token-file, or send the process SIGHUP")
        return JSONResponse({"models": await service.reload()})

    return router


def operations(service: Service) -> APIRouter:
    """The routes that keep a service running."""
    router = APIRouter(tags=["operations"], responses=documented(400, 421))

    @router.get("/healthz", response_model=Health)
    async def healthz() -> Response:
        """The process answers."""
        return JSONResponse({"status": "alive", "models": {}})

    @router.get("/readyz", response_model=Health, responses=documented(503))
    async def readyz() -> Response:
        """The models are loaded and requests are taken."""
        if not service.ready:
            raise Problem(503, "not ready", {"Retry-After": "1"})
        models = {model.name: model.version for model in service.models.models()}
        return JSONResponse({"status": "ready", "models": models})

    @router.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **documented(401)})
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(service.metrics.text(), headers={"Content-Type": service.metrics.content_type})

    return router


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
