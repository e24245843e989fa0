"""How far a site's camera clock is from its radar clock, by when frames arrive. Pure: no clock of its own.

A frame's delay is its arrival by the stream server's clock less its capture by the sensor's. No delay is shorter
than the way takes, so the shortest of each second follow a line: the sensor's clock against the server's. The gap
between both sensors' lines is the offset, and how it changes is the drift.

What it cannot see: a constant difference between the two sensors' ways to the server. A camera whose frames always
take 20 ms longer than the radar's looks exactly like a camera clock that is 20 ms behind.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.ingest.matcher import Side

_BUCKET_MS = 1000
_WINDOW = 120  # buckets
_MIN_BUCKETS = 10
_MAX_APART = 10  # buckets between the last words of both sensors
_MAX_SLOPE = 2e-3  # of a delay over time: beyond any quartz, so a recording that is played faster or slower
_LEAP_NS = 100_000_000
_NUM_LEAP_AHEAD = 3  # buckets in a row that confirm it
_NUM_LEAP_BACK = 10  # a jam looks the same at first
_RESOLUTION_NS = 1_000_000  # of arrival times
_FLOOR_QUANTILE = 0.25  # of the buckets' shortest delays: low, but above what single wrong clocks leave
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ClockEstimate:
    """offset_ns: camera clock minus radar clock, now. drift_ppm: how fast that grows, ns per ms.

    uncertainty_ns: from the spread of the shortest delays and the resolution of arrival times; not of a constant
    difference between the ways of both sensors, which no one can see here. num_frames: that it rests on.
    """

    offset_ns: int
    drift_ppm: float
    uncertainty_ns: int
    num_frames: int


class ClockOffset:
    """The clocks of one site's sensors, over the last two minutes of arrival time. Bounded in memory."""

    def __init__(self) -> None:
        self._lines: dict[Side, _Line] = {"radar": _Line(), "camera": _Line()}

    def observe(self, side: Side, captured_at_ns: int, arrived_ms: int) -> None:
        """Take in one frame. arrived_ms: by the stream server's clock."""
        if self._lines[side].observe(captured_at_ns, arrived_ms):
            for line in self._lines.values():  # what came before a leap says nothing about the clocks after it
                line.forget_before(self._lines[side].first)

    def estimate(self) -> ClockEstimate | None:
        """The offset now. None: too little seen of one sensor lately, or a replay at another speed."""
        radar, camera = self._lines["radar"], self._lines["camera"]
        if min(radar.num_buckets, camera.num_buckets) < _MIN_BUCKETS or abs(radar.last - camera.last) > _MAX_APART:
            return None
        base_ns = radar.base_ns
        now = max(radar.last, camera.last)
        of_radar, of_camera = radar.fit(now, base_ns), camera.fit(now, base_ns)
        if max(abs(of_radar.slope), abs(of_camera.slope)) > _MAX_SLOPE:
            return None
        spread_ns = float(np.hypot(of_radar.spread_ns, of_camera.spread_ns))
        return ClockEstimate(
            offset_ns=round(of_radar.floor_ns - of_camera.floor_ns),
            drift_ppm=(of_radar.slope - of_camera.slope) * 1e6,
            uncertainty_ns=round(2 * spread_ns) + _RESOLUTION_NS,
            num_frames=radar.num_frames + camera.num_frames,
        )


@dataclass(frozen=True, slots=True)
class _Fit:
    """A sensor's shortest delays. floor_ns: now, less a base. slope: ns per ns. spread_ns: of what lies above."""

    floor_ns: float
    slope: float
    spread_ns: float


@dataclass(slots=True)
class _Bucket:
    """One second of arrivals. index: in seconds since 1970."""

    index: int
    shortest_ns: int
    num_frames: int


class _Line:
    """One sensor's shortest delay in each second of arrival time."""

    def __init__(self) -> None:
        self._buckets: deque[_Bucket] = deque(maxlen=_WINDOW)  # closed ones
        self._open: _Bucket | None = None
        self._num_off = 0  # buckets in a row that are off by a leap: ahead if positive, back if negative
        self.num_frames = 0

    @property
    def num_buckets(self) -> int:
        return len(self._buckets)

    @property
    def first(self) -> int:
        return self._buckets[0].index

    @property
    def last(self) -> int:
        return self._buckets[-1].index

    @property
    def base_ns(self) -> int:
        """A delay to count others from: floats have no room for nanoseconds since 1970."""
        return self._buckets[-1].shortest_ns

    def observe(self, captured_at_ns: int, arrived_ms: int) -> bool:
        """Take in one frame. Returns whether it closed a bucket that confirms a leap of the clock."""
        index = arrived_ms // _BUCKET_MS
        delay_ns = arrived_ms * 1_000_000 - captured_at_ns
        bucket = self._open
        if bucket is not None and index <= bucket.index and bucket.index - index <= _MAX_APART:
            bucket.num_frames += 1
            if delay_ns < bucket.shortest_ns:
                bucket.shortest_ns = delay_ns
            return False
        self._open = _Bucket(index, delay_ns, 1)
        if bucket is None:
            return False
        if index < bucket.index:  # another server, whose clock is behind
            self._buckets.clear()
            self.num_frames = self._num_off = 0
            return False
        return self._close(bucket)

    def forget_before(self, index: int) -> None:
        while self._buckets and self._buckets[0].index < index:
            self.num_frames -= self._buckets.popleft().num_frames
        self._num_off = max(-len(self._buckets), min(self._num_off, len(self._buckets)))

    def fit(self, now: int, base_ns: int) -> _Fit:
        """Theil-Sen's line through the buckets, and the floor below it, at the second `now`."""
        at_s = np.array([bucket.index - now for bucket in self._buckets], np.float64)
        delays_ns = np.array([bucket.shortest_ns - base_ns for bucket in self._buckets], np.float64)
        slope_ns_per_s = _slope(at_s, delays_ns)
        rest_ns = delays_ns - slope_ns_per_s * at_s
        floor_ns, middle_ns = np.quantile(rest_ns, (_FLOOR_QUANTILE, 0.5))
        return _Fit(float(floor_ns), slope_ns_per_s / 1e9, float(middle_ns - floor_ns))

    def _close(self, bucket: _Bucket) -> bool:
        if self._buckets:
            self.forget_before(bucket.index - _WINDOW)
        if len(self._buckets) == _WINDOW:
            self.num_frames -= self._buckets[0].num_frames
        off_ns = self._usual_ns() - bucket.shortest_ns if self._buckets else 0
        self._buckets.append(bucket)
        self.num_frames += bucket.num_frames
        if abs(off_ns) <= _LEAP_NS:
            self._num_off = 0
        elif off_ns > 0:
            self._num_off = max(self._num_off, 0) + 1
        else:
            self._num_off = min(self._num_off, 0) - 1
        if -_NUM_LEAP_BACK < self._num_off < _NUM_LEAP_AHEAD:
            return False
        num_new, self._num_off = abs(self._num_off), 0
        self.forget_before(self._buckets[-num_new].index)
        return True

    def _usual_ns(self) -> int:
        """The middle of the last buckets that are not off."""
        end = len(self._buckets) - abs(self._num_off)
        delays_ns = sorted(self._buckets[at].shortest_ns for at in range(max(end - _MIN_BUCKETS, 0), end))
        return delays_ns[len(delays_ns) // 2] if delays_ns else self._buckets[-1].shortest_ns


def _slope(at_s: _Floats, delays_ns: _Floats) -> float:
    """Theil and Sen: the median of the slopes between any two points."""
    first, second = np.triu_indices(len(at_s), 1)
    return float(np.median((delays_ns[second] - delays_ns[first]) / (at_s[second] - at_s[first])))
