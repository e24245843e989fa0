"""What the janitor trims, what it leaves, and what it says it lost; on one server and on a cluster."""

from itertools import pairwise
from typing import Any, cast

import pytest

from services.core import codec
from services.core.streams import INGEST_GROUP, Janitor, stream_key
from services.core.streams.janitor import _Stream, cut_at_ms
from tests.clusters import eventually
from tests.conftest import camera_frame, label, radar_frame

RADAR, CAMERA, LABELS, DEAD = (stream_key("north", kind) for kind in ("radar", "camera", "labels", "dead"))
PLENTY = 1 << 30
SHAPE = (64, 64)  # 8 KB: a stream's node of its own


@pytest.fixture
def janitor(client) -> Janitor:
    return Janitor(client, max_stream_bytes=PLENTY, max_dead_bytes=PLENTY)


def tight(client, server, share: float) -> Janitor:
    """A janitor that may keep `share` of what the site's streams take now."""
    num_bytes = sum(server.memory_usage(key, samples=20) or 0 for key in (RADAR, CAMERA, LABELS))
    return Janitor(client, max_stream_bytes=round(share * num_bytes), max_dead_bytes=PLENTY)


async def publish(feed, start: int, stop: int) -> None:
    await feed.publish([radar_frame(i, seq=i, shape=SHAPE) for i in range(start, stop)])


async def read_all(reader, *, count: int = 100):
    return await reader.read(count=count, block_ms=10)


async def eventually_idle(server, group: str) -> None:
    """Until its consumer has been silent for a millisecond."""

    async def is_idle() -> bool:
        return server.xinfo_consumers(RADAR, group)[0]["idle"] > 0

    await eventually(is_idle)


async def test_what_the_group_has_finished_leaves_memory(feed, reader, janitor, server) -> None:
    await publish(feed, 0, 10)
    await feed.publish([camera_frame(i, seq=i) for i in range(3)])
    await reader.join("north")
    read = [d for d in await read_all(reader) if d.kind == "radar"]
    await reader.acknowledge([*read[:4], *read[5:]])
    tidied = await janitor.tidy("north")
    assert tidied.num_finished == 4  # the fifth is pending: it stays, and what came after it
    assert server.xlen(RADAR) == 6
    assert sum(tidied.num_lost.values()) == 0
    await reader.acknowledge([read[4]])
    assert (await janitor.tidy("north")).num_finished == 6
    assert server.xlen(RADAR) == 0
    assert server.xlen(CAMERA) == 3
    assert await janitor.tidy("north") == await janitor.tidy("north")


async def test_unread_entries_and_sites_that_nobody_joined_are_left_alone(feed, reader, janitor, server) -> None:
    await publish(feed, 0, 5)
    assert (await janitor.tidy("north")).num_finished == 0
    await reader.join("north")
    assert (await janitor.tidy("north")).num_finished == 0
    assert server.xlen(RADAR) == 5
    assert (await janitor.tidy("nowhere")).num_bytes == 0
    assert not server.exists(stream_key("nowhere", "radar"))


async def test_another_group_holds_trimming_back_while_someone_reads_in_it(
    feed, reader, janitor, server, monkeypatch
) -> None:
    await publish(feed, 0, 5)
    await reader.join("north")
    await reader.acknowledge(await read_all(reader))
    server.xgroup_create(RADAR, "forgotten", id="0")
    server.xgroup_create(RADAR, "theirs", id="0")
    [[_, entries]] = server.xreadgroup("theirs", "x", {RADAR: ">"}, count=2)
    assert (await janitor.tidy("north")).num_finished == 0
    server.xack(RADAR, "theirs", *[entry_id for entry_id, _ in entries])
    assert (await janitor.tidy("north")).num_finished == 2
    monkeypatch.setattr("services.core.streams.janitor._GROUP_IDLE_MS", 0)  # nobody was heard of since
    await eventually_idle(server, "theirs")
    assert (await janitor.tidy("north")).num_finished == 3


async def test_beyond_the_limit_the_oldest_go_and_the_unfinished_are_counted(client, reader, server) -> None:
    for number in range(20):  # a millisecond apart
        server.xadd(RADAR, cast(Any, codec.encode(radar_frame(number, seq=number, shape=SHAPE))), id=f"{number}-1")
    await reader.join("north")
    read = await read_all(reader, count=10)
    await reader.acknowledge([read[i] for i in (0, 1, 4, 5, 6)])  # 2 and 3 pending, 7 to 9 pending, 10.. unread
    tidied = await tight(client, server, 0.2).tidy("north")
    left = server.xlen(RADAR)
    assert 0 < left < 8
    assert tidied.num_lost["radar"] == (20 - left) - 5
    assert tidied.num_finished == 5
    assert tidied.num_bytes < 0.2 * 20 * 9000
    assert len(await read_all(reader)) == left
    await reader.count_trimmed()
    assert reader.num_trimmed["north"] == 10 - left  # those that it had not read; what it has read it holds


async def test_two_streams_are_cut_at_one_moment(client, feed, reader, server) -> None:
    for step in range(30):  # in turn, so that both have come in over the same time
        await feed.publish([radar_frame(step, seq=step, shape=SHAPE), camera_frame(step, seq=step)])
    await feed.publish([label(0, "car")])
    await reader.join("north")
    tidied = await tight(client, server, 0.5).tidy("north")
    assert tidied.num_lost["radar"] > 8
    oldest = [server.xrange(key, count=1)[0][0] for key in (RADAR, CAMERA)]
    assert abs(int(oldest[0].split(b"-")[0]) - int(oldest[1].split(b"-")[0])) <= 5


async def test_ids_beyond_exact_numbers_of_lua_are_kept_apart(reader, janitor, server) -> None:
    ids = [f"{2**53 + offset}-{2**53 + 1}" for offset in range(4)]
    for entry_id in ids:
        server.xadd(RADAR, {"data": bytes(8192)}, id=entry_id)
    await reader.join("north")
    read = await read_all(reader)
    server.xgroup_create(RADAR, "a", id=ids[0])
    assert server.xreadgroup("a", "x", {RADAR: ">"}, count=1)
    assert (await janitor.tidy("north")).num_finished == 0  # all is pending with us: our first is before theirs
    server.xgroup_destroy(RADAR, "a")
    await reader.acknowledge(read[:2])
    assert (await janitor.tidy("north")).num_finished == 2
    assert [entry_id.decode() for entry_id, _ in server.xrange(RADAR)] == ids[2:]


async def test_dead_letters_are_bounded_by_bytes_the_newest_stay(client, server) -> None:
    for number in range(50):
        server.xadd(DEAD, {"reason": "r", "field:data": bytes(20_000), "number": number})
    small = Janitor(client, max_stream_bytes=PLENTY, max_dead_bytes=300_000)
    tidied = await small.tidy("north")
    left = server.xrange(DEAD)
    assert tidied.num_dead_dropped == 50 - len(left)
    assert 5 <= len(left) <= 15
    assert left[-1][1][b"number"] == b"49"
    assert (await small.tidy("north")).num_dead_dropped == 0


async def test_only_idle_consumers_with_nothing_pending_are_removed(
    feed, reader, janitor, server, monkeypatch
) -> None:
    await publish(feed, 0, 2)
    await reader.join("north")
    await read_all(reader)
    server.xgroup_createconsumer(RADAR, INGEST_GROUP, "gone")
    await janitor.tidy("north")
    assert len(server.xinfo_consumers(RADAR, INGEST_GROUP)) == 2
    monkeypatch.setattr("services.core.streams.janitor._CONSUMER_IDLE_MS", -1)
    await janitor.tidy("north")
    [left] = server.xinfo_consumers(RADAR, INGEST_GROUP)
    assert left["pending"] == 2


async def test_foreign_keys_are_left_alone(janitor, server) -> None:
    for key in (RADAR, DEAD):
        server.set(key, "no stream")
    assert (await janitor.tidy("north")).num_bytes == 0
    assert server.get(RADAR) == b"no stream"


def test_cut_lies_where_the_surplus_ends() -> None:
    streams = [_Stream(100, 100_000, 0, 999), _Stream(10, 10_000, 500, 999), _Stream(0, 0, 0, 0)]
    cuts = [cut_at_ms(streams, surplus_bytes=surplus) for surplus in (0, 10_000, 50_000, 110_000, 999_999)]
    assert cuts == [0, 100, 500, 1000, 1000]
    assert all(a <= b for a, b in pairwise(cuts))
