"""Pairing of radar and camera frames by capture time. Pure: no clock, no Redis, no disk.

The rule: of all radar and camera frames not further apart than the window, the closest two are a pair; take
them out and repeat (ties: the earlier radar frame, then the earlier camera frame). A pair or a leftover is
decided as soon as no frame still to come could change it. "Still to come" is judged per sensor by event time: a
sensor that has delivered time t may still deliver anything later than t minus the grace. A sensor that is silent
for `idle_timeout_s` of arrival time, while the other one is not, holds nobody back.

A jump of a sensor's clock by more than a minute, ahead or back, counts once a second frame in a row confirms it.
A frame far ahead that the next one did not confirm is a stray: it leaves alone, and event time goes on.
"""

from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from services.core.frames import FrameId

T = TypeVar("T")
Side = Literal["radar", "camera"]
Reason = Literal["no_partner", "partner_taken", "late", "duplicate", "stray"]
_NEVER = -(2**63)
_ALWAYS = 2**63
_NUM_SEEN = 8192
_NUM_TAKEN = 128
_MAX_JUMP_NS = 60 * 10**9


@dataclass(frozen=True, slots=True)
class Item(Generic[T]):
    """One frame in the matcher. payload: whatever the caller wants back."""

    id: FrameId
    payload: T
    is_late: bool

    @property
    def at_ns(self) -> int:
        return self.id.captured_at_ns


@dataclass(frozen=True, slots=True)
class Paired(Generic[T]):
    radar: T
    camera: T


@dataclass(frozen=True, slots=True)
class Unpaired(Generic[T]):
    side: Side
    payload: T
    reason: Reason


Decision = Paired[T] | Unpaired[T]


class Matcher(Generic[T]):
    """The frames of one site that wait for a partner. Every frame added leaves by exactly one decision."""

    def __init__(self, *, window_ns: int, grace_ns: int, idle_timeout_s: float, now_s: float) -> None:
        self._window_ns = window_ns
        self._idle_timeout_s = idle_timeout_s
        self._sources: dict[Side, _Source[T]] = {
            "radar": _Source(grace_ns, now_s),
            "camera": _Source(grace_ns, now_s),
        }
        self.counts: Counter[tuple[Side, str]] = Counter()

    def num_waiting(self, side: Side) -> int:
        return len(self._sources[side].waiting)

    def add(self, side: Side, frame_id: FrameId, payload: T, *, now_s: float) -> list[Decision[T]]:
        """Take in one frame; the answer is empty unless the frame is a duplicate."""
        if all(source.is_idle(now_s, self._idle_timeout_s) for source in self._sources.values()):
            for source in self._sources.values():  # the whole site was away: nobody was missing until now
                source.heard_at_s = now_s
        if self._sources[side].add(frame_id, payload, now_s=now_s):
            return []
        return [self._leftover(side, payload, "duplicate")]

    def excuse(self, side: Side, *, now_s: float) -> None:
        """Not count a sensor's silence so far: its frames were there, but nobody read them."""
        self._sources[side].heard_at_s = now_s

    def decide(self, *, now_s: float) -> list[Decision[T]]:
        """All that no frame still to come could change."""
        radar, camera = self._sources["radar"], self._sources["camera"]
        return self._settle(
            radar.watermark_ns(now_s, self._idle_timeout_s), camera.watermark_ns(now_s, self._idle_timeout_s)
        )

    def flush(self) -> list[Decision[T]]:
        """Decide about everything that waits, as if both sensors had ended."""
        return self._settle(_ALWAYS, _ALWAYS)

    def _settle(self, radar_watermark_ns: int, camera_watermark_ns: int) -> list[Decision[T]]:
        radars, cameras = self._sources["radar"], self._sources["camera"]
        decisions: list[Decision[T]] = []
        for side, source in self._sources.items():
            decisions += [self._leftover(side, stray.payload, "stray") for stray in source.drop_strays()]
        progress = True
        while progress:
            progress = False
            for radar in list(radars.waiting):
                camera = cameras.nearest(radar, self._window_ns)
                if camera is None or radars.nearest(camera, self._window_ns) is not radar:
                    continue
                distance_ns = abs(camera.at_ns - radar.at_ns)
                if (
                    camera_watermark_ns >= radar.at_ns + distance_ns
                    and radar_watermark_ns >= camera.at_ns + distance_ns
                ):
                    decisions.append(self._pair(radar, camera))
                    progress = True
        decisions += self._leftovers("radar", cameras, camera_watermark_ns)
        decisions += self._leftovers("camera", radars, radar_watermark_ns)
        return decisions

    def _pair(self, radar: Item[T], camera: Item[T]) -> Paired[T]:
        self._sources["radar"].take(radar)
        self._sources["camera"].take(camera)
        self.counts["radar", "paired"] += 1
        self.counts["camera", "paired"] += 1
        return Paired(radar.payload, camera.payload)

    def _leftovers(self, side: Side, others: "_Source[T]", watermark_ns: int) -> list[Decision[T]]:
        """Frames of `side` that have no partner and can get none any more; waiting is in order of time."""
        source = self._sources[side]
        decisions: list[Decision[T]] = []
        for item in list(source.waiting):
            if item.at_ns + self._window_ns > watermark_ns:
                break
            if others.nearest(item, self._window_ns) is None:
                source.drop(item)
                reason: Reason = "no_partner"
                if others.has_taken_near(item.at_ns, self._window_ns):
                    reason = "partner_taken"
                elif item.is_late:
                    reason = "late"
                decisions.append(self._leftover(side, item.payload, reason))
        return decisions

    def _leftover(self, side: Side, payload: T, reason: Reason) -> Unpaired[T]:
        self.counts[side, reason] += 1
        return Unpaired(side, payload, reason)


class _Source(Generic[T]):
    """One sensor's waiting frames, in order of time and sequence, and how far it has come."""

    def __init__(self, grace_ns: int, now_s: float) -> None:
        self._grace_ns = grace_ns
        self._newest_ns = _NEVER
        self._jump_ns: int | None = None  # the last frame's time, if it was too far off to be believed alone
        self.heard_at_s = now_s
        self._seen: OrderedDict[FrameId, None] = OrderedDict()
        self._taken_ns: deque[int] = deque(maxlen=_NUM_TAKEN)
        self._ids: list[FrameId] = []  # of `waiting`, for bisection
        self.waiting: list[Item[T]] = []

    def add(self, frame_id: FrameId, payload: T, *, now_s: float) -> bool:
        """Whether the frame is new."""
        self.heard_at_s = now_s
        if frame_id in self._seen:
            return False
        self._seen[frame_id] = None
        if len(self._seen) > _NUM_SEEN:
            self._seen.popitem(last=False)
        is_late = frame_id.captured_at_ns <= self._newest_ns - self._grace_ns
        at = bisect_left(self._ids, frame_id)
        self._ids.insert(at, frame_id)
        self.waiting.insert(at, Item(frame_id, payload, is_late))
        self._advance(frame_id.captured_at_ns)
        return True

    def _advance(self, at_ns: int) -> None:
        newest_ns, jump_ns = self._newest_ns, self._jump_ns
        if newest_ns == _NEVER or abs(at_ns - newest_ns) <= _MAX_JUMP_NS:
            self._newest_ns, self._jump_ns = max(newest_ns, at_ns), None
        elif jump_ns is not None and (jump_ns > newest_ns) == (at_ns > newest_ns):  # said twice: so it is
            self._newest_ns, self._jump_ns = max(jump_ns, at_ns), None
        else:
            self._jump_ns = at_ns

    def is_idle(self, now_s: float, idle_timeout_s: float) -> bool:
        return now_s - self.heard_at_s >= idle_timeout_s

    def watermark_ns(self, now_s: float, idle_timeout_s: float) -> int:
        """Nothing up to this time is waited for."""
        if self.is_idle(now_s, idle_timeout_s):
            return _ALWAYS
        return self._newest_ns - self._grace_ns if self._newest_ns != _NEVER else _NEVER

    def nearest(self, other: Item[T], window_ns: int) -> Item[T] | None:
        """The waiting frame closest in time to `other`, the earlier of two; None beyond the window."""
        at_ns = other.id.captured_at_ns
        after = self._first_from(at_ns)
        best: Item[T] | None = None
        best_ns = window_ns + 1
        if after > 0:
            before_ns = self._ids[after - 1].captured_at_ns
            if at_ns - before_ns <= window_ns:
                best, best_ns = self.waiting[self._first_from(before_ns)], at_ns - before_ns
        if after < len(self._ids) and self._ids[after].captured_at_ns - at_ns < best_ns:
            best = self.waiting[after]
        return best

    def _first_from(self, at_ns: int) -> int:
        return bisect_left(self._ids, FrameId(at_ns, 0))

    def take(self, item: Item[T]) -> None:
        self.drop(item)
        self._taken_ns.append(item.at_ns)

    def drop(self, item: Item[T]) -> None:
        at = bisect_left(self._ids, item.id)
        del self._ids[at], self.waiting[at]

    def drop_strays(self) -> list[Item[T]]:
        """Take out and return frames too far ahead, but for the one that the next frame may still confirm."""
        first = self._first_from(self._newest_ns + _MAX_JUMP_NS + 1)
        strays = [item for item in self.waiting[first:] if item.at_ns != self._jump_ns]
        for stray in strays:
            self.drop(stray)
        return strays

    def has_taken_near(self, at_ns: int, window_ns: int) -> bool:
        return any(abs(taken - at_ns) <= window_ns for taken in self._taken_ns)
