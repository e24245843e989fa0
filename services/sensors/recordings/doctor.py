"""What is in a recording: rates, gaps, how the sensors lie to one another, values, classes.

One pass, one frame in memory (and a few kept for the picture). It prints, draws and advises
nothing; see tables.py, picture.py and advice.py. Its pairing is a plain one-to-one count, not ingest's matcher.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from services.core.errors import RecordingError
from services.core.frames import CLASSES, DEFAULT_WINDOW_MS, CameraFrame, Label, RadarFrame, window_ns
from services.sensors.recordings.base import CorruptFile, Recording, RecordingReport
from services.sensors.recordings.files import decode_image

"""What ingest uses unless told otherwise, so that the count here foretells it."""
GAP_STEPS = 1.5
"""A step longer than this many median steps is a gap: at least one frame is not there."""

_SAMPLES_PER_FRAME = 2048
_MAX_SAMPLES = 2_000_000
_SCENES_AT = (1 / 6, 1 / 2, 5 / 6)
_MAX_SCENES_KEPT = 8

Scene = tuple[RadarFrame, CameraFrame | None]

Times = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Gap:
    """No frame for `seconds` after `at_s` of the recording."""

    at_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Clockwork:
    """One sensor's times. rate_hz: by the median step; span_s: first to last."""

    num_frames: int = 0
    span_s: float = 0.0
    rate_hz: float = 0.0
    step_ms: float = 0.0
    jitter_ms: float = 0.0
    num_same_time: int = 0
    gaps: tuple[Gap, ...] = ()


@dataclass(frozen=True, slots=True)
class Pairing:
    """Radar against camera. offsets: camera minus radar, nearest image, where both sensors run."""

    window_ms: int
    num_pairs: int = 0
    num_unpaired_radar: int = 0
    num_unpaired_camera: int = 0
    overlap_s: float = 0.0
    offset_ms: float = 0.0
    offset_spread_ms: float = 0.0
    enough_window_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Values:
    """What the heatmaps hold, in `unit`. low, high: 1st and 99th percentile of a sample of the values."""

    unit: str = ""
    dtypes: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    least: float = 0.0
    low: float = 0.0
    mean: float = 0.0
    high: float = 0.0
    greatest: float = 0.0
    saturated_share: float = 0.0
    num_constant: int = 0


@dataclass(frozen=True, slots=True)
class Examination:
    """Everything that was found, as plain numbers and names."""

    site: str
    report: RecordingReport
    radar: Clockwork
    camera: Clockwork
    pairing: Pairing
    values: Values
    image_shapes: tuple[str, ...]
    classes: dict[str, int]


@dataclass(slots=True)
class Examples:
    """What the picture needs beyond the numbers. pairs: (radar index, camera index) into the times, in ns."""

    radar_ns: Times = field(default_factory=lambda: np.empty(0, np.int64))
    camera_ns: Times = field(default_factory=lambda: np.empty(0, np.int64))
    pairs: list[tuple[int, int]] = field(default_factory=list)
    sample: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    scenes: list[Scene] = field(default_factory=list)


def examine(
    recording: Recording,
    *,
    window_ms: int = DEFAULT_WINDOW_MS,
    on_progress: Callable[[int], None] = lambda _: None,
) -> tuple[Examination, Examples]:
    """Read the whole recording once. Raises RecordingError when there is nothing to read."""
    seen = _Pass()
    for number, frame in enumerate(recording.frames(), start=1):
        match frame:
            case RadarFrame():
                seen.radar(frame)
            case CameraFrame():
                seen.camera(frame)
            case Label():
                seen.classes[frame.label] += 1
        on_progress(number)
    radar_ns = np.sort(np.array(seen.radar_ns, np.int64))  # a session comes by arrival, not by capture
    camera_ns = np.sort(np.array(seen.camera_ns, np.int64))
    pairs = pair_nearest(radar_ns, camera_ns, window_ns=window_ns(window_ms))
    origin_ns = int(min([*radar_ns[:1], *camera_ns[:1]], default=0))
    report = recording.report()
    found = Examination(
        recording.site,
        RecordingReport(
            report.site,
            report.counts,
            report.missing,
            (*report.corrupt, *seen.undecodable),
            report.surplus,
            report.notes,
        ),
        radar=clockwork(radar_ns, origin_ns=origin_ns),
        camera=clockwork(camera_ns, origin_ns=origin_ns),
        pairing=_pairing(radar_ns, camera_ns, num_pairs=len(pairs), window_ms=window_ms),
        values=seen.values(),
        image_shapes=tuple(sorted(seen.image_shapes)),
        classes={name: seen.classes[name] for name in CLASSES},
    )
    examples = Examples(radar_ns, camera_ns, pairs, seen.sample(), seen.scenes())
    return found, examples


def pair_nearest(radar_ns: Times, camera_ns: Times, *, window_ns: int) -> list[tuple[int, int]]:
    """One-to-one pairs (radar index, camera index) at most `window_ns` apart, nearest first. Sorted times."""
    low = np.searchsorted(camera_ns, radar_ns - window_ns, side="left")
    high = np.searchsorted(camera_ns, radar_ns + window_ns, side="right")
    candidates = sorted(
        (abs(int(camera_ns[camera] - radar_ns[radar])), radar, camera)
        for radar in range(len(radar_ns))
        for camera in range(int(low[radar]), int(high[radar]))
    )
    camera_of: dict[int, int] = {}
    used: set[int] = set()
    for _, radar, camera in candidates:
        if radar not in camera_of and camera not in used:
            camera_of[radar] = camera
            used.add(camera)
    return sorted(camera_of.items())


def clockwork(times_ns: Times, *, origin_ns: int) -> Clockwork:
    """times_ns: sorted. origin_ns: what `Gap.at_s` counts from."""
    if len(times_ns) < 2:
        return Clockwork(num_frames=len(times_ns))
    steps = np.diff(times_ns)
    moving = steps[steps > 0]
    if len(moving) == 0:
        return Clockwork(num_frames=len(times_ns), num_same_time=len(steps))
    median = float(np.median(moving))
    long = np.flatnonzero(steps > GAP_STEPS * median)
    return Clockwork(
        num_frames=len(times_ns),
        span_s=float(times_ns[-1] - times_ns[0]) / 1e9,
        rate_hz=1e9 / median,
        step_ms=median / 1e6,
        jitter_ms=float(np.median(np.abs(moving - median))) / 1e6,
        num_same_time=int(np.count_nonzero(steps == 0)),
        gaps=tuple(Gap(float(times_ns[index] - origin_ns) / 1e9, float(steps[index]) / 1e9) for index in long),
    )


@dataclass(slots=True)
class _Pass:
    """What one pass over the frames collects."""

    radar_ns: list[int] = field(default_factory=list)
    camera_ns: list[int] = field(default_factory=list)
    classes: Counter[str] = field(default_factory=Counter)
    image_shapes: set[str] = field(default_factory=set)
    undecodable: list[CorruptFile] = field(default_factory=list)
    _kept: list[Scene] = field(default_factory=list)
    _keep_every: int = 1
    _latest: CameraFrame | None = None
    _samples: list[npt.NDArray[np.float32]] = field(default_factory=list)
    _num_samples: int = 0
    _units: set[str] = field(default_factory=set)
    _dtypes: set[str] = field(default_factory=set)
    _shapes: set[str] = field(default_factory=set)
    _least: float = np.inf
    _greatest: float = -np.inf
    _num_constant: int = 0
    _num_saturated: int = 0
    _num_values: int = 0

    def radar(self, frame: RadarFrame) -> None:
        heatmap = frame.heatmap
        if len(self.radar_ns) % self._keep_every == 0:
            self._kept.append((frame, self._latest))
        if len(self._kept) > _MAX_SCENES_KEPT:
            self._kept = self._kept[::2]
            self._keep_every *= 2
        self.radar_ns.append(frame.captured_at_ns)
        self._units.add(frame.unit)
        self._dtypes.add(heatmap.dtype.name)
        self._shapes.add(" x ".join(map(str, heatmap.shape)))
        least, greatest = float(heatmap.min()), float(heatmap.max())
        self._least, self._greatest = min(self._least, least), max(self._greatest, greatest)
        self._num_constant += least == greatest
        if heatmap.dtype == np.uint8:
            self._num_saturated += int(np.count_nonzero(heatmap == 255))
        self._num_values += heatmap.size
        if self._num_samples < _MAX_SAMPLES:
            stride = max(1, heatmap.size // _SAMPLES_PER_FRAME) | 1  # odd: does not sit on one column
            sample = heatmap.reshape(-1)[::stride].astype(np.float32)
            self._samples.append(sample)
            self._num_samples += len(sample)

    def camera(self, frame: CameraFrame) -> None:
        self.camera_ns.append(frame.captured_at_ns)
        height, width, _ = frame.shape
        self.image_shapes.add(f"{width} x {height} {frame.encoding}")
        try:
            decode_image(frame.image)
        except RecordingError as error:
            self.undecodable.append(CorruptFile(f"image {frame.seq} at {frame.captured_at_ns} ns", str(error)))
            return
        self._latest = frame
        if self._kept:
            radar, before = self._kept[-1]
            if before is None or _apart_ns(radar, frame) < _apart_ns(radar, before):
                self._kept[-1] = (radar, frame)

    def scenes(self) -> list[Scene]:
        """Three of the kept radar frames, spread over the recording, each with the image nearest to it."""
        kept = [scene for scene in self._kept if scene[1] is not None] or self._kept
        picked = dict.fromkeys(int(share * len(kept)) for share in _SCENES_AT) if kept else {}
        return [kept[index] for index in picked]

    def sample(self) -> npt.NDArray[np.float32]:
        return np.concatenate(self._samples) if self._samples else np.empty(0, np.float32)

    def values(self) -> Values:
        sample = self.sample()
        if len(sample) == 0:
            return Values()
        low, high = np.percentile(sample, [1, 99])
        return Values(
            unit=", ".join(sorted(self._units)),
            dtypes=tuple(sorted(self._dtypes)),
            shapes=tuple(sorted(self._shapes)),
            least=self._least,
            low=float(low),
            mean=float(sample.mean(dtype=np.float64)),
            high=float(high),
            greatest=self._greatest,
            saturated_share=self._num_saturated / self._num_values,
            num_constant=self._num_constant,
        )


def _apart_ns(radar: RadarFrame, camera: CameraFrame) -> int:
    return abs(camera.captured_at_ns - radar.captured_at_ns)


def _pairing(radar_ns: Times, camera_ns: Times, *, num_pairs: int, window_ms: int) -> Pairing:
    unpaired_radar, unpaired_camera = len(radar_ns) - num_pairs, len(camera_ns) - num_pairs
    if len(radar_ns) == 0 or len(camera_ns) == 0:
        return Pairing(window_ms, num_pairs, unpaired_radar, unpaired_camera)
    overlap_ns = min(radar_ns[-1], camera_ns[-1]) - max(radar_ns[0], camera_ns[0])
    right = np.clip(np.searchsorted(camera_ns, radar_ns), 1, max(1, len(camera_ns) - 1))
    left_off = camera_ns[right - 1] - radar_ns
    right_off = camera_ns[np.minimum(right, len(camera_ns) - 1)] - radar_ns
    nearest = np.where(np.abs(left_off) <= np.abs(right_off), left_off, right_off)
    both = (radar_ns >= camera_ns[0]) & (radar_ns <= camera_ns[-1])
    within = nearest[both] if both.any() else nearest
    offset = float(np.median(within))
    return Pairing(
        window_ms,
        num_pairs,
        unpaired_radar,
        unpaired_camera,
        overlap_s=max(0.0, float(overlap_ns) / 1e9),
        offset_ms=offset / 1e6,
        offset_spread_ms=float(np.median(np.abs(within - offset))) / 1e6,
        enough_window_ms=float(np.percentile(np.abs(within), 95)) / 1e6,
    )
