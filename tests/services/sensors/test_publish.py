"""Pacing, back-pressure, a lost server, repetition: with a fake server, and once with the real one."""

import asyncio
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise

import pytest

from services.core.errors import StreamsError
from services.core.frames import CameraFrame, Frame, Label, RadarFrame
from services.core.streams import Publisher, StreamsLost
from services.sensors.publish import AS_FAST_AS_CONSUMED, Pace, publish, timed, wait_until_ingested
from services.sensors.recordings import RecordingReport
from tests.conftest import MS, camera_frame, label, radar_frame

MAX = Pace(speed=AS_FAST_AS_CONSUMED)


@dataclass
class FakePublisher:
    """Remembers every call and when it came; `consume` says what ingest takes at each look at the backlog."""

    calls: list[list[Frame]] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    waiting: int = 0
    most_waiting: int = 0
    consume: int | None = None
    failures: int = 0

    async def publish(self, frames: Sequence[Frame]) -> None:
        if self.failures:
            self.failures -= 1
            raise StreamsLost[0]("connection refused")
        self.calls.append(list(frames))
        self.at_s.append(asyncio.get_running_loop().time())
        self.waiting += len(frames)
        self.most_waiting = max(self.most_waiting, self.waiting)

    async def backlog(self, site: str) -> int:  # noqa: ARG002
        self.waiting = max(0, self.waiting - (self.waiting if self.consume is None else self.consume))
        return self.waiting

    @property
    def frames(self) -> list[Frame]:
        return [frame for call in self.calls for frame in call]


@dataclass
class Played:
    """A recording that is just a list of frames."""

    listed: Sequence[Frame]
    site: str = "north"

    @property
    def num_files(self) -> int:
        return len(self.listed)

    def frames(self) -> Iterator[Frame]:
        return iter(self.listed)

    def report(self) -> RecordingReport:
        return RecordingReport(self.site, {})


def steady(num: int, *, step_s: float = 0.0) -> list[tuple[float, Frame]]:
    return [(seq * step_s, radar_frame(seq * 10, seq=seq)) for seq in range(num)]


async def test_publishes_each_frame_once_in_order_and_counts_it() -> None:
    fake = FakePublisher()
    mixed = [(0.0, radar_frame(0)), (0.0, label(0, "car")), (0.0, camera_frame(3))]
    done = await publish(mixed, publisher=fake, pace=MAX, stop=asyncio.Event())
    assert fake.frames == [frame for _, frame in mixed]
    assert done.counts == {"radar": 1, "camera": 1, "labels": 1}
    assert done.num_bytes == mixed[0][1].heatmap.nbytes + len(mixed[2][1].image)
    assert done.ended == "done"


async def test_groups_what_is_due_together_into_one_call() -> None:
    fake = FakePublisher()
    await publish(steady(20), publisher=fake, pace=Pace(), stop=asyncio.Event())
    assert [len(call) for call in fake.calls] == [20]


@pytest.mark.parametrize(("speed", "took_s"), [(1.0, 0.2), (4.0, 0.05)])
async def test_keeps_the_pace(speed: float, took_s: float) -> None:
    fake = FakePublisher()
    loop = asyncio.get_running_loop()
    began = loop.time()
    await publish(steady(5, step_s=0.05), publisher=fake, pace=Pace(speed=speed), stop=asyncio.Event())
    assert len(fake.frames) == 5
    assert loop.time() - began >= took_s
    due_s = [began + frame.seq * 0.05 / speed for call in fake.calls for frame in call[-1:]]
    assert all(at_s >= due for at_s, due in zip(fake.at_s, due_s, strict=True))


async def test_as_fast_as_consumed_does_not_wait_for_the_clock() -> None:
    fake = FakePublisher()
    async with asyncio.timeout(10):
        await publish(steady(100, step_s=1000), publisher=fake, pace=MAX, stop=asyncio.Event())
    assert len(fake.frames) == 100


async def test_pauses_while_too_much_waits_for_ingest() -> None:
    fake = FakePublisher(consume=7)
    pace = Pace(speed=AS_FAST_AS_CONSUMED, max_backlog=40)
    done = await publish(steady(150), publisher=fake, pace=pace, stop=asyncio.Event())
    assert len(fake.frames) == 150
    assert fake.most_waiting <= 40
    assert done.paused_s > 0


async def test_live_sensor_never_asks_for_the_backlog() -> None:
    fake = FakePublisher(consume=0)
    await publish(steady(150), publisher=fake, pace=Pace(max_backlog=0), stop=asyncio.Event())
    assert fake.most_waiting == 150


async def test_gives_up_with_a_remedy_when_nobody_consumes() -> None:
    fake = FakePublisher(consume=0, waiting=50)
    pace = Pace(speed=AS_FAST_AS_CONSUMED, max_backlog=40, give_up_s=0.05)
    with pytest.raises(StreamsError, match=r"50 entries of site north wait.*start ingest"):
        await publish(steady(3), publisher=fake, pace=pace, stop=asyncio.Event())


async def test_sends_again_what_a_lost_server_did_not_take() -> None:
    fake = FakePublisher(failures=2)
    done = await publish(steady(40), publisher=fake, pace=MAX, stop=asyncio.Event())
    assert [frame.seq for frame in fake.frames] == list(range(40))
    assert done.num_retries == 2


async def test_gives_up_with_a_remedy_when_the_server_stays_away() -> None:
    fake = FakePublisher(failures=1000)
    with pytest.raises(StreamsError, match="check REDIS_URL"):
        await publish(steady(1), publisher=fake, pace=Pace(give_up_s=0.05), stop=asyncio.Event())


@pytest.mark.parametrize("step_s", [0.001, 1000.0])
async def test_stops_between_bursts_when_asked(step_s: float) -> None:
    stop = asyncio.Event()
    endless = ((seq * step_s, radar_frame(seq, seq=seq)) for seq in count())
    async with asyncio.timeout(10):
        done = await publish(
            endless, publisher=FakePublisher(), pace=Pace(), stop=stop, on_progress=_stop_after(stop, frames=1)
        )
    assert done.ended == "stopped"


async def test_stops_while_the_server_is_away() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, stop.set)
    fake = FakePublisher(failures=1000)
    async with asyncio.timeout(10):
        done = await publish(steady(1), publisher=fake, pace=Pace(), stop=stop)
    assert (done.ended, fake.calls) == ("stopped", [])


async def test_ends_when_a_live_source_is_too_late_to_matter() -> None:
    fake = FakePublisher(failures=1)  # costs a tenth of a second
    pace = Pace(max_lag_s=0.05)
    done = await publish(steady(100, step_s=0.001), publisher=fake, pace=pace, stop=asyncio.Event())
    assert done.ended == "behind"


async def test_slow_rendering_does_not_delay_what_is_due() -> None:
    fake = FakePublisher()
    may_go_on = threading.Event()

    def source() -> Iterator[tuple[float, Frame]]:
        for seq in range(32):
            yield 0.0, radar_frame(seq, seq=seq)
        assert may_go_on.wait(10)  # as a renderer that takes its time
        yield 0.0, radar_frame(99, seq=99)

    async with asyncio.timeout(10):
        await publish(
            source(),
            publisher=fake,
            pace=Pace(),
            stop=asyncio.Event(),
            on_progress=lambda done: may_go_on.set() if done.num_frames == 32 else None,
        )
    assert fake.frames[-1].seq == 99


async def test_a_source_that_fails_is_not_hidden() -> None:
    def source() -> Iterator[tuple[float, Frame]]:
        yield 0.0, radar_frame(0)
        raise StreamsError("the scene is gone")

    with pytest.raises(StreamsError, match="the scene is gone"):
        await publish(source(), publisher=FakePublisher(), pace=MAX, stop=asyncio.Event())


async def test_waits_until_everything_is_ingested() -> None:
    fake, seen = FakePublisher(waiting=10, consume=4), []
    await wait_until_ingested(fake, "north", stop=asyncio.Event(), give_up_s=5, on_backlog=seen.append)
    assert seen == [6, 2, 0]


def test_recording_keeps_its_own_times_unless_told() -> None:
    recording = Played([radar_frame(100, seq=4), label(100, "car", seq=4), camera_frame(130, seq=9)])
    assert [(at_s, frame) for at_s, frame in timed(recording)] == [
        (pytest.approx(at_s), frame) for at_s, frame in zip((0, 0, 0.03), recording.listed, strict=True)
    ]


def test_recording_can_be_moved_to_the_present() -> None:
    recording = Played([radar_frame(100), camera_frame(130)])
    moved = list(timed(recording, now_ns=5_000 * MS))
    assert [frame.captured_at_ns for _, frame in moved] == [5_000 * MS, 5_030 * MS]
    assert [at_s for at_s, _ in moved] == [0, pytest.approx(0.03)]


def test_repetition_goes_on_in_time_and_never_repeats_a_frame() -> None:
    recording = Played(
        [radar_frame(0, seq=1), label(0, "car", seq=1), camera_frame(10, seq=7), radar_frame(200, seq=2)]
    )
    endless = timed(recording, repeat=True)
    played = [next(endless) for _ in range(12)]
    radar = [frame for _, frame in played if isinstance(frame, RadarFrame)]
    assert [frame.captured_at_ns // MS for frame in radar] == [0, 200, 400, 600, 800, 1000]
    assert len({(type(frame), frame.id) for _, frame in played}) == 12
    assert all(later >= earlier for (earlier, _), (later, _) in pairwise(played))
    labels = [frame.id for _, frame in played if isinstance(frame, Label)]
    assert labels == [frame.id for frame in radar[::2]]
    assert [frame.captured_at_ns // MS for _, frame in played if isinstance(frame, CameraFrame)] == [10, 410, 810]


def test_repetition_of_nothing_ends() -> None:
    assert list(timed(Played([]), repeat=True)) == []


async def test_publishes_to_a_real_server_and_sees_its_backlog(publisher: Publisher) -> None:
    pace = Pace(speed=math.inf, max_backlog=0)
    done = await publish(steady(40), publisher=publisher, pace=pace, stop=asyncio.Event())
    assert done.num_frames == 40
    assert await publisher.backlog("north") == 40
    with pytest.raises(StreamsError, match="start ingest"):
        await wait_until_ingested(publisher, "north", stop=asyncio.Event(), give_up_s=0.05)


def _stop_after(stop: asyncio.Event, *, frames: int) -> Callable[[object], None]:
    def watch(done: object) -> None:
        if getattr(done, "num_frames", 0) >= frames:
            stop.set()

    return watch


@dataclass
class Session(Played):
    """Frames with their arrival."""

    arrived: Sequence[tuple[int, Frame]] = ()
    format_name: str = "mcap"

    @property
    def sites(self) -> tuple[str, ...]:
        return (self.site,)

    def frames(self) -> Iterator[Frame]:
        return (frame for _, frame in self.arrived)

    def arrivals(self) -> Iterator[tuple[int, Frame]]:
        return iter(self.arrived)


def test_a_session_is_due_by_arrival_however_its_clocks_leap() -> None:
    leaps = [radar_frame(1000, seq=0), radar_frame(86_400_000, seq=1), radar_frame(50, seq=2)]
    session = Session([], arrived=[(5000 * MS + 100 * MS * number, frame) for number, frame in enumerate(leaps)])
    assert [at_s for at_s, _ in timed(session)] == [0.0, 0.1, 0.2]
    assert [frame.captured_at_ns for _, frame in timed(session)] == [frame.captured_at_ns for frame in leaps]
    turns = timed(session, repeat=True)
    looped = [next(turns) for _ in range(9)]
    assert [round(at_s, 3) for at_s, _ in looped] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    assert len({frame.id for _, frame in looped}) == 9
    assert looped[5].frame.captured_at_ns > leaps[1].captured_at_ns  # no turn reaches back into the one before


async def test_waits_for_the_backlog_of_each_site() -> None:
    fake = FakePublisher(consume=0)
    asked: list[str] = []
    backlog = fake.backlog

    async def ask(site: str) -> int:
        asked.append(site)
        return await backlog(site)

    fake.backlog = ask  # type: ignore[method-assign]
    both = [(0.0, radar_frame(0)), (0.0, radar_frame(0, site="south"))]
    pace = Pace(speed=AS_FAST_AS_CONSUMED, max_backlog=10)
    await publish(both, publisher=fake, pace=pace, stop=asyncio.Event())
    assert asked == ["north", "south"]
