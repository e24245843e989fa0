"""The live classification: what the radars stream, as a real server has it, and what is published of it."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from fastapi import FastAPI

from api.live.classification import choose
from services.core.embedded import start_embedded_server
from services.core.predictions import Prediction, decode_prediction
from services.core.streams import Publisher, stream_key
from tests.api.tiny import attach, npy, publish, publish_champion, registry_of, serving, tiny_model, until
from tests.clusters import free_ports
from tests.conftest import radar_frame

LEASE_MS = 600
PATIENT: dict[str, Any] = {
    "live_lease_ms": LEASE_MS,
    "live_max_age_ms": 60_000,
    "live_max_batch": 1000,
    "live_window_ms": 10**6,
}


def said(server: redis.Redis, site: str = "north") -> list[Prediction]:
    return [decode_prediction(fields) for _, fields in server.xrange(stream_key(site, "predictions"))]


@contextlib.asynccontextmanager
async def running(data_dir: Path, url: str, **settings: Any) -> AsyncIterator[tuple[FastAPI, httpx.AsyncClient]]:
    """A server whose champion is live."""
    async with serving(data_dir, redis_url=url, **PATIENT | settings) as (app, client):
        await until(lambda: app.state.live.is_ready)
        yield app, client


async def counts(client: httpx.AsyncClient, name: str, num: int) -> bool:
    """Whether the metrics whose names begin so are `num` together, soon: what is published is counted next."""
    found = -1.0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(10.0):
            while found != num:
                await asyncio.sleep(0.01)
                lines = (await client.get("/metrics")).text.splitlines()
                found = sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))
    return found == num


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    publish_champion(registry_of(tmp_path))
    return tmp_path


async def test_says_of_a_streamed_frame_what_it_says_of_a_posted_one(
    data_dir: Path, redis_url: str, redis_client: redis.Redis, publisher: Publisher
) -> None:
    frames = [radar_frame(100 * i, seq=i, site=site) for site in ("north", "south", "west") for i in range(3)]
    async with running(data_dir, redis_url) as (_, client):
        await publisher.publish(frames)
        await until(lambda: all(len(said(redis_client, site)) == 3 for site in ("north", "south", "west")))
        for frame in frames:
            body = npy(frame.heatmap)
            headers = {"content-type": "application/x-npy"}
            posted = (await client.post(f"/v1/classify?site={frame.site}", content=body, headers=headers)).json()
            [streamed] = [one for one in said(redis_client, frame.site) if one.seq == frame.seq]
            assert (streamed.label, streamed.probabilities) == (posted["label"], posted["probabilities"])
            assert streamed.model.model_dump() == posted["model"]
            assert streamed.captured_at_ns == frame.captured_at_ns
            assert streamed.smoothed.num_frames == frame.seq + 1
            assert 0 <= streamed.latency_ms.read <= streamed.latency_ms.arrived
        assert await counts(client, "echosight_live_predictions_total", 9)
        assert await counts(client, 'echosight_live_latency_seconds_count{since="arrived"}', 9)


async def test_abstains_from_what_is_unknown_or_unsure(
    tmp_path: Path, redis_url: str, redis_client: redis.Redis, publisher: Publisher
) -> None:
    registry = registry_of(tmp_path)
    version = publish(registry, unknown_threshold=1.5)
    attach(registry, version, tiny_model(version, has_unknown=True))  # its score is the frame's mean: seq
    registry.promote(version, by="test", why="test")
    async with running(tmp_path, redis_url, live_abstain_below=0.3) as (_, client):
        await publisher.publish([radar_frame(100 * i, seq=i) for i in range(3)])
        await until(lambda: len(said(redis_client)) == 3)
        assert await counts(client, "echosight_live_abstained_total", 1)
    *known, stranger = said(redis_client)
    assert [(one.answer, one.abstained) for one in known] == [("pedestrian", "")] * 2
    assert (stranger.answer, stranger.abstained, stranger.smoothed.num_frames) == (None, "unknown", 2)
    assert stranger.unknown is not None
    assert stranger.unknown.is_unknown
    async with running(tmp_path, redis_url, live_abstain_below=0.4):
        await publisher.publish([radar_frame(400)])
        await until(lambda: len(said(redis_client)) == 4)
    assert (said(redis_client)[-1].answer, said(redis_client)[-1].abstained) == (None, "unsure")


@pytest.mark.parametrize(
    ("released", "setting", "abstained"),
    [(0.3, {}, ""), (0.4, {}, "unsure"), (None, {}, "unsure"), (0.4, {"live_abstain_below": "0.3"}, "")],
)
async def test_the_release_says_how_sure_an_answer_must_be_unless_a_setting_does(
    tmp_path: Path,
    redis_url: str,
    redis_client: redis.Redis,
    publisher: Publisher,
    released: float | None,
    setting: dict[str, str],
    abstained: str,
) -> None:
    registry = registry_of(tmp_path)
    attach(registry, publish(registry, abstain_below=released), tiny_model(1))  # it is sure to a third
    registry.promote(1, by="test", why="test")
    async with running(tmp_path, redis_url, **setting):
        await publisher.publish([radar_frame(0)])
        await until(lambda: said(redis_client))
    assert said(redis_client)[-1].abstained == abstained


async def test_new_model_answers_from_the_next_frame_on(
    data_dir: Path, redis_url: str, redis_client: redis.Redis, publisher: Publisher
) -> None:
    registry = registry_of(data_dir)
    async with running(data_dir, redis_url) as (app, _):
        await publisher.publish([radar_frame(0)])
        await until(lambda: len(said(redis_client)) == 1)
        version = publish(registry)
        attach(registry, version, tiny_model(version))
        registry.promote(version, by="test", why="test")
        await until(lambda: app.state.live.version == version)
        await publisher.publish([radar_frame(100, seq=1)])
        await until(lambda: len(said(redis_client)) == 2)
    assert [one.model.version for one in said(redis_client)] == [1, version]
    assert said(redis_client)[-1].smoothed.num_frames == 2


async def test_frames_that_the_model_does_not_take_are_counted_and_passed_over(
    data_dir: Path, redis_url: str, redis_client: redis.Redis, publisher: Publisher
) -> None:
    async with running(data_dir, redis_url) as (_, client):
        redis_client.xadd(stream_key("north", "radar"), {"header": "{}"})
        await publisher.publish([radar_frame(0, shape=(2, 4, 4)), radar_frame(100, seq=1, shape=(4, 3))])
        await publisher.publish([radar_frame(200, seq=2)])
        await until(lambda: said(redis_client))
        assert await counts(client, 'echosight_live_skipped_total{reason="wrong_shape",site="north"}', 2)
        assert await counts(client, 'echosight_live_skipped_total{reason="undecodable",site="north"}', 1)
    assert [one.seq for one in said(redis_client)] == [2]


async def test_goes_on_after_a_flush_and_beside_keys_that_are_no_streams(
    data_dir: Path, redis_url: str, redis_client: redis.Redis, publisher: Publisher
) -> None:
    async with running(data_dir, redis_url):
        await publisher.publish([radar_frame(0), radar_frame(0, site="south")])
        await until(lambda: said(redis_client) and said(redis_client, "south"))
        redis_client.flushall()
        redis_client.set(stream_key("south", "radar"), "text")
        await publisher.publish([radar_frame(100, seq=1)])
        await until(lambda: said(redis_client))
    assert said(redis_client)[0].seq == 1


@pytest.mark.parametrize(
    ("kind", "of_type"),
    [("live-lease", "list"), ("live-token", "list"), ("predictions", "string"), ("radar", "string")],
)
async def test_a_key_of_another_type_is_named_costs_no_other_site_and_may_be_put_right(
    data_dir: Path,
    redis_url: str,
    redis_client: redis.Redis,
    publisher: Publisher,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    of_type: str,
) -> None:
    key = stream_key("north", kind)
    await publisher.publish([radar_frame(0), radar_frame(0, site="south")])
    async with running(data_dir, redis_url) as (_, client):
        await until(lambda: said(redis_client) and said(redis_client, "south"))
        redis_client.delete(
            key, stream_key("north", "live-lease")
        )  # the token is looked at when the lease is taken
        redis_client.set(key, "x") if of_type == "string" else redis_client.rpush(key, "x")
        spoilt = [radar_frame(100, seq=1)] if kind == "predictions" else []  # nobody looks at it before
        await publisher.publish([*spoilt, radar_frame(100, seq=1, site="south")])
        await until(lambda: len(said(redis_client, "south")) == 2)
        told = ""

        def is_told() -> bool:
            nonlocal told
            told += "".join(capsys.readouterr())
            return f"{key} is a {of_type}, expected a" in told and "redis-cli DEL" in told

        await until(is_told, timeout_s=10.0)
        await publisher.publish([radar_frame(200, seq=2, site="south")])
        await until(lambda: len(said(redis_client, "south")) == 3)
        redis_client.delete(key)
        await publisher.publish([radar_frame(300, seq=3)])
        await until(lambda: 3 in [one.seq for one in said(redis_client)])
        told += "".join(capsys.readouterr())
        assert told.count("live_site_refused") == 1
        assert await counts(client, "echosight_live_interruptions_total", 0)


async def test_a_stream_that_was_something_else_from_the_start_is_named_once_and_may_be_put_right(
    data_dir: Path,
    redis_url: str,
    redis_client: redis.Redis,
    publisher: Publisher,
    capsys: pytest.CaptureFixture[str],
) -> None:
    redis_client.set(stream_key("north", "radar"), "x")
    async with running(data_dir, redis_url):
        for seq in range(3):  # a look after another
            await publisher.publish([radar_frame(100 * seq, seq=seq, site=f"south{seq}")])
            await until(lambda at=f"south{seq}": said(redis_client, at))
        redis_client.delete(stream_key("north", "radar"))
        await publisher.publish([radar_frame(0)])
        await until(lambda: said(redis_client))
    told = "".join(capsys.readouterr())
    assert "echosight:{north}:radar is a string, expected a stream; delete it: redis-cli DEL" in told
    assert told.count("live_site_refused") == 1


async def test_a_register_of_another_type_is_named_and_may_be_put_right(
    data_dir: Path,
    redis_url: str,
    redis_client: redis.Redis,
    publisher: Publisher,
    capsys: pytest.CaptureFixture[str],
) -> None:
    redis_client.set("echosight:live:replicas", "x")
    async with running(data_dir, redis_url):
        told = ""

        def is_told() -> bool:
            nonlocal told
            told += "".join(capsys.readouterr())
            return "echosight:live:replicas is a string, expected a zset; delete it" in told

        await until(is_told, timeout_s=10.0)
        redis_client.delete("echosight:live:replicas")
        await publisher.publish([radar_frame(0)])
        await until(lambda: said(redis_client))


async def test_waits_for_a_server_that_is_away(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [port] = free_ports(1)
    url = f"redis://127.0.0.1:{port}"
    async with running(data_dir, url) as (_, client):
        assert await counts(client, "echosight_live_interruptions_total", 3)
        assert capsys.readouterr().out.count("live_waits") == 1
        server = await asyncio.to_thread(start_embedded_server, data_dir / "redis", port=port)
        try:
            publisher = await Publisher.connect(url)
            await publisher.publish([radar_frame(0)])
            await publisher.close()
            with redis.Redis.from_url(url) as asked:
                await until(lambda: said(asked))
        finally:
            server.stop()


async def test_what_waited_too_long_is_skipped_and_counted(
    data_dir: Path, redis_url: str, redis_client: redis.Redis, publisher: Publisher
) -> None:
    key = stream_key("north", "radar")
    async with running(data_dir, redis_url) as (app, client):
        redis_client.xadd(key, {"header": "{}"}, id="1000-0")
        await until(lambda: app.state.classification.sites.ours)
        redis_client.xadd(key, {"header": "{}"}, id="2000-0")  # read fifty years late
        await publisher.publish([radar_frame(0, seq=1)])
        await until(lambda: said(redis_client))
        assert await counts(client, 'echosight_live_skipped_total{reason="stale",site="north"}', 1)
    assert [one.seq for one in said(redis_client)] == [1]


async def test_two_replicas_share_the_sites_and_no_frame_is_predicted_twice(
    data_dir: Path, redis_url: str, redis_client: redis.Redis, publisher: Publisher
) -> None:
    sites = [f"site-{i}" for i in range(4)]
    seqs = iter(range(10_000))

    async def send() -> None:
        seq = next(seqs)
        await publisher.publish([radar_frame(100 * seq, seq=seq, site=site) for site in sites])

    async def send_until(is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(20.0):
            while not is_so():
                await send()
                await asyncio.sleep(0.02)

    def held(app: FastAPI) -> set[str]:
        return set(app.state.classification.sites.ours)

    def num_said() -> int:
        return sum(len(said(redis_client, site)) for site in sites)

    async with running(data_dir, redis_url) as (first, _):
        await send_until(lambda: len(held(first)) == 4)
        async with running(data_dir, redis_url) as (second, _):
            await send_until(lambda: len(held(first)) == len(held(second)) == 2)
            assert not held(first) & held(second)
            before = num_said()
            await send_until(lambda: num_said() > before + 40)
        await send_until(lambda: len(held(first)) == 4)
        async with running(data_dir, redis_url) as (killed, _):
            await send_until(lambda: len(held(killed)) == 2)
            killed.state.classification.sites.close = _nothing  # its leases run out by themselves
        await send_until(lambda: len(held(first)) == 4)
        before = num_said()
        await send_until(lambda: num_said() > before + 20)
    for site in sites:
        counts = Counter(one.radar_id for one in said(redis_client, site))
        assert set(counts.values()) == {1}
        seqs_said = [one.seq for one in said(redis_client, site)]
        assert seqs_said == sorted(seqs_said)
        assert len(seqs_said) == max(seqs_said) - min(seqs_said) + 1  # nothing is lost in a hand-over either


async def _nothing() -> None:
    pass


async def test_is_not_there_when_switched_off(
    data_dir: Path, redis_url: str, redis_client: redis.Redis, publisher: Publisher
) -> None:
    async with running(data_dir, redis_url, live=False) as (app, client):
        await publisher.publish([radar_frame(0)])
        assert app.state.classification is None
        assert "echosight_live" not in (await client.get("/metrics")).text
    async with serving(data_dir) as (app, _):
        assert app.state.classification is None


@pytest.mark.parametrize(
    ("sites", "limit", "last_turns", "expected"),
    [
        ("aaa", 2, {}, {1, 2}),
        ("aaab", 2, {}, {2, 3}),
        ("abc", 2, {"a": 3, "b": 1, "c": 2}, {1, 2}),
        ("aabb", 3, {"a": 1, "b": 2}, {0, 1, 3}),
        ("ab", 5, {}, {0, 1}),
        ("", 1, {}, set()),
    ],
)
def test_newest_frames_are_answered_and_no_site_goes_without(
    sites: str, limit: int, last_turns: dict[str, int], expected: set[int]
) -> None:
    assert choose(sites, limit=limit, last_turns=Counter(last_turns)) == expected
