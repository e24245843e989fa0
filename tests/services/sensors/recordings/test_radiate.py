"""RADIATE: exact times, the raw turn and its sector, labels, and survival of what is missing."""

from pathlib import Path

import numpy as np
import pytest

from services.core.errors import RecordingError, SettingsError
from services.core.frames import CameraFrame, Label, RadarFrame, window_ns
from services.sensors.recordings import RadiateRecording
from services.sensors.recordings.doctor import pair_nearest
from services.sensors.recordings.radiate import ahead, majority
from tests.services.sensors.recordings.conftest import (
    box,
    needs_radiate,
    polar_map,
    write_png,
    write_times,
    write_tracks,
)

START_NS = 1574859771_000_000_000


def test_delivers_frames_by_capture_time_and_labels_behind_their_radar_frame(radiate: Path) -> None:
    frames = list(RadiateRecording(radiate).frames())
    assert [(type(frame), frame.captured_at_ns - START_NS, frame.seq) for frame in frames] == [
        (RadarFrame, 100_000_001, 1),
        (Label, 100_000_001, 1),
        (CameraFrame, 120_000_000, 1),
        (RadarFrame, 350_000_000, 2),
        (Label, 350_000_000, 2),
        (CameraFrame, 360_000_000, 2),
        (RadarFrame, 600_000_000, 3),
        (Label, 600_000_000, 3),
    ]


def test_radar_is_the_raw_turn_in_counts(radiate: Path) -> None:
    first = next(RadiateRecording(radiate).frames())
    assert isinstance(first, RadarFrame)
    np.testing.assert_array_equal(first.heatmap, polar_map(1))
    assert (first.heatmap.dtype, first.axes, first.unit) == (np.uint8, ("range", "azimuth"), "counts")


def test_sector_keeps_what_lies_ahead_with_ahead_in_the_middle(radiate: Path) -> None:
    first = next(RadiateRecording(radiate, sector_deg=90).frames())
    assert isinstance(first, RadarFrame)
    assert first.heatmap[1].tolist() == [35, 36, 37, 38, 39, 0, 1, 2, 3, 4]


def test_sector_of_the_whole_turn_has_ahead_in_the_middle_too() -> None:
    heatmap = np.arange(4, dtype=np.uint8)[None]
    assert ahead(heatmap, sector_deg=359).tolist() == [[2, 3, 0, 1]]


def test_images_are_published_as_they_are(radiate: Path) -> None:
    images = [frame for frame in RadiateRecording(radiate).frames() if isinstance(frame, CameraFrame)]
    assert images[1].image == (radiate / "zed_left" / "000002.png").read_bytes()
    assert (images[1].shape, images[1].encoding) == ((8, 12, 3), "png")


def test_missing_and_surplus_files_are_reported_by_name_and_survived(radiate: Path) -> None:
    (radiate / "Navtech_Polar" / "000002.png").unlink()
    write_png(radiate / "Navtech_Polar" / "000009.png", polar_map(9))
    recording = RadiateRecording(radiate)
    list(recording.frames())
    report = recording.report()
    assert report.counts == {"radar": 2, "camera": 2, "labels": 2}
    assert report.missing == ("Navtech_Polar/000002.png", "zed_left/000003.png")
    assert report.surplus == ("Navtech_Polar/000009.png",)


def test_corrupt_files_and_lines_are_reported_with_a_reason_and_survived(radiate: Path) -> None:
    (radiate / "zed_left" / "000001.png").write_bytes(b"rain")
    (radiate / "Navtech_Polar" / "000003.png").write_bytes(b"\x89PNG\r\n\x1a\nrain")
    with (radiate / "zed_left.txt").open("a") as file:
        file.write("Frame: 4 Time: noon\n")
    recording = RadiateRecording(radiate)
    list(recording.frames())
    report = recording.report()
    assert report.counts == {"radar": 2, "camera": 1, "labels": 2}
    assert {bad.name for bad in report.corrupt} == {
        "zed_left/000001.png",
        "Navtech_Polar/000003.png",
        "zed_left.txt:4",
    }


def test_a_second_pass_reports_afresh(radiate: Path) -> None:
    recording = RadiateRecording(radiate)
    first = list(recording.frames()), recording.report()
    second = list(recording.frames()), recording.report()
    assert first[1] == second[1]
    assert len(first[0]) == len(second[0])


def test_label_is_the_class_of_most_boxes_inside_the_sector(radiate: Path) -> None:
    in_front, behind = box(right_px=0, forward_px=100), box(right_px=0, forward_px=-100)
    tracks = [("van", [in_front, behind]), ("bicycle", [behind, behind]), ("motorbike", [behind, behind])]
    write_tracks(radiate, tracks)
    assert _labels(RadiateRecording(radiate)) == ["cyclist", "cyclist"]  # frame 3 was never annotated
    assert _labels(RadiateRecording(radiate, sector_deg=120)) == ["car", "empty"]


@pytest.mark.parametrize(
    ("names", "label"),
    [
        ([], "empty"),
        (["car"], "car"),
        (["car", "car", "pedestrian"], "car"),
        (["car", "cyclist"], "cyclist"),
        (["car", "pedestrian", "cyclist"], "pedestrian"),
    ],
)
def test_majority_prefers_the_most_vulnerable_on_a_tie(names: list[str], label: str) -> None:
    assert majority(names) == label


@pytest.mark.parametrize(
    "text", ["{", '{"a": 1}', '[{"class_name": "car"}]', '[{"class_name": "car", "bboxes": [3]}]']
)
def test_damaged_annotations_cost_the_labels_only(radiate: Path, text: str) -> None:
    (radiate / "annotations" / "annotations.json").write_text(text)
    recording = RadiateRecording(radiate)
    list(recording.frames())
    report = recording.report()
    assert report.counts == {"radar": 3, "camera": 2, "labels": 0}
    assert [bad.name for bad in report.corrupt] == ["annotations/annotations.json"]


def test_recording_without_camera_says_so(radiate: Path) -> None:
    (radiate / "zed_left.txt").unlink()
    recording = RadiateRecording(radiate)
    list(recording.frames())
    assert recording.report().counts["camera"] == 0
    assert "nothing will pair" in recording.report().notes[0]


def test_refuses_with_a_remedy(radiate: Path) -> None:
    with pytest.raises(RecordingError, match="choose the other map"):
        list(RadiateRecording(radiate, radar="cartesian").frames())
    with pytest.raises(SettingsError, match="polar with a sector"):
        RadiateRecording(radiate, radar="cartesian", sector_deg=120)
    with pytest.raises(SettingsError, match="at most 360"):
        RadiateRecording(radiate, sector_deg=0)
    write_times(radiate / "Navtech_Polar.txt", [])
    write_times(radiate / "zed_left.txt", [])
    with pytest.raises(RecordingError, match="lists no frame"):
        list(RadiateRecording(radiate).frames())


@needs_radiate
def test_real_sample_has_18_radar_frames_50_images_and_names_50_missing(radiate_dir: Path) -> None:
    recording = RadiateRecording(radiate_dir)
    frames = list(recording.frames())
    report = recording.report()
    assert report.counts == {"radar": 18, "camera": 50, "labels": 18}
    assert report.missing == tuple(f"zed_left/{number:06d}.png" for number in range(51, 101))
    assert (report.corrupt, report.surplus) == ((), ())
    assert frames[0].captured_at_ns == 1574859771744660272
    assert {frame.heatmap.shape for frame in frames if isinstance(frame, RadarFrame)} == {(576, 400)}
    assert {frame.shape for frame in frames if isinstance(frame, CameraFrame)} == {(376, 672, 3)}
    assert {frame.label for frame in frames if isinstance(frame, Label)} == {"car"}


@needs_radiate
def test_real_sample_pairs_radar_frames_4_to_17(radiate_dir: Path) -> None:
    frames = list(RadiateRecording(radiate_dir).frames())
    radar = [frame for frame in frames if isinstance(frame, RadarFrame)]
    radar_ns = np.array([frame.captured_at_ns for frame in radar])
    camera_ns = np.array([frame.captured_at_ns for frame in frames if isinstance(frame, CameraFrame)])
    pairs = pair_nearest(radar_ns, camera_ns, window_ns=window_ns(31))
    assert [radar[index].seq for index, _ in pairs] == list(range(4, 18))
    # The farthest of them is 31.084 ms apart: 31 in whole milliseconds, as windows are meant.
    farthest_ns = max(abs(int(camera_ns[camera] - radar_ns[index])) for index, camera in pairs)
    assert farthest_ns == 31_084_236


@needs_radiate
def test_real_polar_map_has_ahead_in_column_0_clockwise(radiate_dir: Path) -> None:
    """The Cartesian map, in which the SDK puts ahead up, is found again by turning the polar map."""
    polar, cartesian = (
        next(RadiateRecording(radiate_dir, radar=radar).frames()) for radar in ("polar", "cartesian")
    )
    assert isinstance(polar, RadarFrame)
    assert isinstance(cartesian, RadarFrame)
    y, x = np.mgrid[0:1152:4, 0:1152:4]
    right, forward = x - 576, 576 - y
    distance = np.hypot(right, forward).astype(int)
    inside = distance < 570
    azimuth_deg = np.degrees(np.arctan2(right, forward))

    def similarity(*, turned_deg: float, clockwise: int) -> float:
        column = ((clockwise * azimuth_deg + turned_deg) / 0.9).astype(int) % 400
        seen = polar.heatmap[np.minimum(distance, 575), column]
        return float(np.corrcoef(seen[inside], cartesian.heatmap[::4, ::4][inside])[0, 1])

    ahead_up = similarity(turned_deg=0, clockwise=1)
    assert ahead_up > 0.7
    assert max(similarity(turned_deg=deg, clockwise=turn) for deg in (90, 180, 270) for turn in (1, -1)) < 0.4


def _labels(recording: RadiateRecording) -> list[str]:
    return [frame.label for frame in recording.frames() if isinstance(frame, Label)]
