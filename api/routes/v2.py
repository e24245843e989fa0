"""The Open Inference Protocol V2 beside inference itself: health, metadata, statistics, and what is loaded.

As Triton and KServe speak it; tritonclient works unmodified. Answers that the protocol leaves open to failure are
problems with the member "error". It serves one model, in several versions.
"""

import asyncio
from importlib.metadata import version as version_of
from typing import Any

import numpy as np
import orjson
from fastapi import APIRouter, Request

from api.answering.serving import Serving, not_ready
from api.answering.statistics import Duration, VersionCounts
from api.bodies import tensors
from api.bodies.reading import BodyReader
from api.bodies.requests import described_body, read_body
from api.models.classifier import Classifier
from api.problems import BAD_REQUEST_VALUE, ProblemError
from api.releases.versions import Versions
from api.routes.infer import check_name
from api.routes.openapi import example, problem_responses
from api.routes.v2_bodies import (
    AllStatistics,
    BatchStatistics,
    DurationStatistics,
    IndexRequest,
    IndexRow,
    InferenceStatistics,
    Live,
    Loaded,
    ModelMetadata,
    ModelReady,
    ModelStatistics,
    RepositoryParameters,
    RepositoryRequest,
    Server,
    ServerReady,
    TensorMetadata,
)
from services.core.registry import MODEL_FILE, Registry

EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics")
PLATFORM = "onnxruntime_onnx"
_CONFIG_TYPES = {"BYTES": "TYPE_STRING"}
_ABOUT_MODEL = problem_responses(404, 500, 503)
_ABOUT_REPOSITORY = problem_responses(400, 403, 404, 408, 409, 413, 415, 422, 500)
_METADATA_EXAMPLE = {
    "name": "radar",
    "versions": ["7", "6"],
    "platform": PLATFORM,
    "inputs": [
        {"name": "heatmap", "datatype": "FP32", "shape": [-1, 2, 128, 64]},
        {"name": "site", "datatype": "BYTES", "shape": [-1]},
    ],
    "outputs": [
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, 4]},
        {"name": "embedding", "datatype": "FP32", "shape": [-1, 128]},
    ],
}
_LOADED_EXAMPLE = {"name": "radar", "versions": ["7", "6"]}


def make_router(
    registry: Registry, serving: Serving, versions: Versions, reader: BodyReader, *, max_batch: int
) -> APIRouter:
    """The routes of protocol V2 but for infer, closed over what they show."""
    router = APIRouter(prefix="/v2", tags=["protocol V2"])
    live = serving.live

    async def find(name: str, version: str = "") -> Classifier:
        check_name(name, registry.name)
        return await versions.find(version)

    def answering() -> Loaded:
        return Loaded(name=registry.name, versions=[str(model.version) for model in versions.loaded()])

    @router.get(
        "",
        summary="Server metadata",
        responses=example({"name": "echosight", "version": "1.0", "extensions": EXTENSIONS}),
    )
    async def server() -> Server:
        return Server(version=version_of("echosight"), extensions=list(EXTENSIONS))

    @router.get("/health/live", summary="Is the process alive", responses=example({"live": True}))
    async def health_live() -> Live:
        return Live()

    @router.get(
        "/health/ready",
        summary="Has a model answered yet",
        responses=example({"ready": True}) | problem_responses(503),
    )
    async def health_ready() -> ServerReady:
        if not live.is_ready:
            raise not_ready(live)
        return ServerReady()

    @router.get("/models/stats", summary="Statistics of all versions that answer", responses=_stats_responses())
    async def all_statistics() -> AllStatistics:
        return AllStatistics(model_stats=[_statistics(model, serving) for model in versions.loaded()])

    async def metadata(name: str, version: str = "") -> ModelMetadata:
        return _metadata(await find(name, version), versions)

    async def ready(name: str, version: str = "") -> ModelReady:
        await find(name, version)
        if live.is_stopping:
            raise not_ready(live)
        return ModelReady(name=name)

    async def statistics(name: str, version: str = "") -> AllStatistics:
        check_name(name, registry.name)
        models = [await find(name, version)] if version else versions.loaded()
        return AllStatistics(model_stats=[_statistics(model, serving) for model in models])

    async def config(name: str, version: str = "") -> dict[str, Any]:
        return _config(await find(name, version), versions, max_batch)

    for path, handler, summary, shown in (
        ("", metadata, "Model metadata", example(_METADATA_EXAMPLE)),
        ("/ready", ready, "Does the model answer", example({"name": "radar", "ready": True})),
        ("/stats", statistics, "What the model has answered", _stats_responses()),
        (
            "/config",
            config,
            "Model configuration",
            example({"name": "radar", "platform": PLATFORM, "max_batch_size": 64}),
        ),
    ):
        for prefix, of in (("/models/{name}", ""), ("/models/{name}/versions/{version}", " of a version")):
            if of:
                router.add_api_route(prefix + path, handler, summary=summary + of, responses=shown | _ABOUT_MODEL)
            else:
                router.add_api_route(
                    prefix + path, _of_live(handler), summary=summary, responses=shown | _ABOUT_MODEL
                )

    @router.post(
        "/repository/index",
        summary="All versions, and whether they answer",
        openapi_extra=described_body(IndexRequest, is_required=False, ready={"ready": True}, all={}),
        responses=problem_responses(400, 403, 408, 413, 415, 422, 500)
        | example([{"name": "radar", "version": "7", "state": "READY", "reason": ""}]),
    )
    async def index(request: Request) -> list[IndexRow]:
        asked = await read_body(request, reader, IndexRequest)
        rows = await asyncio.to_thread(_index, registry, {model.version for model in versions.loaded()})
        return [row for row in rows if row.state == "READY" or not asked.ready]

    @router.post(
        "/repository/models/{name}/load",
        summary="Let another version answer too",
        description="By number or alias, or as tritonclient can say it: a config whose version_policy names "
        "versions. Nothing named: what the aliases name. ECHOSIGHT_MAX_LOADED_VERSIONS bounds how many.",
        openapi_extra=described_body(
            RepositoryRequest,
            is_required=False,
            number={"parameters": {"version": 6}},
            previous={"parameters": {"version": "previous"}},
        ),
        responses=_ABOUT_REPOSITORY | example(_LOADED_EXAMPLE),
    )
    async def load(name: str, request: Request) -> Loaded:
        asked = await read_body(request, reader, RepositoryRequest)
        check_name(name, registry.name)
        named = _versions_in(asked.parameters)
        for version in named:
            await versions.load(await versions.number(version))
        if not named:
            await versions.load_aliases()
        return answering()

    @router.post(
        "/repository/models/{name}/unload",
        summary="Let a version no longer answer",
        description="Nothing named: all that were loaded so. The live version stays: it follows the registry.",
        openapi_extra=described_body(RepositoryRequest, is_required=False, number={"parameters": {"version": 6}}),
        responses=_ABOUT_REPOSITORY | example(_LOADED_EXAMPLE | {"versions": ["7"]}),
    )
    async def unload(name: str, request: Request) -> Loaded:
        asked = await read_body(request, reader, RepositoryRequest)
        check_name(name, registry.name)
        named = _versions_in(asked.parameters)
        for version in named:
            versions.unload(await versions.number(version))
        if not named:
            versions.unload()
        return answering()

    return router


def _of_live(handler: Any) -> Any:
    """`handler` for a path without a version."""

    async def of_live(name: str) -> Any:
        return await handler(name)

    of_live.__name__ = f"live_{handler.__name__}"
    of_live.__annotations__["return"] = handler.__annotations__["return"]
    return of_live


def _metadata(model: Classifier, versions: Versions) -> ModelMetadata:
    return ModelMetadata(
        name=model.manifest.name,
        versions=[str(loaded.version) for loaded in versions.loaded()],
        platform=PLATFORM,
        inputs=[
            TensorMetadata(name="heatmap", datatype="FP32", shape=[-1, *model.contract.shape]),
            TensorMetadata(name="site", datatype=tensors.BYTES, shape=[-1]),
        ],
        outputs=[
            TensorMetadata(name=name, datatype=tensors.datatype_of(empty), shape=[-1, *empty.shape[1:]])
            for name, empty in model.outputs.items()
        ],
    )


def _config(model: Classifier, versions: Versions, max_batch: int) -> dict[str, Any]:
    """Triton's model configuration. Dimensions are those after the batch."""
    return {
        "name": model.manifest.name,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "version_policy": {"specific": {"versions": [loaded.version for loaded in versions.loaded()]}},
        "max_batch_size": max_batch,
        "input": [
            {"name": "heatmap", "data_type": "TYPE_FP32", "dims": list(model.contract.shape), "optional": False},
            {"name": "site", "data_type": "TYPE_STRING", "dims": [1], "optional": True},
        ],
        "output": [
            {"name": name, "data_type": _config_type(empty), "dims": list(empty.shape[1:]) or [1]}
            for name, empty in model.outputs.items()
        ],
        "parameters": {
            "classes": {"string_value": ",".join(model.classes)},
            "sites": {"string_value": ",".join(model.manifest.sites)},
            "unit": {"string_value": model.contract.unit},
            "execution": {"string_value": model.variant},
            "threads": {"string_value": str(model.threads)},
        },
    }


def _config_type(empty: np.ndarray[Any, Any]) -> str:
    datatype = tensors.datatype_of(empty)
    return _CONFIG_TYPES.get(datatype, f"TYPE_{datatype}")


def _index(registry: Registry, loaded: set[int]) -> list[IndexRow]:
    refused = registry.refused()
    rows = []
    for version in reversed(registry.versions()):
        if version in loaded:
            state, reason = "READY", ""
        elif version in refused:
            state, reason = "UNAVAILABLE", f"refused: {refused[version]}"
        elif (registry.dir / str(version) / MODEL_FILE).is_file():
            state, reason = "UNAVAILABLE", "not loaded"
        else:
            state, reason = "UNAVAILABLE", "not exported yet"
        rows.append(IndexRow(name=registry.name, version=str(version), state=state, reason=reason))
    return rows


def _versions_in(parameters: RepositoryParameters) -> list[str]:
    """The versions that a load or unload names. Raises ProblemError."""
    if parameters.version is not None:
        return [str(parameters.version)]
    if parameters.config is None:
        return []
    remedy = '{"version_policy": {"specific": {"versions": [6]}}} names version 6; nothing else can be configured'
    try:
        policy = orjson.loads(parameters.config)["version_policy"]
        named = policy["specific"]["versions"] if "specific" in policy else []
        if not isinstance(named, list) or len(named) > 64 or not all(isinstance(n, int | str) for n in named):
            raise ValueError
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        raise ProblemError(BAD_REQUEST_VALUE, f"config is {parameters.config[:80]!r}", remedy=remedy) from None
    return [str(version) for version in named]


def _statistics(model: Classifier, serving: Serving) -> ModelStatistics:
    counts: VersionCounts = serving.statistics.of(model.version)
    unknown = DurationStatistics(count=0, ns=0)
    succeeded_ns = counts.queue.ns + counts.inference.ns + counts.decode.ns + counts.encode.ns
    return ModelStatistics(
        name=model.manifest.name,
        version=str(model.version),
        last_inference=counts.last_at_ms,
        inference_count=counts.num_frames,
        execution_count=counts.num_calls,
        inference_stats=InferenceStatistics(
            success=DurationStatistics(count=counts.inference.count, ns=succeeded_ns),
            fail=_duration(counts.fail),
            queue=_duration(counts.queue),
            compute_input=_duration(counts.decode),
            compute_infer=_duration(counts.inference),
            compute_output=_duration(counts.encode),
            cache_hit=unknown,
            cache_miss=unknown,
        ),
        batch_stats=[
            BatchStatistics(
                batch_size=size, compute_input=unknown, compute_infer=_duration(took), compute_output=unknown
            )
            for size, took in sorted(counts.by_batch.items())
        ],
    )


def _duration(duration: Duration) -> DurationStatistics:
    return DurationStatistics(count=duration.count, ns=duration.ns)


def _stats_responses() -> dict[int | str, dict[str, Any]]:
    one = {"count": 3, "ns": 4_200_000}
    names = (
        "success",
        "fail",
        "queue",
        "compute_input",
        "compute_infer",
        "compute_output",
        "cache_hit",
        "cache_miss",
    )
    shown = {
        "name": "radar",
        "version": "7",
        "last_inference": 1712000000123,
        "inference_count": 3,
        "execution_count": 3,
        "inference_stats": dict.fromkeys(names, one),
        "batch_stats": [
            {"batch_size": 1} | dict.fromkeys(("compute_input", "compute_infer", "compute_output"), one)
        ],
    }
    return example({"model_stats": [shown]})
