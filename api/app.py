"""Puts the model server together. Nothing happens before the app's lifespan begins."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from api import problems
from api.classify import PATH as CLASSIFY_PATH
from api.classify import Classify
from api.cores import available_cores
from api.docs import add_docs
from api.engine import Engine
from api.events import Events
from api.exporter import DEFAULT_COMMAND, Exporter
from api.metrics import Metrics
from api.models import LiveModel
from api.openapi import describe_classify
from api.promoter import Promoter
from api.routes import make_router
from api.settings import ApiSettings
from services.core.registry import Registry


class Api(FastAPI):
    """FastAPI with one way past it, since its layers cost a request more than a small model does.

    It counts every answer; the hot route counts its own.
    """

    def __init__(self, classify: Classify, metrics: Metrics, **options: Any) -> None:
        super().__init__(**options)
        self._classify = classify
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
        elif scope["path"] == CLASSIFY_PATH and scope["method"] == "POST":
            await self._classify(scope, receive, send)
        else:

            async def count(message: Message) -> None:
                if message["type"] == "http.response.start":
                    self._metrics.count_request(message["status"])
                await send(message)

            await super().__call__(scope, receive, count)


def create_app(settings: ApiSettings, *, export_command: Sequence[str] = DEFAULT_COMMAND) -> FastAPI:
    """The server for `settings.model_name`. export_command: what runs an export, before its arguments."""
    live, metrics = LiveModel(), Metrics()
    registry = Registry(settings.registry_dir, settings.model_name)
    engine = Engine(
        threads=settings.inference_threads or available_cores(), in_loop_below_ms=settings.in_loop_below_ms
    )

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
        )
        promoter = Promoter(
            registry,
            exporter,
            live=live,
            metrics=metrics,
            events=events,
            poll_interval_s=settings.poll_interval_s,
        )
        tasks = [
            asyncio.create_task(promoter.run()),
            asyncio.create_task(_report(live, metrics, events, settings.events_interval_s)),
        ]
        try:
            yield
        finally:
            live.is_stopping = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            engine.close()
            events.close()

    classify = Classify(settings, live, engine, metrics)
    app = Api(
        classify,
        metrics,
        title="Echosight",
        summary="Post a radar heatmap, get empty, pedestrian, cyclist or car back.",
        version=version("echosight"),
        lifespan=lifespan,
        docs_url="/swagger",
        redoc_url=None,
    )
    app.state.live = live
    app.router.routes.append(Route(CLASSIFY_PATH, classify, methods=["POST"]))  # for its 405
    problems.install(app)
    app.include_router(make_router(live, registry, metrics))
    describe_classify(app, CLASSIFY_PATH)
    add_docs(app)
    return app


async def _report(live: LiveModel, metrics: Metrics, events: Events, interval_s: float) -> None:
    """Publish the counters now and then."""
    while True:
        await asyncio.sleep(interval_s)
        await events.emit("api", requests=metrics.num_requests, live_version=live.version)
