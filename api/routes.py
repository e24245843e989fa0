"""The routes beside the hot one: probes, the registry to look at, metrics, and where to go from the root."""

import asyncio
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from api import metrics as metrics_module
from api.classify import PATH as CLASSIFY_PATH
from api.classify import not_ready
from api.metrics import Metrics
from api.models import LiveModel
from api.openapi import problem_responses
from services.core.errors import RegistryError
from services.core.registry import MODEL_FILE, Registry


class Alive(BaseModel):
    status: str = "alive"


class Ready(BaseModel):
    status: str = "ready"
    model: str
    version: int


class ModelVersion(BaseModel):
    """One version as its manifest describes it. problem: why the manifest cannot be read, "" if it can."""

    version: int
    is_live: bool
    has_model: bool
    aliases: list[str]
    refused: str = ""
    problem: str = ""
    created_at_s: float | None = None
    classes: list[str] = []
    input: dict[str, Any] = {}
    sites: list[str] = []
    metrics: dict[str, Any] = {}
    parity: dict[str, Any] | None = None


class Models(BaseModel):
    """The registry. versions: newest first; history: oldest first."""

    name: str
    live_version: int | None
    aliases: dict[str, int]
    versions: list[ModelVersion]
    history: list[dict[str, Any]]


def make_router(live: LiveModel, registry: Registry, metrics: Metrics) -> APIRouter:
    """All routes but the hot one, closed over what they show."""
    router = APIRouter()

    @router.get("/", summary="Where to go")
    async def root() -> dict[str, Any]:
        return {
            "service": "echosight",
            "model": {"name": registry.name, "version": live.version, "is_ready": live.is_ready},
            "links": {
                "classify": f"POST {CLASSIFY_PATH}",
                "models": "/v1/models",
                "docs": "/docs",
                "openapi": "/openapi.json",
                "alive": "/livez",
                "ready": "/readyz",
                "metrics": "/metrics",
            },
        }

    @router.get("/livez", summary="Is the process alive", tags=["operations"])
    async def livez() -> Alive:
        return Alive()

    @router.get(
        "/readyz", summary="Has a model answered yet", tags=["operations"], responses=problem_responses(503)
    )
    async def readyz() -> Ready:
        if not live.is_ready or live.version is None:
            raise not_ready(live)
        return Ready(model=registry.name, version=live.version)

    @router.get("/v1/models", summary="Versions, aliases and history", responses=problem_responses(500))
    async def models() -> Models:
        return await asyncio.to_thread(_describe, registry, live.version)

    @router.get(
        "/metrics",
        summary="Counters for Prometheus",
        tags=["operations"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def prometheus() -> Response:
        return Response(metrics.text(), headers={"content-type": metrics_module.CONTENT_TYPE})

    return router


def _describe(registry: Registry, live_version: int | None) -> Models:
    aliases, refused = registry.aliases(), registry.refused()
    versions = []
    for version in reversed(registry.versions()):
        row = ModelVersion(
            version=version,
            is_live=version == live_version,
            has_model=(registry.dir / str(version) / MODEL_FILE).is_file(),
            aliases=[alias for alias, named in aliases.items() if named == version],
            refused=refused.get(version, ""),
        )
        try:
            manifest = registry.manifest(version).model_dump(mode="json")
        except RegistryError as error:
            versions.append(row.model_copy(update={"problem": error.what}))
            continue
        known = {
            name: manifest[name] for name in ("created_at_s", "classes", "input", "sites", "metrics", "parity")
        }
        versions.append(row.model_copy(update=known))
    return Models(
        name=registry.name,
        live_version=live_version,
        aliases=aliases,
        versions=versions,
        history=registry.history(),
    )
