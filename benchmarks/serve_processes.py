"""The servers that are measured, each a process of its own, and what they cost."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ALIKE = {"ORT_DISABLE_TELEMETRY": "1"}
"""As ours has it, the others have it too."""


@contextmanager
def process(
    *command: str, health: str, environment: dict[str, str], python: str = sys.executable
) -> Iterator[int]:
    """A server until the block ends, once `health` answers 200. Yields its process id."""
    child = subprocess.Popen(
        [python, *command], env=os.environ | _ALIKE | environment, process_group=0, stdout=subprocess.DEVNULL
    )
    try:
        deadline_s = time.monotonic() + 60.0
        while not _answers(health):
            if child.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"{' '.join(command)} did not come up at {health}")
            time.sleep(0.1)
        yield child.pid
    finally:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=15.0)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # LitServe's workers too
        child.wait()


@contextmanager
def echosight(folder: Path, port: int, *, processes: int = 1, **settings: str) -> Iterator[int]:
    """Our server on a data folder, once all its processes answer. Yields the first one's id."""
    url = f"http://127.0.0.1:{port}"
    environment = {"ECHOSIGHT_DATA_DIR": str(folder), "REDIS_URL": "", "ECHOSIGHT_LOG_LEVEL": "warning"} | settings
    command = ("-m", "api", "--port", str(port), "--processes", str(processes))
    with process(*command, health=f"{url}/readyz", environment=environment) as pid:
        deadline_s = time.monotonic() + 60.0
        while f"echosight_api_processes {processes}.0" not in _text(f"{url}/metrics"):
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"{processes} processes did not come up")
            time.sleep(0.2)
        yield pid


def _text(url: str) -> str:
    with urllib.request.urlopen(url) as answer:  # noqa: S310
        return str(answer.read().decode())


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as reply:  # noqa: S310
            return bool(reply.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def family(pid: int) -> list[int]:
    """A process and its children, down to the last."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(member for child in children for member in family(int(child)))]


def rss_mib(pid: int) -> float:
    """Memory of a process and its children."""
    pages = sum(int(Path(f"/proc/{member}/statm").read_text().split()[1]) for member in family(pid))
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu_s(pid: int) -> float:
    """CPU time that a process and its children have taken so far, seconds. pid 0: nothing."""
    if not pid:
        return 0.0
    ticks = 0
    for member in family(pid):
        fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
