"""One process of load: posts requests that were made before, as answers come or at a rate, and notes the times.

    python -m services.client.load.generator < order > record.npz

A client is a connection that posts, waits for the whole answer, and posts again. Without a rate it posts at once
(closed loop). With one, every request has a time at which it is meant to be sent, whatever became of those before
it, and its latency counts from there: a server that stalls pays for all who would have come meanwhile.

It knows HTTP/1.1 answers with a content-length, and nothing of what they say.
"""

import asyncio
import io
import json
import signal
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

CLOSED = 0
"""In place of a status: the connection ended without an answer, or could not be made."""
LATE = 1
"""In place of a status: no answer came in time."""
UNSENT = 2
"""In place of a status: meant to be sent, but no client was free before the end. Its latency is that wait."""
UNREADABLE = 3
"""In place of a status: what came is no answer with a content-length."""

_RECONNECT_S = 0.02
_SWEEP_S = 0.25
_MIN_TICK_S = 1e-4
_MAX_TAILS = 20_000
_TAIL_BYTES = 192


@dataclass(frozen=True, slots=True)
class Order:
    """What one process does. rate: requests/s of this process, 0: a closed loop. first_s: when its first is sent.

    num_bytes: length of each request, which follow one another after the order. warm_s: load before it counts.
    """

    host: str
    port: int
    is_tls: bool
    num_clients: int
    seconds: float
    warm_s: float
    timeout_s: float
    num_bytes: list[int]
    rate: float = 0.0
    first_s: float = 0.0

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


class Record:
    """One line for each request that was meant to be sent while it counted.

    latency_s: to the last byte of the answer. status: of HTTP, or CLOSED, LATE, UNSENT, UNREADABLE. tails: how
    answers end, of all if they are few.
    """

    def __init__(self) -> None:
        self.latency_s = array("d")
        self.status = array("H")
        self.tails: list[bytes] = []
        self._stride = 1

    def add(self, latency_s: float, status: int, answer: bytes = b"") -> None:
        if status == 200 and len(self.status) % self._stride == 0:
            self.tails.append(answer[-_TAIL_BYTES:])
            if len(self.tails) == _MAX_TAILS:
                del self.tails[::2]
                self._stride *= 2
        self.latency_s.append(latency_s)
        self.status.append(status)

    def encode(self, *, cpu_s: float) -> bytes:
        file = io.BytesIO()
        np.savez(
            file,
            allow_pickle=False,
            latency_s=np.array(self.latency_s),
            status=np.array(self.status),
            tails=np.array(self.tails, dtype=f"S{_TAIL_BYTES}"),
            cpu_s=cpu_s,
        )
        return file.getvalue()


class Load:
    """The clients of one process, and whose turn it is."""

    def __init__(self, order: Order, requests: Sequence[bytes]) -> None:
        self.order = order
        self.record = Record()
        self._requests = requests
        self._num_sent = 0
        self._num_due = 0
        self._idle: list[_Client] = []
        self._clients: list[_Client] = []
        self._starts_s = self._ends_s = 0.0

    async def run(self) -> None:
        """Until the time is over and nothing is in flight any more. Raises OSError where nobody listens."""
        loop = asyncio.get_running_loop()
        order = self.order
        self._clients = [_Client(self) for _ in range(order.num_clients)]
        for client in self._clients:  # one by one: a listen queue is short
            await client.connect()
        self._starts_s = time.perf_counter() + order.warm_s
        self._ends_s = self._starts_s + order.seconds
        if order.rate:  # the loop's own timers are of whole milliseconds, this one is the kernel's
            loop.add_signal_handler(signal.SIGALRM, self._tick)
            signal.setitimer(signal.ITIMER_REAL, 1e-6 + order.first_s, max(1.0 / order.rate, _MIN_TICK_S))
        for client in self._clients:
            self.free(client)
        while not self._is_over():
            await asyncio.sleep(_SWEEP_S)
            now_s = time.perf_counter()
            for client in self._clients:
                client.sweep(now_s - order.timeout_s)
        if order.rate:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            self._count_unsent()
        for client in self._clients:
            client.close()

    def free(self, client: "_Client") -> None:
        """`client` has nothing to do: let it post, if something is due."""
        intended_s = self._due()
        if intended_s:
            client.post(self._requests[self._num_sent % len(self._requests)], intended_s)
            self._num_sent += 1
        elif self.order.rate:
            self._idle.append(client)

    def forget(self, client: "_Client") -> None:
        """`client` is not connected: it is free again when it is."""
        if client in self._idle:
            self._idle.remove(client)

    def add(self, intended_s: float, status: int, answer: bytes = b"") -> None:
        """What came of the request that was meant for this time."""
        if intended_s >= self._starts_s:
            self.record.add(time.perf_counter() - intended_s, status, answer)

    def is_ending(self) -> bool:
        return time.perf_counter() >= self._ends_s

    def _due(self) -> float:
        """When the next request is meant to be sent, 0 if that is still to come, or would be after the end."""
        now_s = time.perf_counter()
        if not self.order.rate:
            return now_s if now_s < self._ends_s else 0.0
        while (at_s := self._intended_s(self._num_due)) < self._starts_s <= now_s:
            self._num_due += 1  # what the warm-up left undone is no debt
        if at_s > now_s or at_s >= self._ends_s or now_s >= self._ends_s:
            return 0.0
        self._num_due += 1
        return at_s

    def _intended_s(self, number: int) -> float:
        return self._starts_s - self.order.warm_s + self.order.first_s + number / self.order.rate

    def _tick(self) -> None:
        while self._idle:
            client = self._idle.pop()
            num_before = len(self._idle)
            self.free(client)
            if len(self._idle) > num_before:  # it came back: nothing is due
                return

    def _count_unsent(self) -> None:
        while (at_s := self._intended_s(self._num_due)) < self._ends_s:
            self._num_due += 1
            if at_s >= self._starts_s:
                self.record.add(self._ends_s - at_s, UNSENT)

    def _is_over(self) -> bool:
        return self.is_ending() and not any(client.is_busy for client in self._clients)


class _Client(asyncio.Protocol):
    """One connection, made anew when it ends."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._transport: Any = None
        self._answer = b""
        self._intended_s = 0.0
        self._sent_s = 0.0
        self._connecting: asyncio.Task[None] | None = None
        self.is_busy = False

    async def connect(self) -> None:
        order = self._load.order
        connecting = asyncio.get_running_loop().create_connection(
            lambda: self, order.host, order.port, ssl=True if order.is_tls else None
        )
        await asyncio.wait_for(connecting, order.timeout_s)

    def close(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
        if self._transport is not None:
            self._transport.abort()

    def post(self, request: bytes, intended_s: float) -> None:
        self.is_busy = True
        self._answer = b""
        self._intended_s = intended_s
        self._sent_s = time.perf_counter()
        self._transport.write(request)

    def sweep(self, sent_before_s: float) -> None:
        """Give up a request that was sent before."""
        if self.is_busy and self._sent_s < sent_before_s:
            self._end(LATE)
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if not self.is_busy:
            return
        if self._answer:
            data = self._answer + data
        head_bytes = data.find(b"\r\n\r\n")
        if head_bytes < 0:
            self._answer = data
            return
        head = data[:head_bytes].lower()
        at = head.find(b"\r\ncontent-length:")
        if at < 0:
            self._end(UNREADABLE)
            self._transport.abort()
            return
        end = head.find(b"\r\n", at + 17)
        length = int(head[at + 17 : end if end > 0 else None])
        if len(data) < head_bytes + 4 + length:
            self._answer = data
            return
        self._end(int(data[9:12]), data)
        if b"\r\nconnection: close" in head:
            self._transport.abort()
        else:
            self._load.free(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._transport = None
        self._load.forget(self)
        if self.is_busy:
            self._end(CLOSED)
        if not self._load.is_ending():
            self._connecting = asyncio.create_task(self._connect_again())

    def _end(self, status: int, answer: bytes = b"") -> None:
        self.is_busy = False
        self._load.add(self._intended_s, status, answer)

    async def _connect_again(self) -> None:
        while not self._load.is_ending():
            try:
                await self.connect()
            except OSError:  # TimeoutError too
                self._load.add(time.perf_counter(), CLOSED)
                await asyncio.sleep(_RECONNECT_S)
            else:
                self._load.free(self)
                return


def main() -> int:
    order = Order(**json.loads(sys.stdin.buffer.readline()))
    requests = [sys.stdin.buffer.read(size) for size in order.num_bytes]
    load = Load(order, requests)
    try:
        run_fast(load.run())
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    sys.stdout.buffer.write(load.record.encode(cpu_s=time.process_time()))
    return 0


def run_fast(main: Any) -> Any:
    """Run a coroutine on uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


if __name__ == "__main__":
    sys.exit(main())
