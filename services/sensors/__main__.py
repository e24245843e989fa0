"""`python -m services.sensors`: simulate a site, replay or import a recording, ask the doctor about one.

Options, progress and printing live here; reading, pacing and simulating do not.
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import cv2
import typer
from rich.console import Console
from threadpoolctl import threadpool_limits

from services.core.errors import EchosightError, SettingsError
from services.core.frames import DEFAULT_WINDOW_MS
from services.core.logs import configure_logs
from services.sensors.console import print_error, progress
from services.sensors.publish import AS_FAST_AS_CONSUMED
from services.sensors.recordings import FORMATS, ListedRecording, ReadOptions, open_recording
from services.sensors.recordings.base import WHOLE_TURN_DEG, Chirps, RadarView
from services.sensors.settings import SensorsSettings

app = typer.Typer(
    name="sensors",
    help="Publish frames: from a simulated site, or from a recording.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)

_PICTURE_S, _FILM_S = 300.0, 10.0

FormatArgument = Annotated[
    str, typer.Argument(metavar="FORMAT", help=f"{' | '.join(FORMATS)}, or auto to find out.", show_default=False)
]
PathArgument = Annotated[Path, typer.Argument(metavar="PATH", help="Folder of the recording.", show_default=False)]
SiteOption = Annotated[str, typer.Option(help="Publish under this site name; empty: the format's own.")]
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


@app.command(no_args_is_help=True)
def simulate(
    site: Annotated[str, typer.Option(help="A shipped site, or the path of a .yaml file. See --sites.")] = "",
    seconds: Annotated[
        float | None, typer.Option(min=0.1, help="How long; not given: for ever (--publish).")
    ] = None,
    publish_: Annotated[bool, typer.Option("--publish", help="Send frames to the streams, live.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write a recording to this new folder instead.")] = None,
    preview: Annotated[
        Path | None, typer.Option(help="Draw radar and camera to this .png or .mp4 instead.")
    ] = None,
    sites: Annotated[bool, typer.Option("--sites", help="List the shipped sites.")] = False,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Same seed, same frames; not given: 0, live: new.")
    ] = None,
    speed: Annotated[str, typer.Option(help="With --publish: 1 is live, N is N times as fast, or max.")] = "1",
    radar: Annotated[str, typer.Option(help="The radar: cruw_77ghz or iwr6843_60ghz.")] = "cruw_77ghz",
    radar_fps: Annotated[float | None, typer.Option(help="Radar frames a second.")] = None,
    camera_fps: Annotated[float | None, typer.Option(help="Camera frames a second.")] = None,
    label_share: Annotated[float | None, typer.Option(help="Share of radar frames that get a label.")] = None,
    label_mistakes: Annotated[float | None, typer.Option(help="Share of those that are wrong.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A number of radar, camera or traffic: radar.drop_share=0.1, radar.tx_power_dbm=6; repeat.",
        ),
    ] = None,
    redis_url: RedisOption = "",
    as_json: JsonOption = False,
) -> None:
    """Simulate a site with radar, camera and traffic: live, into a folder, or to look at.

    [bold]Examples[/bold]

      echosight simulate --publish                                 a live site, for ever

      echosight simulate --site park --seconds 60 --out park_1     a recording

      echosight replay folder park_1 --speed 4                     ... and play it

      echosight simulate --site street --preview street.png        look at it

      echosight simulate --publish --set radar.drop_share=0.1      try ingest
    """
    from services.sensors.simulate import record_scene, scene_maker, simulation_settings
    from services.sensors.simulator import LabelSettings, list_sites

    if sites:
        for name, shipped in list_sites().items():
            typer.echo(f"{name:<12} {shipped.description}")
        return
    if sum((publish_, out is not None, preview is not None)) != 1:
        raise SettingsError("nothing or too much to do", remedy="give one of --publish, --out DIR, --preview FILE")
    settings = _settings(
        redis_url,
        simulated_site=site or None,
        radar_fps=radar_fps,
        camera_fps=camera_fps,
        label_share=label_share,
        label_mistakes=label_mistakes,
    )
    simulation = simulation_settings(
        radar=radar, radar_fps=settings.radar_fps, camera_fps=settings.camera_fps, changes=tuple(changes or ())
    )
    labels = LabelSettings(share=settings.label_share, mistakes=settings.label_mistakes)
    if seed is None:
        seed = int(time.time()) if publish_ else 0
    make = scene_maker(settings.simulated_site, seed=seed, settings=simulation)
    if publish_:
        from services.sensors.sessions import stream

        factor = parse_speed(speed)
        published = asyncio.run(stream(make, settings, labels=labels, seconds=seconds, speed=factor))
        facts = {"site": settings.simulated_site, "seed": seed, "published": asdict(published)}
        _tell(facts, f"{published.num_frames} frames published ({published.ended})", as_json=as_json)
    elif out is not None:
        if seconds is None:
            raise SettingsError("a recording without an end", remedy="say how long: --seconds 60")
        with progress(f"simulating {settings.simulated_site}", seconds) as advance_to:
            report = record_scene(make(0), out, seconds=seconds, labels=labels, on_progress=advance_to)
        text = f"{out}: " + ", ".join(f"{count} {name}" for name, count in report.counts.items())
        _tell({"seed": seed, "out": str(out), "report": asdict(report)}, text, as_json=as_json)
    elif preview is not None:
        from services.sensors.preview import VIDEO
        from services.sensors.preview import preview as draw_preview

        seconds = seconds or (_FILM_S if preview.suffix == VIDEO else _PICTURE_S)
        with progress(f"drawing {settings.simulated_site}", seconds) as advance_to:
            draw_preview(make(0), preview, seconds=seconds, on_progress=advance_to)
        _tell({"seed": seed, "preview": str(preview)}, f"preview: {preview}", as_json=as_json)


@app.command(no_args_is_help=True)
def replay(
    format_name: FormatArgument,
    path: PathArgument,
    speed: Annotated[
        str, typer.Option(help="1: as recorded; N: N times as fast; max: as fast as ingest takes it.")
    ] = "1",
    loop: Annotated[bool, typer.Option("--loop", help="Repeat for ever; times go on after the end.")] = False,
    now: Annotated[bool, typer.Option("--now", help="Shift times so that the first frame is now.")] = False,
    site: SiteOption = "",
    radar: RadarOption = "polar",
    sector_deg: SectorOption = WHOLE_TURN_DEG,
    chirps: ChirpsOption = "first",
    redis_url: RedisOption = "",
    as_json: JsonOption = False,
) -> None:
    """Publish a recording, at its own pace or faster, and name every file that could not be played.

    Times are those of the recording, so playing it twice stores it once.

    [bold]Examples[/bold]

      echosight replay radiate fog_6_0                    as it was recorded

      echosight replay radiate fog_6_0 --sector-deg 120   only straight ahead

      echosight replay folder my_recording --speed 4      four times as fast

      echosight replay cruw ROD2021 --speed max           as fast as ingested

      echosight replay auto fog_6_0 --loop --now          an endless demo
    """
    recording = _open(format_name, path, site=site, radar=radar, sector_deg=sector_deg, chirps=chirps)
    _play(
        recording, speed=parse_speed(speed), loop=loop, now=now, wait=False, redis_url=redis_url, as_json=as_json
    )


@app.command("import", no_args_is_help=True)
def import_(
    format_name: FormatArgument,
    path: PathArgument,
    site: SiteOption = "",
    radar: RadarOption = "polar",
    sector_deg: SectorOption = WHOLE_TURN_DEG,
    chirps: ChirpsOption = "first",
    redis_url: RedisOption = "",
    as_json: JsonOption = False,
) -> None:
    """Publish a recording as fast as ingest takes it, and wait until all of it is ingested.

    [bold]Examples[/bold]

      echosight import radiate fog_6_0

      echosight import cruw ROD2021/sequences/train/2019_04_09_BMS1000 --site parking

      echosight import folder my_recording --json | jq .report.missing
    """
    recording = _open(format_name, path, site=site, radar=radar, sector_deg=sector_deg, chirps=chirps)
    _play(recording, speed=AS_FAST_AS_CONSUMED, wait=True, redis_url=redis_url, as_json=as_json)


@app.command(no_args_is_help=True)
def doctor(
    path: PathArgument,
    format_name: Annotated[
        str, typer.Option("--format", help="Instead of finding out: " + ", ".join(FORMATS))
    ] = "",
    window_ms: Annotated[
        int, typer.Option(min=1, help="Count pairs at most this far apart, whole milliseconds.")
    ] = DEFAULT_WINDOW_MS,
    picture: Annotated[Path, typer.Option(help="Write the picture here.")] = Path("doctor.png"),
    radar: RadarOption = "polar",
    sector_deg: SectorOption = WHOLE_TURN_DEG,
    chirps: ChirpsOption = "first",
    as_json: JsonOption = False,
) -> None:
    """Examine a recording: rates, gaps, offsets, pairs, values, classes, bad files; with a picture and advice.

    [bold]Examples[/bold]

      echosight doctor fog_6_0

      echosight doctor my_recording --window-ms 20 --picture /tmp/my_recording.png

      echosight doctor my_recording --json | jq .advice
    """
    from services.sensors.recordings.advice import advise  # the picture's library takes its time to load
    from services.sensors.recordings.doctor import examine
    from services.sensors.recordings.picture import draw
    from services.sensors.recordings.tables import show_examination

    recording = _open(format_name or "auto", path, radar=radar, sector_deg=sector_deg, chirps=chirps)
    with progress("reading", recording.num_files) as advance_to:
        found, examples = examine(recording, window_ms=window_ms, on_progress=advance_to)
    advice = advise(found)
    title = f"{path.resolve().name} ({recording.format_name})"
    draw(found, examples, picture, title=title)
    if as_json:
        facts = {"format": recording.format_name, **asdict(found), "advice": advice, "picture": str(picture)}
        typer.echo(json.dumps(facts))
        return
    show_examination(Console(), found, advice=advice, title=title)
    typer.echo(f"picture: {picture}")


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


def _open(
    format_name: str, path: Path, *, radar: RadarView, sector_deg: float, chirps: Chirps, site: str = ""
) -> ListedRecording:
    options = ReadOptions(radar=radar, sector_deg=sector_deg, chirps=chirps)
    recording = open_recording(path, format_name=format_name.removeprefix("auto"), site=site, options=options)
    _ = recording.listing  # an unusable one is refused here, before a server is asked for
    return recording


def _play(
    recording: ListedRecording, *, redis_url: str, as_json: bool, wait: bool, speed: float, **how: bool
) -> None:
    from services.sensors.recordings.tables import show_report
    from services.sensors.sessions import play

    settings = _settings(redis_url)
    began = time.monotonic()
    how = {"loop": False, "now": False} | how
    published = asyncio.run(play(recording, settings, speed=speed, wait=wait, **how))
    took_s = time.monotonic() - began
    report = recording.report()
    if as_json:
        is_ingested = wait and published.ended == "done"
        facts = {
            "took_s": took_s,
            "ingested": is_ingested,
            "published": asdict(published),
            "report": asdict(report),
        }
        typer.echo(json.dumps(facts))
        return
    show_report(Console(), report)
    what = "published and ingested" if wait else "published"
    typer.echo(f"{published.num_frames} frames {what} in {took_s:.1f} s ({published.ended})")


def _tell(facts: dict[str, Any], text: str, *, as_json: bool) -> None:
    typer.echo(json.dumps(facts) if as_json else text)


def _settings(redis_url: str, **given: Any) -> SensorsSettings:
    overrides = {name: value for name, value in given.items() if value is not None}
    if redis_url:
        overrides["REDIS_URL"] = redis_url
    settings = SensorsSettings.read(**overrides)
    configure_logs("sensors", level=settings.log_level, log_format=settings.log_format)
    return settings


def main() -> None:
    """Run the command line; a known error becomes one line and exit status 2, never a traceback."""
    threadpool_limits(1)  # a frame's matrix products are small: shared by two cores they cost four times the CPU
    cv2.setNumThreads(1)
    try:
        app()
    except EchosightError as error:
        print_error(error)
    except OSError as error:
        print_error(EchosightError(str(error), remedy="check the path and its permissions"))
    else:
        return
    sys.exit(2)


if __name__ == "__main__":
    main()
