"""What is peculiar to a Redis Cluster: finding it, asking it cheaply, losing one of its servers."""

import asyncio

import pytest

from services.core.errors import StreamsError
from services.core.streams import (
    Consumer,
    DeadLetters,
    EventLog,
    Publisher,
    SiteLeases,
    StreamsLost,
    connect,
    disconnect,
    stream_key,
    wait_for_server,
)
from tests.clusters import Cluster, eventually
from tests.conftest import camera_frame, radar_frame

SITES = tuple(f"site-{i}" for i in range(12))  # on all three servers


async def test_plain_url_of_a_cluster_node_says_what_to_write(cluster, cluster_url) -> None:
    plain = f"redis://127.0.0.1:{cluster.nodes[0].port}/0"
    client = connect(plain)
    with pytest.raises(StreamsError, match=r"write redis\+cluster://host:port"):
        await wait_for_server(client, timeout_s=5)
    publisher = Publisher(client, max_entries=100)
    with pytest.raises(StreamsError, match=r"write redis\+cluster://host:port"):
        await publisher.publish([radar_frame(0, site=site) for site in SITES])
    reader = Consumer(client, name="first")
    elsewhere = next(s for s in SITES if cluster.node_of(stream_key(s, "radar")) is not cluster.nodes[0])
    with pytest.raises(StreamsError, match=r"write redis\+cluster://host:port"):
        await reader.join(elsewhere)
    await disconnect(client)
    letters = DeadLetters(plain)
    with pytest.raises(StreamsError, match=r"write redis\+cluster://host:port"):
        [letters.list(site, count=1) for site in SITES]
    letters.close()


async def test_cluster_url_of_a_plain_server_says_what_to_write(redis_url) -> None:
    url = redis_url.replace("redis://", "redis+cluster://")
    client = connect(url)
    with pytest.raises(StreamsError, match="write redis://host:port/db"):
        await wait_for_server(client, timeout_s=5)
    await disconnect(client)
    events = EventLog(url, source="test")
    assert not events.emit("anything")
    events.close()


async def test_sites_of_all_servers_are_found_read_and_acknowledged(cluster, cluster_url) -> None:
    publisher = await Publisher.connect(cluster_url)
    client = connect(cluster_url)
    reader = Consumer(client, name="first")
    for seq in range(3):
        await publisher.publish([f(seq, seq=seq, site=s) for s in SITES for f in (radar_frame, camera_frame)])
    assert await reader.discover() == tuple(sorted(SITES))
    assert await reader.read(count=1, block_ms=100, skip={(s, "radar") for s in SITES[1:]})
    read = await reader.read(count=10, block_ms=100)
    assert {d.site for d in read} == set(SITES)
    await reader.acknowledge(read)
    assert cluster.calls("command|getkeys") == 0  # each would be a round trip more
    assert [node.client.dbsize() > 0 for node in cluster.nodes] == [True] * 3
    await disconnect(client)
    await publisher.close()


async def test_waiting_for_entries_does_not_spin_but_ends_when_one_comes(cluster, cluster_url) -> None:
    publisher = await Publisher.connect(cluster_url)
    client = connect(cluster_url)
    reader = Consumer(client, name="first", sites=SITES)
    await reader.discover()
    await reader.read(count=1, block_ms=1)
    before = cluster.calls("xreadgroup")
    assert await reader.read(count=1, block_ms=500) == []
    assert cluster.calls("xreadgroup") - before <= 20 * len(SITES)
    waiting = asyncio.create_task(reader.read(count=1, block_ms=20_000))
    await publisher.publish([radar_frame(7, seq=7, site=SITES[5])])
    async with asyncio.timeout(5):
        [delivery] = await waiting
    assert (delivery.site, delivery.frame.seq) == (SITES[5], 7)
    await disconnect(client)
    await publisher.close()


async def test_server_that_dies_is_replaced_and_no_site_is_lost(tmp_path) -> None:
    cluster = Cluster(tmp_path, has_replica=True)
    publisher = await Publisher.connect(cluster.url)
    client = connect(cluster.url)
    reader = Consumer(client, name="first")
    leases = SiteLeases(client, owner="first", ttl_ms=60_000)
    try:
        await publisher.publish([radar_frame(0, site=site) for site in SITES])
        await reader.discover()
        before = await reader.read(count=10, block_ms=100)
        assert {d.site for d in before} == set(SITES)
        tokens = {site: await leases.acquire(site, floor=0) for site in SITES}
        for node in cluster.nodes[:3]:
            node.client.execute_command("WAIT", 1, 100)
        cluster.nodes[0].kill()
        lost = 0

        async def publish() -> bool:
            nonlocal lost
            try:
                await publisher.publish([radar_frame(1, seq=1, site=site) for site in SITES])
            except StreamsLost:
                lost += 1
                return False
            return True

        found: set[tuple[str, int]] = set()

        async def has_all() -> bool:
            try:
                found.update((d.site, d.frame.seq) for d in await reader.read(count=10, block_ms=50))
            except StreamsLost:
                return False
            return found >= {(site, 1) for site in SITES}

        await eventually(publish)
        await eventually(has_all)
        assert lost > 0
        assert {(site, 0) for site in SITES} <= found  # not acknowledged: taken over from the lost answers
        await reader.acknowledge(before)
        assert await leases.renew(tokens) == set()
    finally:
        await disconnect(client)
        await publisher.close()
        cluster.stop()
