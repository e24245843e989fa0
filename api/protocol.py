"""HTTP as uvicorn speaks it, and bounds of its own: of heads and trailers, and of what nobody reads.

What is not read lies in this process, and uvicorn waits for it without end, also when it closes the connection.
"""

import asyncio
import socket

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
MAX_UNREAD_MS = 60_000


class BoundedHttp(HttpToolsProtocol):
    """Ends a connection on which MAX_HEAD_BYTES and a read have come that are neither a whole head nor a body.

    The kernel ends one whose client takes nothing of what was sent for MAX_UNREAD_MS: TCP_USER_TIMEOUT (RFC 5482).
    """

    _num_pending = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, MAX_UNREAD_MS)

    def data_received(self, data: bytes) -> None:
        self._num_pending += len(data)
        super().data_received(data)
        if self._num_pending > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.abort()

    def on_headers_complete(self) -> None:
        self._num_pending = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_pending = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_pending = 0
        super().on_message_complete()
