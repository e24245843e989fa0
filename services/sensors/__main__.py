"""`python -m services.sensors`: simulate a site; record the streams; replay, import or examine a recording.

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
from services.sensors.options import (
    ChirpsOption,
    JsonOption,
    PathArgument,
    RadarOption,
    RecordingArgument,
    RedisOption,
    SectorOption,
    SiteOption,
    parse_speed,
    split_format,
)
from services.sensors.publish import AS_FAST_AS_CONSUMED
from services.sensors.recordings import FORMATS, OpenRecording, ReadOptions, open_recording
from services.sensors.recordings.base import WHOLE_TURN_DEG, Chirps, RadarView
from services.sensors.settings import SensorsSettings

app = typer.Typer(
    name="sensors",
    help="Publish frames, from a simulated site or a recording; record what is published.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)

_PICTURE_S, _FILM_S = 300.0, 10.0


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
    store: Annotated[
        Path | None,
        typer.Option(help="Put exact pairs, all labelled with the truth, into a store of their own instead."),
    ] = None,
    interval_s: Annotated[
        float, typer.Option(min=0.01, help="With --store: scene time from one pair to the next.")
    ] = 0.66,
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

      echosight simulate --site quay --seconds 660 --store DIR     1,000 pairs to evaluate on
    """
    from services.sensors.simulate import record_scene, scene_maker, simulation_settings
    from services.sensors.simulator import LabelSettings, list_sites

    if sites:
        for name, shipped in list_sites().items():
            typer.echo(f"{name:<12} {shipped.description}")
        return
    if sum((publish_, out is not None, preview is not None, store is not None)) != 1:
        raise SettingsError(
            "nothing or too much to do", remedy="give one of --publish, --out DIR, --preview FILE, --store DIR"
        )
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
    elif store is not None:
        from services.sensors.stored import store_scene

        if seconds is None:
            raise SettingsError("a store without an end", remedy="say how long: --seconds 660")
        truth = LabelSettings(share=_or(label_share, 1.0), mistakes=_or(label_mistakes, 0.0))
        num_frames = max(1, round(seconds / interval_s))
        with progress(f"simulating {settings.simulated_site}", num_frames) as advance_to:
            num_new = store_scene(
                make(0),
                store,
                num_frames=num_frames,
                interval_s=interval_s,
                labels=truth,
                on_progress=advance_to,
            )
        text = f"{store}: {num_new} new pairs of {settings.simulated_site}"
        _tell({"seed": seed, "store": str(store), "pairs": num_frames, "new": num_new}, text, as_json=as_json)
    elif preview is not None:
        from services.sensors.preview import VIDEO
        from services.sensors.preview import preview as draw_preview

        seconds = seconds or (_FILM_S if preview.suffix == VIDEO else _PICTURE_S)
        with progress(f"drawing {settings.simulated_site}", seconds) as advance_to:
            draw_preview(make(0), preview, seconds=seconds, on_progress=advance_to)
        _tell({"seed": seed, "preview": str(preview)}, f"preview: {preview}", as_json=as_json)


@app.command(no_args_is_help=True)
def replay(
    format_and_path: RecordingArgument,
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
    """Publish a recording, at its own pace or faster, and say which files could not be played: --json names all.

    Times are those of the recording, so playing it twice stores it once.

    [bold]Examples[/bold]

      echosight replay fog_6_0                            as it was recorded

      echosight replay fog_6_0 --sector-deg 120           only straight ahead

      echosight replay session.mcap --speed 4             four times as fast

      echosight replay cruw ROD2021 --speed max           as fast as ingested

      echosight replay fog_6_0 --loop --now               an endless demo
    """
    recording = _open(*split_format(format_and_path), site=site, radar=radar, sector_deg=sector_deg, chirps=chirps)
    _play(
        recording, speed=parse_speed(speed), loop=loop, now=now, wait=False, redis_url=redis_url, as_json=as_json
    )


@app.command("import", no_args_is_help=True)
def import_(
    format_and_path: RecordingArgument,
    site: SiteOption = "",
    radar: RadarOption = "polar",
    sector_deg: SectorOption = WHOLE_TURN_DEG,
    chirps: ChirpsOption = "first",
    redis_url: RedisOption = "",
    as_json: JsonOption = False,
) -> None:
    """Publish a recording as fast as ingest takes it, and wait until all of it is ingested.

    [bold]Examples[/bold]

      echosight import fog_6_0

      echosight import cruw ROD2021/sequences/train/2019_04_09_BMS1000 --site parking

      echosight import session.mcap --json | jq .report.corrupt
    """
    recording = _open(*split_format(format_and_path), site=site, radar=radar, sector_deg=sector_deg, chirps=chirps)
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
    picture: Annotated[Path | None, typer.Option(help="Draw it all, too, and write the PNG here.")] = None,
    site: Annotated[str, typer.Option(help="MCAP with several sites: which one.")] = "",
    radar: RadarOption = "polar",
    sector_deg: SectorOption = WHOLE_TURN_DEG,
    chirps: ChirpsOption = "first",
    as_json: JsonOption = False,
) -> None:
    """Examine a recording: rates, gaps, offsets, pairs, values, classes, bad files; with advice, and a picture.

    [bold]Examples[/bold]

      echosight doctor fog_6_0

      echosight doctor session.mcap --window-ms 20 --picture session.png

      echosight doctor my_recording --json | jq .advice
    """
    from services.sensors.recordings.advice import advise
    from services.sensors.recordings.doctor import examine
    from services.sensors.recordings.tables import show_examination

    recording = _open(format_name, path, site=site, radar=radar, sector_deg=sector_deg, chirps=chirps)
    if len(recording.sites) > 1:
        raise SettingsError(f"{path} holds sites {', '.join(recording.sites)}", remedy="name one of them: --site")
    with progress("reading", recording.num_files) as advance_to:
        found, examples = examine(recording, window_ms=window_ms, on_progress=advance_to)
    advice = advise(found)
    title = f"{path.resolve().name} ({recording.format_name})"
    if picture is not None:
        from services.sensors.recordings.picture import draw  # its library takes its time to load

        draw(found, examples, picture, title=title)
    if as_json:
        drawn = None if picture is None else str(picture)
        typer.echo(
            json.dumps({"format": recording.format_name, **asdict(found), "advice": advice, "picture": drawn})
        )
        return
    show_examination(Console(), found, advice=advice, title=title)
    if picture is not None:
        typer.echo(f"picture: {picture}")


@app.command(no_args_is_help=True)
def record(
    path: Annotated[Path, typer.Argument(metavar="FILE.mcap", help="File to write.", show_default=False)],
    site: Annotated[
        list[str] | None, typer.Option(help="Only this site; repeat for several. Not given: all, also new ones.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.1, help="How long; not given: until Ctrl-C or SIGTERM.")
    ] = None,
    from_start: Annotated[
        bool,
        typer.Option("--from-start", help="Also what the streams still hold, not only what comes from now on."),
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for a --site that publishes nothing yet.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
    redis_url: RedisOption = "",
    as_json: JsonOption = False,
) -> None:
    """Record the radar, camera and labels streams to an MCAP file, which Foxglove opens and `replay` plays.

    It reads along: ingest does not notice. Until the end it is FILE.mcap.part;
    where no frame came there is no file.

    [bold]Examples[/bold]

      echosight record session.mcap                      until Ctrl-C

      echosight record noon.mcap --site yard --seconds 600

      echosight replay session.mcap --speed 4            ... and play it
    """
    from services.sensors.record_session import record_session, show_recorded

    recorded = asyncio.run(
        record_session(
            path,
            _settings(redis_url),
            sites=site or (),
            seconds=seconds,
            from_start=from_start,
            overwrite=force,
            wait=wait,
        )
    )
    if as_json:
        typer.echo(json.dumps({**asdict(recorded), "path": str(path), "num_frames": recorded.num_frames}))
        return
    show_recorded(Console(), recorded)


@app.command(no_args_is_help=True)
def export(
    site: Annotated[str, typer.Argument(help="Site to take out of the store.", show_default=False)],
    path: Annotated[Path, typer.Argument(help="FILE.mcap, or a new folder.", show_default=False)],
    newest: Annotated[int | None, typer.Option(min=1, help="Only the newest so many pairs.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an MCAP file that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a site's stored pairs and labels to a recording, which `replay` plays and `doctor` examines.

    [bold]Examples[/bold]

      echosight store export demo demo.mcap

      echosight store export demo demo_folder --newest 1000
    """
    from services.sensors.export import Export

    exported = Export(_settings("").store_dir, site, limit=newest)
    with progress("writing", len(exported.pairs)) as advance_to:
        num_frames = exported.write(path, overwrite=force, on_progress=advance_to)
    exported.close()
    facts = {
        "site": site,
        "path": str(path),
        "pairs": len(exported.pairs),
        "frames": num_frames,
        "damaged": exported.num_damaged,
        "dropped_images": exported.num_dropped_images,
    }
    text = f"{len(exported.pairs)} pairs, {num_frames} frames and labels in {path}"
    for name in ("damaged", "dropped_images"):
        text += f"; {facts[name]} {name.replace('_', ' ')}" if facts[name] else ""
    _tell(facts, text, as_json=as_json)


def _open(
    format_name: str, path: Path, *, radar: RadarView, sector_deg: float, chirps: Chirps, site: str = ""
) -> OpenRecording:
    options = ReadOptions(radar=radar, sector_deg=sector_deg, chirps=chirps)
    recording = open_recording(path, format_name=format_name.removeprefix("auto"), site=site, options=options)
    _ = recording.num_files  # an unusable one is refused here, before a server is asked for
    return recording


def _play(
    recording: OpenRecording, *, redis_url: str, as_json: bool, wait: bool, speed: float, **how: bool
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


def _or(given: float | None, default: float) -> float:
    return default if given is None else given


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
        # The name that people start it by: services/cli.py and `store export` forward to here.
        app(prog_name="echosight store" if sys.argv[1:2] == ["export"] else "echosight")
    except EchosightError as error:
        print_error(error)
    except OSError as error:
        print_error(EchosightError(str(error), remedy="check the path and its permissions"))
    else:
        return
    sys.exit(2)


if __name__ == "__main__":
    main()
