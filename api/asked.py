"""What is known of one request on its way through the server; it travels in the ASGI scope."""

import itertools
import os
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from structlog.contextvars import bind_contextvars

from services.core.keys import Key

if TYPE_CHECKING:
    from opentelemetry.trace import Span

REQUEST_ID = b"x-request-id"
_ASKED = "echosight.asked"
_WHOLE = "echosight.whole"
_SANE_ID = re.compile(rb"[A-Za-z0-9_.:/+=@-]{1,128}")
_process_id = os.urandom(5).hex()
_numbers = itertools.count(1)


@dataclass(slots=True)
class Asked:
    """One request, or one WebSocket.

    caller: the key's name, else the peer's address. problem: the kind of problem that it was answered with, "" for
    none. error: class of what nobody foresaw, "" for nothing.
    """

    request_id: str
    caller: str
    key: Key | None = None
    problem: str = ""
    error: str = ""
    span: "Span | None" = None
    started_ns: int = field(default_factory=time.perf_counter_ns)


def put_asked(scope: Any, asked: Asked) -> None:
    """Let `asked_of` find it, and every log line of this task have its id."""
    scope[_ASKED] = asked
    bind_contextvars(request_id=asked.request_id)


def put_whole(scope: Any) -> None:
    """Say that all of the request's body has come."""
    scope[_WHOLE] = True


def is_whole(scope: Any) -> bool:
    """Whether nobody has to wait for more of the request's body."""
    return _WHOLE in scope


def asked_of(scope: Any) -> Asked:
    """What is known of the request behind a scope. One that came past the gate, as in tests, is anonymous."""
    asked: Asked | None = scope.get(_ASKED)
    return asked or Asked("", peer_of(scope))


def request_id_from(sent: bytes | None) -> str:
    """The client's own id if it is a sane one, else one that no other request has."""
    if sent is not None and _SANE_ID.fullmatch(sent):
        return sent.decode("ascii")
    return f"{_process_id}-{next(_numbers):x}"


def peer_of(scope: Any) -> str:
    """The address that a request came from, "" where there is none."""
    client = scope.get("client")
    return client[0] if client else ""
