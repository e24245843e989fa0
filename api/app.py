"""Puts the model server together. Nothing happens before the app's lifespan begins."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import Receive, Scope, Send

from api import problems
from api.access.gate import Gate
from api.access.keys import Access
from api.access.tracing import Tracing, make_tracing
from api.answering.engine import Limits
from api.answering.serving import Serving
from api.bodies.reading import BodyReader
from api.cores import share_of_cores
from api.events import Events
from api.live.classification import LiveClassification
from api.live.metrics import LiveMetrics
from api.metrics import Metrics
from api.models.execution import Execution
from api.models.live import LiveModel
from api.problems import NO_WEBSOCKET, ProblemError
from api.processes.pool import Pool
from api.releases.exporter import DEFAULT_COMMAND, Exporter
from api.releases.promoter import Promoter, Trial
from api.releases.versions import Versions
from api.routes import catalogue, labels, listeners, probes, v2
from api.routes.classify import PATH as CLASSIFY_PATH
from api.routes.classify import Classify
from api.routes.docs import add_docs
from api.routes.embed import PATH as EMBED_PATH
from api.routes.embed import Embed
from api.routes.endpoint import Endpoint
from api.routes.infer import Infer, is_infer
from api.routes.labels import LabelPublisher
from api.routes.listeners import Listeners
from api.routes.openapi import add_operations, problem_responses
from api.routes.operations import operations
from api.routes.stream import PATH as STREAM_PATH
from api.routes.stream import Stream
from api.settings import ApiSettings
from services.core.errors import SettingsError
from services.core.logs import logger
from services.core.registry import Registry
from services.core.streams import process_name

if TYPE_CHECKING:
    from api.rpc.server import RpcServer

_NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}
"""Of FastAPI's own, which knows nothing of the hot routes: the gate traces all alike."""


class Api(FastAPI):
    """FastAPI with a way past it, since its layers cost a request more than a small model does.

    What is not hot passes the gate here; the hot routes pass it by themselves.
    """

    def __init__(self, hot: Mapping[str, Endpoint], infer: Infer, gate: Gate, **options: Any) -> None:
        super().__init__(**options)
        self._hot = hot
        self._infer = infer
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await super().__call__(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await self._gate.websocket(super().__call__, scope, receive, send)
            return
        if scope["method"] == "POST":
            path = scope["path"]
            endpoint = self._hot.get(path) or (self._infer if is_infer(path) else None)
            if endpoint is not None:
                await endpoint(scope, receive, send)
                return
        await self._gate.http(super().__call__, scope, receive, send)


def create_app(
    settings: ApiSettings,
    *,
    export_command: Sequence[str] = DEFAULT_COMMAND,
    make_tracing: Callable[[ApiSettings], Tracing | None] = make_tracing,
) -> FastAPI:
    """The server for `settings.model_name`. export_command: what runs an export, before its arguments.

    Raises SettingsError for API keys that cannot be read, or none where they are needed.
    """
    live, metrics, access = LiveModel(), Metrics(), Access(settings)
    tracing = make_tracing(settings)
    gate = Gate(settings, access, metrics, tracing)
    cores = share_of_cores(settings.api_processes)
    execution = Execution(settings.execution, data_dir=settings.data_dir, cores=cores, log=logger("api"))
    registry = Registry(settings.registry_dir, settings.model_name)
    serving = make_serving(settings, live, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        events = Events(settings.redis_url)
        exporter = Exporter(
            export_command,
            registry_dir=settings.registry_dir,
            name=settings.model_name,
            store_dir=settings.store_dir,
            timeout_s=settings.export_timeout_s,
            threads=settings.export_threads,
            int8=settings.export_int8,
        )
        promoter = Promoter(
            registry,
            exporter,
            serving=serving,
            metrics=metrics,
            events=events,
            trial=Trial(
                max_frame_ms=settings.max_frame_ms,
                shadow_frames=settings.shadow_frames,
                shadow_timeout_s=settings.shadow_timeout_s,
                shadow_min_agreement=settings.shadow_min_agreement,
            ),
            poll_interval_s=settings.poll_interval_s,
            load=execution.load,
        )
        if rpc is not None:
            await rpc.start()
        tasks = [
            asyncio.create_task(promoter.run()),
            asyncio.create_task(event_listeners.run()),
            asyncio.create_task(event_listeners.follow_predictions()),
            asyncio.create_task(access.run()),
            asyncio.create_task(_report(live, metrics, streamed, events, settings.events_interval_s)),
        ]
        if classification is not None:
            tasks.append(asyncio.create_task(classification.run()))
        try:
            yield
        finally:
            live.is_stopping = True
            if rpc is not None:
                await rpc.stop()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if classification is not None:
                await classification.close()
            await event_listeners.close()
            await label_publisher.close()
            serving.close()
            events.close()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    reader = BodyReader(settings)
    versions = Versions(registry, live, max_loaded=settings.max_loaded_versions, load=execution.load)
    event_listeners = Listeners(settings, live, gate)
    is_live = settings.live and bool(settings.redis_url)
    streamed = LiveMetrics(metrics.registry) if is_live else None
    classification = LiveClassification(settings, serving, streamed) if streamed else None
    label_publisher = LabelPublisher(settings.redis_url)
    hot, infer = hot_routes(settings, serving, versions, reader, gate)
    app = Api(
        hot,
        infer,
        gate,
        title="Echosight",
        summary="Post a radar heatmap, get empty, pedestrian, cyclist or car back.",
        version=version("echosight"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        telemetry=_NO_TELEMETRY,
    )
    app.state.live, app.state.metrics = live, metrics
    app.state.classification = classification
    app.state.pool = Pool(settings, live, serving, gate) if settings.api_processes > 1 else None
    rpc = app.state.rpc = _rpc_server(app, settings)
    for path in (*hot, "/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"):
        app.router.routes.append(Route(path, hot.get(path, infer), methods=["POST"]))  # for its 405
    problems.install(app)
    app.router.routes.append(WebSocketRoute(STREAM_PATH, Stream(settings, serving, gate).serve))
    _explain_stream(app)
    for router in (
        labels.make_router(label_publisher, reader),
        listeners.make_router(event_listeners),
        catalogue.make_router(live, registry, reader),
        v2.make_router(registry, serving, versions, reader, max_batch=settings.max_batch),
        probes.make_router(registry.name, live, metrics),
    ):
        app.include_router(router)
    add_operations(app, operations(), has_keys=access.is_on)
    add_docs(app)
    return app


def make_serving(settings: ApiSettings, live: LiveModel, metrics: Metrics) -> Serving:
    """Of one process: it has its share of the cores, and of the frames that may wait."""
    return Serving(
        live,
        metrics,
        threads=settings.inference_threads or share_of_cores(settings.api_processes),
        in_loop_below_ms=settings.in_loop_below_ms,
        limits=Limits(
            max_rows=settings.max_batch,
            max_waiting_rows=max(1, settings.max_waiting_frames // settings.api_processes),
            batch_wait_ms=settings.batch_wait_ms,
            answer_timeout_s=settings.answer_timeout_s,
        ),
    )


def hot_routes(
    settings: ApiSettings, serving: Serving, versions: Versions, reader: BodyReader, gate: Gate
) -> tuple[dict[str, Endpoint], Infer]:
    """The endpoints by their paths, and that of protocol V2."""
    hot: dict[str, Endpoint] = {
        CLASSIFY_PATH: Classify(serving, reader, gate, max_batch=settings.max_batch),
        EMBED_PATH: Embed(serving, reader, gate, max_batch=settings.max_batch),
    }
    return hot, Infer(settings.model_name, serving, versions, reader, gate, max_batch=settings.max_batch)


def _rpc_server(app: Api, settings: ApiSettings) -> "RpcServer | None":
    """Raises SettingsError where it is wanted and gRPC is not installed."""
    if not settings.grpc_port:
        return None
    # Children are executed at once: gRPC's hooks on fork have nothing to do but log in plain text.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
    try:
        from api.rpc.server import RpcServer
    except ImportError as error:
        raise SettingsError(
            f"ECHOSIGHT_GRPC_PORT is {settings.grpc_port}, but {error.name} is not installed",
            remedy="pip install 'echosight[grpc]', or leave the port at 0",
        ) from None
    return RpcServer(app, settings)


def _explain_stream(app: FastAPI) -> None:
    """OpenAPI knows no WebSocket: say what it is where somebody looks, and to whoever asks without an upgrade."""

    @app.get(
        STREAM_PATH,
        tags=["answers"],
        summary="Stream frames over a WebSocket",
        description="Binary messages are .npy arrays, text messages the JSON of /v1/classify; `?site=north` names "
        "the site of the whole stream. Each message is answered by one of JSON, in order: what /v1/classify "
        "answers, or a problem, with the message's `index`. The server pings, and closes with a reason.",
        status_code=101,
        response_class=Response,
        responses=problem_responses(426),
    )
    async def stream() -> None:
        raise ProblemError(
            NO_WEBSOCKET, "this was plain HTTP", remedy="open a WebSocket", headers={"upgrade": "websocket"}
        )


async def _report(
    live: LiveModel, metrics: Metrics, streamed: LiveMetrics | None, events: Events, interval_s: float
) -> None:
    """Publish the counters now and then, under a name that no other replica has."""
    replica = process_name(socket.gethostname())
    while True:
        await asyncio.sleep(interval_s)
        described = {"live": streamed.describe()} if streamed else {}
        await events.emit(
            "api", replica=replica, requests=metrics.num_requests, live_version=live.version, **described
        )
