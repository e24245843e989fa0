"""Frames from anywhere to the streams, on time: at their own pace, faster, or as fast as they are consumed.

Whatever makes the frames (a recording, the simulator) runs ahead in a thread, so that slow rendering or reading
does not delay what is already due. Frames that are due together go out in one pipelined call. It knows no
format and no scene.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

from services.core.errors import StreamsError
from services.core.frames import CameraFrame, Frame, Label, RadarFrame
from services.core.logs import logger
from services.core.streams import StreamsLost, kind_of
from services.sensors.recordings.base import OpenRecording, Recording

AS_FAST_AS_CONSUMED = math.inf

_CHUNK_FRAMES = 32
_CHUNK_BYTES = 8 * 1024 * 1024
_CHUNK_S = 0.25
_POLL_S = 0.05
_MIN_BACK_OFF_S = 0.1
_MAX_BACK_OFF_S = 5.0
_MIN_LOOP_GAP_NS = 100_000_000

_Due = tuple[float, Frame]


class PublisherLike(Protocol):
    """What is needed of services.core.streams.Publisher."""

    async def publish(self, frames: Sequence[Frame]) -> None: ...

    async def backlog(self, site: str) -> int: ...


class Timed(NamedTuple):
    """A frame and when it is due, in seconds after the first."""

    at_s: float
    frame: Frame


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast to publish, and what to do when the other side cannot follow.

    speed: 1 is real time, N is N times as fast, AS_FAST_AS_CONSUMED never waits for the clock.
    max_backlog: pause while more entries of the site wait for ingest; 0 never asks, as a live sensor.
    max_lag_s: end when this late, so that a live source can start again at the present.
    give_up_s: raise when the server was away, or nobody consumed, for this long.
    """

    speed: float = 1.0
    max_backlog: int = 500
    max_lag_s: float = math.inf
    give_up_s: float = math.inf


@dataclass(slots=True)
class Published:
    """What was published so far."""

    counts: dict[str, int] = field(default_factory=lambda: {"radar": 0, "camera": 0, "labels": 0})
    num_calls: int = 0
    num_bytes: int = 0
    num_retries: int = 0
    paused_s: float = 0.0
    ended: Literal["running", "done", "stopped", "behind"] = "running"

    @property
    def num_frames(self) -> int:
        return sum(self.counts.values())


def timed(recording: Recording, *, repeat: bool = False, now_ns: int | None = None) -> Iterator[Timed]:
    """A recording's frames with their due times, for ever if `repeat`.

    A frame is due when it arrived, where the recording knows that: a sensor's clock may leap, its frames do not.
    now_ns: move the first frame there; None keeps the recording's own times. A repetition goes on after the end,
    in times and in sequence numbers, so that no two frames are the same.
    """
    shift_ns = shift_seq = turn_at_ns = 0
    is_first = True
    while True:
        began_ns, least_ns, most_ns, last_seq, num_radar = -1, -1, -1, 0, 0
        due_ns = turn_at_ns
        for arrived_ns, frame in _arrivals(recording):
            if is_first:
                shift_ns = 0 if now_ns is None else now_ns - frame.captured_at_ns
                is_first = False
            if began_ns < 0:
                began_ns, least_ns = arrived_ns, frame.captured_at_ns
            due_ns = turn_at_ns + arrived_ns - began_ns
            least_ns, most_ns = min(least_ns, frame.captured_at_ns), max(most_ns, frame.captured_at_ns)
            last_seq = max(last_seq, frame.seq)
            num_radar += isinstance(frame, RadarFrame)
            yield Timed(
                due_ns / 1e9,
                replace(frame, captured_at_ns=frame.captured_at_ns + shift_ns, seq=frame.seq + shift_seq),
            )
        if not repeat or began_ns < 0:
            return
        span_ns = due_ns - turn_at_ns
        gap_ns = max(span_ns // max(1, num_radar - 1), _MIN_LOOP_GAP_NS)
        turn_at_ns += span_ns + gap_ns
        shift_ns += most_ns - least_ns + gap_ns
        shift_seq += last_seq + 1


def _arrivals(recording: Recording) -> Iterator[tuple[int, Frame]]:
    if isinstance(recording, OpenRecording):
        return recording.arrivals()
    return ((frame.captured_at_ns, frame) for frame in recording.frames())


async def publish(
    deliveries: Iterable[tuple[float, Frame]],
    *,
    publisher: PublisherLike,
    pace: Pace,
    stop: asyncio.Event,
    on_progress: Callable[[Published], None] = lambda _: None,
) -> Published:
    """Publish `deliveries` (due time in seconds, frame; by due time) until their end or until `stop`.

    A lost server is waited for with growing pauses and the same frames are sent again: ingest knows a frame it
    has seen. Raises StreamsError after `pace.give_up_s`.
    """
    pump = _Pump(publisher, pace, stop)
    done = pump.done
    clock = asyncio.get_running_loop().time
    started = clock()
    async with aclosing(_read_ahead(iter(deliveries))) as chunks:
        async for chunk in chunks:
            while chunk:
                if await pump.stopped_within(started + chunk[0][0] / pace.speed - clock()):
                    done.ended = "stopped"
                    return done
                elapsed_s = clock() - started
                if elapsed_s - chunk[0][0] / pace.speed > pace.max_lag_s:
                    done.ended = "behind"
                    return done
                num_due = max(1, sum(at_s / pace.speed <= elapsed_s for at_s, _ in chunk))
                await pump.send([frame for _, frame in chunk[:num_due]])
                del chunk[:num_due]
                on_progress(done)
    done.ended = "stopped" if stop.is_set() else "done"
    return done


async def wait_until_ingested(
    publisher: PublisherLike,
    site: str,
    *,
    stop: asyncio.Event,
    give_up_s: float,
    on_backlog: Callable[[int], None] = lambda _: None,
) -> None:
    """Return once ingest has acknowledged every entry of `site`, or on `stop`.

    Raises StreamsError when the backlog has not become smaller for `give_up_s`.
    """
    pump = _Pump(publisher, Pace(give_up_s=give_up_s), stop)
    await pump.wait_for_backlog(site, below=1, on_backlog=on_backlog)


class _Pump:
    """Sends bursts; insists while the server is away; pauses while the backlog is full."""

    def __init__(self, publisher: PublisherLike, pace: Pace, stop: asyncio.Event) -> None:
        self.done = Published()
        self._publisher = publisher
        self._pace = pace
        self._stop = stop
        self._credit: Counter[str] = Counter()
        self._log = logger("sensors")
        self._clock = asyncio.get_running_loop().time

    async def send(self, frames: list[Frame]) -> None:
        # The consumer only ever makes the backlog smaller, so room once seen is ours to fill without asking again.
        wanted = Counter(frame.site for frame in frames)
        for site, num in wanted.items():
            if self._pace.max_backlog and self._credit[site] < num:
                began = self._clock()
                backlog = await self.wait_for_backlog(site, below=max(1, self._pace.max_backlog - num + 1))
                self._credit[site] = max(num, self._pace.max_backlog - backlog)
                self.done.paused_s += self._clock() - began
        if not await self._insist(lambda: self._publisher.publish(frames)):
            return
        self._credit.subtract(wanted)
        self.done.num_calls += 1
        for frame in frames:
            self.done.counts[kind_of(frame)] += 1
            self.done.num_bytes += _num_bytes(frame)

    async def wait_for_backlog(
        self, site: str, *, below: int, on_backlog: Callable[[int], None] = lambda _: None
    ) -> int:
        """Wait until fewer than `below` entries wait; return how many do. Returns early on stop."""
        least, since = -1, self._clock()
        while True:
            backlogs: list[int] = []

            async def ask(into: list[int] = backlogs) -> None:
                into.append(await self._publisher.backlog(site))

            if not await self._insist(ask):
                return 0
            [backlog] = backlogs
            on_backlog(backlog)
            if backlog < below:
                return backlog
            if least < 0 or backlog < least:
                least, since = backlog, self._clock()
            elif self._clock() - since > self._pace.give_up_s:
                raise StreamsError(
                    f"{backlog} entries of site {site} wait and none was taken for {self._pace.give_up_s:.0f} s",
                    remedy="start ingest (echosight up, or python -m services.ingest) on the same server",
                )
            if await self.stopped_within(_POLL_S):
                return backlog

    async def stopped_within(self, seconds: float) -> bool:
        """Sleep unless `stop` comes first; whether it has come."""
        if self._stop.is_set() or seconds <= 0:
            return self._stop.is_set()
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _insist(self, call: Callable[[], Awaitable[None]]) -> bool:
        """Make the call until the server takes it; False when stopped before that."""
        back_off_s, lost_at = _MIN_BACK_OFF_S, self._clock()
        while True:
            try:
                await call()
            except StreamsLost as error:
                away_s = self._clock() - lost_at
                if away_s > self._pace.give_up_s:
                    raise StreamsError(
                        f"server was away for {away_s:.0f} s: {error}", remedy="start it, or check REDIS_URL"
                    ) from None
                if back_off_s == _MIN_BACK_OFF_S:
                    self._log.warning("server_lost", error=str(error))
                self.done.num_retries += 1
            else:
                if back_off_s > _MIN_BACK_OFF_S:
                    self._log.info("server_back", away_s=round(self._clock() - lost_at, 1))
                return True
            if await self.stopped_within(back_off_s):
                return False
            back_off_s = min(2 * back_off_s, _MAX_BACK_OFF_S)


async def _read_ahead(source: Iterator[_Due]) -> AsyncGenerator[list[_Due], None]:
    """Chunks of `source`; the next one is made in a thread while this one is used."""
    task = asyncio.create_task(asyncio.to_thread(_take, source))
    try:
        while chunk := await task:
            task = asyncio.create_task(asyncio.to_thread(_take, source))
            yield chunk
    finally:
        await asyncio.wait([task])  # a thread cannot be cancelled; its chunk is short
        if not task.cancelled():
            task.exception()


def _take(source: Iterator[_Due]) -> list[_Due]:
    """Some items: few, small and soon enough that nothing waits long for the chunk. Empty at the end."""
    chunk: list[_Due] = []
    num_bytes, started = 0, time.monotonic()
    for item in source:
        chunk.append(item)
        num_bytes += _num_bytes(item[1])
        late = time.monotonic() - started > _CHUNK_S
        if late or len(chunk) >= _CHUNK_FRAMES or num_bytes >= _CHUNK_BYTES:
            break
    return chunk


def _num_bytes(frame: Frame) -> int:
    match frame:
        case RadarFrame(heatmap=heatmap):
            return int(heatmap.nbytes)
        case CameraFrame(image=image):
            return len(image)
        case Label():
            return 0
