"""Spans of requests, as an exporter gets them; and none, at no cost, where nobody asked for them."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from api.access.tracing import Tracing, make_tracing
from api.app import create_app
from api.settings import ApiSettings
from tests.api.tiny import SHAPE, export_command, heatmap, npy, publish_champion, registry_of, until

sdk: Any = pytest.importorskip("opentelemetry.sdk.trace", reason="opentelemetry-sdk is not installed")
export: Any = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")

NPY = {"content-type": "application/x-npy"}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@pytest.fixture
def exporter() -> Any:
    return export.InMemorySpanExporter()


@pytest.fixture
async def client(tmp_path: Path, exporter: Any) -> AsyncIterator[httpx.AsyncClient]:
    provider = sdk.TracerProvider()
    provider.add_span_processor(sdk.export.SimpleSpanProcessor(exporter))
    publish_champion(registry_of(tmp_path))
    app = create_app(
        ApiSettings.read(data_dir=tmp_path, redis_url="", poll_interval_s=0.02),
        export_command=export_command(tmp_path / "prepared"),
        make_tracing=lambda _: Tracing(provider),
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://api") as client,
    ):
        await until(lambda: app.state.live.is_ready)
        yield client


async def test_a_hot_route_goes_on_with_the_clients_trace_and_says_where_the_time_went(
    client: httpx.AsyncClient, exporter: Any
) -> None:
    tensor = {"name": "heatmap", "shape": [2, *SHAPE], "datatype": "FP32", "data": [1.0] * 48}
    await client.post("/v1/classify", content=npy(heatmap(2, *SHAPE)), headers=NPY | TRACEPARENT)
    await client.post("/v1/embed", content=npy(heatmap(2, *SHAPE)), headers=NPY | TRACEPARENT)
    await client.post("/v2/models/radar/infer", json={"inputs": [tensor]}, headers=TRACEPARENT)
    spans = exporter.get_finished_spans()
    assert [span.name for span in spans] == [
        "POST /v1/classify",
        "POST /v1/embed",
        "POST /v2/models/{name}/infer",
    ]
    for span in spans:
        assert (span.context.trace_id, span.parent.span_id) == (int(TRACE, 16), int(PARENT, 16))
        assert span.kind.name == "SERVER"
        assert span.attributes["http.response.status_code"] == 200
        assert span.attributes["echosight.frames"] == 2
        assert span.attributes["echosight.model_version"] == 1
        assert span.attributes["echosight.decode_ms"] > 0
        assert span.attributes["echosight.inference_ms"] > 0
        assert span.attributes["echosight.queue_ms"] >= 0


async def test_other_routes_have_a_span_too_and_each_request_one(client: httpx.AsyncClient, exporter: Any) -> None:
    answer = await client.get("/v1/models/7", headers={"x-request-id": "one"})
    await client.get("/livez")
    first, second = exporter.get_finished_spans()
    assert (first.name, second.name) == ("GET /v1/models/{version}", "GET /livez")
    assert first.attributes["echosight.request_id"] == answer.headers["x-request-id"] == "one"
    assert first.attributes["echosight.problem"] == "no-such-model"
    assert first.parent is None
    assert first.context.trace_id != second.context.trace_id


async def test_what_failed_is_an_error_and_what_was_refused_is_none(
    client: httpx.AsyncClient, exporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("secret")

    await client.post("/v1/classify", content=b"x")
    monkeypatch.setattr("api.routes.classify.decode", fail)
    await client.post("/v1/classify", content=b"x")
    refused, failed = exporter.get_finished_spans()
    assert (refused.status.status_code.name, failed.status.status_code.name) == ("UNSET", "ERROR")
    assert failed.attributes["error.type"] == "RuntimeError"


def test_nobody_named_means_no_tracing() -> None:
    assert make_tracing(ApiSettings.read(otel_exporter_otlp_endpoint="")) is None


def test_a_collector_is_named_as_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "north-api")
    tracing = make_tracing(ApiSettings.read())
    assert tracing is not None
    assert tracing._provider.resource.attributes["service.name"] == "north-api"
    tracing.close()


def test_without_the_packages_the_server_starts_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with capture_logs() as logs:
        assert make_tracing(ApiSettings.read(otel_exporter_otlp_endpoint="http://127.0.0.1:9")) is None
    assert "echosight[otel]" in logs[0]["remedy"]
