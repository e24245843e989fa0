"""Writes of one moment as one: a system call less, and whoever reads them wakes up once."""

import asyncio

MAX_JOINED_BYTES = 64 * 1024
"""What is longer is not worth a copy."""


class JoinedWrites:
    """A transport that sends what is written within one turn of the event loop together, two by two."""

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
