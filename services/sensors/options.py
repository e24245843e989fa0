"""Arguments and options that several commands share, and how to understand their text. It starts nothing."""

from pathlib import Path
from typing import Annotated

import typer

from services.core.errors import SettingsError
from services.sensors.publish import AS_FAST_AS_CONSUMED
from services.sensors.recordings import FORMATS
from services.sensors.recordings.base import Chirps, RadarView

RecordingArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="[FORMAT] PATH",
        help=f"Folder or file; before it its format, if it shall not be found out: {', '.join(FORMATS)}.",
        show_default=False,
    ),
]
PathArgument = Annotated[
    Path, typer.Argument(metavar="PATH", help="Folder or file of the recording.", show_default=False)
]
SiteOption = Annotated[
    str,
    typer.Option(
        help="Publish under this site name; empty: the recording's own. MCAP with several sites: only this one."
    ),
]
RadarOption = Annotated[RadarView, typer.Option(help="RADIATE: which of its two radar pictures.")]
SectorOption = Annotated[
    float, typer.Option(help="RADIATE polar: keep this many degrees around straight ahead; 360: the raw turn.")
]
ChirpsOption = Annotated[
    Chirps, typer.Option(help="ROD2021: the first chirp (a snapshot), or the mean power of all.")
]
RedisOption = Annotated[
    str, typer.Option("--redis-url", help="Server; empty: REDIS_URL, else the one that `echosight up` runs.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, for scripts.")]


def parse_speed(text: str) -> float:
    """ "1", "4", "x4" or "max" -> a factor. Raises SettingsError."""
    if text == "max":
        return AS_FAST_AS_CONSUMED
    try:
        speed = float(text.strip("xX×"))
    except ValueError:
        speed = 0.0
    if not 0 < speed < AS_FAST_AS_CONSUMED:
        raise SettingsError(f"speed is {text!r}", remedy="use a number above 0, or max")
    return speed


def split_format(arguments: list[str]) -> tuple[str, Path]:
    """[FORMAT] PATH -> format ("" to find out), path. Raises SettingsError."""
    match arguments:
        case [path]:
            return "", Path(path)
        case [format_name, path]:
            return format_name, Path(path)
    raise SettingsError(f"{len(arguments)} arguments: {' '.join(arguments)}", remedy="give [FORMAT] PATH")
