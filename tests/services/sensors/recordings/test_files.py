"""Single files: exact times, images untouched, heatmaps of a known type, and a remedy in every refusal."""

from pathlib import Path

import numpy as np
import pytest

from services.core.errors import RecordingError
from services.sensors.recordings.files import decode_image, read_array, read_heatmap, read_image, unix_ns
from tests.services.sensors.recordings.conftest import write_array, write_image, write_png


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("1574859771.744660272", 1574859771744660272),  # a float would give ...744660139
        ("1574859771", 1574859771000000000),
        ("0.000000001", 1),
        (" 12.5 ", 12500000000),
    ],
)
def test_reads_unix_seconds_without_rounding(text: str, nanoseconds: int) -> None:
    assert unix_ns(text) == nanoseconds


@pytest.mark.parametrize("text", ["", "noon", "-1", "nan", "inf", "1e300", "1574859771744660272"])
def test_refuses_what_is_no_time_of_this_age(text: str) -> None:
    with pytest.raises(RecordingError, match="write unix seconds"):
        unix_ns(text)


@pytest.mark.parametrize(("suffix", "encoding"), [("png", "png"), ("jpg", "jpeg")])
def test_reads_an_image_as_it_is(tmp_path: Path, suffix: str, encoding: str) -> None:
    path = tmp_path / f"image.{suffix}"
    write_image(path, value=40, height=8, width=12)
    image = read_image(path)
    assert image.data == path.read_bytes()
    assert (image.shape, image.encoding) == ((8, 12, 3), encoding)
    assert decode_image(image.data).shape == (8, 12, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_refuses_an_image_that_was_cut_off(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    write_image(path)
    path.write_bytes(path.read_bytes()[:-70])
    with pytest.raises(RecordingError, match="has no end"):
        read_image(path)


def test_refuses_what_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(b"GIF89a")
    with pytest.raises(RecordingError, match="starts with 47494638"):
        read_image(path)


def test_decoded_pixels_are_rgb(tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    write_png(path, np.full((4, 4, 3), (0, 0, 255), np.uint8))  # OpenCV writes blue first
    assert decode_image(path.read_bytes())[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("dtype", "read"),
    [
        ("uint8", "uint8"),
        ("float16", "float16"),
        ("float32", "float32"),
        ("float64", "float32"),
        ("int16", "float32"),
    ],
)
def test_reads_real_arrays_as_a_streamable_type(tmp_path: Path, dtype: str, read: str) -> None:
    write_array(tmp_path / "map.npy", np.arange(6, dtype=dtype).reshape(2, 3))
    heatmap = read_heatmap(tmp_path / "map.npy")
    assert heatmap.dtype.name == read
    assert heatmap.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_refuses_complex_arrays(tmp_path: Path) -> None:
    write_array(tmp_path / "map.npy", np.zeros((2, 2), np.complex64))
    with pytest.raises(RecordingError, match="power in dB"):
        read_heatmap(tmp_path / "map.npy")


def test_never_unpickles(tmp_path: Path) -> None:
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(RecordingError, match="array cannot be read"):
        read_array(tmp_path / "evil.npy")


def test_refuses_a_radar_picture_in_colour(tmp_path: Path) -> None:
    write_image(tmp_path / "map.png")
    with pytest.raises(RecordingError, match="one grey channel"):
        read_heatmap(tmp_path / "map.png")
