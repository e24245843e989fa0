"""Recording from real servers: what came is in the file, whatever happens to server, disk or recorder."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis
import redis.asyncio
import structlog
from typer.testing import CliRunner

from services.core import codec
from services.core.embedded import start_embedded_server
from services.core.errors import BadFrameError, RecordingError, StreamsError
from services.core.frames import Frame
from services.core.streams import KINDS, Consumer, Publisher, connect, disconnect, kind_of, stream_key
from services.core.streams.follower import Follower
from services.sensors.__main__ import app
from services.sensors.record import Recorder, SessionFile
from services.sensors.recordings import McapRecording
from services.sensors.recordings.mcap_writer import McapWriter
from tests.clusters import cluster, cluster_url  # noqa: F401 - fixtures
from tests.conftest import camera_frame, label, radar_frame

DEADLINE_S = 60.0


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def frames_in(path: Path) -> list[Frame]:
    return list(McapRecording(path).frames())


def ids(frames: list[Frame]) -> list[tuple[str, int]]:
    return [(type(frame).__name__, frame.seq) for frame in frames]


@asynccontextmanager
async def recording(recorder: Recorder) -> AsyncIterator[None]:
    """The recorder at work, with "now" behind it; stopped at the end."""
    stop = asyncio.Event()
    task = asyncio.create_task(recorder.run(stop))
    await until(lambda: recorder._follower._has_begun or task.done())
    yield
    stop.set()
    await task


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator["redis.asyncio.Redis"]:
    client = connect(redis_url)
    yield client
    await client.aclose()


@pytest.fixture(autouse=True)
def _logs_of_the_next_test_go_elsewhere() -> Iterator[None]:
    yield
    structlog.reset_defaults()


async def test_records_what_comes_from_now_on_of_all_sites_also_new_ones(
    client, publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.sensors.record._HOUSEKEEPING_S", 0.05)
    await publisher.publish([radar_frame(0, seq=1), camera_frame(0, seq=1)])
    recorder = Recorder(Follower(client), tmp_path / "s.mcap")
    async with recording(recorder):
        await publisher.publish([radar_frame(100, seq=2), camera_frame(103, seq=3), label(100, "car", seq=2)])
        await publisher.publish([radar_frame(100, seq=7, site="south")])
        await until(lambda: recorder.recorded.num_frames == 4)
        assert not (tmp_path / "s.mcap").exists()
    found = frames_in(tmp_path / "s.mcap")
    assert ids([frame for frame in found if frame.site == "north"]) == [
        ("RadarFrame", 2), ("CameraFrame", 3), ("Label", 2)
    ]  # fmt: skip
    assert ids([frame for frame in found if frame.site == "south"]) == [("RadarFrame", 7)]
    assert os.listdir(tmp_path) == ["s.mcap"]  # noqa: PTH208
    assert recorder.recorded.ended == "stopped"
    assert recorder.recorded.file_bytes == (tmp_path / "s.mcap").stat().st_size


async def test_records_the_past_by_arrival_and_leaves_ingest_alone(client, redis_client, tmp_path: Path) -> None:
    consumer = Consumer(client, name="ingest")
    await consumer.join("north")
    sent: list[Frame] = [camera_frame(3 * number, seq=number) for number in range(50)]
    sent[10:10] = [radar_frame(number, seq=number) for number in range(5)]
    sent[30:30] = [label(number, "car", seq=number) for number in range(5)]
    for number, frame in enumerate(sent):  # an id of its own each: what came within one millisecond is no order
        redis_client.xadd(stream_key("north", kind_of(frame)), codec.encode(frame), id=f"{1000 + number}-0")
    before = redis_client.xinfo_groups(stream_key("north", "radar"))
    recorder = Recorder(
        Follower(client, sites=["north"], from_start=True), tmp_path / "s.mcap", page_entries=4
    )  # pages that end at different times
    recorded = await recorder.run(asyncio.Event(), seconds=0.7)
    assert ids(frames_in(tmp_path / "s.mcap")) == ids(sent)
    assert recorded.ended == "done"
    assert recorded.topics["/north/camera"].num_frames == 50
    assert redis_client.xinfo_groups(stream_key("north", "radar")) == before


async def test_pages_follow_one_another_by_arrival_however_full_the_streams_are(client, redis_client) -> None:
    kinds = ["camera"] * 9 + ["radar"] + ["labels"] * 2 + ["camera"] * 3 + ["radar"]
    for number, kind in enumerate(kinds):
        redis_client.xadd(stream_key("north", kind), {"header": b"{}"}, id=f"{number + 1}-0")
    follower = Follower(client, from_start=True)
    await follower.find()
    read = []
    while page := await follower.read("north", count=2, block_ms=1):
        assert len(page) <= 6
        read += page
    assert [entry.order for entry in read] == [(number + 1, 0) for number in range(len(kinds))]
    assert [entry.kind for entry in read] == kinds


async def test_counts_what_cannot_be_decoded_and_what_was_trimmed_unread(
    client, publisher, redis_client, tmp_path: Path
) -> None:
    await publisher.publish([radar_frame(0, seq=0)])
    follower = Follower(client)
    recorder = Recorder(follower, tmp_path / "s.mcap")
    await follower.find()
    await publisher.publish([radar_frame(number, seq=number) for number in range(1, 9)])
    redis_client.xtrim(stream_key("north", "radar"), maxlen=3, approximate=False)
    redis_client.xadd(stream_key("north", "radar"), {"header": b"{}", "data": b""})
    recorded = await recorder.run(asyncio.Event(), seconds=0.2)
    counts = recorded.topics["/north/radar"]
    assert (counts.num_frames, counts.num_undecodable, counts.num_trimmed) == (3, 1, 5)
    assert "header field" in counts.first_undecodable
    assert ids(frames_in(tmp_path / "s.mcap")) == [("RadarFrame", number) for number in (6, 7, 8)]


async def test_trimming_of_what_was_read_is_no_loss(client, publisher, redis_client) -> None:
    follower = Follower(client, from_start=True)
    await publisher.publish([radar_frame(number, seq=number) for number in range(4)])
    await follower.find()
    assert len(await follower.read("north", count=2, block_ms=1)) == 2
    await follower.count_trimmed("north")  # in the middle: the server cannot tell
    redis_client.xtrim(stream_key("north", "radar"), maxlen=2, approximate=False)
    await follower.count_trimmed("north")
    assert len(await follower.read("north", count=9, block_ms=1)) == 2
    redis_client.xtrim(stream_key("north", "radar"), maxlen=0, approximate=False)
    await follower.count_trimmed("north")
    assert follower.num_trimmed.total() == 0


async def test_what_was_trimmed_unread_is_counted_before_the_rest_is_read_and_after_a_flush(
    client, publisher, redis_client
) -> None:
    follower = Follower(client)
    await follower.find()
    for num_trimmed in (6, 12):
        await publisher.publish([radar_frame(number, seq=number) for number in range(8)])
        redis_client.xtrim(stream_key("north", "radar"), maxlen=2, approximate=False)
        await follower.find()
        for _ in range(2):
            await follower.count_trimmed("north")
            assert follower.num_trimmed == {("north", "radar"): num_trimmed}
            await follower.read("north", count=9, block_ms=1)
        redis_client.flushall()
        await follower.count_trimmed("north")


async def test_a_site_whose_key_is_no_stream_is_left_alone(client, publisher, redis_client) -> None:
    redis_client.set(stream_key("odd", "camera"), "mine")
    redis_client.xadd(stream_key("odd", "radar"), {"header": b"{}"})
    redis_client.xadd("echosight:{no/site}:radar", {"header": b"{}"})
    await publisher.publish([radar_frame(0)])
    follower = Follower(client)
    assert await follower.find() == ("north",)
    assert sorted(follower.refused) == ["echosight:{no/site}:radar", "odd"]
    redis_client.delete(stream_key("north", "labels"))
    redis_client.set(stream_key("north", "labels"), "mine")
    assert await follower.read("north", count=1, block_ms=1) == []
    assert not follower.follows("north")


async def test_goes_on_when_the_server_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.sensors.record._MAX_BACK_OFF_S", 0.2)
    server = start_embedded_server(tmp_path / "redis")
    client, publisher = connect(server.url), await Publisher.connect(server.url)
    recorder = Recorder(Follower(client, sites=["north"]), tmp_path / "s.mcap")
    try:
        async with recording(recorder):
            await publisher.publish([radar_frame(0, seq=0)])
            await until(lambda: recorder.recorded.num_frames == 1)
            server.stop()
            await until(lambda: recorder._is_lost)
            server = start_embedded_server(tmp_path / "redis", port=server.port)
            await publisher.close()
            publisher = await Publisher.connect(server.url)
            await publisher.publish([radar_frame(100, seq=1)])
            await until(lambda: recorder.recorded.num_frames == 2)
    finally:
        await client.aclose()
        await publisher.close()
        server.stop()
    assert ids(frames_in(tmp_path / "s.mcap")) == [("RadarFrame", 0), ("RadarFrame", 1)]
    assert recorder.recorded.num_lost == 1


async def test_says_so_when_no_server_answers_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.sensors.record._FIRST_ANSWER_S", 0.1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        client = connect(f"redis://127.0.0.1:{taken.getsockname()[1]}/0")
        with pytest.raises(StreamsError, match="no server answered"):
            await Recorder(Follower(client), tmp_path / "s.mcap").run(asyncio.Event())
        await client.aclose()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--site", "nosuch"], "no stream of site nosuch; there are north, south"),
        (["--site", "nosuch", "--site", "north", "--wait", "--seconds", "0.2"], "no frame in 0."),
        (["--seconds", "0.2"], "no frame in 0."),
    ],
)
def test_recording_of_nothing_says_so_and_leaves_no_file(
    arguments: list[str], error: str, redis_client, redis_url: str, tmp_path: Path
) -> None:
    for site in ("north", "south"):
        redis_client.xadd(stream_key(site, "radar"), codec.encode(radar_frame(0, site=site)))
    path = tmp_path / "s.mcap"
    path.write_bytes(b"an older one")
    command = ["record", str(path), "--force", "--redis-url", redis_url, *arguments]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, RecordingError)
    assert error in str(result.exception)
    assert result.exception.remedy
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"an older one"


async def test_follows_a_cluster(cluster_url: str) -> None:  # noqa: F811
    client = connect(cluster_url)
    try:
        publisher = Publisher(client, max_entries=100)
        await publisher.publish([radar_frame(0, seq=1)])
        follower = Follower(client, from_start=True)
        await publisher.publish([camera_frame(0, seq=2), radar_frame(0, seq=3, site="south")])
        assert await follower.find() == ("north", "south")
        pages = [await follower.read(site, count=5, block_ms=1) for site in ("north", "south")]
        assert [[entry.kind for entry in page] for page in pages] == [["radar", "camera"], ["radar"]]
        await follower.count_trimmed("south")
    finally:
        await disconnect(client)


async def test_a_full_disk_ends_it_in_words_and_the_part_stays_readable(
    client, publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.sensors.record._HOUSEKEEPING_S", 0.02)
    await publisher.publish([radar_frame(0, seq=0)])
    recorder = Recorder(Follower(client, from_start=True), tmp_path / "s.mcap")
    task = asyncio.create_task(recorder.run(asyncio.Event()))
    await until(lambda: recorder.recorded.file_bytes > 200)

    def fail(_: McapWriter) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(McapWriter, "flush", fail)
    with pytest.raises(RecordingError, match=r"s\.mcap\.part cannot be written: No space left"):
        await asyncio.wait_for(task, DEADLINE_S)
    assert ids(frames_in(tmp_path / "s.mcap.part")) == [("RadarFrame", 0)]


def test_never_overwrites_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "s.mcap"
    path.write_bytes(b"precious")
    with pytest.raises(RecordingError, match="is there already; name another file, or give --force"):
        SessionFile(path, overwrite=False)
    path.unlink()
    with pytest.raises(RecordingError, match="cannot be made: No such file"):
        SessionFile(tmp_path / "no" / "s.mcap", overwrite=False)
    first = SessionFile(path, overwrite=False)
    with pytest.raises(RecordingError, match="another recorder writes it, or was killed"):
        SessionFile(path, overwrite=False)
    path.write_bytes(b"came in between")
    with pytest.raises(RecordingError, match="is there already"):
        first.close()
    assert path.read_bytes() == b"came in between"
    forced = SessionFile(path, overwrite=True)
    forced.close()
    assert path.read_bytes().startswith(b"\x89MCAP0")


def test_a_name_that_is_no_site_is_refused() -> None:
    with pytest.raises(BadFrameError, match="site is 'no/site'"):
        Follower(redis.asyncio.Redis(), sites=["no/site"])


def start_recorder(path: Path, url: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "services.sensors", "record", str(path), "--redis-url", url, "--json"]
    return subprocess.Popen([*command, "--from-start"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_recorder_that_is_ended_leaves_a_file_to_play(
    number: int, publisher, redis_url: str, tmp_path: Path
) -> None:
    await publisher.publish([radar_frame(0, seq=0), camera_frame(3, seq=0), label(0, "car", seq=0)])
    path = tmp_path / "s.mcap"
    part = tmp_path / "s.mcap.part"
    process = start_recorder(path, redis_url)
    try:
        await until(lambda: part.exists() and part.stat().st_size > 500)
        process.send_signal(number)
        printed = process.communicate(timeout=DEADLINE_S)[0]
    finally:
        process.kill()
        process.wait()
    if number == signal.SIGTERM:
        assert process.returncode == 0
        facts = json.loads(printed)
        assert (facts["num_frames"], facts["ended"]) == (3, "stopped")
        assert facts["topics"]["/north/camera"]["num_frames"] == 1
    left = McapRecording(path if number == signal.SIGTERM else part)
    assert [type(frame).__name__ for frame in left.frames()] == ["RadarFrame", "CameraFrame", "Label"]
    assert bool(left.report().notes) == (number == signal.SIGKILL)


def test_what_was_recorded_is_replayed_as_it_came(redis_url: str, redis_client, tmp_path: Path) -> None:
    asyncio.run(_publish_a_few(redis_url))
    before = {kind: _fields(redis_client, kind) for kind in KINDS}
    path, runner = str(tmp_path / "s.mcap"), CliRunner()
    arguments = ["--site", "north", "--seconds", "0.6", "--from-start", "--redis-url", redis_url]
    result = runner.invoke(app, ["record", path, *arguments])
    assert result.exit_code == 0, result.output
    assert "15 frames" in result.stdout
    redis_client.flushall()
    began = time.monotonic()
    result = runner.invoke(app, ["replay", path, "--speed", "20", "--redis-url", redis_url])
    assert result.exit_code == 0, result.output
    assert "15 frames published" in result.stdout
    assert {kind: _fields(redis_client, kind) for kind in KINDS} == before
    assert time.monotonic() - began < DEADLINE_S
    result = runner.invoke(app, ["doctor", path, "--json"])
    assert json.loads(result.stdout)["format"] == "mcap"
    assert json.loads(result.stdout)["picture"] is None


async def _publish_a_few(redis_url: str) -> None:
    publisher = await Publisher.connect(redis_url)
    for seq in range(5):
        at_ms = 100 * seq
        await publisher.publish(
            [radar_frame(at_ms, seq=seq), label(at_ms, "car", seq=seq), camera_frame(at_ms + 3, seq=seq)]
        )
    await publisher.close()


def _fields(client: "redis.Redis", kind: str) -> list[dict[bytes, bytes]]:
    return [fields for _, fields in client.xrange(stream_key("north", kind))]
