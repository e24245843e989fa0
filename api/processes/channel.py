"""What two processes of one server say to one another, and how a connection goes from one to the other.

A pair of sockets that keeps messages whole. A message is JSON; a connection is a message with two descriptors
(SCM_RIGHTS): the socket, and a memory file with what has been read from it. No send ever waits.
"""

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any

import orjson

MAX_MESSAGE_BYTES = 512 * 1024
"""More than the kernel lets a socket send by default."""
_BUFFER_BYTES = 1024 * 1024
_CONNECTION = b"{}"

OnMessage = Callable[[dict[str, Any]], None]
OnConnection = Callable[[socket.socket, bytes], None]


def pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a channel."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)  # as much of it as the kernel allows
    return ends


def receive_first(end: socket.socket) -> dict[str, Any]:
    """Wait for the first message. Raises EOFError if the other end is gone."""
    end.setblocking(True)
    data = end.recv(MAX_MESSAGE_BYTES)
    if not data:
        raise EOFError("the other end is closed")
    message: dict[str, Any] = orjson.loads(data)
    return message


class Channel:
    """One end. The callbacks are called in the event loop; on_end once, when the other end is gone.

    on_loss: for a connection that was sent here while this process had no descriptors left.
    """

    def __init__(
        self,
        end: socket.socket,
        *,
        on_message: OnMessage,
        on_connection: OnConnection,
        on_end: Callable[[], None],
        on_loss: Callable[[], None] = lambda: None,
    ) -> None:
        self._end = end
        self._end.setblocking(False)
        self._on_message = on_message
        self._on_connection = on_connection
        self._on_end = on_end
        self._on_loss = on_loss
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Call back from now on."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._end, self.read)

    def close(self) -> None:
        """Neither send nor call back any more."""
        if self._loop is not None:
            self._loop.remove_reader(self._end)
            self._loop = None
        self._end.close()

    def send(self, **message: Any) -> bool:
        """Whether it was sent. If not, the other end is gone, or reads too slowly: say it again later."""
        try:
            self._end.send(orjson.dumps(message, option=orjson.OPT_NON_STR_KEYS))
        except OSError:
            return False
        return True

    def send_connection(self, fd: int, data: bytes) -> bool:
        """Whether the other end has got a connection, of which `data` has been read. It stays open here, too."""
        try:
            memory = os.memfd_create("connection")
        except OSError:  # no descriptors left
            return False
        try:
            os.write(memory, data)
            socket.send_fds(self._end, [_CONNECTION], [fd, memory])
        except OSError:
            return False
        finally:
            os.close(memory)
        return True

    def read(self) -> None:
        """Call back for all that is there."""
        while self._loop is not None:
            try:
                data, fds, _, _ = socket.recv_fds(self._end, MAX_MESSAGE_BYTES, 2)
            except BlockingIOError:
                return
            except ConnectionResetError:  # said once, if the other end left something unread; what it sent is here
                continue
            except OSError:
                data, fds = b"", []
            if not data:
                self.close()
                self._on_end()
                return
            if data != _CONNECTION:
                self._on_message(orjson.loads(data))
            elif len(fds) == 2:
                connection = socket.socket(fileno=fds[0])
                connection.setblocking(False)
                connection.set_inheritable(False)  # a child would keep it open when we have closed it
                self._on_connection(connection, _contents(fds[1]))
            else:
                for fd in fds:
                    os.close(fd)
                self._on_loss()


def _contents(memory: int) -> bytes:
    with os.fdopen(memory, "rb") as file:
        file.seek(0)
        return file.read()
