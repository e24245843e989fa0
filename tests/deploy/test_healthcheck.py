"""deploy/healthcheck.py against a real server, real events and frames, and a small HTTP server."""

import importlib.util
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import redis

from services.core import streams
from services.core.streams import EventLog, Publisher
from tests.conftest import radar_frame
from tests.deploy.files import ROOT, compose

_SPEC = importlib.util.spec_from_file_location("healthcheck", ROOT / "deploy" / "healthcheck.py")
assert _SPEC is not None
assert _SPEC.loader is not None
healthcheck: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(healthcheck)
check: Callable[[list[str]], int] = healthcheck.main


@pytest.fixture(autouse=True)
def _environment(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)


def report(url: str, kind: str) -> None:
    events = EventLog(url, source=kind)
    assert events.emit(kind, pairs=3)
    events.close()


def test_worker_is_healthy_while_it_reports(redis_url: str) -> None:
    report(redis_url, "ingest")
    assert check(["ingest"]) == 0
    assert check(["trainer"]) == 1


def test_worker_that_reported_long_ago_is_not_healthy(
    redis_client: "redis.Redis", capsys: pytest.CaptureFixture[str]
) -> None:
    redis_client.xadd(streams.EVENTS, {"event": b'{"source":"ingest","kind":"ingest"}'}, id="1-1")
    assert check(["ingest"]) == 1
    assert capsys.readouterr().out == f"ingest on {socket.gethostname()} has not reported for 30 s\n"


def test_replica_that_hangs_is_not_healthy_because_another_one_works(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report(redis_url, "trainer")
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    report(redis_url, "ingest")
    assert check(["ingest"]) == 0
    assert check(["trainer"]) == 1
    monkeypatch.undo()
    monkeypatch.setenv("REDIS_URL", redis_url)
    assert check(["ingest"]) == 1
    assert check(["trainer"]) == 0


async def test_site_is_healthy_while_it_publishes(publisher: Publisher) -> None:
    assert check(["site", "north"]) == 1
    await publisher.publish([radar_frame(0.0)])
    assert check(["site", "north"]) == 0
    assert check(["site", "south"]) == 1


def test_says_so_when_the_server_is_away_or_refuses(
    monkeypatch: pytest.MonkeyPatch, redis_client: "redis.Redis", capsys: pytest.CaptureFixture[str]
) -> None:
    redis_client.set(streams.EVENTS, "no stream")
    assert check(["ingest"]) == 1
    assert "WRONGTYPE" in capsys.readouterr().out
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    assert check(["ingest"]) == 1
    assert "no answer from the streams' server" in capsys.readouterr().out


def test_logs_in_where_the_url_has_a_password(
    monkeypatch: pytest.MonkeyPatch, redis_url: str, redis_client: "redis.Redis"
) -> None:
    report(redis_url, "trainer")
    redis_client.acl_setuser("probe", enabled=True, passwords=["+pass"], keys=["*"], commands=["+@all"])
    try:
        monkeypatch.setenv("REDIS_URL", redis_url.replace("//", "//probe:pass@"))
        assert check(["trainer"]) == 0
        monkeypatch.setenv("REDIS_URL", redis_url.replace("//", "//probe:wrong@"))
        assert check(["trainer"]) == 1
    finally:
        redis_client.acl_deluser("probe")


@contextmanager
def server(status: int) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/livez" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield http.server_port
        http.shutdown()
        thread.join()


def test_api_is_healthy_while_livez_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for status, expected in ((200, 0), (503, 1)):
        with server(status) as port:
            monkeypatch.setenv("ECHOSIGHT_API_PORT", str(port))
            assert check(["api"]) == expected
    assert check(["api"]) == 1


def test_keys_are_those_of_the_streams() -> None:
    assert healthcheck.EVENTS == streams.EVENTS
    assert streams.stream_key("north", "radar") == healthcheck.RADAR % "north"


def test_compose_calls_it_with_arguments_that_it_knows(
    redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECHOSIGHT_API_PORT", "1")
    calls = [
        service["healthcheck"]["test"]
        for service in compose()["services"].values()
        if service["healthcheck"]["test"][0] == "CMD"
    ]
    assert len(calls) == 4
    for call in calls:
        assert call[:3] == ["CMD", "python", "/app/healthcheck.py"]
        check(call[3:])
    assert "arguments are" not in capsys.readouterr().out
    assert check(["nobody"]) == 1
