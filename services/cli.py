"""The `echosight` command. It starts the others as processes; it imports none of them."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import orjson
import typer
from rich.console import Console
from rich.table import Table

from services.core.embedded import resolve_redis_url
from services.core.errors import EchosightError
from services.core.registry import Registry
from services.core.settings import CoreSettings
from services.core.store import StoreReader
from services.core.streams import EventLog, StreamsLost
from services.up import Status, Supervisor, Worker

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Vision teaches radio: learn from a camera what radar echoes mean, serve from the radar alone.",
    epilog="Start with `echosight up`. Settings are environment variables; README.md has the table.",
)
_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True}
_console = Console(stderr=False)


@app.command()
def up(
    site: Annotated[
        list[str] | None, typer.Option(help="Simulated site; several are possible. Default: demo.")
    ] = None,
    simulate: Annotated[bool, typer.Option(help="Whether to simulate sensors at all.")] = True,
    label_share: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of simulated frames labelled. Default: 0.05.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port of the API. Default: ECHOSIGHT_API_PORT or 8000.")] = None,
) -> None:
    """Run the whole system on this machine: server, simulated site, ingest, trainer, API. Ctrl-C stops it.

    Without REDIS_URL an embedded Redis-compatible server is started. Everything is kept under ECHOSIGHT_DATA_DIR
    (default ./var); a second start goes on from there.
    """
    settings = _settings()
    host = os.environ.get("ECHOSIGHT_API_HOST", "127.0.0.1")
    if port is not None:
        os.environ["ECHOSIGHT_API_PORT"] = str(port)
    shares = () if label_share is None else ("--label-share", str(label_share))
    sensors = [
        Worker(
            f"sensors-{name}",
            "services.sensors",
            ("simulate", "--publish", "--site", name, *shares),
        )
        for name in (site or ["demo"])
    ]
    os.environ.setdefault("ECHOSIGHT_CONSUMER_NAME", "up")
    workers = [
        *(sensors if simulate else []),
        Worker("ingest", "services.ingest"),
        Worker("trainer", "trainer"),
        Worker("api", "api"),
    ]
    address = (host, int(os.environ.get("ECHOSIGHT_API_PORT", "8000")))
    supervisor = Supervisor(settings, workers, address=address, console=_console)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: supervisor.stop())
    try:
        supervisor.run()
    except EchosightError as error:
        _fail(error)


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what is stored, learnt and served right now, from what the workers left on disk and in the streams."""
    settings = _settings()
    registry = Registry(settings.registry_dir, settings.model_name)
    reader = StoreReader(settings.store_dir)
    newest = Status()
    try:
        reader.refresh()
        aliases, versions = registry.aliases(), registry.versions()
    except EchosightError as error:
        _fail(error)
    streams = "up"
    try:
        events = EventLog(resolve_redis_url(settings), source="status")
        newest.take_in(events.since("0-0")[1])
    except (*StreamsLost, EchosightError) as error:
        streams = str(error)
    found: dict[str, Any] = {
        "streams": streams,
        "store": {
            "pairs": len(reader),
            "bytes": reader.num_bytes,
            "sites": reader.sites,
            "labels": len(reader.labelled()),
        },
        "registry": {"versions": versions, "aliases": aliases},
        "ingest": newest.events.get("ingest"),
        "trainer": newest.events.get("trainer"),
        "at_s": round(time.time(), 3),
    }
    if as_json:
        print(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
        return
    table = Table(show_header=False, box=None)
    table.add_row("streams", streams)
    table.add_row(
        "store", f"{len(reader):,} pairs, {reader.num_bytes / 1e6:.1f} MB, {len(reader.labelled())} labelled"
    )
    table.add_row("sites", ", ".join(reader.sites) or "none yet")
    table.add_row("registry", f"{len(versions)} versions; " + (", ".join(f"{k} v{v}" for k, v in aliases.items())))
    table.add_row("now", newest.line(champion=aliases.get("champion")))
    for name, count in sorted((found["ingest"] or {}).get("counts", {}).items()):
        table.add_row(name, f"{count:,}")
    if newest.events:
        age_s = time.time() - max(event.get("at_s", 0.0) for event in newest.events.values())
        table.add_row("heard", f"{age_s:.0f} s ago" + ("; is it running?" if age_s > 30 else ""))
    _console.print(table)


def _forward(name: str, module: str, summary: str, *prefix: str) -> None:
    @app.command(name, context_settings=_FORWARD, add_help_option=False, help=summary)
    def command(context: typer.Context) -> None:
        os.execv(sys.executable, [sys.executable, "-m", module, *prefix, *context.args])  # noqa: S606 - our own module


_forward(
    "simulate", "services.sensors", "Simulate a site: publish it, write it to disk, or preview it.", "simulate"
)
_forward("replay", "services.sensors", "Publish a recording with its own timing: radiate, cruw, folder.", "replay")
_forward("import", "services.sensors", "Publish a recording as fast as ingest takes it.", "import")
_forward("doctor", "services.sensors", "Say what is in a recording and what is wrong with it.", "doctor")
_forward("ingest", "services.ingest", "Run the ingest worker: streams to pairs in the rolling store.")
_forward("train", "trainer", "Run the trainer worker: learn without end, publish models.")
_forward("serve", "api", "Run the model server.")


def _settings() -> CoreSettings:
    try:
        return CoreSettings.read(data_dir=Path(os.environ.get("ECHOSIGHT_DATA_DIR", "var")).resolve())
    except EchosightError as error:
        _fail(error)


def _fail(error: EchosightError) -> NoReturn:
    Console(stderr=True).print(f"[red]echosight:[/red] {error}", highlight=False)
    raise typer.Exit(2) from None


def main() -> None:
    app()


if __name__ == "__main__":
    main()
