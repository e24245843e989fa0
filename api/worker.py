"""`python -m api.worker FD`: another process of a server, at the end of a channel. Started by the first one."""

import asyncio
import signal
import socket
import sys
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send

from api.access.gate import Gate
from api.access.keys import Access
from api.access.tracing import make_tracing
from api.app import hot_routes, make_serving
from api.bodies.reading import BodyReader
from api.cores import share_of_cores
from api.metrics import Metrics
from api.models.classifier import Classifier
from api.models.live import LiveModel
from api.models.providers import VARIANTS
from api.processes.channel import Channel, receive_first
from api.processes.hot import is_hot
from api.processes.movable import MovableHttp, Place, Switch
from api.releases.versions import Versions
from api.server import adopt, spare_collector, uvicorn_config
from api.settings import ApiSettings
from services.core.disks import allow_descriptors
from services.core.logs import Log, configure_logs
from services.core.registry import MODEL_FILE, Registry

_TELL_S = 1.0


class Worker(Switch):
    """Answers hot requests by the model that the first process says is live; all else goes back there."""

    def __init__(self, settings: ApiSettings, end: socket.socket, log: Log) -> None:
        self._settings = settings
        self._log = log
        self._live = LiveModel()
        self._metrics = Metrics()
        self._access = Access(settings)
        self._tracing = make_tracing(settings)
        self._gate = Gate(settings, self._access, self._metrics, self._tracing)
        self._serving = make_serving(settings, self._live, self._metrics)
        self._registry = Registry(settings.registry_dir, settings.model_name)
        versions = Versions(self._registry, self._live, max_loaded=0)
        self._hot, self._infer = hot_routes(settings, self._serving, versions, BodyReader(settings), self._gate)
        self._channel = Channel(
            end,
            on_message=self._hear,
            on_connection=self._take,
            on_end=self._let_go,
            on_loss=self._count_ended,
        )
        self._told: dict[str, Any] = {}
        self._is_able = False  # to answer by what the first process says is live
        self._is_news = asyncio.Event()
        self._num_ended = 0
        self._taking: set[asyncio.Task[Any]] = set()
        self._server = uvicorn.Server(uvicorn_config(self, settings, switch=self))

    def run(self) -> None:
        """Until it is told to stop, or the first process is gone."""
        self._server.run(sockets=[])

    def stop(self, *_: Any) -> None:
        """Finish what has begun, and end."""
        self._server.should_exit = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live_on(receive, send)
            return
        await self._hot.get(scope["path"], self._infer)(scope, receive, send)

    async def _live_on(self, receive: Receive, send: Send) -> None:
        await receive()
        self._channel.start()
        tasks = [asyncio.create_task(run()) for run in (self._follow, self._tell_on, self._access.run)]
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._live.is_stopping = True
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tell()
        self._serving.close()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        self._channel.close()
        await send({"type": "lifespan.shutdown.complete"})

    # Connections.

    def place(
        self, protocol: MovableHttp, method: bytes, target: bytes, headers: list[tuple[bytes, bytes]]
    ) -> Place:
        del protocol
        is_ours = is_hot(method, target) and self._is_able
        return Place.HERE if is_ours and not self._gate.has_limit(headers) else Place.ONLY_THERE

    def move(self, fd: int, data: bytes) -> bool:
        return self._channel.send_connection(fd, data)

    def ended(self, protocol: MovableHttp) -> None:
        del protocol
        self._count_ended()

    def _count_ended(self) -> None:
        self._num_ended += 1
        self._channel.send(ended=self._num_ended)

    def _take(self, connection: socket.socket, data: bytes) -> None:
        task = asyncio.get_running_loop().create_task(adopt(self._server, self, connection, data))
        self._taking.add(task)
        task.add_done_callback(self._taking.discard)

    # The live model, and what is counted.

    def _hear(self, message: dict[str, Any]) -> None:
        self._told = message
        self._is_news.set()

    def _let_go(self) -> None:
        self._log.warning("the first process is gone")
        self.stop()

    async def _follow(self) -> None:
        """Serve what is live in the first process. What does not load here is answered there.

        What has begun by then is answered by the model that this process had.
        """
        while True:
            await self._is_news.wait()
            self._is_news.clear()
            told, why = self._told, ""
            if told["version"] != self._live.version:
                try:
                    self._live.swap(await asyncio.to_thread(self._load, **told))
                except Exception as error:  # also onnxruntime's
                    why = str(error) or type(error).__name__
            self._is_able = not why
            self._channel.send(serves=None if why else self._live.version, why=why)

    def _load(self, *, version: int, variant: str, threads: int) -> Classifier:
        return Classifier.load(
            self._registry.path(version) / MODEL_FILE,
            self._registry.manifest(version),
            variant=VARIANTS[variant],
            threads=threads,
            cores=share_of_cores(self._settings.api_processes),
        )

    async def _tell_on(self) -> None:
        while True:
            self._tell()
            await asyncio.sleep(_TELL_S)

    def _tell(self) -> None:
        self._channel.send(ended=self._num_ended)  # says by itself that this process lives
        statistics = self._serving.statistics
        if self._channel.send(counted=self._metrics.rows(), statistics=statistics.untold()):
            statistics.has_told()


def main(fd: int) -> None:
    """Serve until the first process says so, or is gone."""
    end = socket.socket(fileno=fd)
    try:
        first = receive_first(end)
    except EOFError:
        return
    settings = ApiSettings.read(**first["settings"])
    log = configure_logs("api", level=settings.log_level, log_format=settings.log_format)
    allow_descriptors()
    worker = Worker(settings, end, log.bind(worker=first["worker"]))
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, worker.stop)  # until then one ends the process, which has nothing to finish
    spare_collector()
    worker.run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
