"""The generic layout, documented in docs/recordings.md: a folder with a manifest of radar files and images.

    manifest.csv (or manifest.parquet)   sensor, file, captured_at_ns | captured_at_s [, seq, label, label_source]
    recording.yaml                       optional: version, site, unit, axes, channels

It is read here, and written for the simulator; whoever can write a CSV needs no code of ours.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from services.core.errors import BadFrameError, RecordingError
from services.core.files import write_atomically
from services.core.frames import Frame, Label, RadarFrame, check_label
from services.sensors.recordings.base import (
    CorruptFile,
    ListedFile,
    ListedRecording,
    Listing,
    ReadOptions,
    RecordingReport,
)
from services.sensors.recordings.files import HEATMAP_SUFFIXES, IMAGE_SUFFIXES, read_heatmap, unix_ns

MANIFESTS = ("manifest.csv", "manifest.parquet")
DESCRIPTION = "recording.yaml"
COLUMNS = ("sensor", "file", "captured_at_ns", "seq", "label", "label_source")

_Row = tuple[int, dict[str, str]]
"""A line's number and its cells."""


class Description(BaseModel):
    """recording.yaml: what holds for all radar files. axes: empty means by the heatmap's dimensions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    site: str = ""
    unit: str = "dB"
    axes: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()


class FolderRecording(ListedRecording):
    """Anyone's recording, described by a manifest."""

    format_name = "folder"
    default_site = "recording"

    def __init__(self, path: Path, *, site: str = "") -> None:
        """site: empty means the one in recording.yaml, else "recording"."""
        self._description = _read_description(path)
        super().__init__(path, site=site or self._description.site or self.default_site)

    @classmethod
    def open(cls, path: Path, *, site: str, options: ReadOptions) -> Self:  # noqa: ARG003
        return cls(path, site=site)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return any((path / name).is_file() for name in MANIFESTS)

    def list_files(self) -> Listing:
        manifest = next((self.root / name for name in MANIFESTS if (self.root / name).is_file()), None)
        if manifest is None:
            raise RecordingError(
                f"{self.root} has no {' or '.join(MANIFESTS)}", remedy="write one; docs/recordings.md shows how"
            )
        listing = Listing()
        rows = _read_csv(manifest) if manifest.suffix == ".csv" else _read_parquet(manifest)
        next_seq = {"radar": 0, "camera": 0}
        for number, row in _readable(manifest, rows):
            try:
                listed = self._listed(row, next_seq)
            except (RecordingError, BadFrameError) as error:
                listing.corrupt.append(CorruptFile(f"{manifest.name}:{number}", str(error)))
            else:
                listing.files.append(listed)
                next_seq[listed.sensor] = listed.seq + 1
        if not listing.files:
            raise RecordingError(
                f"{manifest} lists no file that could be used"
                + (f": line {listing.corrupt[0].name}: {listing.corrupt[0].reason}" if listing.corrupt else ""),
                remedy=f"its columns are {', '.join(COLUMNS)}",
            )
        listing.surplus += self._surplus({listed.path for listed in listing.files})
        return listing

    def read_radar(self, listed: ListedFile) -> RadarFrame:
        heatmap = read_heatmap(listed.path)
        axes = self._description.axes or ("channel", "range", "azimuth")[-heatmap.ndim :]
        if len(axes) != heatmap.ndim:
            raise RecordingError(
                f"heatmap is {heatmap.shape}, axes are {axes}",
                remedy=f"name one axis per dimension in {DESCRIPTION}",
            )
        return RadarFrame(
            self.site,
            listed.seq,
            listed.captured_at_ns,
            heatmap=heatmap,
            axes=axes,
            unit=self._description.unit,
            channels=self._description.channels,
        )

    def _listed(self, row: dict[str, str], next_seq: dict[str, int]) -> ListedFile:
        sensor = row.get("sensor", "")
        if sensor not in ("radar", "camera"):
            raise RecordingError(f"sensor is {sensor!r}", remedy="use radar or camera")
        name = row.get("file", "")
        inside = PurePosixPath(name)
        if not name or inside.is_absolute() or ".." in inside.parts:
            raise RecordingError(f"file is {name!r}", remedy="name a file inside the folder, with a relative path")
        seq = row.get("seq") or str(next_seq[sensor])
        if not re.fullmatch(r"\d{1,18}", seq):
            raise RecordingError(f"seq is {seq!r}", remedy="use a whole number, or leave it empty")
        label = row.get("label", "")
        return ListedFile(
            "radar" if sensor == "radar" else "camera",
            _captured_at_ns(row),
            int(seq),
            self.root / inside,
            label=check_label(label) if label else "",
            label_source=row.get("label_source") or "recording",
        )

    def _surplus(self, listed: set[Path]) -> list[str]:
        """Pictures and arrays that lie in the same folders and are not in the manifest."""
        known = {*HEATMAP_SUFFIXES, *IMAGE_SUFFIXES}
        folders = {path.parent for path in listed}
        found = (path for folder in folders if folder.is_dir() for path in folder.iterdir())
        return sorted(self.name_of(path) for path in found if path.suffix.lower() in known and path not in listed)


@dataclass(slots=True)
class _Writer:
    """Files of frames as they come, and the manifest's rows."""

    root: Path
    rows: dict[tuple[str, int, int], dict[str, str | int]]
    labels: dict[tuple[str, int, int], Label]
    description: Description | None = None

    def add(self, frame: Frame) -> None:
        if isinstance(frame, Label):
            self.labels["radar", frame.captured_at_ns, frame.seq] = frame
            return
        sensor = "radar" if isinstance(frame, RadarFrame) else "camera"
        key = (sensor, frame.captured_at_ns, frame.seq)
        if key in self.rows:  # a sensor that delivers twice: one file is enough
            return
        stem = f"{sensor}/{frame.captured_at_ns}-{frame.seq}"
        if isinstance(frame, RadarFrame):
            self._describe(frame)
            name = f"{stem}.npy"
            np.save(self.root / name, frame.heatmap, allow_pickle=False)
        else:
            name = f"{stem}.{'jpg' if frame.encoding == 'jpeg' else 'png'}"
            (self.root / name).write_bytes(frame.image)
        self.rows[key] = {
            "sensor": sensor,
            "file": name,
            "captured_at_ns": frame.captured_at_ns,
            "seq": frame.seq,
            "label": "",
            "label_source": "",
        }

    def _describe(self, frame: RadarFrame) -> None:
        description = Description(site=frame.site, unit=frame.unit, axes=frame.axes, channels=frame.channels)
        if self.description is None:
            self.description = description
        elif self.description != description:
            raise RecordingError(
                f"radar frame {frame.captured_at_ns} is {description}, the first was {self.description}",
                remedy="write recordings of different sites or radars to different folders",
            )


def write_folder(frames: Iterable[Frame], path: Path) -> RecordingReport:
    """Write frames in any order in the generic layout; the manifest comes last, so it never names half a file.

    Raises RecordingError when `path` already holds a recording, or frames of two sites or radars come.
    """
    if FolderRecording.recognises(path):
        raise RecordingError(f"{path} already holds a recording", remedy="name a new folder")
    for sensor in ("radar", "camera"):
        (path / sensor).mkdir(parents=True, exist_ok=True)
    writer = _Writer(path, {}, {})
    for frame in frames:
        writer.add(frame)
    if not writer.rows:
        raise RecordingError("there was no frame to write", remedy="ask for more seconds")
    orphans = 0
    for key, label in writer.labels.items():
        if key in writer.rows:
            writer.rows[key] |= {"label": label.label, "label_source": label.source}
        else:  # its radar frame was dropped on the way
            orphans += 1
    description = writer.description or Description()
    write_atomically(
        path / DESCRIPTION, yaml.safe_dump(description.model_dump(mode="json"), sort_keys=False).encode()
    )
    ordered = sorted(writer.rows.values(), key=lambda row: (int(row["captured_at_ns"]), row["sensor"] != "radar"))
    lines = [",".join(COLUMNS), *(",".join(str(row[column]) for column in COLUMNS) for row in ordered)]
    write_atomically(path / MANIFESTS[0], ("\n".join(lines) + "\n").encode())
    counts = {sensor: sum(row["sensor"] == sensor for row in ordered) for sensor in ("radar", "camera")} | {
        "labels": len(writer.labels) - orphans
    }
    notes = (f"{orphans} labels of radar frames that never came are left out",) if orphans else ()
    return RecordingReport(description.site, counts, notes=notes)


def _read_description(path: Path) -> Description:
    try:
        text = (path / DESCRIPTION).read_text(encoding="utf-8")
        return Description.model_validate(yaml.safe_load(text) or {})
    except (FileNotFoundError, NotADirectoryError):
        return Description()
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecordingError(
            f"{DESCRIPTION}: {where} is {first.get('input')!r}: {first['msg']}",
            remedy="docs/recordings.md lists its fields",
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecordingError(f"{DESCRIPTION} is no YAML: {error}", remedy="see docs/recordings.md") from None


def _captured_at_ns(row: dict[str, str]) -> int:
    text = row.get("captured_at_ns", "")
    if text:
        if not re.fullmatch(r"\d{1,19}", text) or int(text) >= 2**63:
            raise RecordingError(f"captured_at_ns is {text!r}", remedy="write whole nanoseconds since 1970")
        return int(text)
    return unix_ns(row.get("captured_at_s", ""))


def _readable(path: Path, rows: Iterator[_Row]) -> Iterator[_Row]:
    try:
        yield from rows
    except csv.Error as error:
        raise RecordingError(
            f"{path} cannot be read: {error}", remedy="write plain CSV, comma-separated"
        ) from None


def _read_csv(path: Path) -> Iterator[_Row]:
    """Line numbers and rows."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        _check_columns(path, reader.fieldnames or ())
        for row in reader:
            yield (
                reader.line_num,
                {name: (value or "").strip() for name, value in row.items() if isinstance(name, str)},
            )


def _read_parquet(path: Path) -> Iterator[_Row]:
    """Row numbers and rows, every value as text. A timestamp column becomes whole nanoseconds."""
    import pyarrow as pa  # half a second that only Parquet manifests should cost
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise RecordingError(f"{path} cannot be read: {error}", remedy="write it with a Parquet library") from None
    _check_columns(path, table.column_names)
    columns: dict[str, list[Any]] = {}
    for name in table.column_names:
        column = table[name]
        if pa.types.is_timestamp(column.type):
            column = column.cast(pa.timestamp("ns")).cast(pa.int64())
        columns[name] = column.to_pylist()
    for number in range(table.num_rows):
        yield (
            number + 1,
            {name: "" if values[number] is None else str(values[number]) for name, values in columns.items()},
        )


def _check_columns(path: Path, names: Iterable[str]) -> None:
    have = set(names)
    if not {"sensor", "file"} <= have or not have & {"captured_at_ns", "captured_at_s"}:
        raise RecordingError(
            f"{path.name} has columns {', '.join(sorted(have)) or 'none'}",
            remedy="it needs sensor, file and captured_at_ns or captured_at_s",
        )
