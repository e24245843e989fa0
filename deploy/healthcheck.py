"""Whether a container does its work: `healthcheck.py api | ingest | trainer | site NAME`. Exit status 0: it does.

The API must answer; the worker of this very container must have reported to the event stream lately, whatever its
other replicas do; a simulated site must have published a frame lately. Runs every few seconds beside the worker,
so it imports nothing that takes time: it speaks just enough of the Redis protocol. Keys and events are those of
docs/asyncapi.yaml.
"""

import os
import socket
import sys
import time
from http.client import HTTPConnection
from urllib.parse import unquote, urlsplit

EVENTS = "echosight:events"
RADAR = "echosight:{%s}:radar"
LATELY_S = 30
_TIMEOUT_S = 4.0
_MAX_EVENTS = 500


def main(arguments: list[str]) -> int:
    """Print what is wrong, if anything is."""
    match arguments:
        case ["api"]:
            problem = check_api(int(os.environ.get("ECHOSIGHT_API_PORT", "8000")))
        case ["ingest" | "trainer" as worker]:
            problem = check_worker(os.environ["REDIS_URL"], worker)
        case ["site", site]:
            problem = check_site(os.environ["REDIS_URL"], site)
        case _:
            problem = f"arguments are {arguments}; use api, ingest, trainer, or site NAME"
    print(problem or "healthy")
    return 1 if problem else 0


def check_api(port: int) -> str:
    """What is wrong, or ""."""
    connection = HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/livez")
        status = connection.getresponse().status
    except OSError as error:
        return f"no answer on port {port}: {error}"
    finally:
        connection.close()
    return "" if status == 200 else f"/livez answered {status}"


def check_worker(redis_url: str, worker: str) -> str:
    """What is wrong, or ""."""
    problem, reply = _ask(redis_url, f"XREVRANGE {EVENTS} + {_lately_ms()} COUNT {_MAX_EVENTS}")
    if problem:
        return problem
    ours = (f'"kind":"{worker}"'.encode(), f'"host":"{socket.gethostname()}"'.encode())
    if any(all(part in event for part in ours) for event in reply.splitlines()):  # an event is one line of JSON
        return ""
    return f"{worker} on {socket.gethostname()} has not reported for {LATELY_S} s"


def check_site(redis_url: str, site: str) -> str:
    """What is wrong, or ""."""
    problem, reply = _ask(redis_url, f"XREVRANGE {RADAR % site} + {_lately_ms()} COUNT 1")
    if problem:
        return problem
    return "" if reply.startswith(b"*1") else f"{site} has not published a radar frame for {LATELY_S} s"


def _lately_ms() -> int:
    return int((time.time() - LATELY_S) * 1e3)


def _ask(redis_url: str, command: str) -> tuple[str, bytes]:
    """(what is wrong or "", the raw reply to one command). QUIT makes the server close when it has answered."""
    url = urlsplit(redis_url)
    login = f"AUTH {unquote(url.username or 'default')} {unquote(url.password)}\r\n" if url.password else ""
    try:
        with socket.create_connection((url.hostname or "127.0.0.1", url.port or 6379), _TIMEOUT_S) as connection:
            connection.sendall(f"{login}{command}\r\nQUIT\r\n".encode())
            reply = b"".join(iter(lambda: connection.recv(65536), b""))
    except OSError as error:
        return f"no answer from the streams' server: {error}", b""
    reply = reply.removeprefix(b"+OK\r\n") if login else reply
    return (reply.splitlines()[0].decode(errors="replace"), b"") if reply.startswith(b"-") else ("", reply)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
