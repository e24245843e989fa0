"""CRUW in the layout of the ROD2021 challenge: range-azimuth maps of a 77 GHz radar beside a camera, 30 fps.

Layout after the data set's devkit (github.com/yizhou-wang/cruw-devkit), for one sequence or the whole tree:

    sequences/<split>/<SEQUENCE>/RADAR_RA_H/<frame>_<chirp>.npy   (128, 128, 2) float32: real, imaginary
    sequences/<split>/<SEQUENCE>/IMAGES_0/<frame>.jpg
    annotations/<split>/<SEQUENCE>.txt                            "frame range azimuth class", a line per object
    <SEQUENCE>/ramap_labels.csv                                   the older annotation, a VIA export

The data set has no clock. A frame's time is its number / 30 fps after its sequence's start, which is the date in
the sequence's name plus ten minutes for every sequence of that date before it, by name: always the same.
"""

import csv
import json
import re
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from services.core.errors import RecordingError
from services.core.frames import RadarFrame
from services.sensors.recordings.base import (
    Chirps,
    CorruptFile,
    ListedFile,
    ListedRecording,
    Listing,
    ReadOptions,
)
from services.sensors.recordings.files import IMAGE_SUFFIXES, read_array

FRAMES_PER_S = 30
_SEQUENCE_SLOT_S = 600
_RADAR = "RADAR_RA_H"
_IMAGES = "IMAGES_0"
_NO_DATE = datetime(2019, 1, 1, tzinfo=UTC)
_CLASSES = ("pedestrian", "cyclist", "car")
_MIN_MAGNITUDE = 1e-6  # -120 dB; a bin that is exactly zero would be minus infinity
_RADAR_NAME = re.compile(r"(\d{1,6})_(\d{1,6})\.npy")

_Parsed = tuple[int, str] | str
"""A frame number with a class, or what is wrong with its line."""


class CruwRecording(ListedRecording):
    """One sequence, or all sequences below `path` one after the other.

    heatmap: (range, azimuth) float32 in dB: the magnitude of the first chirp (`chirps="first"`, a snapshot) or
    the mean power of all chirps of the frame (`"mean"`). A frame is labelled with the class of most objects (on
    a tie the most vulnerable), `empty` when its annotated sequence names none.
    """

    format_name = "cruw"
    default_site = "cruw"

    def __init__(self, path: Path, *, chirps: Chirps = "first", site: str = "cruw") -> None:
        super().__init__(path, site=site)
        self._chirps = chirps
        self._sequences = _sequences(path)
        self._chirp_paths: dict[Path, list[Path]] = {}

    @classmethod
    def open(cls, path: Path, *, site: str, options: ReadOptions) -> Self:
        return cls(path, chirps=options.chirps, site=site)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return bool(_sequences(path))

    def list_files(self) -> Listing:
        if not self._sequences:
            raise RecordingError(
                f"{self.root} has no {_RADAR} folder",
                remedy="give a sequence's folder, or the data set's root with sequences/ in it",
            )
        listing = Listing()
        seq_start = 0
        for sequence in self._sequences:
            seq_start += self._list_sequence(sequence, listing, seq_start=seq_start)
        if not listing.files:
            raise RecordingError(
                f"{self.root} has no radar files", remedy=f"{_RADAR} must hold 000000_0000.npy and so on"
            )
        return listing

    def read_radar(self, listed: ListedFile) -> RadarFrame:
        paths = self._chirp_paths[listed.path] if self._chirps == "mean" else [listed.path]
        power = np.mean([_power(path) for path in paths], axis=0)
        heatmap = (10.0 * np.log10(np.maximum(power, _MIN_MAGNITUDE**2))).astype(np.float32)
        return RadarFrame(self.site, listed.seq, listed.captured_at_ns, heatmap=heatmap, unit="dB")

    def _list_sequence(self, sequence: Path, listing: Listing, *, seq_start: int) -> int:
        """Add a sequence's files; return how many frame numbers it takes."""
        chirps = self._list_chirps(sequence, listing)
        if not chirps:
            listing.notes.append(f"{self.name_of(sequence / _RADAR)} holds no radar file")
            return 0
        images = self._list_images(sequence, listing, has_radar=set(chirps))
        labels = self._labels(sequence, listing)
        start_ns = _start_ns(sequence)
        num_chirps = max(len(paths) for paths in chirps.values())
        for frame in range(min(chirps), max(chirps) + 1):
            captured_at_ns = start_ns + frame * 1_000_000_000 // FRAMES_PER_S
            if frame in chirps:
                first, *_ = chirps[frame]
                self._chirp_paths[first] = chirps[frame]
                if len(chirps[frame]) < num_chirps:
                    have = f"{len(chirps[frame])} of {num_chirps} chirps"
                    listing.notes.append(f"frame {frame} of {sequence.name} has {have}")
                label = labels.get(frame, "empty") if labels is not None else ""
                listing.files.append(ListedFile("radar", captured_at_ns, seq_start + frame, first, label=label))
            else:
                listing.missing.append(self.name_of(sequence / _RADAR / f"{frame:06d}_0000.npy"))
            if images is not None:
                image = images.get(frame, sequence / _IMAGES / f"{frame:010d}.jpg")
                listing.files.append(ListedFile("camera", captured_at_ns, seq_start + frame, image))
        return max(chirps) + 1

    def _list_chirps(self, sequence: Path, listing: Listing) -> dict[int, list[Path]]:
        chirps: dict[int, list[Path]] = {}
        for path in sorted((sequence / _RADAR).iterdir()):
            match = _RADAR_NAME.fullmatch(path.name)
            if match is None:
                listing.surplus.append(self.name_of(path))
            else:
                chirps.setdefault(int(match[1]), []).append(path)
        return chirps

    def _list_images(self, sequence: Path, listing: Listing, *, has_radar: set[int]) -> dict[int, Path] | None:
        if not (sequence / _IMAGES).is_dir():
            listing.notes.append(f"{sequence.name} has no {_IMAGES}: there are no images, nothing will pair")
            return None
        images: dict[int, Path] = {}
        for path in sorted((sequence / _IMAGES).iterdir()):
            inside = re.fullmatch(r"\d{1,10}", path.stem) and min(has_radar) <= int(path.stem) <= max(has_radar)
            if inside and path.suffix.lower() in IMAGE_SUFFIXES:
                images[int(path.stem)] = path
            else:
                listing.surplus.append(self.name_of(path))
        return images

    def _labels(self, sequence: Path, listing: Listing) -> dict[int, str] | None:
        """Label by frame number; None when nobody annotated the sequence."""
        path = next((path for path in _annotation_paths(sequence) if path.is_file()), None)
        if path is None:
            listing.notes.append(f"{sequence.name} has no annotations: its frames carry no labels")
            return None
        name = self.name_of(path)
        objects: dict[int, Counter[str]] = {}
        read = _read_csv if path.suffix == ".csv" else _read_txt
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, parsed in read(lines):
            if isinstance(parsed, str):
                listing.corrupt.append(CorruptFile(f"{name}:{number}", parsed))
            else:
                frame, class_name = parsed
                objects.setdefault(frame, Counter())[class_name] += 1
        return {
            frame: max(_CLASSES, key=lambda class_name: counts[class_name]) for frame, counts in objects.items()
        }


def _power(path: Path) -> npt.NDArray[np.float32]:
    """returns: (R, A) float32, squared magnitude of one chirp's complex map."""
    chirp = read_array(path)
    if chirp.ndim != 3 or chirp.shape[-1] != 2 or chirp.dtype.kind != "f":
        raise RecordingError(
            f"radar array is {chirp.shape} {chirp.dtype.name}", remedy="ROD2021 has (128, 128, 2) float32"
        )
    power: npt.NDArray[np.float32] = np.square(chirp, dtype=np.float32).sum(axis=-1)
    if not np.isfinite(power).all():
        raise RecordingError("radar array has values that are not finite", remedy="copy the file again")
    return power


def _sequences(path: Path) -> list[Path]:
    """Sequence folders at or below `path`, by name."""
    if (path / _RADAR).is_dir():
        return [path]
    tree = path / "sequences" if (path / "sequences").is_dir() else path
    found = [folder.parent for pattern in (f"*/{_RADAR}", f"*/*/{_RADAR}") for folder in tree.glob(pattern)]
    return sorted(found, key=lambda sequence: (_date(sequence), sequence.name))


def _annotation_paths(sequence: Path) -> list[Path]:
    """Where a sequence's annotations may lie, the published place first."""
    split, root = sequence.parent.name, sequence.parent.parent.parent
    return [
        root / "annotations" / split / f"{sequence.name}.txt",
        sequence / f"{sequence.name}.txt",
        sequence / "annotations.txt",
        sequence / "ramap_labels.csv",
        sequence / "annotations" / "box" / "ramap_labels.csv",
    ]


def _date(sequence: Path) -> datetime:
    match = re.match(r"(\d{4})_(\d{2})_(\d{2})", sequence.name)
    if match is None:
        return _NO_DATE
    try:
        return datetime(int(match[1]), int(match[2]), int(match[3]), tzinfo=UTC)
    except ValueError:
        return _NO_DATE


def _start_ns(sequence: Path) -> int:
    """The date in the name, plus a slot for each sequence of that date (in any split) that comes before it."""
    splits = sequence.parent.parent if sequence.parent.parent.name == "sequences" else None
    folders = splits.glob(f"*/*/{_RADAR}") if splits else sequence.parent.glob(f"*/{_RADAR}")
    date = _date(sequence)
    same_date = sorted({folder.parent.name for folder in folders if _date(folder.parent) == date})
    return (int(date.timestamp()) + same_date.index(sequence.name) * _SEQUENCE_SLOT_S) * 1_000_000_000


def _read_txt(lines: list[str]) -> list[tuple[int, _Parsed]]:
    """Line number and (frame, class) or what is wrong, per line of "frame range azimuth class"."""
    parsed: list[tuple[int, _Parsed]] = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        if len(words) < 4 or not re.fullmatch(r"\d{1,9}", words[0]) or words[3] not in _CLASSES:
            parsed.append((number, f"line is {line[:60]!r}; expected: frame range azimuth {'|'.join(_CLASSES)}"))
        else:
            parsed.append((number, (int(words[0]), words[3])))
    return parsed


def _read_csv(lines: list[str]) -> list[tuple[int, _Parsed]]:
    """The same for a VIA export: `filename` ends in the frame number, `region_attributes` is {"class": ...}."""
    parsed: list[tuple[int, _Parsed]] = []
    for number, row in enumerate(csv.DictReader(lines), start=2):
        try:
            if int(row["region_count"]) == 0:
                continue
            frame = int(Path(row["filename"]).stem.rsplit("_", 1)[-1])
            class_name = json.loads(row["region_attributes"])["class"]
            if class_name not in _CLASSES:
                raise ValueError(f"class is {class_name!r}")
            parsed.append((number, (frame, class_name)))
        except (KeyError, TypeError, ValueError) as error:
            parsed.append((number, f"row is no VIA region of {'|'.join(_CLASSES)}: {error}"))
    return parsed
