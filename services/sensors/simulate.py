"""A simulated site as a sensor: streamed live for as long as asked, or written to a folder.

It builds the scene from plain options and restarts it at the present when it has fallen behind. It knows
neither the scene's physics nor the command line.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

from services.core.errors import SettingsError
from services.core.frames import Frame
from services.core.logs import logger
from services.sensors.publish import Pace, Published, PublisherLike, publish
from services.sensors.recordings import RecordingReport, write_folder
from services.sensors.simulator import (
    RADARS,
    LabelSettings,
    Scene,
    SimulationSettings,
    load_site,
)

SceneMaker = Callable[[int], Scene]
_GROUPS = {"radar": ("radar_delivery", "radar"), "camera": ("camera_delivery", "camera"), "traffic": ("traffic",)}
"""What `--set` can change: for each group, the settings that its names are looked up in."""


def simulation_settings(
    *, radar: str, radar_fps: float, camera_fps: float, changes: tuple[str, ...] = ()
) -> SimulationSettings:
    """Settings out of options. changes: "radar.drop_share=0.1", "radar.tx_power_dbm=6", "traffic.stop_share=0".

    Raises SettingsError.
    """
    if radar not in RADARS:
        raise SettingsError(f"radar is {radar!r}", remedy=f"use one of {', '.join(RADARS)}")
    good = SimulationSettings()
    settings = replace(
        good,
        radar=RADARS[radar],
        radar_delivery=replace(good.radar_delivery, rate_hz=radar_fps),
        camera_delivery=replace(good.camera_delivery, rate_hz=camera_fps),
    )
    for change in changes:
        settings = _changed(settings, change)
    return settings


def _changed(settings: SimulationSettings, change: str) -> SimulationSettings:
    """`settings` with one number changed, in the group that has a number of that name."""
    group, _, rest = change.partition(".")
    name, _, value = rest.partition("=")
    if group not in _GROUPS:
        raise SettingsError(f"--set {change!r}", remedy=f"write GROUP.NAME=VALUE, GROUP of {', '.join(_GROUPS)}")
    known = []
    for part in _GROUPS[group]:
        current = getattr(settings, part)
        numbers = {f.name: type(getattr(current, f.name)) for f in fields(current)}
        numbers = {field: kind for field, kind in numbers.items() if kind in (int, float)}
        known += list(numbers)
        if name in numbers:
            try:
                number = numbers[name](value)
            except ValueError:
                raise SettingsError(f"--set {change!r}", remedy="give it a number") from None
            return replace(settings, **{part: replace(current, **{name: number})})
    raise SettingsError(f"--set {change!r}", remedy=f"{group} has {', '.join(known)}")


def scene_maker(site: str, *, seed: int, settings: SimulationSettings) -> SceneMaker:
    """Scenes of one site; the n-th has seed + n. Raises SettingsError for an unknown site."""
    loaded = load_site(site)
    return lambda number: Scene(loaded, seed=seed + number, settings=settings)


async def stream_scene(
    make: SceneMaker,
    *,
    seconds: float | None,
    labels: LabelSettings,
    publisher: PublisherLike,
    pace: Pace,
    stop: asyncio.Event,
    on_progress: Callable[[Published], None] = lambda _: None,
) -> Published:
    """Publish scenes from now on, for ever where `seconds` is None; return what the last one came to.

    A scene that has fallen `pace.max_lag_s` behind (the server was away, the machine too slow) is left, and a new
    one starts at the present: late frames of a live sensor are worth less than those of now.
    """
    log = logger("sensors")
    number = 0
    while True:
        scene = await asyncio.to_thread(make, number)
        messages = scene.deliveries(start_ns=time.time_ns(), seconds=seconds, labels=labels)
        timed = ((message.at_s, message.frame) for message in messages)
        published = await publish(timed, publisher=publisher, pace=pace, stop=stop, on_progress=on_progress)
        if published.ended != "behind":
            return published
        number += 1
        log.warning("scene_restarted", reason=f"more than {pace.max_lag_s:g} s late", seed=scene.seed + 1)


def record_scene(
    scene: Scene,
    path: Path,
    *,
    seconds: float,
    labels: LabelSettings,
    on_progress: Callable[[float], None] = lambda _: None,
) -> RecordingReport:
    """Write `seconds` from now on in the generic folder layout. on_progress: gets the seconds done."""

    def frames() -> Iterator[Frame]:
        for message in scene.deliveries(start_ns=time.time_ns(), seconds=seconds, labels=labels):
            on_progress(min(message.at_s, seconds))
            yield message.frame

    return write_folder(frames(), path)
