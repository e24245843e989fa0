"""HTTP connections that can go to another process of the server between two requests.

Whether one goes is decided when the head of a request is known; until then what was read is kept, and goes along.
A client sees nothing of it. It does not know where a connection goes, nor why.
"""

import asyncio
import enum
import socket
from abc import ABC, abstractmethod
from typing import Any

from api.protocol import BoundedHttp

_RETRY_S = 0.01
_MAX_RETRIES = 500


class Place(enum.Enum):
    """Where a request is answered."""

    HERE = enum.auto()
    RATHER_THERE = enum.auto()
    ONLY_THERE = enum.auto()


class Switch(ABC):
    """Decides for the connections of one process, and moves them."""

    @abstractmethod
    def place(
        self, protocol: "MovableHttp", method: bytes, target: bytes, headers: list[tuple[bytes, bytes]]
    ) -> Place:
        """Where a request is to be answered. target: path and query as they were sent."""

    @abstractmethod
    def move(self, fd: int, data: bytes) -> bool:
        """Whether another process has the connection now. data: what was read since the request began."""

    @abstractmethod
    def ended(self, protocol: "MovableHttp") -> None:
        """A connection is over, or has moved."""


class MovableHttp(BoundedHttp):
    """switch: of its process. first: what another process has read from the connection before it came here."""

    def __init__(self, switch: Switch, *, first: bytes | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._switch = switch
        self._first = first
        self.has_moved = first is not None
        """Whether it came from another process."""
        self._read: list[bytes] | None = []  # since the request began, until its head is known
        self._is_leaving = False
        self._may_stay = False
        self._num_retries = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._first:
            data, self._first = self._first, None
            self.data_received(data)  # before the loop reads any more

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._switch.ended(self)

    def data_received(self, data: bytes) -> None:
        if self._read is not None:
            self._read.append(data)
        super().data_received(data)
        if self._is_leaving and self._read is not None:
            self._leave()

    def on_message_begin(self) -> None:
        if self._is_leaving:
            return
        if not self._read:  # it began in the middle of what was read: a pipeline
            self._read = None
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self._is_leaving or self._upgrades_in_vain:
            return
        place = self._switch.place(self, self.parser.get_method(), self.url, self.headers)
        is_alone = self.cycle is None or self.cycle.response_complete
        can_leave = is_alone and bool(self._read)
        if place is Place.HERE or (place is Place.RATHER_THERE and not can_leave):
            self._read = None
            super().on_headers_complete()
            return
        self._num_pending = 0
        self._is_leaving = True
        self._may_stay = place is Place.RATHER_THERE
        if can_leave:
            return
        # RFC 9112, 9.3.2: who pipelines asks again what had no answer when the connection was closed.
        self._read = None
        if is_alone:
            self.transport.close()
        else:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        if self._is_leaving:
            self._num_pending = 0
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_leaving and not self._upgrades_in_vain:
            super().on_message_complete()
            self._read = []

    def handle_websocket_upgrade(self) -> None:
        if not self._is_leaving:
            super().handle_websocket_upgrade()
            self._switch.ended(self)  # another protocol has the connection, and hears of its end

    def _unsupported_upgrade_warning(self) -> None:
        if not self._is_leaving:
            super()._unsupported_upgrade_warning()

    def send_400_response(self, msg: str) -> None:
        if not self._is_leaving:  # what is broken behind a request goes with it
            super().send_400_response(msg)

    def _leave(self) -> None:
        """Go, or be answered here after all; who can only go tries for a while."""
        if self.transport.is_closing() or self._read is None:
            return
        self.transport.pause_reading()
        self._quiet_since_s = self.loop.time()  # something is asked
        data = b"".join(self._read)
        connection: socket.socket = self.transport.get_extra_info("socket")
        if not self.transport.get_write_buffer_size() and self._switch.move(connection.fileno(), data):
            self.transport.abort()
        elif self._may_stay:
            self._begin_anew(data)
        elif self._num_retries < _MAX_RETRIES:
            self._num_retries += not self.transport.get_write_buffer_size()  # a slow reader has MAX_UNREAD_MS
            self.loop.call_later(_RETRY_S, self._leave)
        else:
            self.transport.abort()

    def _begin_anew(self, data: bytes) -> None:
        """As if it had just come back from another process."""
        again = MovableHttp(
            self._switch,
            first=data,
            config=self.config,
            server_state=self.server_state,
            app_state=self.app_state,
            _loop=self.loop,
        )
        self.connections.discard(self)
        self.forget_idle()
        self._switch.ended(self)
        transport = self.inner_transport
        transport.set_protocol(again)
        transport.resume_reading()  # first: `again` may pause it
        again.connection_made(transport)
        if self.flow.write_paused:  # which the transport says once
            again.pause_writing()
