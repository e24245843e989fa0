"""The HTTP surface: answers, problems, probes, metrics, schema."""

import asyncio
import gzip
import shutil
import subprocess
import threading
import time
import zlib
from collections.abc import AsyncIterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import api.metrics
from api.metrics import Metrics
from api.problems import KINDS
from tests.api.tiny import (
    CLASSES,
    SHAPE,
    attach,
    heatmap,
    npy,
    probability_of,
    publish,
    publish_champion,
    registry_of,
    serving,
    tiny_model,
    until,
)

NPY = {"content-type": "application/x-npy"}


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    publish_champion(registry_of(tmp_path))
    async with serving(tmp_path, max_body_bytes=4096, max_batch=8, body_timeout_s=0.2) as (app, client):
        await until(lambda: app.state.live.is_ready)
        yield client


async def test_one_frame_gets_label_probabilities_model_site_and_timing(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/classify?site=north", content=npy(heatmap()), headers=NPY)
    content = answer.json()
    assert answer.status_code == 200
    assert tuple(content["probabilities"]) == CLASSES
    assert content["probabilities"]["empty"] == pytest.approx(probability_of(1, site=1), abs=1e-6)
    assert content["label"] in CLASSES[1:]
    assert "unknown" not in content
    assert content["model"] == {"name": "radar", "version": 1}
    assert content["site"] == {"name": "north", "known": True}
    assert set(content["timing_ms"]) == {"decode", "queue", "inference", "total"}
    assert content["timing_ms"]["total"] >= content["timing_ms"]["inference"] > 0


async def test_an_unknown_site_is_answered_and_said_to_be_unknown(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/classify", json={"heatmap": heatmap().tolist(), "site": "new"})
    assert answer.json()["site"] == {"name": "new", "known": False}


async def test_a_batch_gets_a_result_each(client: httpx.AsyncClient) -> None:
    by_npy = await client.post("/v1/classify", content=npy(heatmap(3, *SHAPE)), headers=NPY)
    by_json = await client.post("/v1/classify", json={"heatmaps": heatmap(3, *SHAPE).tolist()})
    assert len(by_npy.json()["results"]) == 3
    assert by_npy.json()["results"] == by_json.json()["results"]
    assert "label" not in by_npy.json()


async def test_a_model_with_a_threshold_says_which_frames_are_strange_to_it(tmp_path: Path) -> None:
    registry = registry_of(tmp_path)
    version = publish(registry, unknown_threshold=5.0)
    attach(registry, version, tiny_model(version, has_unknown=True))
    frames = np.stack([np.full(SHAPE, value, np.float32) for value in (1.0, 7.0)])
    async with serving(tmp_path) as (app, client):
        await until(lambda: app.state.live.is_ready)
        many = (await client.post("/v1/classify", content=npy(frames), headers=NPY)).json()["results"]
        one = (await client.post("/v1/classify", content=npy(frames[1]), headers=NPY)).json()
    assert many[0]["unknown"] == {"score": 1.0, "threshold": 5.0, "is_unknown": False}
    assert many[1]["unknown"] == one["unknown"] == {"score": 7.0, "threshold": 5.0, "is_unknown": True}


async def test_a_problem_names_value_remedy_and_place(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/classify", content=npy(heatmap(4, 3)), headers=NPY)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json() == {
        "type": "urn:echosight:problem:wrong-shape",
        "title": "The heatmap has the wrong shape",
        "status": 422,
        "detail": "heatmap shape is (4, 3)",
        "remedy": "send (2, 4, 3) for one frame, (batch, 2, 4, 3) for several",
        "instance": "/v1/classify",
        "request_id": answer.headers["x-request-id"],
    }


async def test_a_body_that_says_it_is_too_long_is_refused_unread(client: httpx.AsyncClient) -> None:
    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""  # type: ignore[unreachable]

    answer = await client.post("/v1/classify", content=never(), headers={"content-length": "5000"})
    assert (answer.status_code, "5000 bytes" in answer.json()["detail"]) == (413, True)


async def test_a_chunked_body_is_refused_once_it_is_too_long(client: httpx.AsyncClient) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(1000)

    answer = await client.post("/v1/classify", content=endless())
    assert (answer.status_code, "5000 bytes" in answer.json()["detail"]) == (413, True)


async def test_a_body_that_does_not_come_is_given_up(client: httpx.AsyncClient) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"\x93NUM"
        await asyncio.Event().wait()

    answer = await client.post("/v1/classify", content=slow())
    assert (answer.status_code, "4 bytes" in answer.json()["detail"]) == (408, True)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_compressed_body_is_read_up_to_the_same_limit(client: httpx.AsyncClient, encoding: str) -> None:
    compress = gzip.compress if encoding == "gzip" else zlib.compress
    headers = NPY | {"content-encoding": encoding}
    whole = compress(npy(heatmap()))
    assert (await client.post("/v1/classify", content=whole, headers=headers)).status_code == 200
    bomb = await client.post("/v1/classify", content=compress(bytes(1_000_000)), headers=headers)
    assert (bomb.status_code, "4097 bytes or more" in bomb.json()["detail"]) == (413, True)
    for damaged, named in ((whole[:-4], "truncated"), (whole + b"x", "left over"), (b"x" * 20, "damaged")):
        answer = await client.post("/v1/classify", content=damaged, headers=headers)
        assert (answer.status_code, named in answer.json()["detail"]) == (400, True)


async def test_a_body_in_an_unknown_compression_is_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/classify", content=b"x", headers={"content-encoding": "br"})
    assert (answer.status_code, "'br'" in answer.json()["detail"]) == (415, True)


@pytest.mark.parametrize(
    ("method", "path", "status", "named"),
    [
        ("GET", "/nothing/here", 404, "/nothing/here"),
        ("GET", "/v1/classify", 405, "GET"),
        ("DELETE", "/v1/models", 405, "DELETE"),
    ],
)
async def test_the_frameworks_own_errors_are_problems_too(
    client: httpx.AsyncClient, method: str, path: str, status: int, named: str
) -> None:
    answer = await client.request(method, path)
    assert (answer.status_code, answer.json()["status"]) == (status, status)
    assert answer.headers["content-type"] == "application/problem+json"
    assert named in answer.json()["detail"]
    assert answer.json()["remedy"]


async def test_a_failing_model_is_a_500_problem_that_keeps_its_secrets(tmp_path: Path) -> None:
    publish_champion(registry_of(tmp_path))
    async with serving(tmp_path) as (app, client):
        await until(lambda: app.state.live.is_ready)

        def fail(*_: Any) -> None:
            raise RuntimeError("secret")

        app.state.live.current.run = fail
        answer = await client.post("/v1/classify", content=npy(heatmap()))
    assert (answer.status_code, answer.json()["detail"]) == (500, "RuntimeError while answering")
    assert "secret" not in answer.text


async def test_a_crash_outside_the_hot_route_is_a_counted_problem_too(tmp_path: Path) -> None:
    async with serving(tmp_path) as (app, client):

        @app.get("/crash")
        async def crash() -> None:
            raise RuntimeError("secret")

        answer = await client.get("/crash")
        assert (answer.status_code, answer.json()["detail"]) == (500, "RuntimeError while answering")
        metrics = (await client.get("/metrics")).text
        assert 'echosight_api_requests_total{route="/crash",status="500"} 1.0' in metrics
        assert 'echosight_api_exceptions_total{type="RuntimeError"} 1.0' in metrics
        assert 'echosight_api_problems_total{kind="internal"} 1.0' in metrics


async def test_without_a_model_it_is_alive_but_not_ready_and_says_what_it_waits_for(tmp_path: Path) -> None:
    async with serving(tmp_path) as (app, client):
        await until(lambda: "trainer" in app.state.live.waiting_for)
        assert (await client.get("/livez")).json() == {"status": "alive"}
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.headers["retry-after"]) == (503, "2")
        assert "waiting for the trainer to publish" in ready.json()["detail"]
        answer = await client.post("/v1/classify", content=npy(heatmap()))
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:echosight:problem:not-ready")
        assert (await client.get("/v1/models")).json()["versions"] == []


async def test_a_stopping_server_is_not_ready(tmp_path: Path) -> None:
    publish_champion(registry_of(tmp_path))
    async with serving(tmp_path) as (app, client):
        await until(lambda: app.state.live.is_ready)
        assert (await client.get("/readyz")).json() == {"status": "ready", "model": "radar", "version": 1}
        app.state.live.is_stopping = True
        assert (await client.get("/readyz")).json()["detail"] == "the server is stopping"


async def test_models_shows_versions_aliases_metrics_parity_and_history(tmp_path: Path) -> None:
    registry = registry_of(tmp_path)
    publish_champion(registry)
    publish(registry)
    registry.refuse(2, by="test", why="no good")
    publish(registry)
    (registry.path(3) / "manifest.json").write_bytes(b"{")
    registry.refuse(3, by="test", why="damaged")
    async with serving(tmp_path) as (app, client):
        await until(lambda: app.state.live.is_ready)
        shown = (await client.get("/v1/models")).json()
    damaged, refused, live = shown["versions"]
    assert (shown["live_version"], shown["aliases"]) == (1, {"candidate": 3, "champion": 1})
    assert "manifest.json" in damaged["problem"]
    assert (refused["refused"], refused["has_model"]) == ("no good", False)
    assert (live["is_live"], live["has_model"], live["aliases"]) == (True, True, ["champion"])
    assert live["metrics"] == {"probe_accuracy": 0.9}
    assert live["parity"]["max_allowed"] == 1e-4
    assert [row["by"] for row in shown["history"]][-2:] == ["trainer", "test"]


def test_the_build_info_names_whichever_onnxruntime_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(
        name: str,
    ) -> str:  # onnxruntime-openvino and onnxruntime-gpu are other distributions of the module
        if name == "onnxruntime":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(api.metrics, "version", version)
    assert f'onnxruntime_version="{onnxruntime.__version__}"' in Metrics().text().decode()


async def test_metrics_count_requests_problems_inferences_and_the_live_version(client: httpx.AsyncClient) -> None:
    await client.post("/v1/classify", content=npy(heatmap(2, *SHAPE)), headers=NPY)
    await client.post("/v1/classify", content=b"")
    await client.get("/v1/models/7")
    await client.get("/nothing")
    text = (await client.get("/metrics")).text
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert values["echosight_api_requests_total", "/v1/classify", "200"] == 1
    assert values["echosight_api_requests_total", "/v1/classify", "400"] == 1
    assert values["echosight_api_requests_total", "/v1/models/{version}", "404"] == 1
    assert values["echosight_api_requests_total", "none", "404"] == 1
    assert values["echosight_api_request_duration_seconds_count", "/v1/classify"] == 2
    assert values["echosight_api_problems_total", "unreadable-body"] == 1
    assert values["echosight_api_problems_total", "not-finite"] == 0
    assert values["echosight_api_frames_total",] == 2
    assert values["echosight_api_inference_seconds_count",] == 1
    assert values["echosight_api_live_model_version",] == 1
    assert time.time() - values["echosight_api_live_model_age_seconds",] == pytest.approx(1.0, abs=5.0)
    assert values["echosight_api_model_swaps_total",] == 1
    assert f'echosight_build_info{{onnxruntime_version="{onnxruntime.__version__}"' in text


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
async def test_promtool_finds_nothing_to_complain_about(client: httpx.AsyncClient) -> None:
    await client.post("/v1/classify", content=npy(heatmap()), headers=NPY)
    text = (await client.get("/metrics")).text
    done = await asyncio.to_thread(
        subprocess.run, ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


async def test_started_alive_and_ready_are_three_questions(tmp_path: Path) -> None:
    registry = registry_of(tmp_path)
    registry.dir.parent.mkdir(parents=True)
    registry.dir.write_text("no folder")  # the look into the registry fails, again and again
    async with serving(tmp_path) as (app, client):

        async def probe() -> list[int]:
            return [(await client.get(path)).status_code for path in ("/livez", "/startupz", "/readyz")]

        await until(lambda: "the registry" in app.state.live.waiting_for)
        assert await probe() == [200, 503, 503]
        assert (await client.get("/startupz")).json()["type"] == "urn:echosight:problem:starting"
        registry.dir.unlink()
        await until(lambda: app.state.live.has_looked)
        assert await probe() == [200, 200, 503]
        publish_champion(registry)
        await until(lambda: app.state.live.is_ready)
        assert await probe() == [200, 200, 200]
        app.state.live.is_stopping = True
        assert await probe() == [200, 200, 503]


async def test_the_root_and_the_docs_tell_where_to_go(client: httpx.AsyncClient) -> None:
    root = (await client.get("/")).json()
    for name in ("models", "docs", "openapi", "alive", "started", "ready", "metrics"):
        assert (await client.get(root["links"][name])).status_code == 200


async def test_the_docs_open_without_a_network(client: httpx.AsyncClient) -> None:
    page = (await client.get("/docs")).text
    assert "POST /v1/classify" in page
    assert "application/x-npy" in page
    assert "http://" not in page.replace("http://localhost", "")
    assert "https://" not in page
    assert "<script" not in page


async def test_the_schema_documents_bodies_examples_and_every_problem(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/openapi.json")).json()
    classify = schema["paths"]["/v1/classify"]["post"]
    assert set(classify["requestBody"]["content"]) == {
        "application/x-npy",
        "application/octet-stream",
        "application/json",
    }
    assert classify["requestBody"]["content"]["application/json"]["examples"]
    statuses = {int(status) for status in classify["responses"]}
    assert statuses == {200} | {kind.status for kind in KINDS} - {404, 405, 409, 426}
    assert "application/problem+json" in classify["responses"]["422"]["content"]
    assert {"/", "/livez", "/startupz", "/readyz", "/v1/models", "/metrics"} < set(schema["paths"])


def test_no_request_makes_a_server_error(tmp_path: Path) -> None:
    publish_champion(registry_of(tmp_path))
    types = ["application/x-npy", "application/json", "application/octet-stream", "", "text/plain", "\x7f"]
    whole = npy(heatmap())

    with asyncio.Runner() as runner:
        context = serving(tmp_path, max_body_bytes=1024)
        app, client = runner.run(context.__aenter__())
        runner.run(until(lambda: app.state.live.is_ready))

        @settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(
            body=st.binary(max_size=1100)
            | st.binary(max_size=150).map(lambda tail: whole[:128] + tail)
            | st.binary(max_size=60).map(lambda tail: whole[:10] + tail),
            content_type=st.sampled_from(types) | st.text(st.characters(codec="latin-1"), max_size=10),
            query=st.text(
                st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="#"), max_size=30
            ),
        )
        def post(body: bytes, content_type: str, query: str) -> None:
            headers = {b"content-type": content_type.encode("latin-1")}
            answer = runner.run(client.post(f"/v1/classify?site={query}", content=body, headers=headers))
            assert answer.status_code < 500, answer.text
            if answer.status_code != 200:
                assert answer.json()["remedy"]

        post()
        runner.run(context.__aexit__(None, None, None))


async def test_answers_are_the_same_from_the_loop_and_from_a_thread(tmp_path: Path) -> None:
    publish_champion(registry_of(tmp_path))
    answers = []
    for in_loop_below_ms in (0.0, 1000.0):
        async with serving(tmp_path, in_loop_below_ms=in_loop_below_ms) as (app, client):
            await until(lambda app=app: app.state.live.is_ready)  # type: ignore[misc]
            answer = await client.post("/v1/classify", content=npy(heatmap().astype(np.uint8)))
            answers.append(answer.json()["probabilities"])
    assert answers[0] == answers[1]


async def test_a_client_says_how_long_it_waits(client: httpx.AsyncClient) -> None:
    frame = npy(heatmap())
    assert (await client.post("/v1/classify", content=frame, headers={"x-timeout-ms": "5000"})).status_code == 200
    for wrong in ("0", "-1", "soon", "1.5", "9" * 10):
        answer = await client.post("/v1/classify", content=frame, headers={"x-timeout-ms": wrong})
        assert (answer.status_code, wrong in answer.json()["detail"]) == (422, True)


async def test_no_answer_is_late_and_no_frame_waits_without_a_place(tmp_path: Path) -> None:
    publish_champion(registry_of(tmp_path))
    limits = {"in_loop_below_ms": 0.0, "inference_threads": 1, "max_waiting_frames": 4}
    async with serving(tmp_path, **limits) as (app, client):
        await until(lambda: app.state.live.is_ready)
        model = app.state.live.current
        may_run, began, run = threading.Event(), threading.Event(), model.run
        model.run = lambda *asked: (began.set(), may_run.wait(), run(*asked))[2]
        frame, frames = npy(heatmap()), npy(heatmap(4, *SHAPE))
        busy = asyncio.create_task(client.post("/v1/classify", content=frame))
        await until(began.is_set)
        waiting = asyncio.create_task(client.post("/v1/classify", content=frames))
        await until(lambda: "echosight_api_waiting_frames 4.0" in app.state.metrics.text().decode())
        full = await client.post("/v1/embed", content=frame)
        assert (full.status_code, full.json()["type"]) == (429, "urn:echosight:problem:overloaded")
        assert int(full.headers["retry-after"]) >= 1
        may_run.set()
        assert {answer.status_code for answer in await asyncio.gather(busy, waiting)} == {200}
        may_run.clear()
        late = await client.post("/v1/classify", content=frame, headers={"x-timeout-ms": "20"})
        assert (late.status_code, late.json()["type"]) == (504, "urn:echosight:problem:too-late")
        parameters = {"inputs": [], "parameters": {"timeout": 20_000}} | {
            "inputs": [{"name": "heatmap", "shape": SHAPE, "datatype": "FP32", "data": heatmap().ravel().tolist()}]
        }
        late = await client.post("/v2/models/radar/infer", json=parameters)
        assert late.status_code == 504
        may_run.set()
        assert (await client.post("/v1/classify", content=frame)).status_code == 200
        text = (await client.get("/metrics")).text
    assert 'echosight_api_batch_frames_bucket{le="1.0"}' in text
