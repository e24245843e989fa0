"""The `echosight` command. It starts the others as processes; it imports none of them."""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from services.commands import bench, dead, evaluate, models, store
from services.commands.classify import classify
from services.commands.output import console, fail, read_settings
from services.commands.status import status
from services.commands.watch import watch
from services.core.errors import EchosightError
from services.up import Supervisor, UpSettings, Worker

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Vision teaches radio: learn from a camera what radar echoes mean, serve from the radar alone.",
    epilog="Start with `echosight up`; then `echosight status`, and COMMAND --help for examples. Settings are "
    "environment variables; docs/settings.md has the table.",
)
_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True}
_BEYOND_GRACE_S = 10.0


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

    Without REDIS_URL an embedded Redis-compatible server is started.
    All is kept under ECHOSIGHT_DATA_DIR (./var); a second start goes on from there.
    A worker that cannot start with its settings stops everything.

    [bold]Examples[/bold]

      echosight up                           a model after some minutes

      echosight up --site park --site quay   as `simulate --sites` lists them

      echosight up --no-simulate             for your own sensors, or `replay`

    [bold]Next[/bold]: `echosight status` in another terminal; README.md shows how to ask the API.
    """
    if port is not None:
        os.environ["ECHOSIGHT_API_PORT"] = str(port)
    settings = read_settings(UpSettings)
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
    supervisor = Supervisor(settings, workers, address=address, console=console)
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, lambda *_: supervisor.stop())
    try:
        supervisor.run()
    except EchosightError as error:
        fail(error)


app.command()(status)
app.command()(classify)
app.command()(watch)
app.add_typer(bench.app, name="bench")
app.add_typer(dead.app, name="dead")
app.add_typer(models.app, name="models")
app.add_typer(store.app, name="store")
evaluate.register(app)


def _forward(name: str, module: str, summary: str, *prefix: str) -> None:
    @app.command(name, context_settings=_FORWARD, add_help_option=False, help=summary)
    def command(context: typer.Context) -> None:
        os.execv(sys.executable, [sys.executable, "-m", module, *prefix, *context.args])  # noqa: S606 - our own module


_forward(
    "simulate", "services.sensors", "Simulate a site: publish it, write it to disk, or preview it.", "simulate"
)
_forward(
    "replay", "services.sensors", "Publish a recording at its own pace: MCAP, RADIATE, ROD2021, folder.", "replay"
)
_forward("record", "services.sensors", "Record what sensors publish into an MCAP file.", "record")
_forward("import", "services.sensors", "Publish a recording as fast as ingest takes it.", "import")
_forward("doctor", "services.sensors", "Say what is in a recording and what is wrong with it.", "doctor")
_forward("ingest", "services.ingest", "Run the ingest worker: streams to pairs in the rolling store.")
_forward("train", "trainer", "Run the trainer worker: learn without end, publish models.")
_forward("serve", "api", "Run the model server.")


def main() -> None:
    app(prog_name="echosight")


if __name__ == "__main__":
    main()
