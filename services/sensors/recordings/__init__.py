"""Recordings on disk, one small class per format, and how to find the right one."""

from pathlib import Path

from services.core.errors import RecordingError, SettingsError
from services.sensors.recordings.base import (
    CorruptFile,
    ListedRecording,
    ReadOptions,
    Recording,
    RecordingReport,
)
from services.sensors.recordings.cruw import CruwRecording
from services.sensors.recordings.folder import FolderRecording, write_folder
from services.sensors.recordings.radiate import RadiateRecording

FORMATS: dict[str, type[ListedRecording]] = {
    recording.format_name: recording for recording in (RadiateRecording, CruwRecording, FolderRecording)
}

DEFAULT_OPTIONS = ReadOptions()


def open_recording(
    path: Path, *, format_name: str = "", site: str = "", options: ReadOptions = DEFAULT_OPTIONS
) -> ListedRecording:
    """The recording at `path`. format_name, site: empty means detected, and the format's own.

    Raises RecordingError or SettingsError, with what was found and what would help.
    """
    if not path.is_dir():
        raise RecordingError(f"{path} is not a directory", remedy="give the folder that holds the recording")
    name = format_name or detect_format(path)
    if name not in FORMATS:
        raise SettingsError(f"format is {name!r}", remedy=f"use one of {', '.join(FORMATS)}")
    recording = FORMATS[name]
    if not site and recording is not FolderRecording:
        site = recording.default_site
    return recording.open(path, site=site, options=options)


def detect_format(path: Path) -> str:
    """The name of the format that recognises `path`. Raises RecordingError."""
    for name, recording in FORMATS.items():
        if recording.recognises(path):
            return name
    inside = sorted(entry.name for entry in path.iterdir())[:6] if path.is_dir() else []
    raise RecordingError(
        f"{path} looks like no known recording (it holds {', '.join(inside) or 'nothing'})",
        remedy="RADIATE has Navtech_Polar.txt, ROD2021 a RADAR_RA_H folder; for anything else write a "
        "manifest.csv as docs/recordings.md shows",
    )


__all__ = [
    "FORMATS",
    "CorruptFile",
    "CruwRecording",
    "FolderRecording",
    "ListedRecording",
    "RadiateRecording",
    "ReadOptions",
    "Recording",
    "RecordingReport",
    "detect_format",
    "open_recording",
    "write_folder",
]
