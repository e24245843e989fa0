"""`python -m api`: the model server as a process."""

import asyncio
import signal
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
import uvicorn
from fastapi import FastAPI

from api.app import create_app
from api.models import LiveModel
from api.protocol import BoundedHttp
from api.settings import ApiSettings
from services.core.command import run_command
from services.core.errors import SettingsError, StreamsError
from services.core.logs import Log, configure_logs

if TYPE_CHECKING:
    from api.rpc.server import RpcServer


class Server(uvicorn.Server):
    """Says where it listens, and is not ready from the moment it is told to stop."""

    def __init__(self, config: uvicorn.Config, *, live: LiveModel, log: Log) -> None:
        super().__init__(config)
        self._live = live
        self._log = log

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            self._log.info("listening", url=f"http://{shown}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        rpc: RpcServer | None = self.config.app.state.rpc  # type: ignore[union-attr]
        if rpc is None:
            await super().shutdown(sockets)
        else:  # both at once: each waits for what is in flight
            await asyncio.gather(rpc.stop(), super().shutdown(sockets))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._live.is_stopping = True
        super().handle_exit(sig, frame)


def main(
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: ECHOSIGHT_API_HOST.")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on, 0: any free one. Default: ECHOSIGHT_API_PORT.")
    ] = None,
) -> None:
    """Classify posted radar heatmaps by the champion of the model registry; take over what the trainer publishes.

    Ready (GET /readyz) once a model has answered. SIGTERM: finish, then end.
    Other settings are environment variables (ECHOSIGHT_*); see docs/settings.md.

    [bold]Examples[/bold]

      echosight serve                                for this machine

      echosight serve --host 0.0.0.0 --port 8080     for others, too

    [bold]Next[/bold]: `curl localhost:8000/readyz`; /docs in a browser describes the routes.
    """
    given = {"api_host": host, "api_port": port}
    raise typer.Exit(_run({name: value for name, value in given.items() if value is not None}))


def _run(given: dict[str, Any]) -> int:
    try:
        settings = ApiSettings.read(**given)
        log = configure_logs("api", level=settings.log_level, log_format=settings.log_format)
        app = create_app(settings)
    except (SettingsError, StreamsError) as error:  # a REDIS_URL that cannot be one is the latter
        print(f"error: {error}", file=sys.stderr)
        return 2
    server = Server(uvicorn_config(app, settings), live=app.state.live, log=log)
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, lambda *_: None)  # uvicorn raises it once more when it has stopped; then it is over
    server.run()
    log.info("stopped")
    return 0 if server.started else 1


def uvicorn_config(app: FastAPI, settings: ApiSettings) -> uvicorn.Config:
    """How the server listens."""
    return uvicorn.Config(
        app,
        host=settings.api_host,
        port=settings.api_port,
        loop="uvloop",
        http=BoundedHttp,
        limit_concurrency=settings.max_connections + 1,  # it counts the one that asks
        ws="websockets-sansio",
        ws_max_size=settings.max_body_bytes,
        ws_ping_interval=settings.heartbeat_s,
        ws_ping_timeout=settings.heartbeat_s,
        ws_per_message_deflate=False,
        interface="asgi3",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=settings.stop_grace_s,
    )


if __name__ == "__main__":
    run_command(main, name="serve")
