"""Helpers of the system tests: waiting with a deadline, and the processes that a folder's system left behind."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx

T = TypeVar("T")


def wait_for(probe: Callable[[], T | None], *, timeout_s: float, what: str) -> T:
    """Ask `probe` until it answers something true."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = probe()
        if found:
            return found
        time.sleep(0.2)  # the condition lies in other processes: there is nothing to wait on
    raise AssertionError(f"after {timeout_s:.0f} s still no {what}")


def is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes_of(data_dir: Path) -> list[str]:
    """Command lines of all processes that were given `data_dir`, or work in it."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if f"ECHOSIGHT_DATA_DIR={data_dir}".encode() in environment or str(data_dir) in command:
            found.append(command)
    return [command for command in found if command]
