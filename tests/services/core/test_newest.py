"""Reading what is new at many sites, and publishing predictions under a lease; on one server and on a cluster."""

import asyncio
from typing import Any

import pytest

from services.core.errors import StreamsError
from services.core.predictions import Prediction
from services.core.streams import (
    PREDICTIONS_MAX_ENTRIES,
    Janitor,
    NewestReader,
    PredictionLog,
    Publisher,
    SiteLeases,
    stream_key,
)
from tests.conftest import radar_frame

SITES = ("north", "south", "west")


@pytest.fixture
def newest(client) -> NewestReader:
    return NewestReader(client, kind="radar")


def prediction(seq: int = 7) -> Prediction:
    return Prediction.model_validate(
        {
            "seq": seq,
            "captured_at_ns": 1,
            "radar_id": f"{seq}-0",
            "answer": "car",
            "abstained": "",
            "label": "car",
            "probabilities": {"car": 1.0},
            "smoothed": {"label": "car", "probabilities": {"car": 1.0}, "num_frames": 1},
            "model": {"name": "radar", "version": 1},
            "latency_ms": {"captured": 1.0, "arrived": 1.0, "read": 1.0},
        }
    )


async def read_all(reader: NewestReader, num: int) -> list[Any]:
    found: list[Any] = []
    async with asyncio.timeout(10.0):
        while len(found) < num:
            found += await reader.read(count=10, block_ms=50)
    return found


async def test_reads_on_from_now_at_all_sites_at_once(newest, feed: Publisher) -> None:
    await feed.publish([radar_frame(0, site=site) for site in SITES])
    assert await newest.find_sites() == set(SITES)
    for site in SITES:
        assert await newest.join(site)
    assert await newest.read(count=10, block_ms=0) == []
    await feed.publish([radar_frame(i, seq=i, site=site) for site in SITES for i in (1, 2)])
    found = await read_all(newest, 6)
    assert sorted(one.site for one in found) == sorted(SITES * 2)
    assert all(0 <= one.age_ms < 5000 for one in found)
    newest.leave("north")
    await feed.publish([radar_frame(3, site=site) for site in SITES])
    assert {one.site for one in await read_all(newest, 2)} == {"south", "west"}


async def test_joins_with_what_is_young_enough_and_was_not_seen(newest, feed: Publisher, server) -> None:
    key = stream_key("north", "radar")
    server.xadd(key, {"header": "old"}, id="1000-0")
    await feed.publish([radar_frame(i, seq=i) for i in range(3)])
    assert await newest.join("north", max_age_ms=60_000)
    first, *others = await read_all(newest, 3)
    assert len(others) == 2
    assert await newest.join("north", max_age_ms=60_000, after=first.entry_id)
    assert [one.entry_id for one in await read_all(newest, 2)] == [one.entry_id for one in others]
    assert await newest.join("north", max_age_ms=60_000, after="99999999999999-0")  # of before a flush
    await feed.publish([radar_frame(9, seq=9)])
    assert len(await read_all(newest, 1)) == 1


async def test_key_that_is_no_stream_costs_only_its_own_site(newest, feed: Publisher, server) -> None:
    await feed.publish([radar_frame(0, site=site) for site in SITES])
    for site in SITES:
        await newest.join(site)
    server.delete(stream_key("south", "radar"))
    server.set(stream_key("south", "radar"), "text")
    await feed.publish([radar_frame(1, site=site) for site in ("north", "west")])
    assert {one.site for one in await read_all(newest, 2)} == {"north", "west"}
    assert set(newest.sites) == {"north", "west"}
    assert not await newest.join("south")


async def test_follows_a_stream_that_went_back(newest, server) -> None:
    key = stream_key("north", "radar")
    server.xadd(key, {"header": "x"}, id="9000-0")
    await newest.join("north")
    server.delete(key)
    server.xadd(key, {"header": "x"}, id="5-0")
    await newest.look()
    server.xadd(key, {"header": "y"}, id="6-0")
    assert [one.entry_id for one in await read_all(newest, 1)] == ["6-0"]


async def test_predictions_are_written_only_while_the_lease_is_ours(client, server) -> None:
    leases = SiteLeases(client, owner="first", ttl_ms=60_000, task="live")
    log = PredictionLog(client, leases)
    tokens = {site: await leases.acquire(site, floor=0) for site in SITES}
    assert await log.last_frame("north") == ""
    assert await log.publish({site: [prediction(1), prediction(2)] for site in SITES}, tokens) == set()
    assert await log.last_frame("north") == "2-0"
    server.set(leases.key("north"), "another's")
    server.delete(stream_key("south", "predictions"))
    server.set(stream_key("south", "predictions"), "text")
    assert await log.publish({site: [prediction(3)] for site in SITES}, tokens) == {"north", "south"}
    assert server.xlen(stream_key("north", "predictions")) == 2
    assert server.get(stream_key("south", "predictions")) == b"text"
    with pytest.raises(StreamsError, match="predictions is a string, expected a stream; delete it: redis-cli DEL"):
        await log.last_frame("south")
    server.xadd(stream_key("west", "predictions"), {"header": "{}"})
    assert await log.last_frame("west") == ""


async def test_janitor_keeps_predictions_to_their_cap(client, server) -> None:
    key = stream_key("north", "predictions")
    for _ in range(PREDICTIONS_MAX_ENTRIES + 5):
        server.xadd(key, {"header": "{}"})
    await Janitor(client, max_stream_bytes=10**9, max_dead_bytes=10**6).tidy("north")
    assert server.xlen(key) == PREDICTIONS_MAX_ENTRIES
