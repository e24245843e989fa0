"""One run of publishing, from a server that answers to a closed connection: a recording, or a live scene.

SIGINT and SIGTERM end a run after what is in hand. It does not know the command line.
"""

import asyncio
import time
from contextlib import suppress

from services.core.embedded import resolve_redis_url
from services.core.errors import StreamsError
from services.core.logs import logger
from services.core.streams import Publisher
from services.sensors.console import counters, progress, stop_on_signals
from services.sensors.publish import (
    AS_FAST_AS_CONSUMED,
    Pace,
    Published,
    publish,
    timed,
    wait_until_ingested,
)
from services.sensors.recordings import OpenRecording
from services.sensors.settings import SensorsSettings
from services.sensors.simulate import SceneMaker, stream_scene
from services.sensors.simulator import LabelSettings

_CONNECT_S = 5.0
_GIVE_UP_S = 120.0
_LIVE_LAG_S = 10.0


async def play(
    recording: OpenRecording,
    settings: SensorsSettings,
    *,
    speed: float,
    loop: bool,
    now: bool,
    wait: bool,
) -> Published:
    """Publish a recording; with `wait` return only when ingest has taken all of it. Raises StreamsError."""
    stop = stop_on_signals()
    publisher = await _connect(settings, stop, for_ever=False)
    if publisher is None:
        return Published(ended="stopped")
    pace = Pace(speed=speed, max_backlog=settings.max_backlog, give_up_s=_GIVE_UP_S)
    deliveries = timed(recording, repeat=loop, now_ns=time.time_ns() if now else None)
    try:
        names = ", ".join(recording.sites)
        with progress(f"publishing {names}", None if loop else recording.num_files) as advance_to:
            published = await publish(
                deliveries,
                publisher=publisher,
                pace=pace,
                stop=stop,
                on_progress=lambda done: advance_to(done.counts["radar"] + done.counts["camera"]),
            )
        if wait:
            for site in recording.sites:
                with progress(f"entries of {site} not ingested yet", None) as advance_to:
                    await wait_until_ingested(
                        publisher, site, stop=stop, give_up_s=_GIVE_UP_S, on_backlog=advance_to
                    )
            published.ended = "stopped" if stop.is_set() else published.ended
    finally:
        await publisher.close()
    return published


async def stream(
    make: SceneMaker,
    settings: SensorsSettings,
    *,
    labels: LabelSettings,
    seconds: float | None,
    speed: float,
) -> Published:
    """Publish a scene from now on; for ever where `seconds` is None, however long the server is away.

    At speed 1 it is a live sensor and pauses for nobody; faster, it waits for ingest as a recording does.
    """
    log = logger("sensors")
    stop = stop_on_signals()
    for_ever = seconds is None
    publisher = await _connect(settings, stop, for_ever=for_ever)
    if publisher is None:
        return Published(ended="stopped")
    is_live = speed == 1.0
    pace = Pace(
        speed=speed,
        max_backlog=0 if is_live else settings.max_backlog,
        max_lag_s=_LIVE_LAG_S if for_ever and is_live else AS_FAST_AS_CONSUMED,
        give_up_s=AS_FAST_AS_CONSUMED if for_ever else _GIVE_UP_S,
    )
    log.info("simulation_started", site=settings.simulated_site, seconds=seconds, speed=speed)
    try:
        published = await stream_scene(
            make,
            seconds=seconds,
            labels=labels,
            publisher=publisher,
            pace=pace,
            stop=stop,
            on_progress=counters(settings.simulated_site),
        )
    finally:
        await publisher.close()
    log.info("simulation_stopped", ended=published.ended, **published.counts)
    return published


async def _connect(settings: SensorsSettings, stop: asyncio.Event, *, for_ever: bool) -> Publisher | None:
    """A publisher; None when stopped before the server answered. Raises StreamsError unless `for_ever`."""
    while not stop.is_set():
        try:
            return await Publisher.connect(
                resolve_redis_url(settings), max_entries=settings.stream_max_entries, timeout_s=_CONNECT_S
            )
        except StreamsError as error:
            if not for_ever:
                raise
            logger("sensors").warning("server_missing", error=str(error))
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 1.0)
    return None
