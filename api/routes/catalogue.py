"""The registry over HTTP: look at versions, promote one, roll back. Who serves what follows within a poll."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, Field

from api.bodies.reading import BodyReader
from api.bodies.requests import described_body, read_body
from api.models.classifier import Classifier
from api.models.live import LiveModel
from api.problems import CONFLICT, NO_SUCH_MODEL, ProblemError
from api.routes.openapi import example, problem_responses
from services.core.errors import RegistryError
from services.core.registry import MODEL_FILE, Registry

_Version = Annotated[int, Path(ge=1, lt=2**53, description="as GET /v1/models lists it")]


class LiveExecution(BaseModel):
    """variant: graph and provider, as ECHOSIGHT_EXECUTION names them. threads: cores of one call.

    The times are medians of calls with one frame and with eight, when it was warmed.
    """

    variant: str
    threads: int
    frame_ms: float
    batch_ms: float


class ModelVersion(BaseModel):
    """One version as its manifest describes it. problem: why the manifest cannot be read, "" if it can.

    execution: what runs it, of the live version only.
    """

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
    int8: dict[str, Any] | None = None
    execution: LiveExecution | None = None


class Move(BaseModel):
    """One line of the history. moved: alias (or "refused") to version."""

    at_s: float
    moved: dict[str, int]
    by: str
    why: str


class Models(BaseModel):
    """The registry. versions: newest first; history: oldest first."""

    name: str
    live_version: int | None
    aliases: dict[str, int]
    versions: list[ModelVersion]
    history: list[Move]


class History(BaseModel):
    """Every move of an alias and every refusal, oldest first."""

    name: str
    history: list[Move]


class MoveRequest(BaseModel):
    """Who moves the champion, and why: for the history."""

    by: str = Field(default="http", min_length=1, max_length=64)
    why: str = Field(default="asked for", min_length=1, max_length=500)


class Moved(BaseModel):
    """Where the aliases point now. live_version: what answers now; the champion follows, see GET /readyz."""

    name: str
    live_version: int | None
    aliases: dict[str, int]


_VERSION_EXAMPLE = {
    "version": 7,
    "is_live": True,
    "has_model": True,
    "aliases": ["champion", "candidate"],
    "refused": "",
    "problem": "",
    "created_at_s": 1712000000.25,
    "classes": ["empty", "pedestrian", "cyclist", "car"],
    "input": {"shape": [2, 128, 64], "dtypes": ["float32", "float16", "uint8"], "unit": "dB", "channels": []},
    "sites": ["", "north"],
    "metrics": {"probe": {"accuracy": 0.91}},
    "parity": {"num_frames": 8, "max_abs_probability_error": 9e-8, "max_allowed": 0.001},
    "int8": {"is_kept": True, "num_frames": 600, "accuracy_fp32": 0.902, "accuracy_int8": 0.905},
    "execution": {"variant": "cpu-int8", "threads": 1, "frame_ms": 0.57, "batch_ms": 3.8},
}
_MOVE_EXAMPLE = {
    "at_s": 1712000000.25,
    "moved": {"champion": 7, "previous": 6},
    "by": "api",
    "why": "exported, warmed and answering well",
}
_MOVED_EXAMPLE = {"name": "radar", "live_version": 7, "aliases": {"champion": 6, "previous": 7, "candidate": 7}}
_MOVE_PROBLEMS = problem_responses(400, 403, 404, 408, 409, 413, 415, 422, 500)


def make_router(live: LiveModel, registry: Registry, reader: BodyReader) -> APIRouter:
    """The routes below /v1/models, closed over what they show and move."""
    router = APIRouter(prefix="/v1/models", tags=["models"])

    @router.get(
        "",
        summary="Versions, aliases and history",
        responses=problem_responses(500)
        | example(
            {
                "name": "radar",
                "live_version": 7,
                "aliases": {"champion": 7, "candidate": 7, "previous": 6},
                "versions": [_VERSION_EXAMPLE],
                "history": [_MOVE_EXAMPLE],
            }
        ),
    )
    async def models() -> Models:
        return await asyncio.to_thread(_describe, registry, live.current)

    @router.get(
        "/history",
        summary="Who moved what, when and why",
        responses=problem_responses(500) | example({"name": "radar", "history": [_MOVE_EXAMPLE]}),
    )
    async def history() -> History:
        return History(name=registry.name, history=await asyncio.to_thread(_moves, registry))

    @router.post(
        "/rollback",
        summary="Make the champion before the champion again",
        description="A second call takes the first one back.",
        openapi_extra=described_body(MoveRequest, is_required=False, why={"by": "ada", "why": "sees ghosts"}),
        responses=_MOVE_PROBLEMS | example(_MOVED_EXAMPLE),
    )
    async def rollback(request: Request) -> Moved:
        asked = await read_body(request, reader, MoveRequest)
        return await asyncio.to_thread(_roll_back, registry, live.version, asked)

    @router.get(
        "/{version}",
        summary="One version",
        responses=problem_responses(404, 422, 500) | example(_VERSION_EXAMPLE),
    )
    async def model(version: _Version) -> ModelVersion:
        return await asyncio.to_thread(_describe_one, registry, version, live.current)

    @router.post(
        "/{version}/promote",
        summary="Make a version the champion",
        description="It must not have been refused; one that the gate holds may be promoted. The server takes it "
        "over within a poll, or once it has exported it, without a gap; the champion before stays as `previous`.",
        openapi_extra=described_body(MoveRequest, is_required=False, why={"by": "ada", "why": "better at night"}),
        responses=_MOVE_PROBLEMS | example(_MOVED_EXAMPLE),
    )
    async def promote(version: _Version, request: Request) -> Moved:
        asked = await read_body(request, reader, MoveRequest)
        return await asyncio.to_thread(_promote, registry, version, live.version, asked)

    return router


def _describe(registry: Registry, live: Classifier | None) -> Models:
    aliases, refused = registry.aliases(), registry.refused()
    return Models(
        name=registry.name,
        live_version=live.version if live else None,
        aliases=aliases,
        versions=[
            _version(registry, version, live, aliases, refused) for version in reversed(registry.versions())
        ],
        history=_moves(registry),
    )


def _describe_one(registry: Registry, version: int, live: Classifier | None) -> ModelVersion:
    _check_known(registry, version)
    return _version(registry, version, live, registry.aliases(), registry.refused())


def _version(
    registry: Registry, version: int, live: Classifier | None, aliases: dict[str, int], refused: dict[int, str]
) -> ModelVersion:
    row = ModelVersion(
        version=version,
        is_live=live is not None and version == live.version,
        has_model=(registry.dir / str(version) / MODEL_FILE).is_file(),
        aliases=[alias for alias, named in aliases.items() if named == version],
        refused=refused.get(version, ""),
        execution=_execution(live) if live is not None and version == live.version else None,
    )
    try:
        manifest = registry.manifest(version).model_dump(mode="json")
    except RegistryError as error:
        return row.model_copy(update={"problem": error.what})
    names = ("created_at_s", "classes", "input", "sites", "metrics", "parity", "int8")
    return row.model_copy(update={name: manifest[name] for name in names})


def _execution(live: Classifier) -> LiveExecution:
    return LiveExecution(
        variant=live.variant,
        threads=live.threads,
        frame_ms=round(live.frame_ms, 3),
        batch_ms=round(live.batch_ms, 3),
    )


def _moves(registry: Registry) -> list[Move]:
    return [Move.model_validate(row) for row in registry.history()]


def _promote(registry: Registry, version: int, live_version: int | None, asked: MoveRequest) -> Moved:
    _check_known(registry, version)
    refused = registry.refused().get(version)
    if refused is not None:
        raise ProblemError(
            CONFLICT,
            f"version {version} was refused: {refused}",
            remedy=f"promote another, or this one by: echosight models promote {version} --force",
        )
    try:
        registry.manifest(version)
    except RegistryError as error:
        raise ProblemError(CONFLICT, error.what, remedy="promote another") from None
    registry.promote(version, by=asked.by, why=asked.why)
    return Moved(name=registry.name, live_version=live_version, aliases=registry.aliases())


def _roll_back(registry: Registry, live_version: int | None, asked: MoveRequest) -> Moved:
    previous = registry.aliases().get("previous")
    if previous is None:
        raise ProblemError(CONFLICT, "there was no champion before this one", remedy="promote a version by number")
    return _promote(registry, previous, live_version, asked)


def _check_known(registry: Registry, version: int) -> None:
    if version not in registry.versions():
        raise ProblemError(
            NO_SUCH_MODEL, f"model {registry.name} has no version {version}", remedy="GET /v1/models lists them"
        )
