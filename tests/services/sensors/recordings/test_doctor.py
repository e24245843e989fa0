"""What the doctor finds and advises, on recordings with one known trouble each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from rich.console import Console

from services.core.errors import RecordingError
from services.core.frames import CameraFrame, Frame, Label, RadarFrame
from services.sensors.recordings import RecordingReport, detect_format, open_recording
from services.sensors.recordings.advice import advise
from services.sensors.recordings.doctor import Examination, clockwork, examine, pair_nearest
from services.sensors.recordings.picture import draw
from services.sensors.recordings.tables import show_examination, show_report
from tests.services.sensors.recordings.conftest import needs_radiate

MS = 1_000_000
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
JPEG = cv2.imencode(".jpg", PIXELS)[1].tobytes()


@dataclass(frozen=True)
class Played:
    """A recording that is just a list of frames."""

    listed: Sequence[Frame]
    site: str = "yard"

    @property
    def num_files(self) -> int:
        return len(self.listed)

    def frames(self) -> Iterator[Frame]:
        return iter(sorted(self.listed, key=lambda frame: frame.captured_at_ns))

    def report(self) -> RecordingReport:
        return RecordingReport(self.site, {"radar": 0, "camera": 0, "labels": 0})


def radar(at_ms: float, *, value: int = 9, shape: tuple[int, ...] = (4, 3)) -> RadarFrame:
    heatmap = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape) + np.uint8(value)
    return RadarFrame("yard", round(at_ms), round(at_ms * MS), heatmap=heatmap, unit="counts")


def camera(at_ms: float, *, image: bytes = JPEG) -> CameraFrame:
    return CameraFrame("yard", round(at_ms), round(at_ms * MS), image=image, shape=(8, 12, 3))


def found(frames: Sequence[Frame], *, window_ms: int = 20) -> Examination:
    return examine(Played(frames), window_ms=window_ms)[0]


def test_clockwork_of_a_steady_sensor_with_a_hole() -> None:
    times_ms = [*range(0, 1000, 100), *range(1500, 2000, 100)]
    sensor = clockwork(np.array(times_ms, np.int64) * MS, origin_ns=0)
    assert (sensor.num_frames, sensor.num_same_time) == (15, 0)
    assert (sensor.span_s, sensor.rate_hz) == (pytest.approx(1.9), pytest.approx(10))
    assert (sensor.step_ms, sensor.jitter_ms) == (pytest.approx(100), pytest.approx(0))
    assert [(gap.at_s, gap.seconds) for gap in sensor.gaps] == [(0.9, 0.6)]


@pytest.mark.parametrize(("times", "num_same_time"), [([], 0), ([5], 0), ([5, 5, 5], 2)])
def test_clockwork_of_next_to_nothing(times: list[int], num_same_time: int) -> None:
    sensor = clockwork(np.array(times, np.int64), origin_ns=0)
    assert (sensor.num_frames, sensor.rate_hz, sensor.num_same_time) == (len(times), 0, num_same_time)


def test_pairs_nearest_first_and_each_frame_once() -> None:
    radar_ns, camera_ns = np.array([100, 110]), np.array([90, 112, 200])
    assert pair_nearest(radar_ns, camera_ns, window_ns=15) == [(0, 0), (1, 1)]
    assert pair_nearest(radar_ns, np.array([108]), window_ns=15) == [(1, 0)]
    assert pair_nearest(radar_ns, np.array([125]), window_ns=15) == [(1, 0)]  # the window's edge belongs to it
    assert pair_nearest(radar_ns, np.array([126]), window_ns=15) == []


def test_tells_rates_pairs_values_and_classes() -> None:
    frames: list[Frame] = []
    for at_ms in range(0, 2000, 200):
        frames += [radar(at_ms), Label("yard", at_ms, at_ms * MS, label="car" if at_ms else "empty")]
    frames += [camera(at_ms + 7) for at_ms in range(0, 2000, 50)]
    examination, examples = examine(Played(frames), window_ms=20)
    assert (examination.radar.rate_hz, examination.camera.rate_hz) == (pytest.approx(5), pytest.approx(20))
    assert (examination.pairing.num_pairs, examination.pairing.num_unpaired_camera) == (10, 30)
    assert examination.pairing.offset_ms == pytest.approx(7)
    assert (examination.values.least, examination.values.greatest, examination.values.unit) == (9, 20, "counts")
    assert examination.classes == {"empty": 1, "pedestrian": 0, "cyclist": 0, "car": 9}
    assert len(examples.scenes) == 3
    assert all(
        image is not None and image.captured_at_ns - seen.captured_at_ns == 7 * MS
        for seen, image in examples.scenes
    )


def test_keeps_only_a_few_frames_of_a_long_recording() -> None:
    frames = [frame for at_ms in range(0, 5000, 10) for frame in (radar(at_ms), camera(at_ms + 1))]
    _, examples = examine(Played(frames))
    assert [seen.seq for seen, _ in examples.scenes] == [640, 2560, 3840]


@pytest.mark.parametrize(
    ("frames", "sentence"),
    [
        ([radar(0), radar(100)], "no readable image"),
        ([camera(0), camera(50)], "no readable radar frame"),
        ([radar(0), radar(100), camera(9e6), camera(9.1e6)], "never run at the same time"),
        ([radar(0), radar(100), radar(100), camera(0), camera(100)], "1 radar frames carry the time"),
        ([*map(radar, range(0, 900, 100)), radar(1500), camera(0)], "radar has 1 gap"),
        ([radar(0, shape=(2, 2)), radar(100), camera(0), camera(100)], "several shapes (2 x 2, 4 x 3)"),
        ([radar(0, shape=(1, 1)), radar(100, shape=(1, 1)), camera(0)], "hold one single value"),
        ([radar(0, value=244), radar(100, value=244), camera(0)], "values are 255"),
        (
            [*map(radar, range(0, 900, 100)), *(camera(at + 40) for at in range(0, 900, 100))],
            "40 ms would reach 95 %",
        ),
        ([*map(radar, range(0, 900, 100)), *(camera(at + 40) for at in range(0, 900, 100))], "a steady +40.0 ms"),
        ([radar(0), radar(100), camera(0)], "No frame is labelled"),
        ([radar(0), Label("yard", 0, 0, label="car"), radar(100)], "Every label says car"),
        ([radar(0), radar(100), camera(0, image=b"\xff\xd8\xff\xd9")], "pixels cannot be decoded"),
        ([radar(0), radar(100), camera(0)], "too short to train on"),
    ],
)
def test_advises_on_trouble(frames: list[Frame], sentence: str) -> None:
    assert any(sentence in advice for advice in advise(found(frames)))


def test_has_nothing_to_say_about_a_good_recording() -> None:
    frames: list[Frame] = []
    for at_ms in range(0, 61_000, 500):
        label = "car" if at_ms % 1000 else "empty"
        frames += [radar(at_ms), Label("yard", at_ms, at_ms * MS, label=label), camera(at_ms + 2)]
    assert advise(found(frames)) == []


def test_draws_and_prints_any_recording(tmp_path: Path) -> None:
    for name, frames in {
        "none": [],
        "radar only": [radar(0)],
        "camera only": [camera(0)],
        "both": [radar(0, shape=(2, 4, 3)), radar(100, shape=(2, 4, 3)), camera(5)],
    }.items():
        examination, examples = examine(Played(frames))
        draw(examination, examples, tmp_path / f"{name}.png", title=name)
        assert cv2.imread(str(tmp_path / f"{name}.png")).shape[2] == 3
        console = Console(file=StringIO(), width=100)
        show_examination(console, examination, advice=["look [twice]"], title=name)
        show_report(console, examination.report)
        assert isinstance(console.file, StringIO)
        assert "look [twice]" in console.file.getvalue()


def test_finds_out_the_format(radiate: Path, cruw: Path, tmp_path: Path) -> None:
    assert detect_format(radiate) == "radiate"
    assert detect_format(cruw) == "cruw"
    assert detect_format(cruw / "sequences" / "train" / "2019_04_09_BMS1000") == "cruw"
    assert open_recording(radiate).site == "radiate"
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "video.bag").touch()
    with pytest.raises(RecordingError, match=r"holds video\.bag"):
        detect_format(tmp_path / "odd")


@needs_radiate
def test_real_sample_is_understood(radiate_dir: Path) -> None:
    examination, examples = examine(open_recording(radiate_dir), window_ms=31)
    assert examination.radar.rate_hz == pytest.approx(4.04, abs=0.01)
    assert examination.camera.rate_hz == pytest.approx(14.98, abs=0.01)
    assert examination.pairing.num_pairs == 14
    assert examination.pairing.num_unpaired_radar == 4
    assert examination.classes["car"] == 18
    assert all(image is not None for _, image in examples.scenes)
    assert any("50 listed files are missing" in sentence for sentence in advise(examination))
