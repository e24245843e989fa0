"""What the streams' reader survives: flushes, vanished keys, restarts, slow servers, lost answers, moved sites."""

import asyncio

import pytest

from services.core.embedded import start_embedded_server
from services.core.streams import (
    INGEST_GROUP,
    KINDS,
    Consumer,
    Publisher,
    StreamsLost,
    connect,
    disconnect,
    stream_key,
)
from tests.clusters import eventually
from tests.conftest import camera_frame, radar_frame

RADAR = stream_key("north", "radar")


def seqs(deliveries, site: str = "north") -> list[int]:
    return [d.frame.seq for d in deliveries if (d.site, d.kind) == (site, "radar")]


async def next_read(reader, site: str = "north") -> list[int]:
    """The next frames that come, however often nothing or an error does before."""

    async def ask() -> list[int]:
        try:
            return seqs(await reader.read(count=10, block_ms=10), site)
        except StreamsLost:
            return []

    return await eventually(ask)


async def test_group_lost_to_a_flush_is_made_anew_from_the_beginning(feed, reader, server) -> None:
    await feed.publish([radar_frame(0), radar_frame(0, site="south")])
    await reader.discover()
    await reader.read(count=10, block_ms=10)
    server.flushall()
    await feed.publish([radar_frame(5, seq=5), radar_frame(6, seq=6, site="south")])
    assert await reader.read(count=10, block_ms=1) == []
    read = await reader.read(count=10, block_ms=10)
    assert (seqs(read), seqs(read, "south")) == ([5], [6])
    await reader.count_trimmed()
    assert not +reader.num_trimmed


async def test_flush_while_the_reader_waits_loses_no_site(feed, reader, server) -> None:
    await feed.publish([radar_frame(0), radar_frame(0, site="south")])
    await reader.discover()
    await reader.read(count=10, block_ms=10)
    waiting = asyncio.create_task(reader.read(count=10, block_ms=5000))
    await asyncio.sleep(0.05)  # it does not matter what comes first
    await asyncio.to_thread(server.flushall)
    await feed.publish([radar_frame(1, seq=1), radar_frame(2, seq=2, site="south")])
    first = await waiting
    assert reader.sites == ("north", "south")
    found = {site: seqs(first, site) for site in reader.sites}
    for site, expected in (("north", [1]), ("south", [2])):
        for _ in range(20):
            if not found["north"] or not found["south"]:
                read = await reader.read(count=10, block_ms=20)
                found = {name: found[name] + seqs(read, name) for name in found}
        assert found[site] == expected


@pytest.mark.parametrize("how", ["deleted", "renamed"])
async def test_key_that_vanished_comes_back_and_the_other_site_is_read_on(feed, reader, server, how) -> None:
    await feed.publish([radar_frame(0), radar_frame(0, site="south")])
    await reader.discover()
    await reader.read(count=10, block_ms=10)
    if how == "deleted":
        server.delete(RADAR)
    else:
        server.rename(RADAR, stream_key("north", "elsewhere"))
    await feed.publish([radar_frame(3, seq=3, site="south")])
    assert await next_read(reader, "south") == [3]
    await feed.publish([radar_frame(4, seq=4)])
    assert await next_read(reader) == [4]


async def test_group_that_is_destroyed_again_and_again_is_no_hot_loop(redis_url, redis_client) -> None:
    client = connect(redis_url)
    reader = Consumer(client, name="first", sites=["north"])
    await reader.discover()
    redis_client.config_resetstat()
    clock = asyncio.get_running_loop().time
    num_reads, began_s = 0, clock()
    while clock() - began_s < 0.8:
        reading = asyncio.create_task(reader.read(count=10, block_ms=20))
        while not reading.done():  # whenever it waits for entries, and before it starts to
            await asyncio.to_thread(redis_client.xgroup_destroy, RADAR, INGEST_GROUP)
        assert await reading == []
        num_reads += 1
    created = redis_client.info("commandstats")["cmdstat_xgroup|create"]["calls"]
    assert 0 < created <= 3 * 8  # three streams, and pauses that double
    assert num_reads <= 0.8 / 0.02 + 2 * 8
    await disconnect(client)


async def test_lost_answer_is_read_again_and_not_counted_as_trimmed(redis_url, publisher, redis_client) -> None:
    client = connect(f"{redis_url}?socket_timeout=0.2")
    reader = Consumer(client, name="first")
    await publisher.publish([radar_frame(0)])
    await reader.join("north")
    assert await next_read(reader) == [0]
    await publisher.publish([f for i in range(1, 4) for f in (radar_frame(i, seq=i), camera_frame(i, seq=i))])
    redis_client.client_pause(600, all=True)
    with pytest.raises(StreamsLost):
        await reader.read(count=10, block_ms=10)
    redis_client.client_unpause()
    seen = await next_read(reader)
    assert seen == [0, 1, 2, 3]  # all that is not acknowledged, the first one a second time
    await reader.count_trimmed()
    assert reader.num_trimmed["north"] == 0
    await disconnect(client)


async def test_read_that_is_cancelled_loses_nothing(redis_url, publisher) -> None:
    client = connect(redis_url)
    reader = Consumer(client, name="first")
    await publisher.publish([radar_frame(0)])
    await reader.join("north")
    assert await next_read(reader) == [0]
    waiting = asyncio.create_task(reader.read(count=10, block_ms=5000))
    await asyncio.sleep(0.05)  # cancelled before it waits, it proves less but passes all the same
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await publisher.publish([radar_frame(1, seq=1)])
    found: set[int] = set()
    while found != {0, 1}:
        found |= set(await next_read(reader))
    await disconnect(client)


async def test_site_that_is_left_while_it_is_read_is_not_delivered(feed, reader, heir) -> None:
    await reader.join("north")
    assert await reader.read(count=10, block_ms=1) == []
    waiting = asyncio.create_task(reader.read(count=10, block_ms=300))
    await asyncio.sleep(0.05)
    reader.leave("north")
    await feed.publish([radar_frame(0)])
    assert await waiting == []
    await heir.join("north")
    assert await next_read(heir) == [0]


async def test_restarted_server_is_read_on_where_it_was_left(tmp_path) -> None:
    server = start_embedded_server(tmp_path, appendfsync="always")
    publisher = await Publisher.connect(server.url)
    client = connect(server.url)
    reader = Consumer(client, name="first")
    try:
        await publisher.publish([radar_frame(i, seq=i) for i in range(3)])
        await reader.join("north")
        read = await reader.read(count=2, block_ms=10)
        await reader.acknowledge(read[:1])
        server.process.kill()
        server.process.wait()
        for _ in range(2):
            with pytest.raises(StreamsLost):
                await reader.read(count=10, block_ms=10)
        server = start_embedded_server(tmp_path, port=server.port)
        assert await next_read(reader) == [1, 2]  # what is pending, then what is new
        assert reader.sites == ("north",)
    finally:
        await disconnect(client)
        await publisher.close()
        server.stop()


async def test_group_is_made_on_all_streams_of_a_site_that_has_only_one(feed, reader, server) -> None:
    await feed.publish([radar_frame(0)])
    await reader.join("north")
    for kind in KINDS:
        assert server.xinfo_groups(stream_key("north", kind))[0]["name"] == INGEST_GROUP.encode()
