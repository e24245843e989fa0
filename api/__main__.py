"""`python -m api`: the model server as a process."""

import signal
import sys
from typing import Annotated, Any

import typer

from api.app import create_app
from api.server import Server, spare_collector, uvicorn_config
from api.settings import ApiSettings
from services.core.command import run_command
from services.core.disks import allow_descriptors
from services.core.errors import SettingsError, StreamsError
from services.core.logs import configure_logs


def main(
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: ECHOSIGHT_API_HOST.")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on, 0: any free one. Default: ECHOSIGHT_API_PORT.")
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(help="Processes that answer the hot routes. Default: ECHOSIGHT_API_PROCESSES."),
    ] = None,
) -> None:
    """Classify posted radar heatmaps by the champion of the model registry; take over what the trainer publishes.

    Ready (GET /readyz) once a model has answered. SIGTERM: finish, then end.
    Other settings are environment variables (ECHOSIGHT_*); see docs/settings.md.

    [bold]Examples[/bold]

      echosight serve                                for this machine

      echosight serve --host 0.0.0.0 --port 8080     for others, too

      echosight serve --processes 2                  for more requests a second than one core can answer

    [bold]Next[/bold]: `curl localhost:8000/readyz`; /docs in a browser describes the routes.
    """
    given = {"api_host": host, "api_port": port, "api_processes": processes}
    raise typer.Exit(_run({name: value for name, value in given.items() if value is not None}))


def _run(given: dict[str, Any]) -> int:
    try:
        settings = ApiSettings.read(**given)
        log = configure_logs("api", level=settings.log_level, log_format=settings.log_format)
        allow_descriptors()
        app = create_app(settings)
    except (SettingsError, StreamsError) as error:  # a REDIS_URL that cannot be one is the latter
        print(f"error: {error}", file=sys.stderr)
        return 2
    server = Server(uvicorn_config(app, settings, switch=app.state.pool), live=app.state.live, log=log)
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, lambda *_: None)  # uvicorn raises it once more when it has stopped; then it is over
    spare_collector()
    server.run()
    log.info("stopped")
    return 0 if server.started else 1


if __name__ == "__main__":
    run_command(main, name="serve")
