"""Small recordings in each format's published layout, made on the spot."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

START_S = "1574859771"
NUM_RANGES, NUM_AZIMUTHS = 6, 40

needs_radiate = pytest.mark.skipif(
    "ECHOSIGHT_RADIATE_DIR" not in os.environ, reason="ECHOSIGHT_RADIATE_DIR does not name the real recording"
)


@pytest.fixture
def radiate_dir() -> Path:
    """The real sample, wherever the environment says it lies."""
    return Path(os.environ["ECHOSIGHT_RADIATE_DIR"])


def write_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


def write_image(path: Path, *, value: int = 7, height: int = 8, width: int = 12) -> None:
    write_png(path, np.full((height, width, 3), value, np.uint8))


def write_array(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array, allow_pickle=False)


def polar_map(frame: int) -> np.ndarray:
    """Every column holds its own number, so that a turn shows; the first row holds the frame's."""
    heatmap = np.tile(np.arange(NUM_AZIMUTHS, dtype=np.uint8), (NUM_RANGES, 1))
    heatmap[0] = frame
    return heatmap


def write_times(path: Path, lines: Sequence[tuple[int, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"Frame: {frame:06d} Time: {START_S}.{fraction}\n" for frame, fraction in lines))


def box(*, right_px: float, forward_px: float) -> dict[str, Any]:
    """An SDK box whose middle is that far from the car; x, y are its upper left corner."""
    return {"position": [576 + right_px - 5, 576 - forward_px - 10, 10, 20], "rotation": 0.0}


@pytest.fixture
def radiate(tmp_path: Path) -> Path:
    """Three radar frames at .1, .35, .6 s; images at .12 and .36, a third listed and not there."""
    root = tmp_path / "fog"
    write_times(root / "Navtech_Polar.txt", [(1, "100000001"), (2, "350000000"), (3, "600000000")])
    for frame in (1, 2, 3):
        write_png(root / "Navtech_Polar" / f"{frame:06d}.png", polar_map(frame))
    write_times(root / "zed_left.txt", [(1, "120000000"), (2, "360000000"), (3, "480000000")])
    for frame in (1, 2):
        write_image(root / "zed_left" / f"{frame:06d}.png", value=frame)
    write_tracks(root, [("bus", [box(right_px=10, forward_px=100), box(right_px=10, forward_px=90), []])])
    return root


def write_tracks(root: Path, tracks: Sequence[tuple[str, list[Any]]]) -> None:
    path = root / "annotations" / "annotations.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            [
                {"id": number, "class_name": name, "bboxes": boxes}
                for number, (name, boxes) in enumerate(tracks, start=1)
            ]
        )
    )


CHIRPS = (0, 64, 128, 192)


def write_cruw_sequence(root: Path, name: str, *, num_frames: int = 3, split: str = "train") -> Path:
    """A ROD2021 sequence; frame f, chirp number c holds (f + 1) * (c + 1) as its real part everywhere."""
    sequence = root / "sequences" / split / name
    for frame in range(num_frames):
        for number, chirp in enumerate(CHIRPS):
            array = np.zeros((128, 128, 2), np.float32)
            array[..., 0] = (frame + 1) * (number + 1)
            write_array(sequence / "RADAR_RA_H" / f"{frame:06d}_{chirp:04d}.npy", array)
        write_image(sequence / "IMAGES_0" / f"{frame:010d}.jpg")
    return sequence


@pytest.fixture
def cruw(tmp_path: Path) -> Path:
    root = tmp_path / "ROD2021"
    write_cruw_sequence(root, "2019_04_09_BMS1000")
    annotations = root / "annotations" / "train"
    annotations.mkdir(parents=True)
    lines = ["0 5.1 0.20 car", "0 6.0 0.10 pedestrian", "0 7.0 0.10 car", "2 6.0 0.10 cyclist"]
    (annotations / "2019_04_09_BMS1000.txt").write_text("\n".join(lines) + "\n")
    return root


def write_manifest(root: Path, text: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "manifest.csv").write_text(text)
