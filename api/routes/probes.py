"""The routes for operations: probes, metrics, and where to go from the root."""

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from api import metrics as metrics_module
from api.answering.serving import not_ready
from api.metrics import Metrics
from api.models.live import LiveModel
from api.problems import STARTING, ProblemError
from api.routes.classify import PATH as CLASSIFY_PATH
from api.routes.embed import PATH as EMBED_PATH
from api.routes.listeners import PATH as EVENTS_PATH
from api.routes.openapi import example, problem_responses
from api.routes.stream import PATH as STREAM_PATH


class Alive(BaseModel):
    status: str = "alive"


class Started(BaseModel):
    status: str = "started"


class Ready(BaseModel):
    status: str = "ready"
    model: str
    version: int


def make_router(name: str, live: LiveModel, metrics: Metrics) -> APIRouter:
    """The routes, closed over what they show. name: of the model."""
    router = APIRouter(tags=["operations"])
    links = {
        "classify": f"POST {CLASSIFY_PATH}",
        "embed": f"POST {EMBED_PATH}",
        "stream": f"WebSocket {STREAM_PATH}",
        "events": EVENTS_PATH,
        "labels": "POST /v1/labels",
        "models": "/v1/models",
        "protocol_v2": "/v2",
        "docs": "/docs",
        "openapi": "/openapi.json",
        "alive": "/livez",
        "started": "/startupz",
        "ready": "/readyz",
        "metrics": "/metrics",
    }
    model_example = {"name": "radar", "version": 7, "is_ready": True}

    @router.get(
        "/",
        summary="Where to go",
        responses=example({"service": "echosight", "model": model_example, "links": links}),
    )
    async def root() -> dict[str, Any]:
        return {
            "service": "echosight",
            "model": {"name": name, "version": live.version, "is_ready": live.is_ready},
            "links": links,
        }

    @router.get("/livez", summary="Is the process alive", responses=example({"status": "alive"}))
    async def livez() -> Alive:
        return Alive()

    @router.get(
        "/startupz",
        summary="Has the server come up: has it looked into the registry",
        responses=problem_responses(503) | example({"status": "started"}),
    )
    async def startupz() -> Started:
        if not live.has_looked:
            raise ProblemError(
                STARTING,
                f"waiting for {live.waiting_for}",
                remedy="try again soon; the log of the API says what is wrong if it stays so",
                headers={"retry-after": "2"},
            )
        return Started()

    @router.get(
        "/readyz",
        summary="Has a model answered yet",
        responses=problem_responses(503) | example({"status": "ready", "model": "radar", "version": 7}),
    )
    async def readyz() -> Ready:
        if not live.is_ready or live.version is None:
            raise not_ready(live)
        return Ready(model=name, version=live.version)

    @router.get(
        "/metrics",
        summary="Counters for Prometheus",
        response_class=Response,
        responses={
            200: {
                "content": {
                    "text/plain": {
                        "schema": {"type": "string"},
                        "examples": {
                            "one": {
                                "value": 'echosight_api_requests_total{route="/v1/classify",status="200"} 42.0'
                            }
                        },
                    }
                }
            }
        },
    )
    async def prometheus() -> Response:
        return Response(metrics.text(), headers={"content-type": metrics_module.CONTENT_TYPE})

    return router
