"""The first process's side: it starts the others, tells them which model is live, and gives them connections.

A process that ends, or says nothing for long, is replaced; its clients ask again and are answered by the rest.
"""

import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

from api.access.gate import Gate
from api.answering.serving import Serving
from api.models.classifier import Classifier
from api.models.live import LiveModel
from api.processes.channel import Channel, pair
from api.processes.hot import is_hot
from api.processes.movable import MovableHttp, Place, Switch
from api.settings import ApiSettings
from services.core.logs import logger

MAX_SILENT_LOOKS = 120
"""A minute of a process that tells its totals every second: it hangs. Of looks, since this one may have paused."""
_MAX_QUIET_LOOKS = 4
"""Two seconds: it gets no more connections until it says something."""
_LOOK_S = 0.5
_MAX_PAUSE_S = 30.0
_RETRY_S = 10.0


class Worker:
    """Another process, as the first one sees it. version: that it answers with, None: not yet."""

    def __init__(self, number: int, child: asyncio.subprocess.Process) -> None:
        self.number = number
        self.child = child
        self.version: int | None = None
        self.num_given = 0
        self.num_ended = 0
        self.num_silent_looks = 0
        self.told_at_s = 0.0
        self.channel: Channel

    @property
    def num_open(self) -> int:
        """Connections that it has."""
        return self.num_given - self.num_ended

    @property
    def is_able(self) -> bool:
        """Whether it may get connections."""
        return self.version is not None and self.num_silent_looks <= _MAX_QUIET_LOOKS


class Pool(Switch):
    """The other processes of one server."""

    def __init__(self, settings: ApiSettings, live: LiveModel, serving: Serving, gate: Gate) -> None:
        self._settings = settings
        self._live = live
        self._statistics = serving.statistics
        self._gate = gate
        self._metrics = gate.metrics
        self._workers: list[Worker] = []
        self._num_started = 0
        self._hot: set[MovableHttp] = set()
        self._adopting: set[asyncio.Task[Any]] = set()
        self._task: asyncio.Task[None] | None = None
        self._go_on: Callable[[socket.socket, bytes], Coroutine[Any, Any, None]]
        self._log = logger("api")

    def start(self, go_on: Callable[[socket.socket, bytes], Coroutine[Any, Any, None]]) -> None:
        """Start the others once a model is live. go_on: with a connection that comes back, and what was read."""
        self._go_on = go_on
        self._live.followers.append(self._tell)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Let the others finish what they have begun, and end them."""
        if self._task is None:
            return
        self._live.followers.remove(self._tell)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for worker in self._workers:
            with contextlib.suppress(ProcessLookupError):
                worker.child.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.stop_grace_s + 2.0):
                await asyncio.gather(*(worker.child.wait() for worker in self._workers))
        for worker in list(self._workers):
            await self._end(worker)

    def kill(self) -> None:
        """End the others, whatever they have begun."""
        for worker in self._workers:
            with contextlib.suppress(ProcessLookupError):
                worker.child.kill()

    # Connections.

    def place(
        self, protocol: MovableHttp, method: bytes, target: bytes, headers: list[tuple[bytes, bytes]]
    ) -> Place:
        if not is_hot(method, target):
            return Place.HERE
        worker = self._freest()
        self._hot.add(protocol)
        if (
            not protocol.has_moved
            and worker is not None
            and worker.num_open + 1 < len(self._hot)
            and not self._gate.has_limit(headers)
        ):
            return Place.RATHER_THERE
        return Place.HERE

    def move(self, fd: int, data: bytes) -> bool:
        worker = self._freest()
        if worker is None or not worker.channel.send_connection(fd, data):
            return False
        worker.num_given += 1
        return True

    def ended(self, protocol: MovableHttp) -> None:
        self._hot.discard(protocol)

    def _freest(self) -> Worker | None:
        able = [worker for worker in self._workers if worker.is_able]
        return min(able, key=lambda worker: worker.num_open, default=None)

    def _adopt(self, connection: socket.socket, data: bytes) -> None:
        """A connection came back."""
        task = asyncio.get_running_loop().create_task(self._go_on(connection, data))
        self._adopting.add(task)
        task.add_done_callback(self._adopting.discard)

    # Processes.

    async def _run(self) -> None:
        pause_s, next_s = 1.0, 0.0
        while True:
            now_s = time.monotonic()
            for worker in list(self._workers):
                worker.num_silent_looks += 1
                is_silent = worker.num_silent_looks > MAX_SILENT_LOOKS
                if worker.child.returncode is None and not is_silent:
                    if worker.version != self._live.version and now_s > worker.told_at_s + _RETRY_S:
                        self._say_what_is_live(worker)
                    continue
                self._log.error(
                    "process lost", worker=worker.number, status=worker.child.returncode, silent=is_silent
                )
                self._metrics.lost_processes.inc()
                await self._end(worker)
                pause_s = min(2 * pause_s, _MAX_PAUSE_S)
                next_s = now_s + pause_s
            is_short = len(self._workers) < self._settings.api_processes - 1
            if is_short and self._live.current is not None and now_s >= next_s:
                try:
                    await self._start_one()
                except OSError as error:
                    next_s = now_s + _MAX_PAUSE_S
                    self._log.error("process not started", error=str(error))
            elif now_s > next_s + _MAX_PAUSE_S:
                pause_s = 1.0
            self._metrics.processes.set(1 + sum(worker.is_able for worker in self._workers))
            await asyncio.sleep(_LOOK_S)

    async def _start_one(self) -> None:
        ours, theirs = pair()
        with theirs:
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "api.worker", str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a Ctrl-C is for us; it ends when its end of the channel does
            )
        self._num_started += 1
        worker = Worker(self._num_started, child)
        worker.channel = Channel(
            ours,
            on_message=lambda message: self._hear(worker, message),
            on_connection=self._adopt,
            on_end=lambda: None,  # its exit status tells more
        )
        worker.channel.send(worker=worker.number, settings=self._settings.model_dump(mode="json"))
        worker.channel.start()
        self._workers.append(worker)
        self._say_what_is_live(worker)
        self._log.info("process started", worker=worker.number, pid=child.pid)

    async def _end(self, worker: Worker) -> None:
        self._workers.remove(worker)
        with contextlib.suppress(ProcessLookupError):
            worker.child.kill()
        await worker.child.wait()
        worker.channel.read()  # its last totals
        worker.channel.close()
        self._metrics.tallies.end(worker.number)
        self._statistics.end(worker.number)

    def _tell(self, _: Classifier) -> None:
        for worker in self._workers:
            self._say_what_is_live(worker)

    def _say_what_is_live(self, worker: Worker) -> None:
        model = self._live.current
        if model is not None:
            worker.told_at_s = time.monotonic()
            worker.channel.send(version=model.version, variant=model.variant, threads=model.threads)

    def _hear(self, worker: Worker, message: dict[str, Any]) -> None:
        """ended: connections that it no longer has. serves: the version that it answers with."""
        worker.num_silent_looks = 0
        worker.num_ended = message.get("ended", worker.num_ended)
        if "serves" in message:
            worker.version = message["serves"]
            if message.get("why"):
                self._log.warning("process has no model", worker=worker.number, why=message["why"])
            else:
                self._log.info("process serves", worker=worker.number, version=worker.version)
        if "counted" in message:
            self._metrics.tallies.tell(worker.number, message["counted"])
            self._statistics.tell(worker.number, message["statistics"])
