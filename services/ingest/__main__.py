"""`python -m services.ingest`: the ingest worker as a process."""

import asyncio
import signal
import sys
from typing import Annotated

import typer

from services.core.command import run_command
from services.core.embedded import resolve_redis_url
from services.core.errors import EchosightError
from services.core.logs import configure_logs
from services.core.streams import Consumer, EventLog, Janitor, SiteLeases, connect, wait_for_server
from services.ingest.settings import IngestSettings
from services.ingest.worker import IngestWorker


def main(
    until_idle_s: Annotated[
        float | None, typer.Option(help="Stop once no frame came for so many seconds; default: run for ever.")
    ] = None,
) -> None:
    """Pair radar and camera frames from the streams and keep the pairs in the rolling store.

    Any number of such processes share the sites. SIGTERM: commit, hand over, end.
    Settings are environment variables (ECHOSIGHT_*, REDIS_URL); see docs/settings.md.

    [bold]Examples[/bold]

      REDIS_URL=redis://host:6379/0 echosight ingest        all sites

      ECHOSIGHT_SITES=north,south echosight ingest          these alone

      ECHOSIGHT_INGEST_METRICS_PORT=9101 echosight ingest   for Prometheus

      echosight ingest --until-idle-s 5                     what is there

    [bold]Next[/bold]: `echosight status` shows what it does, `echosight dead list` what it refused.
    """
    try:
        asyncio.run(_run(IngestSettings.read(), until_idle_s))
    except EchosightError as error:
        print(f"echosight ingest: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


async def _run(settings: IngestSettings, until_idle_s: float | None) -> None:
    log = configure_logs("ingest", level=settings.log_level, log_format=settings.log_format)
    url = resolve_redis_url(settings)
    client = connect(url)
    server = await wait_for_server(client, timeout_s=60.0)
    consumer = Consumer(client, name=settings.consumer_name, sites=settings.site_names)
    events = EventLog(url, source="ingest")
    leases = SiteLeases(client, owner=settings.consumer_name, ttl_ms=settings.lease_ms, sites=settings.site_names)
    janitor = Janitor(client, max_stream_bytes=settings.max_stream_bytes, max_dead_bytes=settings.max_dead_bytes)
    worker = IngestWorker(settings, consumer, leases=leases, janitor=janitor, log=log, events=events)
    stop_metrics = worker.metrics.serve(host=settings.ingest_metrics_host, port=settings.ingest_metrics_port)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.stop)
    log.info("ingest_started", server=server, store=str(settings.store_dir), window_ms=settings.window_ms)
    try:
        await worker.run(until_idle_s=until_idle_s)
    finally:
        stop_metrics()
        await consumer.close()
        events.close()
    log.info("ingest_stopped", counts=dict(worker.counts))


if __name__ == "__main__":
    run_command(main, name="ingest")
