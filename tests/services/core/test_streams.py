"""Handoff 1 on a real server: groups, acknowledgement, claiming, dead letters, caps."""

import time

import pytest

from services.core.errors import BadFrameError, StreamsError
from services.core.streams import (
    EVENTS,
    Consumer,
    EventLog,
    Publisher,
    StreamsLost,
    connect,
    stream_key,
    wait_for_server,
)
from tests.conftest import camera_frame, label, radar_frame


@pytest.fixture
async def consumer(redis_url):
    consumer = Consumer(connect(redis_url), name="first")
    yield consumer
    await consumer.close()


async def test_frames_arrive_in_order_with_site_and_kind(publisher, consumer) -> None:
    frames = [radar_frame(0), camera_frame(1), label(0, "car"), radar_frame(100, seq=1, site="south")]
    await publisher.publish(frames)
    assert await consumer.discover() == ("north", "south")
    read = await consumer.read(count=10, block_ms=10)
    assert {(d.site, d.kind) for d in read} == {
        ("north", "radar"), ("north", "camera"), ("north", "labels"), ("south", "radar")
    }  # fmt: skip


async def test_unacknowledged_entries_come_again_after_a_restart(publisher, consumer, redis_url) -> None:
    await publisher.publish([radar_frame(i, seq=i) for i in range(3)])
    await consumer.discover()
    read = await consumer.read(count=10, block_ms=10)
    await consumer.acknowledge(read[:1])
    again = Consumer(connect(redis_url), name="first")
    await again.discover()
    assert [d.frame.seq for d in await again.read(count=10, block_ms=10)] == [1, 2]
    assert await again.read(count=10, block_ms=10) == []
    await again.close()


async def test_entries_of_a_dead_consumer_are_claimed_but_not_those_still_held(
    publisher, consumer, redis_url
) -> None:
    await publisher.publish([radar_frame(i, seq=i) for i in range(3)])
    await consumer.discover()
    read = await consumer.read(count=10, block_ms=10)
    heir = Consumer(connect(redis_url), name="second")
    await heir.discover()
    held = {(read[0].key, read[0].entry_id)}
    claimed = await heir.claim_stale(min_idle_ms=0, count=10, held=held)
    assert [d.frame.seq for d in claimed] == [1, 2]
    await heir.close()


async def test_undecodable_entry_is_buried_with_its_reason_and_acknowledged(
    publisher, consumer, redis_client
) -> None:
    await publisher.publish([radar_frame(0)])
    redis_client.xadd(stream_key("north", "radar"), {"header": b"{}", "data": b"x"})
    await consumer.discover()
    _, bad = await consumer.read(count=10, block_ms=10)
    assert isinstance(bad.frame, BadFrameError)
    await consumer.bury(bad, str(bad.frame))
    [(_, letter)] = redis_client.xrange(stream_key("north", "dead"))
    assert b"header field" in letter[b"reason"]
    assert letter[b"field:data"] == b"x"
    assert redis_client.xpending(stream_key("north", "radar"), "ingest")["pending"] == 1


async def test_producer_caps_its_stream(redis_url, redis_client) -> None:
    publisher = await Publisher.connect(redis_url, max_entries=100)
    for start in range(0, 1000, 250):
        await publisher.publish([radar_frame(i, seq=i) for i in range(start, start + 250)])
    await publisher.close()
    assert 100 <= redis_client.xlen(stream_key("north", "radar")) < 300


async def test_trimmed_pending_entries_are_counted_not_fatal(publisher, consumer, redis_url, redis_client) -> None:
    await publisher.publish([radar_frame(i, seq=i) for i in range(4)])
    await consumer.discover()
    await consumer.read(count=10, block_ms=10)
    redis_client.xtrim(stream_key("north", "radar"), maxlen=1, approximate=False)
    again = Consumer(connect(redis_url), name="first")
    await again.discover()
    read = await again.read(count=10, block_ms=10)
    assert again.num_trimmed == 3
    assert sum(isinstance(d.frame, BadFrameError) for d in read) == 3
    await again.close()


async def test_group_lost_to_a_flush_is_made_anew_from_the_beginning(publisher, consumer, redis_client) -> None:
    await publisher.publish([radar_frame(0)])
    await consumer.discover()
    await consumer.read(count=10, block_ms=10)
    redis_client.flushall()
    await publisher.publish([radar_frame(5, seq=5)])
    assert await consumer.read(count=10, block_ms=1) == []
    assert [d.frame.seq for d in await consumer.read(count=10, block_ms=10)] == [5]


async def test_entries_trimmed_before_they_were_read_are_counted_once(publisher, consumer, redis_client) -> None:
    async def publish(start: int, stop: int) -> None:
        await publisher.publish([radar_frame(i, seq=i) for i in range(start, stop)])
        redis_client.xtrim(stream_key("north", "radar"), maxlen=20, approximate=False)

    async def num_trimmed() -> int:
        await consumer.count_trimmed()
        return consumer.num_trimmed

    await publish(0, 30)  # 10 are gone before the group is there: nobody was to read them
    await consumer.discover()
    await publish(30, 50)
    assert await num_trimmed() == 20
    await consumer.read(count=100, block_ms=10)
    assert await num_trimmed() == 20
    await publish(50, 100)
    await consumer.read(count=5, block_ms=10)
    await publish(100, 110)
    await consumer.read(count=100, block_ms=10)
    assert await num_trimmed() == 20 + 30 + 5
    assert await num_trimmed() == 55


async def test_entries_trimmed_while_nobody_ran_are_counted_at_the_next_start(
    publisher, consumer, redis_url, redis_client
) -> None:
    await publisher.publish([radar_frame(i, seq=i) for i in range(5)])
    await consumer.discover()
    await consumer.read(count=10, block_ms=10)
    await publisher.publish([radar_frame(i, seq=i) for i in range(5, 20)])
    redis_client.xtrim(stream_key("north", "radar"), maxlen=5, approximate=False)
    again = Consumer(connect(redis_url), name="second")
    await again.discover()
    await again.read(count=100, block_ms=10)
    await again.count_trimmed()
    assert again.num_trimmed == 10
    await again.close()


async def test_site_with_a_foreign_key_is_passed_over_and_the_others_are_read(
    publisher, consumer, redis_client
) -> None:
    redis_client.xadd(b"echosight:{caf\xe9}:radar", {"a": "b"})
    redis_client.xadd("echosight:{a/b}:radar", {"a": "b"})
    redis_client.xadd("echosight:{}:radar", {"a": "b"})
    redis_client.xadd(stream_key("mixed", "radar"), {"a": "b"})
    redis_client.set(stream_key("mixed", "camera"), "no stream")
    await publisher.publish([radar_frame(0)])
    assert await consumer.discover() == ("north",)
    assert len(await consumer.read(count=10, block_ms=10)) == 1
    assert set(consumer.refused) == {
        "echosight:{caf\\xe9}:radar", "echosight:{a/b}:radar", "echosight:{}:radar", "mixed"
    }  # fmt: skip
    redis_client.delete(stream_key("mixed", "camera"))
    assert await consumer.discover() == ("mixed", "north")


async def test_stream_that_became_something_else_takes_only_its_site_out(
    publisher, consumer, redis_client
) -> None:
    await publisher.publish([radar_frame(0), radar_frame(0, site="south")])
    await consumer.discover()
    redis_client.set(stream_key("south", "camera"), "no stream")
    assert await consumer.read(count=10, block_ms=1) == []
    assert consumer.sites == ("north",)
    assert [d.site for d in await consumer.read(count=10, block_ms=10)] == ["north"]


async def test_refusal_that_passes_by_itself_is_one_to_wait_for(publisher, consumer, redis_client) -> None:
    await publisher.publish([radar_frame(0)])
    await consumer.discover()
    read = await consumer.read(count=10, block_ms=10)
    redis_client.config_set("min-replicas-to-write", 1)
    try:
        with pytest.raises(StreamsLost, match="NOREPLICAS"):
            await consumer.read(count=10, block_ms=10)
        with pytest.raises(StreamsLost, match="NOREPLICAS"):
            await consumer.acknowledge(read)
        with pytest.raises(StreamsLost, match="NOREPLICAS"):
            await consumer.bury(read[0], "reason")
        with pytest.raises(StreamsLost, match="NOREPLICAS"):
            await publisher.publish([radar_frame(1, seq=1)])
    finally:
        redis_client.config_set("min-replicas-to-write", 0)
    await consumer.acknowledge(read)


async def test_backlog_counts_unread_and_pending(publisher, consumer) -> None:
    assert await publisher.backlog("north") == 0
    await publisher.publish([radar_frame(i, seq=i) for i in range(5)])
    assert await publisher.backlog("north") == 5
    await consumer.discover()
    read = await consumer.read(count=3, block_ms=10)
    assert await publisher.backlog("north") == 5
    await consumer.acknowledge(read)
    assert await publisher.backlog("north") == 2


async def test_bad_site_is_refused_before_anything_is_sent(publisher, redis_client) -> None:
    with pytest.raises(BadFrameError, match="'no}rth'"):
        await publisher.publish([radar_frame(0), radar_frame(1, site="no}rth")])
    assert redis_client.dbsize() == 0


async def test_absent_server_is_a_clear_error() -> None:
    client = connect("redis://127.0.0.1:1/0")
    with pytest.raises(StreamsError, match="REDIS_URL"):
        await wait_for_server(client, timeout_s=0.1)
    await client.aclose()


def test_events_are_read_from_where_one_left_off(redis_url) -> None:
    events = EventLog(redis_url, source="test")
    events.emit("before")
    last_id, _ = events.since("$")
    events.emit("after", loss=1.5)
    last_id, news = events.since(last_id)
    assert news == [{"source": "test", "kind": "after", "at_s": pytest.approx(time.time(), abs=60), "loss": 1.5}]
    assert events.since(last_id)[1] == []
    events.close()


def test_lost_server_does_not_stop_who_emits() -> None:
    events = EventLog("redis://127.0.0.1:1/0", source="test")
    assert not events.emit("anything")
    events.close()


def test_events_that_are_no_json_objects_are_passed_over(redis_url, redis_client) -> None:
    events = EventLog(redis_url, source="test")
    for body in (b"{", b"[1]", b"null", b"\xff"):
        redis_client.xadd(EVENTS, {"event": body})
    last = redis_client.xadd(EVENTS, {"other": b"{}"})
    assert events.since("0-0") == (last.decode(), [])
    events.emit("after")
    assert [event["kind"] for event in events.since("0-0")[1]] == ["after"]
    events.close()


def test_event_log_refuses_a_url_that_is_none() -> None:
    with pytest.raises(StreamsError, match="REDIS_URL is 'nowhere'"):
        EventLog("nowhere", source="test")
