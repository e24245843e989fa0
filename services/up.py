"""`echosight up`: the whole system on one machine, as child processes, watched by one status line.

It starts an embedded server when none is named, then sensors, ingest, trainer and API; starts again what dies;
and on Ctrl-C or SIGTERM stops them in the order of the flow, the server last. It imports none of the workers.
"""

import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from services.core.embedded import EmbeddedServer, start_embedded_server
from services.core.errors import EchosightError, SettingsError
from services.core.registry import Registry
from services.core.settings import CoreSettings
from services.core.streams import EventLog, StreamsLost

_STATUS_EVERY_S = 5.0
_STOP_TIMEOUT_S = 15.0
_RESTART_AFTER_S = (0.5, 2.0, 5.0, 15.0, 60.0)
_LASTED_S = 60.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Worker:
    """A process to keep running. module: what `python -m` runs."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()


@dataclass(slots=True)
class _Child:
    worker: Worker
    log_path: Path
    process: "subprocess.Popen[bytes] | None" = None
    started_s: float = 0.0
    num_failures: int = 0
    restart_at_s: float = 0.0


@dataclass(slots=True)
class Status:
    """The newest event of each kind, and what of it a person wants to read."""

    events: dict[str, dict[str, Any]] = field(default_factory=dict)

    def take_in(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            self.events[str(event.get("kind"))] = event

    def line(self, *, champion: int | None) -> str:
        """One line: pairs/s, stored, step, loss against chance, live model, accuracy."""
        ingest, trainer = self.events.get("ingest", {}), self.events.get("trainer", {})
        parts = [
            f"{ingest.get('pairs_per_s', 0.0):.1f} pairs/s",
            f"{ingest.get('pairs', 0):,} stored",
            self._learning(trainer),
            f"live model v{champion}" if champion is not None else "no model live yet",
        ]
        if trainer.get("accuracy") is not None:
            parts.append(f"accuracy {100 * trainer['accuracy']:.0f} % on held-out of {trainer['labels']} labels")
        elif trainer:
            parts.append(f"{trainer.get('labels', 0)} labels")
        return " | ".join(parts)

    @staticmethod
    def _learning(trainer: Mapping[str, Any]) -> str:
        if not trainer:
            return "trainer is starting"
        if "loss" not in trainer:
            return f"waiting for pairs: {trainer['pairs']} of {trainer['needed']}"
        return f"step {trainer['step']:,} | loss {trainer['loss']:.2f} (chance {trainer['chance']:.2f})"


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
        """Start, watch, stop. Raises SettingsError if another `up` runs here, or the API's port is taken."""
        self._logs_dir.mkdir(parents=True, exist_ok=True)
        lock = _lock(self._settings.data_dir / "up.lock")
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

    def _redis_url(self) -> str:
        if self._settings.redis_url:
            return self._settings.redis_url
        self._server = start_embedded_server(self._settings.data_dir / "redis")
        return self._server.url

    def _greet(self, url: str) -> None:
        host, port = self._address
        self._console.print(f"[bold]Echosight[/bold] in {self._settings.data_dir.resolve()}")
        self._console.print(f"  streams  {url}{' (embedded)' if self._server else ''}")
        self._console.print(f"  API      http://{host}:{port}  (docs: http://{host}:{port}/docs)")
        self._console.print(f"  logs     {self._logs_dir}/*.log")
        self._console.print("Ctrl-C stops everything. The first model comes after some minutes.\n")

    def _watch(self, environment: dict[str, str], events: EventLog) -> None:
        status = Status()
        registry = Registry(self._settings.registry_dir, self._settings.model_name)
        last_id = "$"  # from now on: what an earlier run said is no news
        while not self._stopping.wait(_STATUS_EVERY_S):
            for child in self._children:
                self._keep_alive(child, environment)
            try:
                last_id, news = events.since(last_id)
                status.take_in(news)
                champion = registry.aliases().get("champion")
            except (*StreamsLost, EchosightError) as error:
                self._console.print(f"[yellow]no status: {error}[/yellow]")
                continue
            clock = time.strftime("%H:%M:%S")
            self._console.print(
                f"[dim]{clock}[/dim]  {status.line(champion=champion)}", highlight=False, soft_wrap=True
            )

    def _start(self, child: _Child, environment: dict[str, str]) -> None:
        with child.log_path.open("ab") as log:
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

    def _keep_alive(self, child: _Child, environment: dict[str, str]) -> None:
        now_s = time.monotonic()
        if child.process is None:
            if now_s >= child.restart_at_s:
                self._start(child, environment)
            return
        code = child.process.poll()
        if code is None:
            return
        child.process = None
        if code == 0 and now_s - child.started_s > _STATUS_EVERY_S:
            child.restart_at_s = float("inf")  # it had its fill, a simulation of N seconds for instance
            self._console.print(f"{child.worker.name} has finished")
            return
        child.num_failures = 0 if now_s - child.started_s > _LASTED_S else child.num_failures + 1
        delay_s = _RESTART_AFTER_S[min(child.num_failures, len(_RESTART_AFTER_S) - 1)]
        child.restart_at_s = now_s + delay_s
        self._console.print(
            f"[red]{child.worker.name} ended with status {code}[/red]; starting it again in {delay_s:.0f} s. "
            f"Last line of {child.log_path}:\n  {_last_line(child.log_path)}",
            highlight=False,
        )

    def _stop_children(self) -> None:
        """SIGTERM in the order of the flow, so that what was published is still stored; SIGKILL after a while."""
        running = [child for child in self._children if child.process is not None]
        for child in running:
            assert child.process is not None
            child.process.terminate()
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        for child in running:
            assert child.process is not None
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._console.print(f"[red]{child.worker.name} did not stop; killed[/red]")
                child.process.kill()
                child.process.wait()


def _die_with_parent() -> Callable[[], None]:
    """Ask the kernel to SIGTERM the child when we are killed: nobody else would stop it."""
    libc = ctypes.CDLL(None)

    def in_child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return in_child


def _lock(path: Path) -> IO[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
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
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SettingsError(
                f"the API cannot listen on {host}:{port}: {error.strerror}",
                remedy="stop what listens there, or set ECHOSIGHT_API_PORT",
            ) from None


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:300] if lines else ""
