"""The frames of one sensor that wait for a partner. Pure; it knows nothing of the other sensor."""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from dataclasses import dataclass
from operator import attrgetter
from typing import Generic, TypeVar

from services.core.frames import FrameId
from services.ingest.event_time import ALWAYS, FAR_NS, EventTime

T = TypeVar("T")
_NUM_SEEN = 4096
_NUM_TAKEN = 128
_BY_ID = attrgetter("id")


@dataclass(frozen=True, slots=True)
class Item(Generic[T]):
    """One frame in the matcher. payload: whatever the caller wants back."""

    id: FrameId
    payload: T
    num_bytes: int
    is_late: bool


class Source(Generic[T]):
    """One sensor's waiting frames, in order of time and sequence, and how far it has come."""

    def __init__(self, grace_ns: int, idle_timeout_s: float, now_s: float) -> None:
        self._grace_ns = grace_ns
        self._idle_timeout_s = idle_timeout_s
        self._offset_ns = 0
        self._seen: set[FrameId] = set()
        self._seen_before: set[FrameId] = set()
        self._taken_ns: deque[int] = deque(maxlen=_NUM_TAKEN)  # of the frames that got a partner lately
        self.time = EventTime(grace_ns=grace_ns)
        self.heard_at_s = now_s
        self.moved_at_s = now_s  # when its event time last went on
        self.waiting: list[Item[T]] = []
        self.times_ns: list[int] = []  # of `waiting`, less the clock offset
        self.num_bytes = 0

    def is_new(self, frame_id: FrameId) -> bool:
        """Whether the frame is none of the last few thousand; from now on it is."""
        if frame_id in self._seen or frame_id in self._seen_before:
            return False
        if len(self._seen) >= _NUM_SEEN:
            self._seen, self._seen_before = set(), self._seen
        self._seen.add(frame_id)
        return True

    def insert(self, frame_id: FrameId, payload: T, *, now_s: float, num_bytes: int) -> int:
        """Let the frame wait. Returns by how much the sensor's clock has leapt, as it confirms; else 0."""
        at_ns = frame_id.captured_at_ns - self._offset_ns
        newest_ns = self.time.newest_ns
        leap_ns = self.time.follow(at_ns)
        if self.time.newest_ns != newest_ns:
            self.moved_at_s = now_s
        is_late = at_ns <= newest_ns - self._grace_ns
        item = Item(frame_id, payload, num_bytes, is_late)
        if not self.waiting or frame_id > self.waiting[-1].id:
            self.waiting.append(item)
            self.times_ns.append(at_ns)
        else:
            insort(self.waiting, item, key=_BY_ID)
            insort(self.times_ns, at_ns)
        self.num_bytes += num_bytes
        return leap_ns

    def excuse(self, now_s: float) -> None:
        self.heard_at_s = self.moved_at_s = now_s

    def is_silent(self, now_s: float) -> bool:
        return now_s - self.heard_at_s >= self._idle_timeout_s

    def watermark_ns(self, now_s: float) -> int:
        """Nothing up to this time is waited for."""
        return ALWAYS if now_s - self.moved_at_s >= self._idle_timeout_s else self.time.watermark_ns

    def set_clock_offset(self, offset_ns: int) -> None:
        by_ns = self._offset_ns - offset_ns
        self._offset_ns = offset_ns
        self.times_ns = [at_ns + by_ns for at_ns in self.times_ns]
        self._taken_ns = deque((at_ns + by_ns for at_ns in self._taken_ns), maxlen=_NUM_TAKEN)
        self.time.shift(by_ns)

    def strays(self) -> list[int]:
        """The places of frames too far ahead of the sensor's event time."""
        if not self.times_ns or self.times_ns[-1] <= self.time.newest_ns + FAR_NS:
            return []
        first = bisect_right(self.times_ns, self.time.newest_ns + FAR_NS)
        return [at for at in range(first, len(self.times_ns)) if self.time.is_stray(self.times_ns[at])]

    def remove(self, places: list[int]) -> None:
        for at in sorted(places, reverse=True):
            self.num_bytes -= self.waiting[at].num_bytes
            del self.waiting[at], self.times_ns[at]

    def note_taken(self, at_ns: int) -> None:
        self._taken_ns.append(at_ns)

    def has_near(self, at_ns: int, window_ns: int) -> bool:
        """Whether a frame within the window waits or has got a partner."""
        first = bisect_left(self.times_ns, at_ns - window_ns)
        if first < len(self.times_ns) and self.times_ns[first] <= at_ns + window_ns:
            return True
        return any(abs(taken_ns - at_ns) <= window_ns for taken_ns in reversed(self._taken_ns))
