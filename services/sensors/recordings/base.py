"""What a recording is to everyone else: its frames in capture order, one at a time, and what was wrong with it.

A format is one small class: it lists its files with their times (`list_files`) and reads one radar file
(`read_radar`). Order, images, labels, and missing or corrupt files are handled here, once. Nothing here knows
Redis, pacing or statistics.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, Protocol, Self, runtime_checkable

from services.core.errors import BadFrameError, RecordingError
from services.core.frames import CameraFrame, Frame, Label, RadarFrame, check_heatmap, check_site
from services.sensors.recordings.files import read_image

Sensor = Literal["radar", "camera"]
RadarView = Literal["polar", "cartesian"]
Chirps = Literal["first", "mean"]

WHOLE_TURN_DEG = 360.0


class Recording(Protocol):
    """Radar and camera of one place, on disk."""

    @property
    def site(self) -> str: ...

    @property
    def num_files(self) -> int:
        """How many radar and camera files are listed, there or not; for progress bars."""

    def frames(self) -> Iterator[Frame]:
        """All frames by capture time, read one by one; a label comes directly after its radar frame."""

    def report(self) -> "RecordingReport":
        """What the last pass over `frames()` came across."""


@runtime_checkable
class OpenRecording(Recording, Protocol):
    """A recording as `open_recording` gives it: it tells its format, its sites, and when each frame came."""

    @property
    def format_name(self) -> str: ...

    @property
    def sites(self) -> tuple[str, ...]: ...

    def arrivals(self) -> Iterator[tuple[int, Frame]]:
        """All frames, each with the time at which it came, ns since 1970, in that order.

        A format that was not recorded from the streams knows capture times only, and gives those.
        """


@dataclass(frozen=True, slots=True)
class CorruptFile:
    """A file that is there and cannot be used. name: its path inside the recording."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class RecordingReport:
    """counts: frames delivered by "radar", "camera" and "labels". File names are paths inside the recording."""

    site: str
    counts: dict[str, int]
    missing: tuple[str, ...] = ()
    corrupt: tuple[CorruptFile, ...] = ()
    surplus: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How to read what a format leaves open; a format ignores what it does not know.

    radar, sector_deg: RADIATE's two radar pictures, and how many degrees around straight ahead to keep.
    chirps: ROD2021's first chirp, or the mean power of all chirps of a frame.
    """

    radar: RadarView = "polar"
    sector_deg: float = WHOLE_TURN_DEG
    chirps: Chirps = "first"


@dataclass(frozen=True, slots=True)
class ListedFile:
    """One line of a recording's index. label: one of CLASSES, or empty when nobody said anything."""

    sensor: Sensor
    captured_at_ns: int
    seq: int
    path: Path
    label: str = ""
    label_source: str = "recording"


@dataclass(slots=True)
class Listing:
    """A recording's index and what was noticed while it was read."""

    files: list[ListedFile] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    corrupt: list[CorruptFile] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class ListedRecording(ABC):
    """Base of all formats: `Recording` on top of a format's index."""

    format_name: ClassVar[str]
    default_site: ClassVar[str]

    def __init__(self, path: Path, *, site: str) -> None:
        """path: an existing directory. Raises RecordingError, or BadFrameError for an impossible site name."""
        if not path.is_dir():
            raise RecordingError(f"{path} is not a directory", remedy="give the folder that holds the recording")
        self.root = path
        self.site = check_site(site)
        self._counts: dict[str, int] = {}
        self._missing: list[str] = []
        self._corrupt: list[CorruptFile] = []

    @classmethod
    @abstractmethod
    def open(cls, path: Path, *, site: str, options: ReadOptions) -> Self:
        """A recording of this format. Raises RecordingError or SettingsError."""

    @classmethod
    @abstractmethod
    def recognises(cls, path: Path) -> bool:
        """Whether the folder looks like this format."""

    @abstractmethod
    def list_files(self) -> Listing:
        """The index, in any order. Raises RecordingError when there is nothing to play."""

    @abstractmethod
    def read_radar(self, listed: ListedFile) -> RadarFrame:
        """One radar frame. Raises FileNotFoundError, RecordingError or BadFrameError."""

    @cached_property
    def listing(self) -> Listing:
        listing = self.list_files()
        # Radar before camera at the same instant; sort() is stable, so equal lines keep the format's order.
        listing.files.sort(key=lambda listed: (listed.captured_at_ns, listed.sensor != "radar", listed.seq))
        return listing

    @property
    def num_files(self) -> int:
        return len(self.listing.files)

    @property
    def sites(self) -> tuple[str, ...]:
        return (self.site,)

    def arrivals(self) -> Iterator[tuple[int, Frame]]:
        return ((frame.captured_at_ns, frame) for frame in self.frames())

    def frames(self) -> Iterator[Frame]:
        """All frames by capture time. Files that are missing or corrupt are remembered and passed over."""
        files = self.listing.files
        self._counts = {"radar": 0, "camera": 0, "labels": 0}
        self._missing, self._corrupt = [], []
        for listed in files:
            try:
                frame = self._read(listed)
            except FileNotFoundError:
                self._missing.append(self.name_of(listed.path))
                continue
            except (BadFrameError, RecordingError) as error:
                self._corrupt.append(CorruptFile(self.name_of(listed.path), str(error)))
                continue
            self._counts[listed.sensor] += 1
            yield frame
            if listed.sensor == "radar" and listed.label:
                self._counts["labels"] += 1
                yield Label(
                    self.site, listed.seq, listed.captured_at_ns, label=listed.label, source=listed.label_source
                )

    def report(self) -> RecordingReport:
        return RecordingReport(
            self.site,
            dict(self._counts),
            missing=(*self.listing.missing, *self._missing),
            corrupt=(*self.listing.corrupt, *self._corrupt),
            surplus=tuple(self.listing.surplus),
            notes=tuple(self.listing.notes),
        )

    def name_of(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path.name

    def _read(self, listed: ListedFile) -> RadarFrame | CameraFrame:
        if listed.sensor == "radar":
            frame = self.read_radar(listed)
            check_heatmap(frame.heatmap)
            return frame
        image = read_image(listed.path)
        return CameraFrame(
            self.site,
            listed.seq,
            listed.captured_at_ns,
            image=image.data,
            shape=image.shape,
            encoding=image.encoding,
        )
