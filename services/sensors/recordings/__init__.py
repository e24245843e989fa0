"""Recordings on disk, one small class per format, and how to find the right one."""

from pathlib import Path

from services.core.errors import RecordingError, SettingsError
from services.sensors.recordings.base import (
    CorruptFile,
    ListedRecording,
    OpenRecording,
    ReadOptions,
    Recording,
    RecordingReport,
)
from services.sensors.recordings.cruw import CruwRecording
from services.sensors.recordings.folder import FolderRecording, write_folder
from services.sensors.recordings.mcap import McapRecording, is_mcap
from services.sensors.recordings.radiate import RadiateRecording

FOLDER_FORMATS: dict[str, type[ListedRecording]] = {
    recording.format_name: recording for recording in (RadiateRecording, CruwRecording, FolderRecording)
}
FORMATS = (*FOLDER_FORMATS, McapRecording.format_name)

DEFAULT_OPTIONS = ReadOptions()


def open_recording(
    path: Path, *, format_name: str = "", site: str = "", options: ReadOptions = DEFAULT_OPTIONS
) -> OpenRecording:
    """The recording at `path`. format_name, site: empty means detected, and the recording's own.

    Raises RecordingError or SettingsError, with what was found and what would help.
    """
    if format_name and format_name not in FORMATS:
        raise SettingsError(f"format is {format_name!r}", remedy=f"use one of {', '.join(FORMATS)}")
    if not path.exists():
        raise RecordingError(
            f"{path} is not a directory, nor a file",
            remedy="give the folder that holds the recording, or its file",
        )
    name = format_name or detect_format(path)
    if name == McapRecording.format_name:
        if not path.is_file():
            raise RecordingError(f"{path} is not a file", remedy="give the MCAP file itself")
        return McapRecording(path, site=site)
    if not path.is_dir():
        raise RecordingError(f"{path} is not a directory", remedy="give the folder that holds the recording")
    recording = FOLDER_FORMATS[name]
    if not site and recording is not FolderRecording:
        site = recording.default_site
    return recording.open(path, site=site, options=options)


def detect_format(path: Path) -> str:
    """The name of the format that recognises `path`. Raises RecordingError."""
    if path.is_file():
        if is_mcap(path):
            return McapRecording.format_name
        raise RecordingError(f"{path} is not an MCAP file", remedy="of other formats give the folder")
    for name, recording in FOLDER_FORMATS.items():
        if recording.recognises(path):
            return name
    inside = sorted(entry.name for entry in path.iterdir())[:6] if path.is_dir() else []
    raise RecordingError(
        f"{path} looks like no known recording (it holds {', '.join(inside) or 'nothing'})",
        remedy="RADIATE has Navtech_Polar.txt, ROD2021 a RADAR_RA_H folder; for anything else write a "
        "manifest.csv as docs/recordings.md shows",
    )


__all__ = [
    "FOLDER_FORMATS",
    "FORMATS",
    "CorruptFile",
    "CruwRecording",
    "FolderRecording",
    "ListedRecording",
    "McapRecording",
    "OpenRecording",
    "RadiateRecording",
    "ReadOptions",
    "Recording",
    "RecordingReport",
    "detect_format",
    "open_recording",
    "write_folder",
]
