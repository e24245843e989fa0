"""A server that does nothing: what a load generator reaches against it is what the generator can do at most.

    python -m services.client.load.sink NUM_BYTES

It answers every so many bytes, without looking at them, and prints its port.
"""

import asyncio
import sys
from typing import Any

from services.client.load.generator import run_fast

_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-type: application/json\r\n\r\n{}"


class Sink(asyncio.Protocol):
    """One connection."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._num_received = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._num_received += len(data)
        while self._num_received >= self._num_bytes:
            self._num_received -= self._num_bytes
            self._transport.write(_ANSWER)


async def _serve(num_bytes: int) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Sink(num_bytes), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    run_fast(_serve(int(sys.argv[1])))
