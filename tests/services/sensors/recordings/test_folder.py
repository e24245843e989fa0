"""The generic layout: read from CSV and Parquet, written and read back the same."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.core.errors import RecordingError
from services.core.frames import CameraFrame, Frame, Label, RadarFrame
from services.sensors.recordings import FolderRecording, write_folder
from tests.services.sensors.recordings.conftest import write_array, write_image, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "mine"
    write_array(root / "r" / "1.npy", np.ones((4, 3), np.float32))
    write_image(root / "c" / "1.jpg")
    write_manifest(
        root,
        "sensor,file,captured_at_s,label\ncamera,c/1.jpg,1700000000.020,\nradar,r/1.npy,1700000000.000000001,cyclist\n",
    )
    return root


def test_plays_a_manifest_by_time_with_labels(folder: Path) -> None:
    radar, label, camera = FolderRecording(folder).frames()
    assert isinstance(radar, RadarFrame)
    assert isinstance(camera, CameraFrame)
    assert (radar.site, radar.seq, radar.captured_at_ns) == ("recording", 0, 1700000000_000000001)
    assert (radar.axes, radar.unit) == (("range", "azimuth"), "dB")
    assert label == Label("recording", 0, 1700000000_000000001, label="cyclist", source="recording")
    assert camera.captured_at_ns == 1700000000_020000000


def test_description_gives_site_unit_axes_and_channels(folder: Path) -> None:
    write_array(folder / "r" / "1.npy", np.ones((2, 4, 3), np.float16))
    (folder / "recording.yaml").write_text(
        "version: 1\nsite: yard\nunit: counts\naxes: [channel, range, azimuth]\nchannels: [integrated, moving]\n"
    )
    radar = next(FolderRecording(folder).frames())
    assert isinstance(radar, RadarFrame)
    assert (radar.site, radar.unit, radar.channels) == ("yard", "counts", ("integrated", "moving"))


def test_the_site_asked_for_wins(folder: Path) -> None:
    (folder / "recording.yaml").write_text("site: yard\n")
    assert FolderRecording(folder, site="mast").site == "mast"
    assert FolderRecording(folder).site == "yard"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("version: 2\n", "version"),
        ("colour: red\n", "colour"),
        ("site: [\n", "no YAML"),
        ("- a\n", "valid dictionary"),
    ],
)
def test_refuses_a_description_it_does_not_understand(folder: Path, text: str, named: str) -> None:
    (folder / "recording.yaml").write_text(text)
    with pytest.raises(RecordingError, match=named):
        FolderRecording(folder)


@pytest.mark.parametrize("times", ["captured_at_ns", "captured_at_s", "timestamp"])
def test_plays_a_parquet_manifest(folder: Path, times: str) -> None:
    (folder / "manifest.csv").unlink()
    columns = {
        "captured_at_ns": pa.array([1700000000_000000001, 1700000000_020000000], pa.int64()),
        "captured_at_s": pa.array([1700000000.0, 1700000000.02], pa.float64()),
        "timestamp": pa.array([1700000000_000000001, 1700000000_020000000], pa.timestamp("ns")),
    }
    name = "captured_at_ns" if times == "timestamp" else times
    table = {
        "sensor": ["radar", "camera"],
        "file": ["r/1.npy", "c/1.jpg"],
        name: columns[times],
        "label": ["car", None],
    }
    pq.write_table(pa.table(table), folder / "manifest.parquet")
    frames = list(FolderRecording(folder).frames())
    assert [type(frame) for frame in frames] == [RadarFrame, Label, CameraFrame]
    assert abs(frames[0].captured_at_ns - 1700000000_000000001) <= 1


def test_bad_rows_and_files_are_reported_by_name_and_survived(folder: Path) -> None:
    write_array(folder / "r" / "cube.npy", np.ones((2, 2, 2, 2), np.float32))
    write_array(folder / "r" / "nan.npy", np.full((2, 2), np.nan, np.float32))
    write_array(folder / "r" / "stray.npy", np.ones((2, 2), np.float32))
    with (folder / "manifest.csv").open("a") as file:
        file.write("lidar,r/1.npy,1700000001,\nradar,../secret.npy,1700000001,\nradar,r/1.npy,noon,\n")
        file.write("radar,r/1.npy,1700000001,tram\nradar,r/gone.npy,1700000002,\nradar,r/cube.npy,1700000003,\n")
        file.write("radar,r/nan.npy,1700000004,\n")
    recording = FolderRecording(folder)
    list(recording.frames())
    report = recording.report()
    assert report.counts == {"radar": 1, "camera": 1, "labels": 1}
    assert report.missing == ("r/gone.npy",)
    assert report.surplus == ("r/stray.npy",)
    assert {bad.name for bad in report.corrupt} == {
        *(f"manifest.csv:{line}" for line in (4, 5, 6, 7)),
        "r/cube.npy",
        "r/nan.npy",
    }


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "has columns none"),
        ("file,captured_at_s\n", "needs sensor, file"),
        ("sensor,file\n", "captured_at_ns"),
        ("sensor,file,captured_at_s\n", "lists no file"),
        ("sensor,file,captured_at_s\nlidar,a.npy,1\n", "use radar or camera"),
        (f"sensor,file,captured_at_ns\nradar,a.npy,{'9' * 5000}\n", "whole nanoseconds"),
        (f"sensor,file,captured_at_s\nradar,{'x' * 200_000},1\n", "plain CSV"),
    ],
)
def test_refuses_a_manifest_with_nothing_to_play(folder: Path, text: str, named: str) -> None:
    write_manifest(folder, text)
    with pytest.raises(RecordingError, match=named):
        list(FolderRecording(folder).frames())


def test_what_is_written_plays_back_the_same(folder: Path, tmp_path: Path) -> None:
    played = list(FolderRecording(folder, site="yard").frames())
    report = write_folder(reversed(played), tmp_path / "copy")
    again = list(FolderRecording(tmp_path / "copy").frames())
    assert report.counts == {"radar": 1, "camera": 1, "labels": 1}
    assert [_plain(frame) for frame in again] == [_plain(frame) for frame in played]


def test_writing_keeps_one_file_of_a_frame_delivered_twice_and_drops_orphan_labels(
    folder: Path, tmp_path: Path
) -> None:
    radar, label, camera = FolderRecording(folder).frames()
    orphan = Label(radar.site, 9, 9, label="car")
    report = write_folder([radar, camera, radar, label, orphan], tmp_path / "copy")
    assert report.counts == {"radar": 1, "camera": 1, "labels": 1}
    assert "1 labels" in report.notes[0]


def test_refuses_to_write_over_a_recording_or_mix_two(folder: Path, tmp_path: Path) -> None:
    radar, *_ = FolderRecording(folder).frames()
    assert isinstance(radar, RadarFrame)
    with pytest.raises(RecordingError, match="already holds"):
        write_folder([radar], folder)
    with pytest.raises(RecordingError, match="different folders"):
        write_folder([radar, replace(radar, site="other", seq=1)], tmp_path / "mixed")
    with pytest.raises(RecordingError, match="no frame"):
        write_folder([], tmp_path / "none")


def _plain(frame: Frame) -> tuple[object, ...]:
    content = frame.heatmap.tolist() if isinstance(frame, RadarFrame) else None
    image = frame.image if isinstance(frame, CameraFrame) else None
    label = frame.label if isinstance(frame, Label) else None
    return (type(frame), frame.site, frame.captured_at_ns, frame.seq, content, image, label)
