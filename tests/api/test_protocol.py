"""What a connection may cost: heads and trailers are bounded, and so are connections."""

import asyncio
import contextlib
import gc
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from api.problems import ProblemError
from tests.api.tiny import answering, listening, publish_champion, registry_of, until

START = b"GET /livez HTTP/1.1\r\nhost: api\r\n"
CHUNKED = b"POST /v1/models/rollback HTTP/1.1\r\nhost: api\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    async with listening(tmp_path, max_connections=2) as (_, address):
        yield address


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (START, b"x-one: 1\r\n" * 1000),
        (START + b"x-long: ", b"a" * 10_000),
        (b"GET /", b"a" * 10_000),
        (CHUNKED + b"0\r\n", b"x-one: 1\r\n" * 1000),
    ],
    ids=["many headers", "a long header", "a long address", "trailers"],
)
async def test_a_head_without_end_ends_the_connection(address: str, start: bytes, more: bytes) -> None:
    assert await _num_taken(address, start, more, max_bytes=10_000_000) < 10_000_000


async def test_a_large_head_and_a_larger_body_are_read(address: str) -> None:
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        assert (await client.get("/livez", headers={"x-long": "a" * 50_000})).status_code == 200
        answer = await client.post("/v1/models/rollback", content=b" " * 1_000_000)
    assert answer.status_code == 400


async def test_a_client_that_takes_nothing_of_its_answers_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.protocol.MAX_UNREAD_MS", 300)
    async with listening(tmp_path) as (_, address):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = address.split(":")
        client.connect((host, int(port)))  # the kernel accepts it: the server's loop is this one
        reader, writer = await asyncio.open_connection(sock=client)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        asks = b"GET /openapi.json HTTP/1.1\r\nhost: api\r\n\r\n"
        async with asyncio.timeout(20.0):
            with pytest.raises(OSError):  # noqa: PT011, PT012 - reset or broken pipe, as the race falls
                while True:
                    writer.write(asks)
                    await writer.drain()
                    await asyncio.sleep(0.01)


@pytest.mark.parametrize("asks", [b"", START + b"\r\n", START], ids=["never", "once", "half of it"])
async def test_a_client_that_asks_nothing_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asks: bytes
) -> None:
    monkeypatch.setattr("api.server.KEEP_ALIVE_S", 0.1)
    async with listening(tmp_path) as (_, address), asyncio.timeout(20.0):
        reader, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(asks)
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200") == (asks == START + b"\r\n")
        writer.close()


async def test_a_client_that_waits_for_its_answer_is_not_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.server.KEEP_ALIVE_S", 0.05)

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.3)  # several looks at who is idle
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await asyncio.sleep(0.3)  # the head does not wait for its body
        await send({"type": "http.response.body", "body": b"done"})

    async with answering(slow) as server, asyncio.timeout(20.0):
        reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname()[:2])
        writer.write(START + b"\r\n")
        assert (await reader.read(1000)).endswith(b"\r\n\r\n")
        assert await reader.read() == b"done"
        writer.close()


async def test_connections_are_bounded(address: str) -> None:
    others = [await asyncio.open_connection(*address.split(":")) for _ in range(2)]
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        refused = await client.get("/livez")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
        assert "ECHOSIGHT_MAX_CONNECTIONS" in refused.json()["remedy"]
        for _, writer in others:
            writer.close()
            await writer.wait_closed()
        async with asyncio.timeout(10.0):
            while (await client.get("/livez")).status_code == 503:
                pass


async def test_what_is_no_http_is_answered_by_a_problem(address: str) -> None:
    answer = await _all_of(address, b"\x16\x03\x01\x02\0\x01")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"connection: close" in head.splitlines()
    assert orjson.loads(body)["type"] == "urn:echosight:problem:not-http"


async def test_a_client_that_has_said_all_is_answered(address: str) -> None:
    answer = await _all_of(address, b"GET /v1/models HTTP/1.1\r\nhost: api\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert (
        await _all_of(address, b"POST /v1/models/rollback HTTP/1.1\r\nhost: api\r\ncontent-length: 2\r\n\r\n{")
        == b""
    )


async def test_events_end_when_their_client_has_gone(tmp_path: Path, redis_url: str) -> None:
    async with listening(tmp_path, redis_url=redis_url, heartbeat_s=3600.0) as (app, address):
        reader, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(b"GET /v1/events HTTP/1.1\r\nhost: api\r\n\r\n")
        await reader.readuntil(b"retry")
        writer.close()
        await until(lambda: b"echosight_api_open_listeners 0.0" in app.state.metrics.text())


@pytest.mark.parametrize("size", [1, 50, 10_000])
async def test_a_wish_for_another_protocol_is_ignored_and_the_body_kept(address: str, size: int) -> None:
    """As Java's client sends it by default, in pieces of `size`."""
    body = b'["a body"]' + b" " * 200
    asked = b"POST /v1/models/rollback HTTP/1.1\r\nhost: api\r\n"
    asked += b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAQ\r\n"
    asked += b"content-length: %d\r\n\r\n" % len(body) + body
    pieces = [asked[start : start + size] for start in range(0, len(asked), size)]
    answer = await _all_of(address, *pieces, START + b"connection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 422 ")
    assert b"['a body']" in answer
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 1


async def test_wishes_for_another_protocol_are_ignored_one_after_the_other(address: str) -> None:
    wish = b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAQ\r\n"
    asked = b"POST /v1/models/rollback HTTP/1.1\r\nhost: api\r\ncontent-length: 4\r\n" + wish + b"\r\n"
    answers = await _all_of(address, asked + b"[11]" + asked + b"[22]" + START + b"\r\n")
    assert [answers.count(part) for part in (b"[11]", b"[22]", b"HTTP/1.1 200 OK\r\n")] == [1, 1, 1]
    assert answers.index(b"[11]") < answers.index(b"[22]") < answers.index(b"HTTP/1.1 200 OK\r\n")


async def test_what_is_no_http_takes_nobody_his_answer(address: str) -> None:
    answers = await _all_of(address, b"GET /v1/models HTTP/1.1\r\nhost: api\r\n\r\n\x16\x03\r\n\r\n")
    assert answers.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answers.count(b"HTTP/1.1") == 1
    broken = START + b"transfer-encoding: chunked\r\n\r\nno size\r\n"
    assert await _all_of(address, START + b"\r\n" + broken) == b"", "whose answer would it be?"


async def test_trailers_are_no_headers(address: str) -> None:
    trailers = b"0\r\nx-request-id: trailer\r\norigin: http://elsewhere\r\n\r\n"
    asked = CHUNKED.replace(b"host: api", b"host: api\r\nx-request-id: header") + b"2\r\n[]\r\n" + trailers
    answer = await _all_of(address, asked)
    assert answer.startswith(b"HTTP/1.1 422 ")
    assert b"x-request-id: header\r\n" in answer


async def test_a_client_that_leaves_is_noticed_though_it_had_asked_more(tmp_path: Path, redis_url: str) -> None:
    async with listening(tmp_path, redis_url=redis_url, heartbeat_s=0.05) as (app, address):
        reader, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(b"GET /v1/events HTTP/1.1\r\nhost: api\r\n\r\n" + START + b"\r\n")
        await reader.readuntil(b"retry")
        writer.transport.abort()
        await until(lambda: b"echosight_api_open_listeners 0.0" in app.state.metrics.text(), timeout_s=20.0)


async def test_a_refused_body_is_let_go_at_once(tmp_path: Path) -> None:
    def num_errors() -> int:
        return sum(issubclass(type(one), ProblemError) for one in gc.get_objects())

    publish_champion(registry_of(tmp_path))
    asked = b"POST %s HTTP/1.1\r\nhost: api\r\ncontent-length: 4\r\n\r\nnone"
    async with listening(tmp_path) as (app, address):
        await until(lambda: app.state.live.is_ready)
        gc.collect()
        gc.disable()
        try:
            before = num_errors()
            for path in (b"/v1/classify", b"/v1/embed", b"/v2/models/radar/infer", b"/v1/models/rollback"):
                assert (await _all_of(address, asked % path)).startswith(b"HTTP/1.1 4"), path
            assert num_errors() == before
        finally:
            gc.enable()


async def _all_of(address: str, *pieces: bytes) -> bytes:
    """What is answered to a client that sends no more."""
    reader, writer = await asyncio.open_connection(*address.split(":"))
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0)
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer


async def _num_taken(address: str, start: bytes, more: bytes, *, max_bytes: int) -> int:
    """How many bytes of `more` again and again can be sent before the connection is reset."""
    _, writer = await asyncio.open_connection(*address.split(":"))
    writer.write(start)
    sent = 0
    with contextlib.suppress(OSError):
        while sent < max_bytes:
            writer.write(more)
            await writer.drain()
            sent += len(more)
            await asyncio.sleep(0)
    writer.close()
    return sent
