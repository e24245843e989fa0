"""HTTP as uvicorn speaks it, with bounds of its own, and without what costs more than a small model does.

What is not read lies in this process, and uvicorn waits for it without end, also when it closes the connection. It
copies a body twice, sends the head of an answer apart from the rest, and sets a timer anew with every answer.
What comes before the app, and so past the gate, is answered by a problem, too.
"""

import asyncio
import socket
import sys
from typing import Any

import httptools
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from api import problems
from api.asked import put_whole
from api.problems import ProblemError
from api.writes import JoinedWrites

MAX_HEAD_BYTES = 64 * 1024
MAX_UNREAD_MS = 60_000
_NOT_HTTP = ProblemError(
    problems.NOT_HTTP, "what was sent is no request of HTTP/1.1", remedy="use a client for HTTP, without TLS"
)
_FULL = ProblemError(
    problems.TOO_MANY_CONNECTIONS,
    "the server has as many connections as it may",
    remedy="try again soon, keep fewer connections open, or have ECHOSIGHT_MAX_CONNECTIONS raised",
    headers={"retry-after": "2"},
)


class BoundedHttp(HttpToolsProtocol):
    """Ends a connection on which MAX_HEAD_BYTES and a read have come that are neither a whole head nor a body, and
    one on which nothing came for `timeout_keep_alive` s while nothing was asked.

    The kernel ends one whose client takes nothing of what was sent for MAX_UNREAD_MS: TCP_USER_TIMEOUT (RFC 5482).
    """

    _num_pending = 0
    _data = b""
    _quiet_since_s = 0.0
    _idle_timer: asyncio.TimerHandle | None = None
    _begun: RequestResponseCycle | None = None
    """The request that is being answered, or was last: `cycle` is the one that came last."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._limit, self.limit_concurrency = self.limit_concurrency, None  # its refusal would be bare text
        self._whole_app = self.app

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, MAX_UNREAD_MS)
        self._joined = JoinedWrites(transport, self.loop)
        self.transport = self._joined  # type: ignore[assignment]
        self._quiet_since_s = self.loop.time()
        self._end_if_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        self.forget_idle()
        super().connection_lost(exc)
        self.pipeline.clear()
        begun = self._begun
        if begun is not None and not begun.response_complete:
            begun.disconnected = True
            begun.message_event.set()

    def data_received(self, data: bytes) -> None:
        self._quiet_since_s = self.loop.time()
        self._num_pending += len(data)
        self._data = data
        super().data_received(data)
        self._data = b""
        if self._num_pending > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.abort()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays open: for whoever has asked, sends no more and waits for the answer.

        One that left altogether looks the same until it is answered; from an answer that goes on, it is let go.
        """
        self._joined.flush()
        cycle = self.cycle
        is_waited_for = cycle is not None and not cycle.more_body and not cycle.response_started
        if is_waited_for:
            cycle.keep_alive = False
        return is_waited_for

    def on_headers_complete(self) -> None:
        self._num_pending = 0
        if self._upgrades_in_vain:
            return
        is_full = self._limit is not None and max(len(self.connections), len(self.tasks)) >= self._limit
        self.app = _refuse if is_full else self._whole_app
        super().on_headers_complete()
        if not self.parser.should_upgrade():
            self.headers = []  # trailers are none of the request's headers (RFC 9110, 6.5.1)

    def on_body(self, body: bytes) -> None:
        self._num_pending = 0
        cycle = self.cycle
        if cycle.body or cycle.response_complete or self.parser.should_upgrade():
            super().on_body(body)
        else:  # what comes first is read as it is
            cycle.body = body  # type: ignore[assignment]
            cycle.message_event.set()

    def on_message_complete(self) -> None:
        self._num_pending = 0
        if self._upgrades_in_vain:
            return
        super().on_message_complete()
        if self.cycle is not None:
            put_whole(self.cycle.scope)

    def on_response_complete(self) -> None:
        """As uvicorn's, but for the timer: there is one a connection, which looks when it was last needed."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self._quiet_since_s = self.loop.time()
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._begun = cycle
        super()._start_asgi_task(cycle, app)

    def handle_websocket_upgrade(self) -> None:
        self.forget_idle()
        self.transport = self.inner_transport
        super().handle_websocket_upgrade()

    @property
    def inner_transport(self) -> asyncio.Transport:
        """The event loop's, for another protocol that takes over: with all that was written."""
        self._joined.flush()
        return self._joined.inner

    def forget_idle(self) -> None:
        """Another protocol has the connection, or nobody."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _end_if_idle(self) -> None:
        is_asked = self.cycle is not None and not self.cycle.response_complete
        quiet_s = 0.0 if is_asked else self.loop.time() - self._quiet_since_s
        if quiet_s >= self.timeout_keep_alive:
            self.transport.close()
        else:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive - quiet_s, self._end_if_idle)

    @property
    def _upgrades_in_vain(self) -> bool:
        """Whether this request would go on in a protocol that is not spoken here, as Java's client in HTTP/2."""
        return bool(
            self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT" and not self._should_upgrade()
        )

    def _unsupported_upgrade_warning(self) -> None:
        """Read the request again without its wish, which may be ignored (RFC 9110, 7.8).

        The parser takes what follows the head for that protocol, a body too.
        """
        if not self._upgrades_in_vain:
            return
        num_read = sys.exception().args[0]  # type: ignore[union-attr]
        version = self.parser.get_http_version().encode()
        head = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        head += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._data = b"\r\n".join([*head, b"", b""]) + self._data[num_read:]
        super().data_received(self._data)  # in which the next request may wish the same

    def send_400_response(self, msg: str) -> None:
        """In its turn: after the answer to what was asked before, or not at all."""
        del msg
        cycle, begun = self.cycle, self._begun
        if cycle is not None and not cycle.more_body and not cycle.response_complete:
            cycle.keep_alive = False
            return
        if begun is not None and not begun.response_complete and (begun is not cycle or begun.response_started):
            self.transport.close()
            return
        headers, body = _answer(_NOT_HTTP, "")
        lines = [b"HTTP/1.1 400 Bad Request", *(name + b": " + value for name, value in headers)]
        self.transport.write(b"\r\n".join([*lines, b"", body]))
        self.transport.close()


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that has no room."""
    del receive
    headers, body = _answer(_FULL, scope["path"])
    await send({"type": "http.response.start", "status": _FULL.kind.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _answer(error: ProblemError, path: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """The headers and the body of a connection's last answer."""
    body = error.body(path, "")
    headers = [
        (b"content-type", problems.MEDIA_TYPE.encode()),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
        (b"x-content-type-options", b"nosniff"),
        (b"cache-control", b"no-store"),
        *((name.encode(), value.encode()) for name, value in error.headers.items()),
    ]
    return headers, body
