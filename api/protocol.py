"""HTTP as uvicorn speaks it, with bounds of its own, and without what costs more than a small model does.

What is not read lies in this process, and uvicorn waits for it without end, also when it closes the connection. It
copies a body twice, sends the head of an answer apart from the rest, and sets a timer anew with every answer.
"""

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api.asked import put_whole

MAX_HEAD_BYTES = 64 * 1024
MAX_UNREAD_MS = 60_000
MAX_JOINED_BYTES = 64 * 1024
"""What is longer is not worth a copy."""


class BoundedHttp(HttpToolsProtocol):
    """Ends a connection on which MAX_HEAD_BYTES and a read have come that are neither a whole head nor a body, and
    one on which nothing came for `timeout_keep_alive` s while nothing was asked.

    The kernel ends one whose client takes nothing of what was sent for MAX_UNREAD_MS: TCP_USER_TIMEOUT (RFC 5482).
    """

    _num_pending = 0
    _quiet_since_s = 0.0
    _idle_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, MAX_UNREAD_MS)
        self.transport = JoinedWrites(transport, self.loop)  # type: ignore[assignment]
        self._quiet_since_s = self.loop.time()
        self._end_if_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        self.forget_idle()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._quiet_since_s = self.loop.time()
        self._num_pending += len(data)
        super().data_received(data)
        if self._num_pending > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.abort()

    def on_headers_complete(self) -> None:
        self._num_pending = 0
        super().on_headers_complete()

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

    def handle_websocket_upgrade(self) -> None:
        self.forget_idle()
        self.transport = self.inner_transport
        super().handle_websocket_upgrade()

    @property
    def inner_transport(self) -> asyncio.Transport:
        """The event loop's, for another protocol that takes over: with all that was written."""
        joined: Any = self.transport
        joined.flush()
        return joined.inner  # type: ignore[no-any-return]

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


class JoinedWrites:
    """A transport that sends two writes of one moment as one: a system call less, and its reader wakes up once."""

    def __init__(self, inner: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self.inner = inner
        self._loop = loop
        self._held = b""
        self.is_closing = inner.is_closing
        self.get_extra_info = inner.get_extra_info
        self.pause_reading = inner.pause_reading
        self.resume_reading = inner.resume_reading

    def write(self, data: bytes) -> None:
        """At once with what was held, or a moment later."""
        held = self._held
        if not held:
            self._held = data
            self._loop.call_soon(self.flush)
        elif len(data) <= MAX_JOINED_BYTES:
            self._held = b""
            self.inner.write(held + data)
        else:
            self.flush()
            self.inner.write(data)

    def flush(self) -> None:
        """Send what is held."""
        held, self._held = self._held, b""
        if held and not self.inner.is_closing():
            self.inner.write(held)

    def get_write_buffer_size(self) -> int:
        return len(self._held) + self.inner.get_write_buffer_size()

    def close(self) -> None:
        self.flush()
        self.inner.close()

    def abort(self) -> None:
        self._held = b""
        self.inner.abort()
