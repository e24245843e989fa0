"""Handoff 1 on real servers: groups, recovery, acknowledgement, burials, caps, what is lost and how it is told."""

import socket
import time

import pytest

from services.core.errors import BadFrameError, StreamsError
from services.core.streams import (
    EVENTS,
    INGEST_GROUP,
    Consumer,
    EventLog,
    Publisher,
    StreamsLost,
    connect,
    disconnect,
    masked,
    stream_key,
    wait_for_server,
)
from tests.conftest import camera_frame, label, radar_frame

RADAR, CAMERA = (stream_key("north", kind) for kind in ("radar", "camera"))


def seqs(deliveries, kind: str = "radar", site: str = "north") -> list[int]:
    return [d.frame.seq for d in deliveries if (d.site, d.kind) == (site, kind)]


def num_pending(server, key: str = RADAR) -> int:
    return int(server.xpending(key, INGEST_GROUP)["pending"])


async def test_frames_arrive_in_order_with_site_kind_and_time(feed, reader, server) -> None:
    frames = [radar_frame(0), camera_frame(1), label(0, "car"), radar_frame(100, seq=1, site="south")]
    await feed.publish(frames)
    assert await reader.discover() == ("north", "south")
    read = await reader.read(count=10, block_ms=10)
    assert {(d.site, d.kind) for d in read} == {
        ("north", "radar"), ("north", "camera"), ("north", "labels"), ("south", "radar")
    }  # fmt: skip
    now_s, now_us = server.time() if not isinstance(server.time(), dict) else next(iter(server.time().values()))
    assert all(abs(d.arrived_ms - (now_s * 1000 + now_us // 1000)) < 60_000 for d in read)


async def test_site_is_taken_over_with_all_that_is_pending_on_both_streams(feed, reader, heir, server) -> None:
    await feed.publish([f for i in range(5) for f in (radar_frame(i, seq=i), camera_frame(i, seq=i))])
    await reader.join("north")
    read = await reader.read(count=4, block_ms=10)
    await reader.acknowledge([d for d in read if d.frame.seq == 1])
    reader.leave("north")
    assert reader.sites == ()
    assert await reader.read(count=10, block_ms=1) == []
    await heir.join("north")
    first = await heir.read(count=10, block_ms=10)
    assert (seqs(first, "radar"), seqs(first, "camera")) == ([0, 2, 3, 4], [0, 2, 3, 4])
    await heir.acknowledge(first)
    assert num_pending(server, RADAR) == num_pending(server, CAMERA) == 0


async def test_pending_comes_in_pages_before_anything_new_while_other_sites_go_on(feed, reader, heir) -> None:
    await feed.publish([radar_frame(i, seq=i) for i in range(5)])
    await reader.join("north")
    await reader.read(count=10, block_ms=10)
    await feed.publish([radar_frame(5, seq=5), camera_frame(5, seq=5), radar_frame(0, site="south")])
    await heir.discover()
    pages = [await heir.read(count=2, block_ms=10) for _ in range(4)]
    assert [seqs(page) for page in pages] == [[0, 1], [2, 3], [4, 5], []]
    assert [seqs(page, "camera") for page in pages] == [[], [], [5], []]
    assert seqs(pages[0] + pages[1], site="south") == [0]


async def test_full_stream_does_not_keep_the_other_one_from_being_read_on(feed, reader, heir) -> None:
    await feed.publish([radar_frame(i, seq=i) for i in range(3)])
    await reader.join("north")
    await reader.read(count=10, block_ms=10)
    await feed.publish([camera_frame(0)])
    await heir.join("north")
    skip = {("north", "radar")}
    read = [d for _ in range(2) for d in await heir.read(count=10, block_ms=10, skip=skip)]
    assert [d.kind for d in read] == ["camera"]
    assert seqs(await heir.read(count=10, block_ms=10)) == [0, 1, 2]


async def test_entries_that_another_read_after_losing_the_site_are_taken_over(feed, reader, heir) -> None:
    await reader.join("north")
    await heir.join("north")
    assert await heir.read(count=10, block_ms=1) == []
    await feed.publish([radar_frame(0)])
    await reader.read(count=10, block_ms=10)  # it does not know yet
    assert await heir.read(count=10, block_ms=1) == []
    await heir.count_trimmed()
    assert seqs(await heir.read(count=10, block_ms=10)) == [0]
    assert heir.num_trimmed["north"] == 0


async def test_what_another_read_unawares_comes_before_what_follows_it(feed, reader, heir, server) -> None:
    """Else the camera frame would be without a partner by the time that the radar frame is taken over."""
    await feed.publish([radar_frame(0), camera_frame(0)])
    await reader.join("north")
    await reader.read(count=10, block_ms=10)
    await heir.join("north")
    assert seqs(await heir.read(count=10, block_ms=10)) == [0]
    await feed.publish([radar_frame(1, seq=1)])
    await reader.read(count=10, block_ms=10)  # it does not know yet that the site is the heir's
    assert num_pending(server, RADAR) == 2
    await feed.publish([camera_frame(1, seq=1), radar_frame(2, seq=2)])
    pages = [await heir.read(count=10, block_ms=10) for _ in range(3)]
    [page] = [page for page in pages if page]
    assert (seqs(page, "radar"), seqs(page, "camera")) == ([0, 1, 2], [0, 1])
    await heir.count_trimmed()
    assert not heir.num_trimmed["north"]


async def test_entries_trimmed_while_pending_are_counted_and_acknowledged_away(feed, reader, heir, server) -> None:
    await feed.publish([radar_frame(i, seq=i) for i in range(4)])
    await reader.join("north")
    await reader.read(count=10, block_ms=10)
    server.xtrim(RADAR, maxlen=1, approximate=False)
    await heir.join("north")
    assert seqs(await heir.read(count=10, block_ms=10)) == [3]
    assert heir.num_trimmed == {"north": 3}
    assert num_pending(server) == 1


async def test_both_frames_of_a_pair_are_acknowledged_at_once(feed, reader, server) -> None:
    sites = ("north", "south", "east")
    await feed.publish([f for s in sites for f in (radar_frame(0, site=s), camera_frame(0, site=s))])
    await reader.discover()
    read = await reader.read(count=10, block_ms=10)
    await reader.acknowledge([])
    await reader.acknowledge(read)
    assert sum(num_pending(server, d.key) for d in read) == 0
    await reader.acknowledge(read)  # again, after a lost answer for instance


async def test_acknowledging_many_sites_takes_one_round_trip(redis_url, redis_client, publisher) -> None:
    client = connect(redis_url)
    reader = Consumer(client, name="first")
    frames = [f for s in range(10) for f in (radar_frame(0, site=f"s{s}"), camera_frame(0, site=f"s{s}"))]
    for _ in range(2):
        await publisher.publish(frames)
        await reader.discover()
        read = await reader.read(count=10, block_ms=10)
        before = redis_client.info("stats")["total_reads_processed"]
        await reader.acknowledge(read)
        num_reads = redis_client.info("stats")["total_reads_processed"] - before
    assert len(read) == 20
    assert num_reads <= 3  # ours, and that of who asks
    await disconnect(client)


async def test_full_server_still_takes_acknowledgements(redis_url, redis_client, publisher) -> None:
    client = connect(redis_url)
    reader = Consumer(client, name="first")
    await publisher.publish([radar_frame(0)])
    await reader.join("north")
    read = await reader.read(count=10, block_ms=10)
    redis_client.config_set("maxmemory", 1)
    try:
        with pytest.raises(StreamsLost):
            await publisher.publish([radar_frame(1, seq=1)])
        with pytest.raises(StreamsLost):
            await reader.bury([(read[0], "reason")])
        assert num_pending(redis_client) == 1  # neither half of the burial was done
        await reader.acknowledge(read)
    finally:
        redis_client.config_set("maxmemory", 0)
    assert num_pending(redis_client) == 0
    await disconnect(client)


async def test_undecodable_entry_is_buried_with_its_reason_and_acknowledged(feed, reader, server) -> None:
    await feed.publish([radar_frame(0)])
    server.xadd(RADAR, {"header": b"{}", "data": b"x"})
    await reader.join("north")
    _, bad = await reader.read(count=10, block_ms=10)
    assert isinstance(bad.frame, BadFrameError)
    await reader.bury([(bad, str(bad.frame))])
    [(_, letter)] = server.xrange(stream_key("north", "dead"))
    assert b"header field" in letter[b"reason"]
    assert letter[b"field:data"] == b"x"
    assert num_pending(server) == 1


async def test_producer_caps_its_stream(any_url, server) -> None:
    publisher = await Publisher.connect(any_url, max_entries=100)
    for start in range(0, 1000, 250):
        await publisher.publish([radar_frame(i, seq=i) for i in range(start, start + 250)])
    await publisher.close()
    assert 100 <= server.xlen(RADAR) < 300


async def test_entries_trimmed_before_they_were_read_are_counted_once(feed, reader, server) -> None:
    async def publish(start: int, stop: int) -> None:
        await feed.publish([radar_frame(i, seq=i) for i in range(start, stop)])
        server.xtrim(RADAR, maxlen=20, approximate=False)

    async def num_trimmed() -> int:
        await reader.count_trimmed()
        return reader.num_trimmed["north"]

    await publish(0, 30)  # 10 are gone before the group is there: nobody was to read them
    await reader.join("north")
    await publish(30, 50)
    assert await reader.read(count=1, block_ms=10, skip={("north", "radar")}) == []
    await reader.read(count=100, block_ms=10)
    assert await num_trimmed() == 20
    await publish(50, 100)
    await reader.read(count=5, block_ms=10)
    await publish(100, 110)
    await reader.read(count=100, block_ms=10)
    assert await num_trimmed() == 20 + 30 + 5
    assert await num_trimmed() == 55


async def test_entries_trimmed_while_nobody_ran_are_counted_at_the_next_start(feed, reader, heir, server) -> None:
    await feed.publish([radar_frame(i, seq=i) for i in range(5)])
    await reader.join("north")
    await reader.read(count=10, block_ms=10)
    await feed.publish([radar_frame(i, seq=i) for i in range(5, 20)])
    server.xtrim(RADAR, maxlen=5, approximate=False)
    await heir.join("north")
    for _ in range(2):
        await heir.read(count=100, block_ms=10)
    await heir.count_trimmed()
    assert heir.num_trimmed["north"] == 10 + 5  # unread, and pending with the one before


async def test_site_with_a_foreign_key_is_passed_over_and_the_others_are_read(feed, reader, server) -> None:
    server.xadd(b"echosight:{caf\xe9}:radar", {"a": "b"})
    server.xadd("echosight:{a/b}:radar", {"a": "b"})
    server.xadd("echosight:{}:radar", {"a": "b"})
    server.xadd(stream_key("mixed", "radar"), {"a": "b"})
    server.set(stream_key("mixed", "camera"), "no stream")
    server.set(stream_key("text", "radar"), "no stream")
    await feed.publish([radar_frame(0)])
    assert await reader.discover() == ("north",)
    assert len(await reader.read(count=10, block_ms=10)) == 1
    assert set(reader.refused) == {
        "echosight:{caf\\xe9}:radar", "echosight:{a/b}:radar", "echosight:{}:radar", "mixed", "text"
    }  # fmt: skip
    assert (
        "echosight:{text}:radar is a string, expected a stream; delete it: redis-cli DEL" in reader.refused["text"]
    )
    server.delete(stream_key("mixed", "camera"), stream_key("text", "radar"))
    assert await reader.discover() == ("mixed", "north")
    assert "text" not in reader.refused


async def test_stream_that_became_something_else_takes_only_its_site_out(feed, reader, server) -> None:
    await feed.publish([radar_frame(0), radar_frame(0, site="south")])
    await reader.discover()
    server.set(stream_key("south", "camera"), "no stream")
    read = [d for _ in range(3) for d in await reader.read(count=10, block_ms=10)]
    assert reader.sites == ("north",)
    assert [d.site for d in read if d.site == "north"] == ["north"]


async def test_refusal_that_passes_by_itself_is_one_to_wait_for(redis_url, redis_client, publisher) -> None:
    client = connect(redis_url)
    reader = Consumer(client, name="first")
    await publisher.publish([radar_frame(0)])
    await reader.join("north")
    read = await reader.read(count=10, block_ms=10)
    redis_client.config_set("min-replicas-to-write", 1)
    try:
        with pytest.raises(StreamsLost, match="NOREPLICAS"):
            await reader.read(count=10, block_ms=10)
        with pytest.raises(StreamsLost, match="NOREPLICAS"):
            await reader.acknowledge(read)
        with pytest.raises(StreamsLost, match="NOREPLICAS"):
            await reader.bury([(read[0], "reason")])
        with pytest.raises(StreamsLost, match="NOREPLICAS"):
            await publisher.publish([radar_frame(1, seq=1)])
    finally:
        redis_client.config_set("min-replicas-to-write", 0)
    assert seqs(await reader.read(count=10, block_ms=10)) == [0]  # nobody knows what such an answer took along
    await reader.acknowledge(read)
    await disconnect(client)


async def test_backlog_counts_unread_and_pending(feed, reader) -> None:
    assert await feed.backlog("north") == 0
    await feed.publish([radar_frame(i, seq=i) for i in range(5)])
    assert await feed.backlog("north") == 5
    await reader.join("north")
    read = await reader.read(count=3, block_ms=10)
    assert await feed.backlog("north") == 5
    await reader.acknowledge(read)
    assert await feed.backlog("north") == 2


async def test_server_that_forgot_how_much_was_read_is_told(feed, reader, server) -> None:
    await feed.publish([radar_frame(i, seq=i) for i in range(6)])
    await reader.join("north")
    await reader.acknowledge(await reader.read(count=10, block_ms=10))
    await reader.count_trimmed()
    newest = server.xinfo_stream(RADAR)["last-generated-id"]
    # What a server has once it starts again from its append-only file.
    server.execute_command("XGROUP SETID", RADAR, "ingest", newest, "ENTRIESREAD", 1)
    await feed.publish([radar_frame(i, seq=i) for i in range(6, 8)])
    assert await feed.backlog("north") > 2
    await reader.count_trimmed()
    await reader.acknowledge(await reader.read(count=10, block_ms=10))
    await reader.count_trimmed()
    assert await feed.backlog("north") == 0
    assert not reader.num_trimmed.total()


async def test_bad_site_is_refused_before_anything_is_sent(feed, server) -> None:
    with pytest.raises(BadFrameError, match="'no}rth'"):
        await feed.publish([radar_frame(0), radar_frame(1, site="no}rth")])
    assert not server.exists(RADAR)


async def test_absent_server_is_a_clear_error() -> None:
    for url in ("redis://127.0.0.1:1/0", "redis+cluster://127.0.0.1:1"):
        client = connect(url)
        with pytest.raises(StreamsError, match="REDIS_URL"):
            await wait_for_server(client, timeout_s=0.1)
        await disconnect(client)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:secret/pa@host:6379/0",
        "redis://user:secret@host:many/0",
        "redis+cluster://u:secret@host:1,other:x",
        "nowhere://user:se@cret@host",
        "redis://host:port/?password=secret",
        "redis+cluster://host:1/5?password=secret",
    ],
)
def test_password_is_never_shown(url) -> None:
    assert "secret" not in masked(url)
    with pytest.raises(StreamsError, match="REDIS_URL is ") as caught:
        connect(url)
    assert "secret" not in str(caught.value)
    assert "cret" not in str(caught.value)


async def test_tls_and_user_are_taken_from_the_url() -> None:
    for url in ("rediss://user:word@host:7/0", "rediss+cluster://user:word@host:7,other:8"):
        client = connect(url)
        node = getattr(client, "connection_pool", None) or client.startup_nodes[-1]
        assert "SSL" in node.connection_class.__name__
        assert (node.connection_kwargs["username"], node.connection_kwargs["password"]) == ("user", "word")
        assert node.connection_kwargs["port"] == 7
        await disconnect(client)


def test_events_are_read_from_where_one_left_off(any_url) -> None:
    events = EventLog(any_url, source="test")
    events.emit("before")
    last_id, _ = events.since("$")
    events.emit("after", loss=1.5)
    last_id, news = events.since(last_id)
    about = {"source": "test", "host": socket.gethostname(), "at_s": pytest.approx(time.time(), abs=60)}
    assert news == [{"kind": "after", "loss": 1.5, **about}]
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
