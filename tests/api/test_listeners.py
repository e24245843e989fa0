"""GET /v1/events: what happens, to whoever listens, from where they left off."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from api.access.gate import Gate
from api.access.keys import Access
from api.metrics import Metrics
from api.models.live import LiveModel
from api.routes.listeners import EventStream, Listeners, Wish
from api.settings import ApiSettings
from services.core.streams import EventLog
from tests.api.tiny import listening, serving


def gate_of(settings: ApiSettings) -> Gate:
    return Gate(settings, Access(settings), Metrics(), None)


class Heard:
    """The blocks of one response, read as they come."""

    def __init__(self, response: httpx.Response) -> None:
        self._lines = response.aiter_lines()

    async def block(self) -> dict[str, str]:
        """The next one: its fields, or its comment under ""."""
        fields: dict[str, str] = {}
        async with asyncio.timeout(10.0):
            async for line in self._lines:
                if not line:
                    return fields
                name, _, value = line.partition(": ")
                fields[name] = value
        return fields

    async def event(self) -> dict[str, str]:
        while True:
            block = await self.block()
            if "id" in block:
                return block


@pytest.fixture
async def api(tmp_path: Path, redis_url: str) -> AsyncIterator[httpx.AsyncClient]:
    settings: dict[str, Any] = {"redis_url": redis_url, "max_event_clients": 2, "heartbeat_s": 0.1}
    async with (
        listening(tmp_path, events_interval_s=1000.0, **settings) as (_, address),
        httpx.AsyncClient(base_url=f"http://{address}", timeout=10.0) as client,
    ):
        yield client


async def test_events_come_with_id_kind_and_data(api: httpx.AsyncClient, redis_url: str) -> None:
    log = EventLog(redis_url, source="test")
    async with api.stream("GET", "/v1/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        heard = Heard(response)
        assert (await heard.block())["retry"] == "2000"
        await heard.block()  # a heartbeat: the follower is past its start
        log.emit("model_live", version=7)
        event = await heard.event()
    log.close()
    assert event["event"] == "model_live"
    assert orjson.loads(event["data"])["version"] == 7


async def test_a_client_goes_on_after_the_last_event_that_it_has_seen(
    api: httpx.AsyncClient, redis_url: str
) -> None:
    log = EventLog(redis_url, source="test")
    for number in range(3):
        log.emit("step", number=number)
    async with api.stream("GET", "/v1/events", headers={"last-event-id": "0-0"}) as response:
        heard = Heard(response)
        first = await heard.event()
    async with api.stream("GET", "/v1/events", headers={"last-event-id": first["id"]}) as response:
        heard = Heard(response)
        log.emit("step", number=3)
        seen = [orjson.loads((await heard.event())["data"])["number"] for _ in range(3)]
    log.close()
    assert seen == [1, 2, 3]


async def test_only_the_kinds_that_were_asked_for(api: httpx.AsyncClient, redis_url: str) -> None:
    log = EventLog(redis_url, source="test")
    for kind in ("step", "model_live", "step"):
        log.emit(kind)
    async with api.stream("GET", "/v1/events?kind=model_live", headers={"last-event-id": "0-0"}) as response:
        heard = Heard(response)
        assert (await heard.event())["event"] == "model_live"
        assert "" in await heard.block()
    log.close()


async def test_clients_are_bounded_and_a_place_is_free_when_one_has_gone(api: httpx.AsyncClient) -> None:
    async with api.stream("GET", "/v1/events"), api.stream("GET", "/v1/events"):
        refused = await api.get("/v1/events")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
        assert "ECHOSIGHT_MAX_EVENT_CLIENTS" in refused.json()["remedy"]
    async with asyncio.timeout(10.0):
        while "echosight_api_open_listeners 0.0" not in (await api.get("/metrics")).text:
            pass


async def test_a_wrong_last_event_id_is_a_problem(api: httpx.AsyncClient) -> None:
    answer = await api.get("/v1/events", headers={"last-event-id": "yesterday"})
    assert (answer.status_code, "'yesterday'" in answer.json()["detail"]) == (422, True)


async def test_without_streams_it_says_what_to_set(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        answer = await client.get("/v1/events")
    assert (answer.status_code, answer.json()["detail"]) == (503, "REDIS_URL is not set")


async def test_a_stopping_server_ends_its_listeners(tmp_path: Path, redis_url: str) -> None:
    async with httpx.AsyncClient(timeout=10.0) as client:
        async with listening(tmp_path, redis_url=redis_url) as (_, address):
            request = client.build_request("GET", f"http://{address}/v1/events")
            response = await client.send(request, stream=True)
        await response.aread()  # it has an end


async def test_a_client_that_reads_nothing_gives_its_place_back(tmp_path: Path, redis_url: str) -> None:
    read = ApiSettings.read(data_dir=tmp_path, redis_url=redis_url, body_timeout_s=0.05)
    listeners = Listeners(read, LiveModel(), gate_of(read))

    async def never(*_: object) -> Any:
        await asyncio.Event().wait()

    async with asyncio.timeout(10.0):
        await EventStream(listeners, "", Wish())({"type": "http"}, never, never)
    assert not listeners._queues
    await listeners.close()


async def test_a_past_that_cannot_be_read_ends_the_answer_instead_of_leaving_a_gap(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    read = ApiSettings.read(data_dir=tmp_path, redis_url=f"redis://127.0.0.1:{port}")
    listeners = Listeners(read, LiveModel(), gate_of(read))
    async with asyncio.timeout(10.0):
        lines = [line async for line in listeners.lines(listeners.join(Wish()), "0-0")]
    assert [line[:6] for line in lines] == [b"retry:"]
    await listeners.close()


def prediction(site: str, seq: int) -> tuple[str, dict[str, Any]]:
    return "", {"kind": "prediction", "site": site, "seq": seq}


async def test_predictions_come_by_kind_and_site_and_never_crowd_out_events(tmp_path: Path) -> None:
    read = ApiSettings.read(data_dir=tmp_path, redis_url="redis://127.0.0.1:1")
    gate = gate_of(read)
    listeners = Listeners(read, LiveModel(), gate)
    wishes = {
        "all": Wish(),
        "north": Wish(sites=frozenset({"north"})),
        "events": Wish(kinds=frozenset({"model_live"})),
    }
    queues = {name: listeners.join(wish) for name, wish in wishes.items()}
    for seq in range(300):
        listeners._hand_out(prediction("north" if seq % 2 else "south", seq))
    listeners._hand_out(("1-0", {"kind": "model_live"}))
    heard = {name: [queue.get_nowait()[1] for _ in range(queue.qsize())] for name, queue in queues.items()}
    assert [len(events) for events in heard.values()] == [129, 129, 1]
    assert {event.get("site") for event in heard["north"]} == {"north", None}
    assert all(events[-1]["kind"] == "model_live" for events in heard.values())
    unheard = gate.metrics.registry.get_sample_value("echosight_api_unheard_predictions_total")
    assert unheard == 300 - 128 + 150 - 128
    assert not listeners._overflown
    await listeners.close()


async def test_a_prediction_has_no_id_so_that_the_last_event_stays_the_last(tmp_path: Path) -> None:
    read = ApiSettings.read(data_dir=tmp_path, redis_url="redis://127.0.0.1:1")
    listeners = Listeners(read, LiveModel(), gate_of(read))
    queue = listeners.join(Wish())
    listeners._hand_out(prediction("north", 7))
    lines = listeners.lines(queue, "")
    await anext(lines)
    assert await anext(lines) == b'event: prediction\ndata: {"kind":"prediction","site":"north","seq":7}\n\n'
    await listeners.close()
