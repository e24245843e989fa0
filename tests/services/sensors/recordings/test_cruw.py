"""ROD2021's published layout: complex chirps to dB, frames at 30 fps, annotations to labels."""

from pathlib import Path

import numpy as np
import pytest

from services.core.errors import RecordingError
from services.core.frames import CameraFrame, Label, RadarFrame
from services.sensors.recordings import CruwRecording
from tests.services.sensors.recordings.conftest import write_array, write_cruw_sequence, write_image

DAY_NS = 1554768000 * 10**9  # 2019-04-09, midnight UTC


def test_frames_follow_each_other_at_30_fps_from_the_date_in_the_name(cruw: Path) -> None:
    frames = list(CruwRecording(cruw).frames())
    radar = [frame for frame in frames if isinstance(frame, RadarFrame)]
    camera = [frame for frame in frames if isinstance(frame, CameraFrame)]
    assert [frame.captured_at_ns - DAY_NS for frame in radar] == [0, 33_333_333, 66_666_666]
    assert [(frame.captured_at_ns, frame.seq) for frame in camera] == [
        (frame.captured_at_ns, frame.seq) for frame in radar
    ]


def test_heatmap_is_the_magnitude_of_the_first_chirp_in_db(cruw: Path) -> None:
    radar = [frame for frame in CruwRecording(cruw).frames() if isinstance(frame, RadarFrame)]
    assert radar[0].heatmap.shape == (128, 128)
    assert (radar[0].heatmap.dtype, radar[0].unit) == (np.float32, "dB")
    assert [float(frame.heatmap[5, 7]) for frame in radar] == pytest.approx([0.0, 6.0206, 9.5424], abs=1e-3)


def test_mean_averages_the_power_of_all_chirps(cruw: Path) -> None:
    first = next(CruwRecording(cruw, chirps="mean").frames())
    assert isinstance(first, RadarFrame)
    assert float(first.heatmap[0, 0]) == pytest.approx(10 * np.log10((1 + 4 + 9 + 16) / 4), abs=1e-3)


def test_a_silent_bin_stays_finite(cruw: Path) -> None:
    path = cruw / "sequences/train/2019_04_09_BMS1000/RADAR_RA_H/000000_0000.npy"
    write_array(path, np.zeros((128, 128, 2), np.float32))
    first = next(CruwRecording(cruw).frames())
    assert isinstance(first, RadarFrame)
    assert float(first.heatmap.max()) == pytest.approx(-120)


def test_label_is_the_class_of_most_objects_and_empty_where_none_is_annotated(cruw: Path) -> None:
    assert _labels(CruwRecording(cruw)) == [(0, "car"), (1, "empty"), (2, "cyclist")]


def test_a_sequence_alone_plays_as_it_does_in_the_whole_tree(cruw: Path) -> None:
    write_cruw_sequence(cruw, "2019_04_09_CMS1002", num_frames=1)
    whole = [frame.captured_at_ns for frame in CruwRecording(cruw).frames()]
    alone = [
        frame.captured_at_ns
        for name in ("BMS1000", "CMS1002")
        for frame in CruwRecording(cruw / "sequences" / "train" / f"2019_04_09_{name}").frames()
    ]
    assert alone == whole
    assert whole[-1] - DAY_NS == 600 * 10**9


def test_sequences_of_one_tree_never_share_a_frame_id(cruw: Path) -> None:
    write_cruw_sequence(cruw, "2019_04_09_CMS1002")
    ids = [frame.id for frame in CruwRecording(cruw).frames() if isinstance(frame, RadarFrame)]
    assert len(ids) == len(set(ids)) == 6
    assert [frame_id.seq for frame_id in ids] == [0, 1, 2, 3, 4, 5]


def test_reads_the_older_annotation_as_a_via_export(tmp_path: Path) -> None:
    sequence = write_cruw_sequence(tmp_path, "2019_05_23_PM1S012", num_frames=2)
    header = "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes"
    shape = '"{""name"":""point"",""cx"":10,""cy"":20}"'
    rows = [
        f'2019_05_23_pm1s012_0000000000.jpg,1,{{}},1,0,{shape},"{{""class"":""pedestrian""}}"',
        f'2019_05_23_pm1s012_0000000001.jpg,1,{{}},1,0,{shape},"{{""class"":""tram""}}"',
        "2019_05_23_pm1s012_0000000001.jpg,1,{},0,0,{},{}",
    ]
    (sequence / "ramap_labels.csv").write_text("\n".join([header, *rows]) + "\n")
    recording = CruwRecording(sequence)
    assert _labels(recording) == [(0, "pedestrian"), (1, "empty")]
    assert [bad.name for bad in recording.report().corrupt] == ["ramap_labels.csv:3"]


def test_holes_in_the_numbering_are_missing_by_name(cruw: Path) -> None:
    sequence = cruw / "sequences/train/2019_04_09_BMS1000"
    for path in (sequence / "RADAR_RA_H").glob("000001_*.npy"):
        path.unlink()
    (sequence / "IMAGES_0" / "0000000002.jpg").unlink()
    write_image(sequence / "IMAGES_0" / "0000000077.jpg")
    (sequence / "RADAR_RA_H" / "notes.txt").write_text("rain")
    recording = CruwRecording(sequence)
    list(recording.frames())
    report = recording.report()
    assert report.counts == {"radar": 2, "camera": 2, "labels": 2}
    assert report.missing == ("RADAR_RA_H/000001_0000.npy", "IMAGES_0/0000000002.jpg")
    assert set(report.surplus) == {"IMAGES_0/0000000077.jpg", "RADAR_RA_H/notes.txt"}


@pytest.mark.parametrize(
    "array",
    [np.zeros((128, 128), np.float32), np.zeros((4, 4, 2), np.int16), np.full((4, 4, 2), np.nan, np.float32)],
)
def test_arrays_of_another_kind_are_corrupt_and_survived(cruw: Path, array: np.ndarray) -> None:
    write_array(cruw / "sequences/train/2019_04_09_BMS1000/RADAR_RA_H/000001_0000.npy", array)
    recording = CruwRecording(cruw)
    list(recording.frames())
    assert recording.report().counts["radar"] == 2
    [bad] = recording.report().corrupt
    assert bad.name.endswith("000001_0000.npy")


def test_test_split_without_images_or_annotations_is_played_with_notes(tmp_path: Path) -> None:
    sequence = write_cruw_sequence(tmp_path, "2019_05_28_CM1S013", num_frames=1, split="test")
    (sequence / "IMAGES_0" / "0000000000.jpg").unlink()
    (sequence / "IMAGES_0").rmdir()
    recording = CruwRecording(tmp_path)
    assert len(list(recording.frames())) == 1
    assert [note.split(" ", 2)[2][:6] for note in recording.report().notes] == ["no IMA", "no ann"]


def test_refuses_a_folder_without_radar(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="RADAR_RA_H"):
        list(CruwRecording(tmp_path).frames())


def _labels(recording: CruwRecording) -> list[tuple[int, str]]:
    return [(frame.seq, frame.label) for frame in recording.frames() if isinstance(frame, Label)]
