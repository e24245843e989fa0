"""WebSocket /v1/stream: answers in order, problems in their place, and an end that says why."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from starlette.types import Message
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Origin

from tests.api.tiny import (
    SHAPE,
    heatmap,
    listening,
    npy,
    probability_of,
    publish_champion,
    registry_of,
    serving,
    until,
)


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    publish_champion(registry_of(tmp_path))
    async with listening(
        tmp_path, max_streams=1, max_batch=4, max_body_bytes=4096, stream_idle_s=0.5, heartbeat_s=0.1
    ) as (app, address):
        await until(lambda: app.state.live.is_ready)
        yield address


async def test_frames_are_answered_in_order_and_a_bad_one_in_its_place(address: str) -> None:
    async with connect(f"ws://{address}/v1/stream?site=north") as stream:
        bodies = [npy(heatmap()), b"rubbish", npy(heatmap(2, *SHAPE)), npy(heatmap(3, 3))]
        for body in [*bodies, json.dumps({"heatmap": heatmap().tolist()})]:
            await stream.send(body)
        answers = [json.loads(await stream.recv()) for _ in range(5)]
    one, rubbish, batch, misshapen, from_json = answers
    assert [answer["index"] for answer in answers] == [0, 1, 2, 3, 4]
    assert one["probabilities"]["empty"] == pytest.approx(probability_of(1, site=1), abs=1e-6)
    assert one["site"] == {"name": "north", "known": True}
    assert one["timing_ms"]["total"] > 0
    assert (rubbish["status"], rubbish["type"]) == (400, "urn:echosight:problem:unreadable-body")
    assert len(batch["results"]) == 2
    assert (misshapen["status"], "(3, 3)" in misshapen["detail"], bool(misshapen["remedy"])) == (422, True, True)
    assert from_json["label"] == one["label"]


async def test_a_second_client_is_told_that_there_is_no_place(address: str) -> None:
    async with connect(f"ws://{address}/v1/stream"):
        with pytest.raises(InvalidStatus) as refused:
            async with connect(f"ws://{address}/v1/stream"):
                pass
    assert refused.value.response.status_code == 503
    assert "ECHOSIGHT_MAX_STREAMS" in json.loads(refused.value.response.body)["remedy"]


async def test_a_bad_site_is_refused_at_the_handshake(address: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with connect(f"ws://{address}/v1/stream?site=../etc"):
            pass
    assert refused.value.response.status_code == 422


async def test_a_page_of_another_site_is_refused_at_the_handshake(address: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with connect(f"ws://{address}/v1/stream", origin=Origin("https://example.org")):
            pass
    assert refused.value.response.status_code == 403
    async with connect(f"ws://{address}/v1/stream", origin=Origin(f"http://{address}")):
        pass


async def test_an_idle_stream_is_closed_with_the_reason_and_frees_its_place(address: str) -> None:
    for _ in range(2):
        async with connect(f"ws://{address}/v1/stream") as stream:
            with pytest.raises(ConnectionClosed) as closed:
                await stream.recv()
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1000, "no frame for 0.5 s")


async def test_a_message_that_is_too_long_ends_the_stream(address: str) -> None:
    async with connect(f"ws://{address}/v1/stream") as stream:
        await stream.send(bytes(5000))
        with pytest.raises(ConnectionClosed) as closed:
            await stream.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009


async def test_a_client_that_does_not_answer_pings_is_let_go(address: str) -> None:
    reader, writer = await asyncio.open_connection(*address.split(":"))
    writer.write(
        b"GET /v1/stream HTTP/1.1\r\nhost: api\r\nconnection: Upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    async with asyncio.timeout(10.0):
        received = await reader.read()  # until the server ends it, well before it is idle
    assert received.startswith(b"HTTP/1.1 101")
    assert b"no frame" not in received
    writer.close()


async def test_a_client_that_reads_no_answer_gives_its_place_back(tmp_path: Path) -> None:
    publish_champion(registry_of(tmp_path))
    scope = {"type": "websocket", "path": "/v1/stream", "query_string": b"", "headers": [], "subprotocols": []}
    messages = [{"type": "websocket.connect"}, *[{"type": "websocket.receive", "bytes": npy(heatmap())}] * 2]

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        if message["type"] != "websocket.accept":
            await asyncio.Event().wait()

    async with serving(tmp_path, body_timeout_s=0.05) as (app, client):
        await until(lambda: app.state.live.is_ready)
        async with asyncio.timeout(10.0):
            await app(scope, receive, send)
        assert "echosight_api_open_streams 0.0" in (await client.get("/metrics")).text


async def test_a_stopping_server_closes_its_streams(tmp_path: Path) -> None:
    publish_champion(registry_of(tmp_path))
    async with listening(tmp_path) as (app, address):
        await until(lambda: app.state.live.is_ready)
        stream = await connect(f"ws://{address}/v1/stream")
    with pytest.raises(ConnectionClosed) as closed:
        await stream.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1012
