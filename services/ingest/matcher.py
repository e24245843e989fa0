"""Pairing of radar and camera frames by capture time. Pure: no clock, no Redis, no disk.

The rule: of all radar and camera frames not further apart than the window, the closest two are a pair; take them
out and repeat (ties: the earlier radar frame, then the earlier camera frame). So of all ways to pair the frames
one to one it is the one whose sorted list of (distance, radar frame, camera frame) comes first, a missing pair
counting as infinitely far.

A pair or a leftover is decided as soon as no frame still to come could change it. "Still to come" is judged per
sensor by event time: a sensor that has come to time t may still deliver anything later than t minus the grace.
A sensor whose event time stands still for `idle_timeout_s` of arrival time, while the other one is there, holds
nobody back. What waits is bounded by bytes. docs/pairing.md tells all of it, with examples.
"""

from bisect import bisect_right
from collections import Counter, deque
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from services.core.frames import FrameId
from services.ingest.closest import NOBODY, closest_first
from services.ingest.event_time import ALWAYS
from services.ingest.waiting import Source

T = TypeVar("T")
Side = Literal["radar", "camera"]
Reason = Literal["no_partner", "partner_taken", "late", "duplicate", "stray", "evicted"]
_FRAME_BYTES = 512  # what a waiting frame costs besides its payload
_NUM_LEAPS = 64
_Unit = tuple[int, int]  # the place of a radar and of a camera frame among those that wait; NOBODY for none


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
    """The frames of one site that wait for a partner. Every frame added leaves by exactly one decision.

    max_bytes: of waiting frames, both sensors together, with 512 B each on top. counts: frames by side and reason,
    "paired" included.
    """

    def __init__(
        self, *, window_ns: int, grace_ns: int, idle_timeout_s: float, max_bytes: int, now_s: float
    ) -> None:
        self._window_ns = window_ns
        self._max_bytes = max_bytes
        self._radars: Source[T] = Source(grace_ns, idle_timeout_s, now_s)
        self._cameras: Source[T] = Source(grace_ns, idle_timeout_s, now_s)
        self._sources: dict[Side, Source[T]] = {"radar": self._radars, "camera": self._cameras}
        self._settled_at: tuple[int, int] | None = None  # both watermarks, if nothing has changed since
        self._leaps: deque[tuple[Side, int]] = deque(maxlen=_NUM_LEAPS)
        self.counts: Counter[tuple[Side, str]] = Counter()

    @property
    def num_bytes(self) -> int:
        """Of all frames that wait, as counted against `max_bytes`."""
        return self._radars.num_bytes + self._cameras.num_bytes

    def num_waiting(self, side: Side) -> int:
        return len(self._sources[side].waiting)

    def add(self, side: Side, frame_id: FrameId, payload: T, *, now_s: float, num_bytes: int) -> list[Decision[T]]:
        """Take in one frame. The answer is empty but for a duplicate, a clock set back, or too many bytes."""
        if all(source.is_silent(now_s) for source in self._sources.values()):
            for source in self._sources.values():  # the whole site was away: nobody was missing until now
                source.excuse(now_s)
        source = self._sources[side]
        source.heard_at_s = now_s
        if not source.is_new(frame_id):
            self.counts[side, "duplicate"] += 1
            return [Unpaired(side, payload, "duplicate")]
        leap_ns = source.insert(frame_id, payload, now_s=now_s, num_bytes=num_bytes + _FRAME_BYTES)
        self._settled_at = None
        decisions: list[Decision[T]] = []
        if leap_ns:
            self._leaps.append((side, leap_ns))
            if leap_ns < 0:
                decisions += self._end_old_time(side)
        if self.num_bytes > self._max_bytes:
            decisions += self.decide(now_s=now_s)
            decisions += self._evict()
        return decisions

    def excuse(self, side: Side, *, now_s: float) -> None:
        """Not count a sensor's silence so far: its frames were there, but nobody read them."""
        self._sources[side].excuse(now_s)

    def set_clock_offset(self, offset_ns: int) -> None:
        """Compare the camera's times as captured_at_ns - offset_ns from now on, those that wait as well."""
        self._cameras.set_clock_offset(offset_ns)
        self._settled_at = None

    def take_leaps(self) -> list[tuple[Side, int]]:
        """The leaps of the sensors' clocks since the last call, the newest 64: whose, and how many ns ahead."""
        leaps = list(self._leaps)
        self._leaps.clear()
        return leaps

    def decide(self, *, now_s: float) -> list[Decision[T]]:
        """All that no frame still to come could change."""
        return self._settle(self._radars.watermark_ns(now_s), self._cameras.watermark_ns(now_s))

    def flush(self) -> list[Decision[T]]:
        """Decide about everything that waits, as if both sensors had ended."""
        return self._settle(ALWAYS, ALWAYS)

    def _settle(self, radar_ns: int, camera_ns: int) -> list[Decision[T]]:
        """What is decided once each sensor delivers nothing any more up to its watermark.

        Two outcomes bound all others: any number of camera frames and no radar frame to come, and the reverse. A
        pair in both is sure. A frame without a partner in the outcome that is the best for it will get none.
        """
        if self._settled_at == (radar_ns, camera_ns):
            return []
        self._settled_at = radar_ns, camera_ns
        decisions = self._drop_strays()
        radars, cameras = self._radars, self._cameras
        if not self._may_settle(radar_ns, camera_ns):
            return decisions
        of_radars = self._best_for(radars, cameras, camera_ns)
        of_cameras = self._best_for(cameras, radars, radar_ns)
        units: list[_Unit] = []
        for radar, camera in enumerate(of_radars):
            if camera == NOBODY:
                units.append((radar, NOBODY))
            elif 0 <= camera < len(of_cameras) and of_cameras[camera] == radar:
                units.append((radar, camera))
        units += [(NOBODY, camera) for camera, radar in enumerate(of_cameras) if radar == NOBODY]
        return decisions + self._release(units, None)

    def _may_settle(self, radar_ns: int, camera_ns: int) -> bool:
        """Whether the watermarks have come far enough for the oldest frames; a cheap look, most often enough."""
        first_radar_ns = self._radars.times_ns[0] if self._radars.times_ns else ALWAYS
        first_camera_ns = self._cameras.times_ns[0] if self._cameras.times_ns else ALWAYS
        return (
            (first_radar_ns <= camera_ns and first_camera_ns <= radar_ns)
            or first_radar_ns + self._window_ns <= camera_ns
            or first_camera_ns + self._window_ns <= radar_ns
        )

    def _best_for(self, source: Source[T], others: Source[T], others_ns: int) -> list[int]:
        """For each frame of `source` up to the others' watermark its best partner, however many of them come."""
        ones_ns = source.times_ns[: bisect_right(source.times_ns, others_ns)]
        if not ones_ns:
            return []
        end_ns = min(others_ns, ones_ns[-1] + self._window_ns)
        others_times_ns = others.times_ns[: bisect_right(others.times_ns, end_ns)]
        return closest_first(ones_ns, others_times_ns, window_ns=self._window_ns, open_from_ns=others_ns + 1)

    def _all_units(self) -> list[_Unit]:
        """All that waits, paired as if both sensors had ended: in order of radar time, lone cameras last."""
        cameras_ns = self._cameras.times_ns
        units = list(enumerate(self._best_for(self._radars, self._cameras, ALWAYS)))
        taken = {camera for _, camera in units}
        return units + [(NOBODY, camera) for camera in range(len(cameras_ns)) if camera not in taken]

    def _end_old_time(self, side: Side) -> list[Decision[T]]:
        """After its clock was set back, let go of the sensor's frames from before: paired, where they can be."""
        source = self._sources[side]
        first = bisect_right(source.times_ns, source.time.newest_ns)
        which = 0 if side == "radar" else 1
        return self._release([unit for unit in self._all_units() if unit[which] >= first], "evicted")

    def _evict(self) -> list[Decision[T]]:
        """Let the oldest go until an eighth of the bytes is free, so that the next frame need not do it again."""
        radars, cameras = self._radars, self._cameras
        excess = self.num_bytes - self._max_bytes * 7 // 8
        if self.num_bytes <= self._max_bytes:
            return []
        oldest: list[tuple[int, _Unit, int]] = []
        for radar, camera in self._all_units():
            times_ns = [source.times_ns[at] for source, at in ((radars, radar), (cameras, camera)) if at >= 0]
            sizes = [
                source.waiting[at].num_bytes for source, at in ((radars, radar), (cameras, camera)) if at >= 0
            ]
            oldest.append((min(times_ns), (radar, camera), sum(sizes)))
        units: list[_Unit] = []
        for _, unit, size in sorted(oldest):
            if excess <= 0:
                break
            units.append(unit)
            excess -= size
        return self._release(units, "evicted")

    def _drop_strays(self) -> list[Decision[T]]:
        """Frames too far ahead of their sensor, but for one that the next frame may still confirm."""
        decisions: list[Decision[T]] = []
        radars, cameras = self._radars.strays(), self._cameras.strays()
        if radars or cameras:
            units = [(radar, NOBODY) for radar in radars] + [(NOBODY, camera) for camera in cameras]
            decisions += self._release(units, "stray")
        return decisions

    def _release(self, units: list[_Unit], reason: Reason | None) -> list[Decision[T]]:
        """Take `units` out, the pairs first. reason: why frames without a partner leave; None: find out."""
        radars, cameras = self._radars, self._cameras
        decisions: list[Decision[T]] = []
        for radar, camera in units:
            if radar >= 0 and camera >= 0:
                decisions.append(Paired(radars.waiting[radar].payload, cameras.waiting[camera].payload))
                radars.note_taken(radars.times_ns[radar])
                cameras.note_taken(cameras.times_ns[camera])
        if decisions:
            self.counts["radar", "paired"] += len(decisions)
            self.counts["camera", "paired"] += len(decisions)
        for radar, camera in units:
            if camera == NOBODY:
                decisions.append(self._leftover("radar", radar, reason))
            elif radar == NOBODY:
                decisions.append(self._leftover("camera", camera, reason))
        radars.remove([radar for radar, _ in units if radar >= 0])
        cameras.remove([camera for _, camera in units if camera >= 0])
        return decisions

    def _leftover(self, side: Side, at: int, reason: Reason | None) -> Unpaired[T]:
        source, others = self._sources[side], self._sources["camera" if side == "radar" else "radar"]
        item = source.waiting[at]
        if reason is None:
            reason = "late" if item.is_late else "no_partner"
            if others.has_near(source.times_ns[at], self._window_ns):
                reason = "partner_taken"
        self.counts[side, reason] += 1
        return Unpaired(side, item.payload, reason)
