"""The `echosight` command. It starts the others as processes; it imports none of them."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import orjson
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.core.embedded import resolve_redis_url
from services.core.errors import EchosightError
from services.core.registry import Registry
from services.core.settings import CoreSettings
from services.core.store import StoreReader
from services.core.streams import EventLog, StreamsLost
from services.up import Status, Supervisor, UpSettings, Worker, number

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Vision teaches radio: learn from a camera what radar echoes mean, serve from the radar alone.",
    epilog="Start with `echosight up`. Settings are environment variables; README.md has the table.",
)
_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True}
_BEYOND_GRACE_S = 10.0
_console = Console(stderr=False)
_Settings = TypeVar("_Settings", bound=CoreSettings)


@app.command()
def up(
    site: Annotated[
        list[str] | None,
        typer.Option(help="Simulated site; repeat for several. Default: ECHOSIGHT_SIMULATED_SITE or demo."),
    ] = None,
    simulate: Annotated[bool, typer.Option(help="Whether to simulate sensors at all.")] = True,
    label_share: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of simulated frames labelled. Default: 0.05.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port of the API. Default: ECHOSIGHT_API_PORT or 8000.")
    ] = None,
) -> None:
    """Run the whole system on this machine: server, simulated site, ingest, trainer, API. Ctrl-C stops it.

    Without REDIS_URL an embedded Redis-compatible server is started. Everything is kept under ECHOSIGHT_DATA_DIR
    (default ./var); a second start goes on from there.
    """
    if port is not None:
        os.environ["ECHOSIGHT_API_PORT"] = str(port)
    settings = _settings(UpSettings)
    shares = () if label_share is None else ("--label-share", str(label_share))
    chosen: list[tuple[str, tuple[str, ...]]] = [
        (f"sensors-{Path(name).stem}", ("--site", name)) for name in site or []
    ]
    sensors = [
        Worker(name, "services.sensors", ("simulate", "--publish", *option, *shares), may_finish=True)
        for name, option in chosen or [("sensors", ())]  # none chosen: ECHOSIGHT_SIMULATED_SITE
    ]
    os.environ.setdefault("ECHOSIGHT_CONSUMER_NAME", "up")
    workers = [
        *(sensors if simulate else []),
        Worker("ingest", "services.ingest", stage=1),
        Worker("trainer", "trainer", stage=2),
        Worker("api", "api", stage=2, stop_timeout_s=settings.stop_grace_s + _BEYOND_GRACE_S),
    ]
    address = (settings.api_host, settings.api_port)
    supervisor = Supervisor(settings, workers, address=address, console=_console)
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, lambda *_: supervisor.stop())
    try:
        supervisor.run()
    except EchosightError as error:
        _fail(error)


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what is stored, learnt and served right now, from what the workers left on disk and in the streams."""
    settings = _settings(CoreSettings)
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
        newest.take_in(events.latest())
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
    counts = newest.events.get("ingest", {}).get("counts")
    counts = counts if isinstance(counts, dict) else {}
    for name in sorted(counts):
        table.add_row(escape(name), f"{number(counts, name):,.0f}")
    if newest.events:
        age_s = time.time() - max(number(event, "at_s") for event in newest.events.values())
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


def _settings(kind: type[_Settings]) -> _Settings:
    try:
        return kind.read(data_dir=Path(os.environ.get("ECHOSIGHT_DATA_DIR", "var")).resolve())
    except EchosightError as error:
        _fail(error)


def _fail(error: EchosightError) -> NoReturn:
    Console(stderr=True).print(f"[red]echosight:[/red] {escape(str(error))}", highlight=False)
    raise typer.Exit(2) from None


def main() -> None:
    app()


if __name__ == "__main__":
    main()
