"""A server, some ingest processes, and what befalls them: killed, paused, joined by others, by a seed.

It runs processes and kills them; what is sent through them and what must come out is in `traffic`.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import redis

from services.core.embedded import EmbeddedServer, start_embedded_server
from services.core.streams import stream_key
from tests.system.traffic import Account, Producer, Schedule, Watcher, account, undone

Trouble = Literal["kill", "pause", "join", "leave", "kill server"]
LEASE_MS = 500
SITES = ("north", "south", "west")
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 1.2 * LEASE_MS / 1e3, 3.0 * LEASE_MS / 1e3
_PROGRESS_TIMEOUT_S = 30.0
_DRAIN_TIMEOUT_S = 60.0
_SETTINGS = {
    "ECHOSIGHT_LEASE_MS": str(LEASE_MS),
    "ECHOSIGHT_IDLE_TIMEOUT_S": "2",
    "ECHOSIGHT_MIN_FREE_BYTES": "0",
    "ECHOSIGHT_MAX_STORE_BYTES": str(256 * 1024**2),
    "PYTHONFAULTHANDLER": "1",
}


class Ingest:
    """One ingest process. Its output goes to `log_path`."""

    def __init__(
        self, name: str, *, url: str, data_dir: Path, log_path: Path, settings: dict[str, str] | None = None
    ) -> None:
        self.name = name
        environment = os.environ | _SETTINGS | (settings or {}) | {
            "REDIS_URL": url, "ECHOSIGHT_DATA_DIR": str(data_dir), "ECHOSIGHT_CONSUMER_NAME": name,
        }  # fmt: skip
        self._log_path = log_path
        with log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "services.ingest"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL: no farewell."""
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def leave(self, *, timeout_s: float = 30.0) -> int:
        """SIGTERM; its exit status. One that did not listen yet dies of it, which counts as 0."""
        was_started = b"ingest_started" in self._log_path.read_bytes()[self._log_start :]
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(timeout_s)
        return 0 if status == -signal.SIGTERM and not was_started else status


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: what was done to it, what it carried, and where every frame is."""

    seed: int
    troubles: dict[str, int]
    num_entries: int
    num_retries: int
    num_reads: int
    num_buried: int
    died: list[str]
    slowest_progress_s: float
    wall_s: float
    account: Account

    def faults(self) -> dict[str, list[str]]:
        """All that must not be; empty if all is well."""
        found = self.account.faults()
        if self.died:
            found["died"] = self.died
        if self.num_buried:
            found["buried"] = [f"{self.num_buried} good frames are among the dead letters"]
        return found


class Rig:
    """A server, ingest processes, a producer and a reader on one directory, and the troubles that come over them.

    fsync: the server's policy; under "always" it says of nothing that it has it before it is in the file.
    """

    def __init__(
        self,
        directory: Path,
        *,
        seed: int,
        num_replicas: int,
        fsync: Literal["everysec", "always"] = "always",
        instants_per_s: float = 30.0,
    ) -> None:
        self._directory = directory
        self._seed = seed
        self._fsync = fsync
        self._rng = random.Random(seed)
        self._started_s = time.monotonic()
        self._never = threading.Event()
        self._num_named = 0
        self._troubles: Counter[str] = Counter()
        self._died: list[str] = []
        self._slowest_s = 0.0
        self._replicas: list[Ingest] = []
        self._num_replicas = num_replicas
        self._server = self._start_server(port=0)
        start_ns = time.time_ns() // 10**9 * 10**9
        schedule = Schedule(SITES, seed=seed, start_ns=start_ns)
        self._producer = Producer(self._server.url, schedule, instants_per_s=instants_per_s)
        self._watcher = Watcher(directory / "store", seed=seed)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.callback(lambda: self._server.stop())
        self._stack.callback(self._kill_all)
        with ExitStack() as stack:
            stack.push(self._stack)
            for _ in range(self._num_replicas):
                self._start_replica()
            self._stack.enter_context(self._watcher)
            self._stack.enter_context(self._producer)
            stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def suffer(self, num: int, *, kinds: Sequence[Trouble]) -> None:
        """Let `num` troubles come: most once every site has made progress since the last, some without waiting."""
        self._await_progress("the start")
        for _ in range(num):
            trouble = self._rng.choice(kinds)
            if self._rng.random() < 0.25:  # amid a start, a takeover, a recovery
                self._never.wait(self._rng.uniform(0.0, 1.0))
            else:
                self._await_progress(", ".join(self._troubles) or "the start")
                self._never.wait(self._rng.uniform(0.0, 0.3))
            self._do(trouble)
            self._troubles[trouble] += 1
        self._await_progress("the last trouble")

    def settle(self) -> Outcome:
        """Stop sending, wait until all is acknowledged, let the replicas leave, and account for every frame."""
        self._producer.stop()
        with redis.Redis.from_url(self._server.url) as client:
            self._until(
                lambda: not undone(client, SITES),
                timeout_s=_DRAIN_TIMEOUT_S,
                what="end of all streams",
                tell=lambda: undone(client, SITES),
            )
            num_buried = sum(client.xlen(stream_key(site, "dead")) for site in SITES)
        for replica in self._replicas:
            if (status := replica.leave()) != 0:
                self._died.append(f"{replica.name} answered SIGTERM with status {status}")
        self._replicas.clear()
        found = account(self._producer.sent, self._directory / "store")
        torn = [*found.torn, *self._watcher.torn]
        return Outcome(
            seed=self._seed,
            troubles=dict(self._troubles),
            num_entries=self._producer.num_entries,
            num_retries=self._producer.num_retries,
            num_reads=self._watcher.num_reads,
            num_buried=num_buried,
            died=self._died,
            slowest_progress_s=self._slowest_s,
            wall_s=time.monotonic() - self._started_s,
            account=Account(found.num_pairs, found.num_alone, found.lost, found.doubled, found.foreign, torn),
        )

    def _do(self, trouble: Trouble) -> None:
        replica = self._rng.choice(self._replicas)
        match trouble:
            case "kill":
                self._replicas.remove(replica)
                replica.kill()
                self._start_replica(name=replica.name if self._rng.random() < 0.5 else None)
            case "pause":
                replica.freeze()
                self._never.wait(self._rng.uniform(_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S))
                replica.thaw()
            case "join":
                self._start_replica()
                if len(self._replicas) > self._num_replicas + 1:
                    self._replicas.remove(replica)
                    replica.kill()
            case "leave":
                self._replicas.remove(replica)
                if (status := replica.leave()) != 0:
                    self._died.append(f"{replica.name} answered SIGTERM with status {status}")
                if len(self._replicas) < self._num_replicas:
                    self._start_replica()
            case "kill server":
                self._server.process.kill()
                self._server.process.wait()
                self._never.wait(self._rng.choice((0.0, 0.2, 1.0)))
                self._server = self._start_server(port=self._server.port)

    def _kill_all(self) -> None:
        for replica in self._replicas:
            replica.kill()

    def _start_server(self, *, port: int) -> EmbeddedServer:
        return start_embedded_server(self._directory / "redis", port=port, appendfsync=self._fsync)

    def _start_replica(self, *, name: str | None = None) -> None:
        if name is None:
            self._num_named += 1
            name = f"replica-{self._num_named}"
        log_path = self._directory / f"{name}.log"
        self._replicas.append(Ingest(name, url=self._server.url, data_dir=self._directory, log_path=log_path))

    def _await_progress(self, after: str) -> None:
        """Wait until every site has more pairs than now."""
        before = {site: self._watcher.num_pairs(site) for site in SITES}
        started_s = time.monotonic()
        self._until(
            lambda: all(self._watcher.num_pairs(site) > num for site, num in before.items()),
            timeout_s=_PROGRESS_TIMEOUT_S,
            what=f"new pair of every site after {after}",
            tell=lambda: {site: self._watcher.num_pairs(site) - num for site, num in before.items()},
        )
        self._slowest_s = max(self._slowest_s, time.monotonic() - started_s)

    def _until(
        self, is_so: Callable[[], bool], *, timeout_s: float, what: str, tell: Callable[[], object]
    ) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not is_so():
            dead = [one for one in self._replicas if not one.is_running]
            if dead or time.monotonic() > deadline_s:
                told = f"{dead[0].name} has exited" if dead else f"after {timeout_s:.0f} s"
                tails = "\n".join(f"--- {one.name}\n{self._tail(one.name)}" for one in dead or self._replicas)
                raise AssertionError(
                    f"seed {self._seed}: {told}, still no {what}: {tell()}; troubles so far "
                    f"{dict(self._troubles)}, torn {self._watcher.torn[:3]}\n{tails}"
                )
            self._never.wait(0.02)  # the condition lies in other processes: there is nothing to wait on

    def _tail(self, name: str, *, num_bytes: int = 2000) -> str:
        """The end of a replica's log."""
        return (self._directory / f"{name}.log").read_text(errors="replace")[-num_bytes:]
