"""RADIATE: a turning Navtech radar and a forward ZED camera on a car, in bad weather.

Layout and meaning after the data set's SDK (github.com/marcelsheeny/radiate_sdk): `Navtech_Polar.txt`,
`Navtech_Cartesian.txt` and `zed_left.txt` hold "Frame: 000001 Time: <unix seconds>", the folder of the same name
holds the pictures. The polar map is 576 ranges (rows, 0.1736 m) by 400 azimuths (columns, 0.9 degrees,
clockwise); column 0 looks straight ahead, which is up in the Cartesian map (the car stands in its middle).
"""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, Self, cast

import numpy as np

from services.core.errors import RecordingError, SettingsError
from services.core.frames import Heatmap, RadarFrame
from services.sensors.recordings.base import (
    WHOLE_TURN_DEG,
    CorruptFile,
    ListedFile,
    ListedRecording,
    Listing,
    RadarView,
    ReadOptions,
)
from services.sensors.recordings.files import IMAGE_SUFFIXES, read_heatmap, unix_ns

CLASS_OF = {
    "car": "car",
    "van": "car",
    "truck": "car",
    "bus": "car",
    "vehicle": "car",
    "motorbike": "cyclist",
    "bicycle": "cyclist",
    "pedestrian": "pedestrian",
    "group_of_pedestrians": "pedestrian",
}
_TIE_ORDER = ("pedestrian", "cyclist", "car")
_SIDE_PX = 1152
_FOLDER = {"polar": "Navtech_Polar", "cartesian": "Navtech_Cartesian"}
_CAMERA = "zed_left"
_LINE = re.compile(r"Frame:\s*(\d{1,18})\s+Time:\s*(\S+)")


class RadiateRecording(ListedRecording):
    """One RADIATE sequence: radar, left camera, and one label per annotated radar frame.

    The heatmap is the raw whole turn, (576, 400) uint8 in "counts", or with `sector_deg` < 360 that many degrees
    with straight ahead in the middle column; `cartesian` is (1152, 1152) uint8, axes (y, x). A frame is labelled
    with the class of most boxes inside what is kept (on a tie the most vulnerable of them), `empty` without one.
    """

    format_name = "radiate"
    default_site = "radiate"

    def __init__(
        self,
        path: Path,
        *,
        radar: RadarView = "polar",
        site: str = "radiate",
        sector_deg: float = WHOLE_TURN_DEG,
    ) -> None:
        super().__init__(path, site=site)
        if not 0 < sector_deg <= WHOLE_TURN_DEG:
            raise SettingsError(f"sector is {sector_deg} degrees", remedy="use more than 0 and at most 360")
        if radar == "cartesian" and sector_deg != WHOLE_TURN_DEG:
            raise SettingsError(
                f"sector of {sector_deg} degrees of the Cartesian map", remedy="use --radar polar with a sector"
            )
        self._radar = radar
        self._sector_deg = sector_deg
        self._folder = _FOLDER[radar]

    @classmethod
    def open(cls, path: Path, *, site: str, options: ReadOptions) -> Self:
        return cls(path, radar=options.radar, site=site, sector_deg=options.sector_deg)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return any((path / f"{folder}.txt").is_file() for folder in _FOLDER.values())

    def list_files(self) -> Listing:
        if not (self.root / f"{self._folder}.txt").is_file():
            raise RecordingError(
                f"{self.root} has no {self._folder}.txt",
                remedy="give the sequence's folder, or choose the other map with --radar polar|cartesian",
            )
        listing = Listing()
        labels = self._labels(listing)
        self._list_sensor("radar", self._folder, listing, labels)
        if (self.root / f"{_CAMERA}.txt").is_file():
            self._list_sensor("camera", _CAMERA, listing, {})
        else:
            listing.notes.append(f"no {_CAMERA}.txt: there are no images, nothing will pair")
        if not listing.files:
            raise RecordingError(
                f"{self._folder}.txt lists no frame",
                remedy="its lines must read: Frame: 000001 Time: 1574859771.7",
            )
        return listing

    def read_radar(self, listed: ListedFile) -> RadarFrame:
        heatmap = read_heatmap(listed.path)
        axes = ("range", "azimuth") if self._radar == "polar" else ("y", "x")
        if self._sector_deg < WHOLE_TURN_DEG:
            heatmap = ahead(heatmap, sector_deg=self._sector_deg)
        return RadarFrame(self.site, listed.seq, listed.captured_at_ns, heatmap=heatmap, axes=axes, unit="counts")

    def _list_sensor(self, sensor: Any, folder: str, listing: Listing, labels: dict[int, str]) -> None:
        on_disk = {path.name for path in (self.root / folder).glob("*") if path.is_file()}
        text = (self.root / f"{folder}.txt").read_text(encoding="utf-8", errors="replace")
        listed_names = set()
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                frame, captured_at_ns = _parse_line(line)
            except RecordingError as error:
                listing.corrupt.append(CorruptFile(f"{folder}.txt:{number}", str(error)))
                continue
            names = [frame + suffix for suffix in IMAGE_SUFFIXES]
            name = next((name for name in names if name in on_disk), names[0])
            listed_names.add(name)
            path = self.root / folder / name
            label = labels.get(int(frame), "")
            listing.files.append(ListedFile(sensor, captured_at_ns, int(frame), path, label=label))
        listing.surplus += sorted(f"{folder}/{name}" for name in on_disk - listed_names)

    def _labels(self, listing: Listing) -> dict[int, str]:
        """Label by radar frame number. bboxes[i] belongs to frame i + 1 (the SDK's get_annotation_from_id)."""
        path = self.root / "annotations" / "annotations.json"
        try:
            tracks = cast(list[dict[str, Any]], json.loads(path.read_bytes()))
            boxes: dict[int, list[str]] = {}
            for track in tracks:
                name = str(track["class_name"])
                if name not in CLASS_OF:
                    listing.notes.append(f"annotated class {name!r} is not known and left out")
                    continue
                for frame, box in enumerate(track["bboxes"], start=1):
                    inside = boxes.setdefault(frame, [])
                    if box and self._keeps(box["position"]):
                        inside.append(CLASS_OF[name])
        except FileNotFoundError:
            listing.notes.append("no annotations/annotations.json: frames carry no labels")
            return {}
        except (ValueError, KeyError, TypeError) as error:
            reason = f"not the SDK's structure ({type(error).__name__}: {error}); frames carry no labels"
            listing.corrupt.append(CorruptFile(self.name_of(path), reason))
            return {}
        return {frame: majority(names) for frame, names in boxes.items()}

    def _keeps(self, position: list[float]) -> bool:
        """position: x, y, width, height in pixels of the Cartesian map."""
        x, y, width, height = position
        right, forward = x + width / 2 - _SIDE_PX / 2, _SIDE_PX / 2 - (y + height / 2)
        return abs(math.degrees(math.atan2(right, forward))) <= self._sector_deg / 2


def ahead(heatmap: Heatmap, *, sector_deg: float) -> Heatmap:
    """heatmap: (R, A), column 0 straight ahead, clockwise. returns: (R, n), straight ahead in column n // 2."""
    num_azimuths = heatmap.shape[1]
    half = max(1, round(num_azimuths * sector_deg / WHOLE_TURN_DEG / 2))
    return np.ascontiguousarray(np.roll(heatmap, half, axis=1)[:, : 2 * half])


def majority(names: list[str]) -> str:
    """The class of most boxes; on a tie the most vulnerable of them; `empty` without boxes."""
    counts = Counter(names)
    return max(_TIE_ORDER, key=lambda name: counts[name]) if counts else "empty"


def _parse_line(line: str) -> tuple[str, int]:
    match = _LINE.fullmatch(line.strip())
    if match is None:
        raise RecordingError(f"line is {line.strip()[:60]!r}", remedy="write Frame: 000001 Time: 1574859771.7")
    return match[1], unix_ns(match[2])
