"""As much of WebSocket (RFC 6455) as a client needs that sends arrays and reads texts, on a plain socket."""

import base64
import contextlib
import hashlib
import http.client
import os
import socket
import ssl
import struct

import numpy as np

from services.client.errors import StreamClosedError, UnreachableError, error_from
from services.client.http import Connection, read_json

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
_FINAL, _MASKED = 0x80, 0x80
_NORMAL = 1000


class WebSocket:
    """One open connection. For one thread at a time."""

    def __init__(self, to: Connection, path: str) -> None:
        """Raises ClientError: the server's problem if it refuses, UnreachableError if nobody answers."""
        try:
            self._socket = _connect(to)
        except OSError as error:
            raise UnreachableError(f"no answer from {to.url}: {error}", remedy="start the server") from None
        try:
            self._shake_hands(to, path)
        except BaseException:
            self._socket.close()
            raise
        self._received = bytearray()

    def send(self, data: bytes) -> None:
        """One binary message. Raises StreamClosedError."""
        self._send(_BINARY, data)

    def receive(self) -> bytes:
        """The next message; pings are answered on the way. Raises StreamClosedError."""
        message = bytearray()
        while True:
            is_final, opcode, data = self._frame()
            match opcode:
                case 0x0 | 0x1 | 0x2:
                    message += data
                    if len(message) > MAX_MESSAGE_BYTES:
                        raise StreamClosedError("message is too long")
                    if is_final:
                        return bytes(message)
                case 0x9:
                    self._send(_PONG, data)
                case 0x8:
                    code = struct.unpack("!H", data[:2])[0] if len(data) >= 2 else 0
                    reason = data[2:].decode(errors="replace") or "no reason given"
                    self._socket.close()
                    raise StreamClosedError(
                        f"the server closed the stream ({code}): {reason}", remedy="open it again"
                    )

    def close(self) -> None:
        """Say good-bye; whatever the server still sends is not waited for."""
        with contextlib.suppress(StreamClosedError):
            self._send(_CLOSE, struct.pack("!H", _NORMAL))
        self._socket.close()

    def _shake_hands(self, to: Connection, path: str) -> None:
        key = base64.b64encode(os.urandom(16))
        host = f"[{to.host}]" if ":" in to.host else to.host
        head = (
            f"GET {to.prefix}{path} HTTP/1.1\r\nHost: {host}{f':{to.port}' if to.port else ''}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {key.decode()}\r\n"
        )
        own = "".join(f"{name}: {value}\r\n" for name, value in to.headers.items())
        try:
            self._socket.sendall(f"{head}{own}\r\n".encode())
            # Unbuffered: what follows the head of the answer belongs to the first message.
            response = _Handshake(self._socket)
            response.begin()
            body = b"" if response.status == http.HTTPStatus.SWITCHING_PROTOCOLS else response.read()
        except (OSError, http.client.HTTPException) as error:
            raise UnreachableError(
                f"no answer from {to.url}: {error}", remedy="is this an Echosight API?"
            ) from None
        if response.status != http.HTTPStatus.SWITCHING_PROTOCOLS:
            raise error_from(response.status, read_json(body, or_else=None))
        wanted = base64.b64encode(hashlib.sha1(key + _MAGIC, usedforsecurity=False).digest()).decode()
        if response.headers.get("sec-websocket-accept") != wanted:
            raise UnreachableError(f"{to.url} speaks no WebSocket", remedy="is there a proxy between?")

    def _send(self, opcode: int, data: bytes) -> None:
        size = len(data)
        if size < 126:
            head = struct.pack("!BB", _FINAL | opcode, _MASKED | size)
        elif size < 65536:
            head = struct.pack("!BBH", _FINAL | opcode, _MASKED | 126, size)
        else:
            head = struct.pack("!BBQ", _FINAL | opcode, _MASKED | 127, size)
        mask = os.urandom(4)
        masked = np.frombuffer(data, np.uint8) ^ np.resize(np.frombuffer(mask, np.uint8), size)
        try:
            self._socket.sendall(head + mask + masked.tobytes())
        except OSError as error:
            raise StreamClosedError(f"the stream is broken: {error}", remedy="open it again") from None

    def _frame(self) -> tuple[bool, int, bytes]:
        first, second = self._take(2)
        size = second & 0x7F
        if size == 126:
            size = struct.unpack("!H", self._take(2))[0]
        elif size == 127:
            size = struct.unpack("!Q", self._take(8))[0]
        if size > MAX_MESSAGE_BYTES or second & _MASKED:
            raise StreamClosedError("what came is no WebSocket frame", remedy="open it again")
        return bool(first & _FINAL), first & 0x0F, self._take(size)

    def _take(self, size: int) -> bytes:
        try:
            while len(self._received) < size:
                chunk = self._socket.recv(65536)
                if not chunk:
                    raise StreamClosedError("the stream ended without a word", remedy="open it again")
                self._received += chunk
        except OSError as error:
            raise StreamClosedError(f"the stream is broken: {error}", remedy="open it again") from None
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken


class _Handshake(http.client.HTTPResponse):
    """Reads the head of an answer and not a byte more."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self.fp.close()
        self.fp = connection.makefile("rb", buffering=0)  # type: ignore[assignment]


def _connect(to: Connection) -> socket.socket:
    port = to.port or (443 if to.scheme == "https" else 80)
    connection = socket.create_connection((to.host, port), to.timeout_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if to.scheme == "https":
        return ssl.create_default_context().wrap_socket(connection, server_hostname=to.host)
    return connection
