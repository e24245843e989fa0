"""How the model server listens and stops: uvicorn, with what it does not do by itself."""

import asyncio
import gc
import socket
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI

from api.models.live import LiveModel
from api.processes.movable import MovableHttp, Switch
from api.protocol import BoundedHttp
from api.settings import ApiSettings
from services.core.logs import Log

if TYPE_CHECKING:
    from api.processes.pool import Pool
    from api.rpc.server import RpcServer


KEEP_ALIVE_S = 30


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
            if self._state.pool is not None:
                self._state.pool.start(self._adopt)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        rpc: RpcServer | None = self._state.rpc
        pool: Pool | None = self._state.pool
        stops = [part.stop() for part in (rpc, pool) if part is not None]
        await asyncio.gather(super().shutdown(sockets), *stops)  # at once: each waits for what is in flight

    @property
    def _state(self) -> Any:
        app: FastAPI = self.config.app  # type: ignore[assignment]
        return app.state

    async def _adopt(self, connection: socket.socket, first: bytes) -> None:
        await adopt(self, self._state.pool, connection, first)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets what has begun finish; the second one does not."""
        self._live.is_stopping = True
        if self.should_exit:
            self.force_exit = True
            if self._state.pool is not None:
                self._state.pool.kill()
        super().handle_exit(sig, frame)


def spare_collector() -> None:
    """Before a process answers: let Python look less often for garbage in cycles; requests leave next to none.

    What is imported and made by then stays, and is not looked through again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


async def adopt(server: uvicorn.Server, switch: Switch, connection: socket.socket, first: bytes) -> None:
    """Let `server` go on with a connection from another process, which has read `first` of it."""

    protocol = MovableHttp(
        switch,
        first=first,
        config=server.config,
        server_state=server.server_state,
        app_state=server.lifespan.state,
    )
    try:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, connection)
    except OSError:  # the client is gone already
        connection.close()
        switch.ended(protocol)
        return
    if protocol.flow.read_paused:
        transport.pause_reading()  # again: one whose protocol is being connected begins to read after that
    if server.should_exit:
        protocol.shutdown()  # with the answer to what has begun


def uvicorn_config(app: Any, settings: ApiSettings, *, switch: Switch | None = None) -> uvicorn.Config:
    """How a server listens. app: ASGI. switch: moves connections to other processes."""
    return uvicorn.Config(
        app,
        host=settings.api_host,
        port=settings.api_port,
        loop="uvloop",
        http=BoundedHttp if switch is None else partial(MovableHttp, switch),  # type: ignore[arg-type]
        limit_concurrency=settings.max_connections + 1,  # it counts the one that asks
        ws="websockets-sansio",
        ws_max_size=settings.max_body_bytes,
        ws_ping_interval=settings.heartbeat_s,
        ws_ping_timeout=settings.heartbeat_s,
        ws_per_message_deflate=False,
        interface="asgi3",
        lifespan="on",
        log_config=None,
        log_level="error",  # below are lines without bound about what clients do
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=settings.stop_grace_s,
    )
