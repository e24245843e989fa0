"""`echosight up`: the whole system on one machine, as child processes, watched by one status line.

It starts an embedded server when none is named, then sensors, ingest, trainer and API; starts again what dies,
the server too; and when it is told to stop, stops them stage by stage in the order of the flow, the server last.
It imports none of the workers.
"""

import ctypes
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydantic import Field
from rich.console import Console
from rich.markup import escape

from services.core.embedded import EmbeddedServer, start_embedded_server
from services.core.errors import EchosightError, SettingsError
from services.core.registry import Registry
from services.core.settings import CoreSettings
from services.core.streams import EventLog, StreamsLost
from services.status import Status

_STATUS_EVERY_S = 5.0
_RESTART_AFTER_S = (0.5, 2.0, 5.0, 15.0, 60.0)
_LASTED_S = 60.0
_WRONG_SETTING = 2  # a worker's exit status
_PR_SET_PDEATHSIG = 1


class UpSettings(CoreSettings):
    """Settings of `echosight up`: what it must know of the API's without importing them."""

    api_host: str = Field(default="127.0.0.1", description="address that the API listens on")
    api_port: int = Field(default=8000, ge=0, le=65535, description="port that the API listens on")
    stop_grace_s: int = Field(
        default=20, ge=1, description="how long requests in flight may take to finish when the API is stopped"
    )


@dataclass(frozen=True, slots=True)
class Worker:
    """A process to keep running.

    module: what `python -m` runs. may_finish: whether exit status 0 means that it had its fill, not that somebody
    stopped it. stage: workers of a lower stage are stopped, and gone, before those of the next.
    stop_timeout_s: seconds from SIGTERM to SIGKILL.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    may_finish: bool = False
    stage: int = 0
    stop_timeout_s: float = 30.0


@dataclass(slots=True)
class _Child:
    worker: Worker
    log_path: Path
    process: "subprocess.Popen[bytes] | None" = None
    log_from: int = 0  # where the log of this process begins
    started_s: float = 0.0
    num_starts: int = 0
    num_failures: int = 0
    restart_at_s: float = 0.0


class Supervisor:
    """Runs the workers until `stop`."""

    def __init__(
        self, settings: CoreSettings, workers: list[Worker], *, address: tuple[str, int], console: Console
    ) -> None:
        self._settings = settings
        self._console = console
        self._address = address
        self._logs_dir = settings.data_dir / "logs"
        self._children = [_Child(worker, self._logs_dir / f"{worker.name}.log") for worker in workers]
        self._server: EmbeddedServer | None = None
        self._stopping = threading.Event()

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        """Start, watch, stop.

        Raises SettingsError if another `up` runs here, if the folder cannot be written, if the API cannot listen
        where it is told to, or if a worker cannot start with its settings.
        """
        lock = self._take_folder()
        try:
            _require_free(*self._address)
            url = self._redis_url()
            environment = {**os.environ, "REDIS_URL": url, "ECHOSIGHT_DATA_DIR": str(self._settings.data_dir)}
            self._greet(url)
            events = EventLog(url, source="up")
            try:
                for child in self._children:
                    self._start(child, environment)
                self._watch(environment, events)
            finally:
                self._stop_children()
                events.close()
        finally:
            if self._server is not None:
                self._server.stop()
            lock.close()
        self._console.print("stopped; `echosight up` goes on from here")

    def _take_folder(self) -> IO[str]:
        data_dir = self._settings.data_dir
        try:
            self._logs_dir.mkdir(parents=True, exist_ok=True)
            return _lock(data_dir / "up.lock")
        except OSError as error:
            raise SettingsError(
                f"ECHOSIGHT_DATA_DIR is {str(data_dir)!r}: {error.strerror}",
                remedy="name a folder you may write to",
            ) from None

    def _redis_url(self) -> str:
        if self._settings.redis_url:
            return self._settings.redis_url
        self._server = start_embedded_server(self._settings.data_dir / "redis")
        return self._server.url

    def _greet(self, url: str) -> None:
        host, port = self._address
        api = escape(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
        self._console.print(f"[bold]Echosight[/bold] in {escape(str(self._settings.data_dir.resolve()))}")
        self._console.print(f"  streams  {escape(without_password(url))}{' (embedded)' if self._server else ''}")
        self._console.print(f"  API      {api}  (docs: {api}/docs)")
        self._console.print(f"  logs     {escape(str(self._logs_dir))}/*.log")
        self._console.print("Ctrl-C stops everything. The first model comes after some minutes.\n")

    def _watch(self, environment: dict[str, str], events: EventLog) -> None:
        status = Status()
        registry = Registry(self._settings.registry_dir, self._settings.model_name)
        last_id = "$"  # from now on: what an earlier run said is no news
        while not self._stopping.wait(_STATUS_EVERY_S):
            self._keep_server()
            for child in self._children:
                self._keep_alive(child, environment)
            try:
                last_id, news = events.since(last_id)
                status.take_in(news)
                champion = registry.aliases().get("champion")
            except (*StreamsLost, EchosightError) as error:
                self._console.print(f"[yellow]no status: {escape(str(error))}[/yellow]")
                continue
            clock = time.strftime("%H:%M:%S")
            self._console.print(
                f"[dim]{clock}[/dim]  {status.line(champion=champion)}", highlight=False, soft_wrap=True
            )

    def _keep_server(self) -> None:
        """Start the embedded server again if it has died, where the workers know it. Its data is on disk."""
        if self._server is None:
            return
        code = self._server.process.poll()
        if code is None:
            return
        self._console.print(f"[red]the embedded server ended with status {code}[/red]; starting it again")
        try:
            self._server = start_embedded_server(self._settings.data_dir / "redis", port=self._server.port)
        except (EchosightError, OSError) as error:  # tried again at the next look
            self._console.print(f"[red]the embedded server does not start:[/red] {escape(str(error))}")

    def _start(self, child: _Child, environment: dict[str, str]) -> None:
        with child.log_path.open("ab") as log:
            child.log_from = log.tell()
            child.process = subprocess.Popen(
                [sys.executable, "-m", child.worker.module, *child.worker.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C in the terminal is for us alone: we stop them in order
                preexec_fn=_die_with_parent(),
            )
        child.started_s = time.monotonic()
        child.num_starts += 1

    def _keep_alive(self, child: _Child, environment: dict[str, str]) -> None:
        """Start again what has ended. Raises SettingsError if it cannot ever work: settings do not change."""
        now_s = time.monotonic()
        if child.process is None:
            if now_s >= child.restart_at_s:
                self._start(child, environment)
            return
        code = child.process.poll()
        if code is None:
            return
        child.process = None
        if code == 0 and child.worker.may_finish:
            child.restart_at_s = float("inf")
            self._console.print(f"{child.worker.name} has finished")
            return
        if code == _WRONG_SETTING and child.num_starts == 1 and now_s - child.started_s <= _LASTED_S:
            said = _last_lines(child.log_path, start=child.log_from)
            raise SettingsError(
                f"{child.worker.name} cannot start, so everything was stopped; it says\n{said or '  nothing'}"
            )
        child.num_failures = 0 if now_s - child.started_s > _LASTED_S else child.num_failures + 1
        delay_s = _RESTART_AFTER_S[min(child.num_failures, len(_RESTART_AFTER_S) - 1)]
        child.restart_at_s = now_s + delay_s
        self._console.print(
            f"[red]{child.worker.name} ended with status {code}[/red]; starting it again in {delay_s:.0f} s. "
            f"The end of {escape(str(child.log_path))}:\n{escape(_last_lines(child.log_path))}",
            highlight=False,
        )

    def _stop_children(self) -> None:
        """Stage by stage in the order of the flow: who publishes is gone before who stores is told to stop."""
        for stage in sorted({child.worker.stage for child in self._children}):
            self._stop_stage([child for child in self._children if child.worker.stage == stage])

    def _stop_stage(self, children: list[_Child]) -> None:
        """SIGTERM to all, SIGKILL to those that take longer than they may."""
        running = [(child.worker, child.process) for child in children if child.process is not None]
        for _, process in running:
            process.terminate()
        told_s = time.monotonic()
        for worker, process in running:
            try:
                process.wait(max(0.1, told_s + worker.stop_timeout_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._console.print(f"[red]{worker.name} did not stop; killed[/red]")
                process.kill()
                process.wait()


def _die_with_parent() -> Callable[[], None]:
    """Ask the kernel to SIGTERM the child when we are killed: nobody else would stop it."""
    libc = ctypes.CDLL(None)

    def in_child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return in_child


def without_password(url: str) -> str:
    """`url` for people to read: its password, before the host or in the query, is ***."""
    url = re.sub(r"://([^:@/]*):.*@", r"://\1:***@", url)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", url)


def _lock(path: Path) -> IO[str]:
    """Raises OSError if `path` cannot be opened, SettingsError if another process holds it."""
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise SettingsError(
            f"another `echosight up` runs in {path.parent}", remedy="stop it, or set ECHOSIGHT_DATA_DIR"
        ) from None
    return file


def _require_free(host: str, port: int) -> None:
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no resolver could be asked for
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(
            f"the API cannot listen on ECHOSIGHT_API_HOST {host!r}, ECHOSIGHT_API_PORT {port}: {reason}",
            remedy="stop what listens there, or set another host or port",
        ) from None


def _last_lines(path: Path, num: int = 2, *, start: int = 0) -> str:
    """The last lines of a log, from `start` on: a message and, under it, what to do."""
    try:
        lines = path.read_bytes()[start:].decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return "\n".join(f"  {line[:300]}" for line in lines[-num:])
