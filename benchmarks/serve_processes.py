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


@contextmanager
def process(
    *command: str, health: str, environment: dict[str, str], python: str = sys.executable
) -> Iterator[int]:
    """A server until the block ends, once `health` answers 200. Yields its process id."""
    child = subprocess.Popen(
        [python, *command], env=os.environ | environment, process_group=0, stdout=subprocess.DEVNULL
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


def rss_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu_s(pid: int) -> float:
    """CPU time that a process and its children have taken so far, seconds. pid 0: nothing."""
    if not pid:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") + sum(cpu_s(int(c)) for c in children)
