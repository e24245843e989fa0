"""The ingest worker on a real server: stored before acknowledged, nothing lost, nothing twice."""

import asyncio
import contextlib
import errno
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
import structlog.testing

from services.core import codec, fence
from services.core.errors import SettingsError, StoreError
from services.core.frames import FrameId
from services.core.logs import logger
from services.core.records import ROW
from services.core.segments import SegmentReader
from services.core.store import Pair, StoreLimits, StoreReader, StoreWriter
from services.core.streams import (
    INGEST_GROUP,
    KINDS,
    REPLICAS,
    Consumer,
    Delivery,
    EventLog,
    Janitor,
    Publisher,
    SiteLeases,
    connect,
    stream_key,
)
from services.ingest import commit as commit_module
from services.ingest import worker as worker_module
from services.ingest.settings import IngestSettings
from services.ingest.worker import IngestWorker
from tests.conftest import MS, camera_frame, label, pair, radar_frame


@contextlib.asynccontextmanager
async def ingest(url: str, data_dir: Path, **settings: object) -> AsyncIterator[IngestWorker]:
    """A worker that is not running yet, quick to give up on silent sensors and dead consumers."""
    quick = {"idle_timeout_s": 0.2, "lease_ms": 500, "min_free_bytes": 0, "consumer_name": "first"}
    read = IngestSettings.read(data_dir=data_dir, redis_url=url, **(quick | settings))
    client = connect(url)
    consumer = Consumer(client, name=read.consumer_name, sites=read.site_names)
    leases = SiteLeases(client, owner=read.consumer_name, ttl_ms=read.lease_ms, sites=read.site_names)
    janitor = Janitor(client, max_stream_bytes=read.max_stream_bytes, max_dead_bytes=read.max_dead_bytes)
    events = EventLog(url, source="ingest")
    yield IngestWorker(read, consumer, leases=leases, janitor=janitor, log=logger("test"), events=events)
    await consumer.close()
    events.close()


@contextlib.asynccontextmanager
async def running(worker: IngestWorker) -> AsyncIterator[None]:
    task = asyncio.create_task(worker.run())
    try:
        yield
    finally:
        worker.stop()
        async with asyncio.timeout(20):
            await task


async def until(holds: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():  # noqa: ASYNC110 - what is waited for happens on a server or a disk
            await asyncio.sleep(0.01)


async def publish_pairs(publisher: Publisher, start: int, stop: int, *, site: str = "north") -> None:
    for seq in range(start, stop):
        await publisher.publish(
            [radar_frame(seq * 100, seq=seq, site=site), camera_frame(seq * 100 + 4, seq=seq, site=site)]
        )


def stored(data_dir: Path, site: str = "north") -> list[FrameId]:
    """The id of every row on disk, in order: a pair stored twice would show twice."""
    ids = []
    for path in sorted(site_dir(data_dir, site).glob("*.idx")):
        segment = SegmentReader(path.parent, path.stem)
        segment.refresh()
        assert all(segment.is_intact(row) for row in range(len(segment.rows)))
        ids += [FrameId(int(row["captured_at_ns"]), int(row["seq"])) for row in segment.rows]
        segment.close()
    return ids


def num_rows(data_dir: Path) -> int:
    """How many pairs the index files of site north have room for; cheap enough to poll."""
    return sum((path.stat().st_size - 64) // ROW.itemsize for path in site_dir(data_dir).glob("*.idx"))


def site_dir(data_dir: Path, site: str = "north") -> Path:
    """Where the site's segments are now."""
    return fence.data_dir(data_dir / "store" / site)


def ids(start: int, stop: int) -> list[FrameId]:
    return [FrameId(seq * 100 * MS, seq) for seq in range(start, stop)]


def num_pending(client: "redis.Redis", site: str = "north") -> int:
    total = 0
    for kind in KINDS:
        with contextlib.suppress(redis.ResponseError):  # no such stream or group yet
            total += int(client.xpending(stream_key(site, kind), INGEST_GROUP)["pending"])
    return total


async def test_pairs_of_all_sites_are_stored_and_everything_is_acknowledged(
    publisher, redis_url, redis_client, tmp_path
) -> None:
    await publish_pairs(publisher, 0, 20)
    await publish_pairs(publisher, 0, 5, site="south")
    await publisher.publish([camera_frame(5000, seq=99)])
    async with ingest(redis_url, tmp_path) as worker:
        await worker.run(until_idle_s=0.3)
        assert worker.counts == Counter(
            {"radar.paired": 25, "camera.paired": 25, "stored": 25, "camera.no_partner": 1}
        )
    assert stored(tmp_path) == ids(0, 20)
    assert stored(tmp_path, "south") == ids(0, 5)
    assert num_pending(redis_client) == num_pending(redis_client, "south") == 0
    assert await publisher.backlog("north") == 0


async def test_partners_are_what_was_published(publisher, redis_url, tmp_path) -> None:
    await publish_pairs(publisher, 0, 3)
    async with ingest(redis_url, tmp_path) as worker:
        await worker.run(until_idle_s=0.3)
    reader = StoreReader(tmp_path / "store")
    reader.refresh()
    for stored_pair in reader:
        radar, camera = stored_pair.radar(), stored_pair.camera()
        assert radar is not None
        assert camera is not None
        assert (radar.heatmap == stored_pair.id.seq).all()
        assert (camera.seq, camera.captured_at_ns) == (radar.seq, radar.captured_at_ns + 4 * MS)
    reader.close()


async def test_frame_published_twice_is_stored_once(publisher, redis_url, redis_client, tmp_path) -> None:
    for _ in range(2):
        await publish_pairs(publisher, 0, 5)
    async with ingest(redis_url, tmp_path) as worker:
        await worker.run(until_idle_s=0.3)
        assert worker.counts["radar.duplicate"] == worker.counts["camera.duplicate"] == 5
    async with ingest(redis_url, tmp_path) as again:  # a restart has forgotten what it saw; the store has not
        await publish_pairs(publisher, 0, 6)
        await again.run(until_idle_s=0.3)
        assert again.counts["stored"] == 1
    assert stored(tmp_path) == ids(0, 6)
    assert num_pending(redis_client) == 0


@dataclass
class Refusals:
    num: int = 0
    are_over: bool = False


@contextlib.contextmanager
def refusing_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Refusals]:
    """No store takes a pair until the refusals are over."""
    refusals, append = Refusals(), StoreWriter.append

    def refuse(writer: StoreWriter, pairs: Sequence[Pair]) -> int:
        if refusals.are_over:
            return append(writer, pairs)
        refusals.num += 1
        raise StoreError("disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "append", refuse)
        yield refusals


async def test_nothing_is_acknowledged_while_the_store_refuses_and_work_resumes_by_itself(
    publisher, redis_url, redis_client, tmp_path, monkeypatch
) -> None:
    with refusing_store(monkeypatch) as refusals:
        await publish_pairs(publisher, 0, 10)
        async with ingest(redis_url, tmp_path) as worker, running(worker):
            await until(lambda: refusals.num > 0)
            await publish_pairs(publisher, 10, 12)
            await until(lambda: num_pending(redis_client) >= 20)
            assert stored(tmp_path) == []
            refusals.are_over = True
            await until(lambda: worker.counts["stored"] == 12)
            await until(lambda: num_pending(redis_client) == 0)
    assert stored(tmp_path) == ids(0, 12)


async def test_store_that_goes_on_refusing_is_tried_ever_more_rarely_and_said_twice(
    publisher, redis_url, tmp_path, monkeypatch
) -> None:
    waits = (0.01, 0.011, 0.012, 0.013, 0.014)
    monkeypatch.setattr(commit_module, "BACKOFF_S", waits)
    monkeypatch.setattr(worker_module, "_BLOCK_MS", 1)
    await publish_pairs(publisher, 0, 5)
    with refusing_store(monkeypatch) as refusals, structlog.testing.capture_logs() as lines:
        async with ingest(redis_url, tmp_path) as worker, running(worker):
            await until(lambda: refusals.num > 12)
        said = [line["retry_in_s"] for line in lines if line["event"] == "ingest_waits"]
    assert said == [waits[0], waits[-1]]


async def test_server_that_refuses_writes_for_a_while_is_waited_for(
    publisher, redis_url, redis_client, tmp_path
) -> None:
    await publish_pairs(publisher, 0, 5)
    redis_client.config_set("min-replicas-to-write", 1)
    try:
        with structlog.testing.capture_logs() as lines:
            async with ingest(redis_url, tmp_path) as worker, running(worker):
                await until(lambda: any("NOREPLICAS" in line.get("reason", "") for line in lines))
                redis_client.config_set("min-replicas-to-write", 0)
                await until(lambda: worker.counts["stored"] == 5)
    finally:
        redis_client.config_set("min-replicas-to-write", 0)
    assert stored(tmp_path) == ids(0, 5)


async def test_second_replica_leaves_a_site_alone_until_the_first_stops(
    publisher, redis_url, redis_client, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(worker_module, "_LOOK_EVERY_S", 0.05)
    await publish_pairs(publisher, 0, 1)
    async with (
        ingest(redis_url, tmp_path, consumer_name="first") as first,
        ingest(redis_url, tmp_path, consumer_name="second") as second,
    ):
        async with running(first):
            await until(lambda: first.counts["stored"] == 1)
            following = asyncio.create_task(second.run())
            await until(lambda: second.sites.num_foreign == 1)
            await publish_pairs(publisher, 1, 50)
            await until(lambda: first.counts["stored"] == 50)
        assert second.counts["stored"] == 0
        await publish_pairs(publisher, 50, 60)
        await until(lambda: second.counts["stored"] == 10)
        second.stop()
        await following
    assert sorted(stored(tmp_path)) == ids(0, 60)
    assert num_pending(redis_client) == 0


async def test_replica_that_joins_gets_its_share_of_the_sites_and_gives_it_back_when_it_leaves(
    publisher, redis_url, redis_client, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(worker_module, "_LOOK_EVERY_S", 0.05)
    names = ("a", "b", "c", "d")
    for site in names:
        await publish_pairs(publisher, 0, 2, site=site)
    async with (
        ingest(redis_url, tmp_path, consumer_name="first") as first,
        ingest(redis_url, tmp_path, consumer_name="second") as second,
        running(first),
    ):
        await until(lambda: len(first.sites.ours) == 4 and first.counts["stored"] == 8)
        async with running(second):
            await until(lambda: len(first.sites.ours) == len(second.sites.ours) == 2)
            for site in names:
                await publish_pairs(publisher, 2, 20, site=site)
            await until(lambda: first.counts["stored"] + second.counts["stored"] == 80)
            assert second.counts["stored"] == 36
        await until(lambda: len(first.sites.ours) == 4)
    for site in names:
        assert sorted(stored(tmp_path, site)) == ids(0, 20)
        assert num_pending(redis_client, site) == 0


async def test_replicas_with_different_sites_share_them_evenly_and_hand_over_no_more_than_that_takes(
    publisher, redis_url, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(worker_module, "_LOOK_EVERY_S", 0.05)
    for site in ("a", "b", "c", "d"):
        await publish_pairs(publisher, 0, 2, site=site)
    with structlog.testing.capture_logs() as lines:
        async with (
            ingest(redis_url, tmp_path, consumer_name="all") as first,
            ingest(redis_url, tmp_path, consumer_name="few", sites="c,d") as second,
            ingest(redis_url, tmp_path, consumer_name="one", sites="d") as third,
        ):
            workers = (first, second, third)
            async with running(first):
                await until(lambda: first.counts["stored"] == 8)
                async with running(second), running(third):
                    await until(lambda: [len(worker.sites.ours) for worker in workers] == [2, 1, 1])
                    assert third.sites.ours.keys() == {"d"}
                    taken = len([line for line in lines if line["event"] == "site_taken"])
                    for _ in range(20):
                        await first.sites.look()
                        await second.sites.look()
                        await third.sites.look()
                    assert [len(worker.sites.ours) for worker in workers] == [2, 1, 1]
                    assert len([line for line in lines if line["event"] == "site_taken"]) == taken <= 7


async def test_frames_that_wait_for_a_partner_are_handed_over_with_their_site(
    publisher, redis_url, redis_client, tmp_path
) -> None:
    await publisher.publish([radar_frame(100, seq=1), camera_frame(160, seq=7)])
    async with ingest(redis_url, tmp_path, idle_timeout_s=60) as first, running(first):
        await until(lambda: first.sites.ours["north"].num_held == 2 if "north" in first.sites.ours else False)
    async with ingest(redis_url, tmp_path, consumer_name="second", idle_timeout_s=0.2) as second:
        await publisher.publish([camera_frame(104, seq=1), radar_frame(163, seq=7)])
        await second.run(until_idle_s=0.5)
    assert sorted(stored(tmp_path)) == [FrameId(100 * MS, 1), FrameId(163 * MS, 7)]
    assert num_pending(redis_client) == 0


async def test_replica_that_was_paused_while_another_took_over_stores_and_acknowledges_nothing_more(
    publisher, redis_url, redis_client, tmp_path, monkeypatch
) -> None:
    await publish_pairs(publisher, 0, 5)
    async with ingest(redis_url, tmp_path, idle_timeout_s=60) as paused:
        await paused.sites.look()
        deliveries = await paused._read()
        assert len(deliveries) == 10
        paused._take_in(deliveries)
        paused._flush()  # decided, and not yet stored: here it is paused, for longer than its lease
        redis_client.delete(stream_key("north", "lease"), REPLICAS)
        async with ingest(redis_url, tmp_path, consumer_name="second") as second:
            await second.run(until_idle_s=0.5)
            assert second.counts["stored"] == 5
        redis_client.xadd(stream_key("north", "camera"), {"header": b"{}"})  # something to tell pending apart by
        await paused._committer.next()
        await paused._committer.wait()
        assert paused.sites.ours == {}
        assert paused.counts["stored"] == 0
    assert sorted(stored(tmp_path)) == ids(0, 5)


async def test_foreign_keys_are_said_once_and_stop_nobody(
    publisher, redis_url, redis_client, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(worker_module, "_LOOK_EVERY_S", 0.02)
    redis_client.xadd(b"echosight:{caf\xe9}:radar", {"a": "b"})
    redis_client.xadd(stream_key("mixed", "radar"), {"a": "b"})
    redis_client.set(stream_key("mixed", "camera"), "no stream")
    redis_client.set(stream_key("text", "radar"), "no stream")
    await publish_pairs(publisher, 0, 5)
    with structlog.testing.capture_logs() as lines:
        async with ingest(redis_url, tmp_path) as worker:
            await worker.run(until_idle_s=0.3)
    assert stored(tmp_path) == ids(0, 5)
    skipped = sorted(line["name"] for line in lines if line["event"] == "site_skipped")
    assert skipped == ["echosight:{caf\\xe9}:radar", "mixed", "text"]


async def test_old_pairs_of_a_site_that_sends_nothing_go(publisher, redis_url, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(worker_module, "_TIDY_EVERY_S", 0.05)
    writer = StoreWriter(tmp_path / "store", "silent", limits=StoreLimits(min_free_bytes=0))
    writer.append([pair(0, site="silent")])
    writer.close()
    async with ingest(redis_url, tmp_path, max_age_s=3600) as worker, running(worker):
        await publish_pairs(publisher, 0, 1)
        await until(lambda: worker.counts["stored"] == 1)
        assert stored(tmp_path, "silent") == [FrameId(0, 0)]
        [index] = site_dir(tmp_path, "silent").glob("*.idx")
        os.utime(index, (0, 0))
        await until(lambda: not index.exists())
    assert stored(tmp_path, "silent") == []


async def test_disk_that_fails_in_the_middle_of_an_append_costs_nothing(
    publisher, redis_url, redis_client, tmp_path, monkeypatch
) -> None:
    fdatasync = os.fdatasync
    failures = iter([True, False, True])

    def failing(fd: int) -> None:
        if next(failures, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", failing)
    await publish_pairs(publisher, 0, 10)
    await publisher.publish([label(0, "car")])
    async with ingest(redis_url, tmp_path) as worker, running(worker):
        await until(lambda: worker.counts["stored"] == 10 and worker.counts["labels.stored"] == 1)
        await until(lambda: num_pending(redis_client) == 0)
    assert stored(tmp_path) == ids(0, 10)


async def test_stop_while_the_store_refuses_leaves_everything_pending_for_the_next_start(
    publisher, redis_url, redis_client, tmp_path, monkeypatch
) -> None:
    await publish_pairs(publisher, 0, 5)
    with refusing_store(monkeypatch) as refusals:
        async with ingest(redis_url, tmp_path) as worker:
            async with running(worker):
                await until(lambda: refusals.num > 0)
            assert num_pending(redis_client) == 10
    async with ingest(redis_url, tmp_path) as again:
        await again.run(until_idle_s=0.3)
    assert stored(tmp_path) == ids(0, 5)
    assert num_pending(redis_client) == 0


async def test_undecodable_entry_is_buried_with_its_reason_and_the_rest_goes_on(
    publisher, redis_url, redis_client, tmp_path
) -> None:
    await publish_pairs(publisher, 0, 3)
    redis_client.xadd(stream_key("north", "radar"), {"header": b'{"v":9}', "data": b"x"})
    redis_client.xadd(stream_key("north", "camera"), {"something": b"else"})
    await publish_pairs(publisher, 3, 6)
    async with ingest(redis_url, tmp_path) as worker:
        await worker.run(until_idle_s=0.3)
        assert worker.counts["radar.undecodable"] == worker.counts["camera.undecodable"] == 1
    letters = [fields for _, fields in redis_client.xrange(stream_key("north", "dead"))]
    assert {letter[b"stream"] for letter in letters} == {b"radar", b"camera"}
    assert any(b"header field v is 9" in letter[b"reason"] for letter in letters)
    assert stored(tmp_path) == ids(0, 6)
    assert num_pending(redis_client) == 0


async def test_labels_are_stored_before_or_after_their_pair(publisher, redis_url, redis_client, tmp_path) -> None:
    await publisher.publish([label(100, "car", seq=1)])
    await publish_pairs(publisher, 0, 2)
    await publisher.publish([label(0, "cyclist"), label(0, "pedestrian")])
    async with ingest(redis_url, tmp_path) as worker:
        await worker.run(until_idle_s=0.3)
    reader = StoreReader(tmp_path / "store")
    reader.refresh()
    assert {pair.id.seq: said.label for pair, said in reader.labelled()} == {0: "pedestrian", 1: "car"}
    reader.close()
    assert num_pending(redis_client) == 0


async def test_entries_left_by_a_dead_consumer_are_claimed_and_stored(
    publisher, redis_url, redis_client, tmp_path
) -> None:
    await publish_pairs(publisher, 0, 8)
    dead = Consumer(connect(redis_url), name="dead", sites=["north"])
    await dead.discover()
    assert len(await dead.read(count=8, block_ms=100)) == 16
    await dead.close()
    async with ingest(redis_url, tmp_path) as worker, running(worker):
        await until(lambda: worker.counts["stored"] == 8)
        await publish_pairs(publisher, 8, 10)
        await until(lambda: worker.counts["stored"] == 10)
        await until(lambda: num_pending(redis_client) == 0)
    assert stored(tmp_path) == ids(0, 10)


async def test_sensor_whose_stream_waits_for_the_recovery_of_the_other_one_is_not_called_silent(
    publisher, redis_url, redis_client, tmp_path, monkeypatch
) -> None:
    """A dead consumer had read far more of the camera than of the radar; taking that over takes its time."""
    await publish_pairs(publisher, 0, 20)
    dead = Consumer(connect(redis_url), name="dead", sites=["north"])
    await dead.discover()
    await dead.read(count=2, block_ms=100, skip={("north", "camera")})
    await dead.read(count=20, block_ms=100, skip={("north", "radar")})
    await dead.close()
    read = Consumer.read

    async def slowly(consumer: Consumer, **how: Any) -> list[Delivery]:
        await asyncio.sleep(0.05)
        return await read(consumer, **(how | {"count": 2}))

    monkeypatch.setattr(Consumer, "read", slowly)
    async with ingest(redis_url, tmp_path, idle_timeout_s=0.2) as worker, running(worker):
        await until(lambda: worker.counts.total() >= 40)
        await until(lambda: worker.counts["stored"] == 20)
    assert stored(tmp_path) == ids(0, 20)


async def test_flush_of_the_server_is_survived(publisher, redis_url, redis_client, tmp_path) -> None:
    async with ingest(redis_url, tmp_path) as worker, running(worker):
        await publish_pairs(publisher, 0, 3)
        await until(lambda: worker.counts["stored"] == 3)
        redis_client.flushall()
        await publish_pairs(publisher, 3, 6)
        await until(lambda: worker.counts["stored"] == 6)
    assert stored(tmp_path) == ids(0, 6)


async def test_sensor_far_ahead_of_the_other_waits_in_its_stream(publisher, redis_url, tmp_path) -> None:
    wide = (2, 64, 64)  # 16 KiB: all of them would be more than may wait
    await publisher.publish([radar_frame(seq * 100, seq=seq, shape=wide) for seq in range(100)])
    await publisher.publish([camera_frame(at, seq=at) for at in range(4, 10_004, 10)])
    async with ingest(redis_url, tmp_path, max_buffer_bytes=1024**2, idle_timeout_s=5.0) as worker:
        most = 0

        def watch() -> bool:
            nonlocal most
            most = max(most, sum(site.num_waiting_bytes for site in worker.sites.ours.values()))
            return worker.counts["stored"] >= 97

        async with running(worker):
            await until(watch)
        assert 0 < most <= 1024**2 // 4
        assert worker.counts["radar.evicted"] == 0
    assert stored(tmp_path) == ids(0, len(stored(tmp_path)))


async def test_sensors_that_die_at_every_site_do_not_stop_ingest_for_good(publisher, redis_url, tmp_path) -> None:
    """More waits at all sites together than may be held; then the radars come back."""
    names, wide = [f"s{i}" for i in range(10)], (2, 64, 64)
    async with (
        ingest(redis_url, tmp_path, max_buffer_bytes=1024**2, idle_timeout_s=0.5) as worker,
        running(worker),
    ):
        for site in names:
            await publisher.publish([radar_frame(seq * 100, seq=seq, site=site, shape=wide) for seq in range(30)])
        await until(lambda: worker.counts["radar.no_partner"] + worker.counts["radar.evicted"] >= 250)
        for site in names:
            await publish_pairs(publisher, 100, 110, site=site)
        await until(lambda: worker.counts["stored"] >= 80)


async def test_worker_does_not_go_on_without_its_leases(publisher, redis_url, tmp_path, monkeypatch) -> None:
    await publish_pairs(publisher, 0, 1)
    async with ingest(redis_url, tmp_path) as worker:
        run = asyncio.create_task(worker.run())
        await until(lambda: "north" in worker.sites.ours)

        async def broken(_: object) -> set[str]:
            raise ValueError("what nobody thought of")

        monkeypatch.setattr(worker.sites._leases, "renew", broken)
        async with asyncio.timeout(10):
            with pytest.raises(ValueError, match="nobody thought of"):
                await run


async def test_full_server_that_refuses_a_burial_does_not_keep_others_from_being_acknowledged(
    publisher, redis_url, redis_client, tmp_path
) -> None:
    for site in ("north", "south"):
        await publish_pairs(publisher, 0, 1, site=site)
    try:
        async with ingest(redis_url, tmp_path) as worker, running(worker):
            await until(lambda: worker.counts["stored"] == 2)
            with redis_client.pipeline(
                transaction=True
            ) as sent:  # all is there, and the server full, in one moment
                sent.xadd(stream_key("south", "radar"), {"header": b"{}", "data": bytes(1000)})
                for frame, kind in ((radar_frame(100, seq=1), "radar"), (camera_frame(104, seq=1), "camera")):
                    sent.xadd(stream_key("north", kind), dict(codec.encode(frame)))
                sent.config_set("maxmemory", 1)
                sent.execute()
            await until(lambda: worker.counts["stored"] == 3)
            await until(lambda: num_pending(redis_client) == 0)
            assert worker.counts["radar.undecodable"] == 0
            redis_client.config_set("maxmemory", 0)
            await until(lambda: worker.counts["radar.undecodable"] == 1)
    finally:
        redis_client.config_set("maxmemory", 0)


async def test_burial_whose_answer_is_lost_is_counted_once_by_who_has_the_site(
    publisher, redis_url, redis_client, tmp_path, monkeypatch
) -> None:
    await publish_pairs(publisher, 0, 1)
    for _ in range(3):
        redis_client.xadd(stream_key("north", "radar"), {"header": b"{}", "data": b""})
    bury, num_lost = Consumer.bury, 0

    async def losing(consumer: Consumer, refused: Sequence[tuple[Delivery, str]]) -> list[bool]:
        nonlocal num_lost
        answer = await bury(consumer, refused)
        num_lost += 1
        if num_lost == 1:
            raise redis.ConnectionError("the answer is lost")
        return answer

    monkeypatch.setattr(Consumer, "bury", losing)
    async with ingest(redis_url, tmp_path) as worker, running(worker):
        await until(lambda: num_lost > 1 and worker.sites.ours["north"].is_settled)
        assert worker.counts["radar.undecodable"] == 3
    assert redis_client.xlen(stream_key("north", "dead")) == 3


async def test_reading_and_committing_that_fail_together_wait_for_the_server_once(
    publisher, redis_url, tmp_path, monkeypatch
) -> None:
    await publish_pairs(publisher, 0, 3)
    async with ingest(redis_url, tmp_path) as worker:
        await worker.sites.look()
        worker._take_in(await worker._read())
        worker._flush()

        async def refuse(deliveries: object) -> None:
            raise redis.ConnectionError("refused")

        with monkeypatch.context() as away:
            away.setattr(worker._consumer, "acknowledge", refuse)
            away.setattr(commit_module, "BACKOFF_S", (0.0,))
            away.setattr(worker_module, "BACKOFF_S", (0.0,))
            await worker._committer.next()
            commit = worker._committer._commit
            assert commit is not None
            await asyncio.wait([commit])
            await worker._back_off(redis.ConnectionError("refused"), 0)
        assert not await worker._committer.next()  # tried again, without raising what is over
        await worker._committer.finish()
        assert worker.counts["stored"] == worker.counts["radar.paired"] == 3


async def test_letters_that_another_replica_buried_meanwhile_are_counted_by_that_one(
    publisher, redis_url, redis_client, tmp_path
) -> None:
    redis_client.xadd(stream_key("north", "radar"), {"header": b"{}", "data": b""})
    async with ingest(redis_url, tmp_path) as paused:
        await paused.sites.look()
        paused._take_in(await paused._read())
        site = paused.sites.ours["north"]
        assert site.begin_commit()
        site.store()  # here it is paused, for longer than its lease
        redis_client.delete(stream_key("north", "lease"), REPLICAS)
        async with ingest(redis_url, tmp_path, consumer_name="second") as second:
            await second.run(until_idle_s=0.3)
            assert second.counts["radar.undecodable"] == 1
        assert not await paused._committer._bury(site)
        assert paused.counts["radar.undecodable"] == 0
        assert paused.sites.ours == {}
    assert redis_client.xlen(stream_key("north", "dead")) == 1


class Proxy:
    """A TCP hop in front of the server that can be cut: connections drop and new ones find nobody."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname, parts.port)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.is_cut = False

    async def __aenter__(self) -> "Proxy":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        self.is_cut = True
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_cut:
            writer.transport.abort()
            return
        there_reader, there_writer = await asyncio.open_connection(*self._target)
        for source, sink in ((reader, there_writer), (there_reader, writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._tasks.add(task)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        self._writers.add(sink)
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.transport.abort()
        self._writers.discard(sink)


async def test_server_away_for_a_moment_is_survived(publisher, redis_url, redis_client, tmp_path) -> None:
    async with Proxy(redis_url) as proxy, ingest(proxy.url, tmp_path) as worker, running(worker):
        await publish_pairs(publisher, 0, 5)
        await until(lambda: worker.counts["stored"] == 5)
        proxy.cut()
        await until(lambda: redis_client.info("clients")["blocked_clients"] == 0)  # the server has noticed
        await publish_pairs(publisher, 5, 10)
        assert worker.counts["stored"] == 5
        proxy.is_cut = False
        await until(lambda: worker.counts["stored"] == 10, timeout_s=20)
        await until(lambda: num_pending(redis_client) == 0, timeout_s=20)
    assert stored(tmp_path) == ids(0, 10)


@contextlib.asynccontextmanager
async def ingest_process(url: str, data_dir: Path, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    environment = os.environ | {
        "REDIS_URL": url, "ECHOSIGHT_DATA_DIR": str(data_dir), "ECHOSIGHT_IDLE_TIMEOUT_S": "0.5",
        "ECHOSIGHT_MIN_FREE_BYTES": "0", "ECHOSIGHT_CONSUMER_NAME": "first", "ECHOSIGHT_LEASE_MS": "500",
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.ingest", *arguments, env=environment, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.system
async def test_killed_process_loses_no_pair_and_stores_none_twice(
    publisher, redis_url, redis_client, tmp_path
) -> None:
    publishing = asyncio.create_task(publish_pairs(publisher, 0, 500))
    for enough in (50, 150):
        async with ingest_process(redis_url, tmp_path) as process:
            await until(lambda enough=enough: num_rows(tmp_path) >= enough)
            process.send_signal(signal.SIGKILL)
            assert await process.wait() == -signal.SIGKILL
    await publishing
    async with ingest_process(redis_url, tmp_path, "--until-idle-s", "0.5") as process:
        async with asyncio.timeout(30):
            assert await process.wait() == 0
    assert sorted(stored(tmp_path)) == ids(0, 500)
    assert num_pending(redis_client) == 0


@pytest.mark.system
async def test_process_commits_and_leaves_cleanly_on_sigterm(publisher, redis_url, redis_client, tmp_path) -> None:
    await publish_pairs(publisher, 0, 20)
    async with ingest_process(redis_url, tmp_path) as process:
        await until(lambda: num_rows(tmp_path) >= 10)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await process.wait() == 0
    assert num_pending(redis_client) == 40 - 2 * len(stored(tmp_path))


def test_site_that_cannot_be_one_is_refused_in_the_settings() -> None:
    with pytest.raises(SettingsError, match=r"ECHOSIGHT_SITES is 'north, a/b'.*site is 'a/b'"):
        IngestSettings.read(sites="north, a/b")
