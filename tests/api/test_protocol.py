"""What a connection may cost: heads and trailers are bounded, and so are connections."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from api.protocol import MAX_JOINED_BYTES, JoinedWrites
from api.server import uvicorn_config
from api.settings import ApiSettings
from tests.api.tiny import listening, until

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

    config = uvicorn_config(slow, ApiSettings.read(api_port=0))
    config.lifespan = "off"
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(START + b"\r\n")
    async with asyncio.timeout(20.0):
        assert (await reader.read(1000)).endswith(b"\r\n\r\n")
        assert await reader.read() == b"done"
    writer.close()
    server.should_exit = True
    await serving


class _Sent:
    """A transport that keeps what is sent."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.is_over = False

    def write(self, data: bytes) -> None:
        self.parts.append(data)

    def is_closing(self) -> bool:
        return self.is_over

    def close(self) -> None:
        self.is_over = True

    abort = close

    def get_write_buffer_size(self) -> int:
        return 0

    get_extra_info = pause_reading = resume_reading = get_write_buffer_size


async def test_two_writes_of_a_moment_are_one_and_a_lone_one_waits_for_none() -> None:
    sent = _Sent()
    joined = JoinedWrites(sent, asyncio.get_running_loop())  # type: ignore[arg-type]
    joined.write(b"head ")
    assert (sent.parts, joined.get_write_buffer_size()) == ([], 5)
    joined.write(b"body")
    joined.write(b"next")
    await asyncio.sleep(0)
    assert sent.parts == [b"head body", b"next"]
    long = bytes(MAX_JOINED_BYTES + 1)
    joined.write(b"head")
    joined.write(long)
    joined.write(b"last")
    joined.close()
    assert sent.parts[2:] == [b"head", long, b"last"]
    await asyncio.sleep(0)
    assert len(sent.parts) == 5


async def test_nothing_is_sent_after_the_end() -> None:
    sent = _Sent()
    joined = JoinedWrites(sent, asyncio.get_running_loop())  # type: ignore[arg-type]
    joined.write(b"head")
    joined.abort()
    joined.write(b"body")
    await asyncio.sleep(0)
    assert sent.parts == []


async def test_connections_are_bounded(address: str) -> None:
    others = [await asyncio.open_connection(*address.split(":")) for _ in range(2)]
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        assert (await client.get("/livez")).status_code == 503
        for _, writer in others:
            writer.close()
            await writer.wait_closed()
        async with asyncio.timeout(10.0):
            while (await client.get("/livez")).status_code == 503:
                pass


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
