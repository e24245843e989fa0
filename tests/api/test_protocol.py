"""What a connection may cost: heads and trailers are bounded, and so are connections."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.api.tiny import listening

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
