"""What every answer has, hot route or not: an id, careful headers, a line in the log, and CORS where it is on."""

import io
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from fastapi import FastAPI
from structlog.contextvars import clear_contextvars, merge_contextvars
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin

from api.access.gate import MAX_LINES_PER_S, Lines
from api.settings import ApiSettings
from services.core.errors import SettingsError
from tests.api.tiny import heatmap, listening, npy, publish_champion, registry_of, serving, until

NPY = {"content-type": "application/x-npy"}
PAGE = "https://dashboard.example"


@pytest.fixture
async def app_and_client(tmp_path: Path) -> AsyncIterator[tuple[FastAPI, httpx.AsyncClient]]:
    publish_champion(registry_of(tmp_path))
    async with serving(tmp_path, allowed_origins=f"{PAGE}, http://localhost:3000") as (app, client):
        await until(lambda: app.state.live.is_ready)
        yield app, client


@pytest.fixture
def client(app_and_client: tuple[FastAPI, httpx.AsyncClient]) -> httpx.AsyncClient:
    return app_and_client[1]


@contextmanager
def logged() -> Iterator[list[dict[str, Any]]]:
    """Every line of the log as the JSON that a collector gets."""
    lines: list[dict[str, Any]] = []
    before = structlog.get_config()
    out = io.StringIO()
    structlog.configure(
        processors=[merge_contextvars, structlog.processors.add_log_level, structlog.processors.JSONRenderer()],
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=False,
    )
    try:
        yield lines
    finally:
        structlog.configure(**before)
        lines += [json.loads(line) for line in out.getvalue().splitlines() if line.startswith("{")]
        clear_contextvars()


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/classify"), ("POST", "/v2/models/radar/infer"), ("GET", "/v1/models"), ("GET", "/nothing")],
)
async def test_a_sane_id_of_the_client_is_kept_and_any_other_replaced(
    client: httpx.AsyncClient, method: str, path: str
) -> None:
    for sent in ("3f0a-11", "a" * 128, "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"):
        answer = await client.request(method, path, headers={"x-request-id": sent})
        assert answer.headers["x-request-id"] == sent
    made = set()
    for sent in ("", "a" * 129, "a b", 'a"b', "a\x7fb"):
        answer = await client.request(method, path, headers={"x-request-id": sent})
        made.add(answer.headers["x-request-id"])
        assert sent not in made
    assert len(made) == 5


async def test_a_problem_and_every_log_line_of_a_request_have_its_id(
    app_and_client: tuple[FastAPI, httpx.AsyncClient],
) -> None:
    app, client = app_and_client

    @app.get("/crash")
    async def crash() -> None:
        raise RuntimeError("secret")

    with logged() as lines:
        hot = await client.post("/v1/classify", content=b"x", headers=NPY | {"x-request-id": "one"})
        other = await client.get("/crash", headers={"x-request-id": "two"})
        await client.post("/v1/classify", content=npy(heatmap()), headers=NPY | {"x-request-id": "three"})
    assert (hot.json()["request_id"], other.json()["request_id"]) == ("one", "two")
    assert (hot.json()["instance"], other.json()["instance"]) == ("/v1/classify", "/crash")
    by_id = {name: [line for line in lines if line.get("request_id") == name] for name in ("one", "two", "three")}
    assert [line["event"] for line in by_id["one"]] == ["answered"]
    assert [line["event"] for line in by_id["two"]] == ["request failed", "answered"]
    assert by_id["three"] == []
    line = by_id["one"][0]
    assert (line["status"], line["problem"], line["path"]) == (400, "unreadable-body", "/v1/classify")
    assert line["caller"] == "127.0.0.1"
    assert line["ms"] > 0


async def test_at_debug_good_answers_are_logged_too(tmp_path: Path) -> None:
    publish_champion(registry_of(tmp_path))
    async with serving(tmp_path, log_level="debug") as (app, client):
        await until(lambda: app.state.live.is_ready)
        with logged() as lines:
            await client.post("/v1/classify", content=npy(heatmap()), headers=NPY)
            await client.get("/livez")
    answered = [(line["level"], line["path"], line["status"]) for line in lines if line["event"] == "answered"]
    assert answered == [("debug", "/v1/classify", 200), ("debug", "/livez", 200)]


def test_a_flood_of_refusals_leaves_a_bounded_log_that_says_what_it_left_out() -> None:
    now_s = [10.0]
    lines = Lines(lambda: now_s[0])
    assert sum(lines.may_write() for _ in range(MAX_LINES_PER_S + 7)) == MAX_LINES_PER_S
    now_s[0] += 1.0
    assert lines.may_write()
    assert lines.left_out() == {"num_left_out": 7}
    assert lines.left_out() == {}


async def test_a_path_cannot_write_lines_of_its_own_into_the_log(client: httpx.AsyncClient) -> None:
    with logged() as lines:
        await client.get("/x%0A2026-01-01%20forged%1B[2J")
    assert [line["path"] for line in lines] == ["/x\\n2026-01-01 forged\\x1b[2J"]


async def test_answers_are_careful_with_browsers(client: httpx.AsyncClient) -> None:
    hot = await client.post("/v1/classify", content=npy(heatmap()), headers=NPY)
    for answer in (hot, await client.get("/v1/models"), await client.get("/nothing"), await client.get("/docs")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert len(answer.headers.get_list("cache-control")) == 1
    for path in ("/v1/models", "/docs", "/swagger"):
        answer = await client.get(path)
        [policy] = answer.headers.get_list("content-security-policy")
        assert policy.startswith("default-src 'none'")
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["referrer-policy"] == "no-referrer"
    assert "script-src" not in (await client.get("/docs")).headers["content-security-policy"]
    assert (await client.get("/docs")).text.count("<style>") == 1


@pytest.mark.parametrize(
    "path", ["/v1/classify", "/v2/models/radar/infer", "/v1/models", "/v1/labels", "/v1/events"]
)
async def test_an_allowed_page_may_ask_and_read_and_no_other(client: httpx.AsyncClient, path: str) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    answer = await client.options(path, headers=asked | {"origin": PAGE})
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in answer.headers["access-control-allow-headers"]
    assert "POST" in answer.headers["access-control-allow-methods"]
    for origin in ("https://evil.example", "null", f"{PAGE}.evil.example", f"http{PAGE[5:]}"):
        refused = await client.options(path, headers=asked | {"origin": origin})
        assert refused.status_code == 405
        assert "access-control-allow-origin" not in refused.headers
        assert refused.headers["vary"] == "origin"


async def test_an_allowed_page_may_give_orders_and_another_may_not(client: httpx.AsyncClient) -> None:
    for origin, status in ((PAGE, 200), ("https://evil.example", 403)):
        answer = await client.post("/v1/models/1/promote", headers={"origin": origin})
        assert (answer.status_code, answer.headers.get("access-control-allow-origin") == origin) == (
            status,
            status == 200,
        )
    hot = await client.post("/v1/classify", content=npy(heatmap()), headers=NPY | {"origin": PAGE})
    assert hot.headers["access-control-allow-origin"] == PAGE
    assert "x-model-version" in hot.headers["access-control-expose-headers"]


async def test_without_the_setting_no_page_of_another_server_may_read(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        answer = await client.get("/livez", headers={"origin": PAGE})
        preflight = await client.options(
            "/v1/classify", headers={"origin": PAGE, "access-control-request-method": "POST"}
        )
    assert not [name for name in answer.headers if name.startswith("access-control") or name == "vary"]
    assert preflight.status_code == 405


async def test_an_allowed_page_may_open_a_stream(tmp_path: Path) -> None:
    publish_champion(registry_of(tmp_path))
    async with listening(tmp_path, allowed_origins=PAGE) as (app, address):
        await until(lambda: app.state.live.is_ready)
        async with connect(f"ws://{address}/v1/stream", origin=Origin(PAGE)) as stream:
            assert stream.response is not None
            assert stream.response.headers["x-request-id"]
        with pytest.raises(InvalidStatus):
            async with connect(f"ws://{address}/v1/stream", origin=Origin("https://evil.example")):
                pass
        async with httpx.AsyncClient(base_url=f"http://{address}") as client:
            text = (await client.get("/metrics")).text
    assert 'echosight_api_requests_total{route="/v1/stream",status="101"} 1.0' in text
    assert 'echosight_api_requests_total{route="/v1/stream",status="403"} 1.0' in text


@pytest.mark.parametrize(
    "origins", ["*", "dashboard.example", "https://a.example/", "ftp://a.example", "https://"]
)
def test_what_is_no_origin_is_refused_at_the_start(origins: str) -> None:
    with pytest.raises(SettingsError, match="ECHOSIGHT_ALLOWED_ORIGINS"):
        ApiSettings.read(allowed_origins=origins)
