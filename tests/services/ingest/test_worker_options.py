"""The ingest worker with what is off by default: a cluster, clocks apart, curation, images that go."""

import numpy as np
import redis
import simplejpeg

from services.core import codec
from services.core.store import StoreReader
from services.core.streams import Publisher, connect, disconnect, stream_key
from services.ingest import worker as worker_module
from tests.clusters import cluster, cluster_url  # noqa: F401 - fixtures
from tests.conftest import MS, camera_frame, radar_frame
from tests.services.ingest.test_worker import ids, ingest, publish_pairs, running, stored, until
from trainer.encodings import Encoded, EncodingCache


async def test_sites_of_a_cluster_are_ingested_and_handed_over(cluster_url, tmp_path) -> None:  # noqa: F811
    client = connect(cluster_url)
    publisher = Publisher(client, max_entries=2000)
    for site in ("a", "b", "c", "d"):
        await publish_pairs(publisher, 0, 10, site=site)
    await publisher.publish([radar_frame(100, site="e", seq=1)])
    async with ingest(cluster_url, tmp_path, idle_timeout_s=60) as first, running(first):
        await until(lambda: first.counts["stored"] >= 28)
    await publisher.publish([camera_frame(104, site="e", seq=1)])
    async with ingest(cluster_url, tmp_path, consumer_name="second") as second:
        await second.run(until_idle_s=0.5)
        assert second.counts["stored"] + first.counts["stored"] == 41
    for site in ("a", "b", "c", "d"):
        assert sorted(stored(tmp_path, site)) == ids(0, 10)
        assert await publisher.backlog(site) == 0
    assert len(stored(tmp_path, "e")) == 1
    await disconnect(client)


async def test_known_clock_offset_is_subtracted_before_pairing(publisher, redis_url, tmp_path) -> None:
    for seq in range(5):
        await publisher.publish([radar_frame(seq * 100, seq=seq), camera_frame(seq * 100 + 1204, seq=seq)])
    async with ingest(redis_url, tmp_path, clock_offsets_ms="north=1200") as worker:
        await worker.run(until_idle_s=0.3)
        assert worker.counts["radar.paired"] == 5
    reader = StoreReader(tmp_path / "store")
    reader.refresh()
    assert [pair.clock_offset_ns for pair in reader] == [1200 * MS] * 5
    assert [pair.camera_at_ns - pair.id.captured_at_ns for pair in reader] == [1204 * MS] * 5
    reader.close()


def arrive(client: "redis.Redis", start: int, stop: int, *, ahead_ms: int) -> None:
    """Frames of both sensors at 10 a second, the camera's clock ahead; entry ids are when they arrived."""
    for seq in range(start, stop):
        at_ms = 1_000_000 + seq * 100
        radar = radar_frame(at_ms, seq=seq)
        camera = camera_frame(at_ms + ahead_ms, seq=seq)
        for kind, frame, way_ms in (("radar", radar, 20), ("camera", camera, 20)):
            client.xadd(stream_key("north", kind), dict(codec.encode(frame)), id=f"{at_ms + way_ms + seq % 7}-0")


async def test_clocks_that_are_apart_are_told_and_followed_when_asked_to(
    redis_client, redis_url, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(worker_module, "_REPORT_EVERY_S", 0.05)
    arrive(redis_client, 0, 300, ahead_ms=400)
    async with ingest(redis_url, tmp_path, clock_correction="apply") as worker, running(worker):
        await until(lambda: "north" in worker.sites.ours and worker.sites.ours["north"].applied_offset_ns != 0)
        site = worker.sites.ours["north"]
        assert abs(site.applied_offset_ns - 400 * MS) < 10 * MS
        before = worker.counts["radar.paired"]
        arrive(redis_client, 300, 400, ahead_ms=400)
        await until(lambda: worker.counts["radar.paired"] >= before + 95)


async def test_images_go_once_the_trainer_has_encoded_them(publisher, redis_url, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(worker_module, "_TIDY_EVERY_S", 0.05)
    await publish_pairs(publisher, 0, 4)
    async with ingest(redis_url, tmp_path, drop_images=True) as worker, running(worker):
        await until(lambda: worker.counts["stored"] == 4)
        reader = StoreReader(tmp_path / "store")
        reader.refresh()
        encoded, others = reader.pairs[:2], reader.pairs[2:]
        cache = EncodingCache(tmp_path / "store", site="north", encoder_id="test", dim=4)
        cache.append([Encoded(pair.id, False, np.ones(4, np.float16)) for pair in encoded])
        await until(lambda: not any(pair.has_image for pair in encoded))
        assert all(pair.radar() is not None for pair in encoded)
        assert all(pair.camera() is not None for pair in others)
        reader.close()


async def test_curation_keeps_what_it_can_read_and_counts_what_it_cannot(publisher, redis_url, tmp_path) -> None:
    image = simplejpeg.encode_jpeg(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    broken = image[:40] + bytes(40) + image[-2:]
    for seq, data in enumerate([image, broken, image]):
        camera = camera_frame(seq * 100 + 4, seq=seq)
        sent = type(camera)("north", seq, camera.captured_at_ns, image=data, shape=(64, 64, 3))
        await publisher.publish([radar_frame(seq * 100, seq=seq), sent])
    async with ingest(redis_url, tmp_path, curation="keep") as worker:
        await worker.run(until_idle_s=0.3)
        assert worker.counts["radar.paired"] == worker.counts["stored"] == 2
        assert worker.counts["radar.unreadable"] == worker.counts["camera.unreadable"] == 1
    assert [frame_id.seq for frame_id in stored(tmp_path)] == [0, 2]
