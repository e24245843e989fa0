"""Puts load on a server from as many processes as asked, and says what came of it."""

import io
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from services.client.errors import ClientError, UnreachableError
from services.client.load.generator import CLOSED, LATE, UNREADABLE, UNSENT, Order
from services.client.load.requests import Target

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
NAMES = {CLOSED: "closed", LATE: "timeout", UNSENT: "unsent", UNREADABLE: "unreadable"}
TIMING_PARTS = ("decode", "queue", "inference")
CEILING_S = 1.0

_TIMING = re.compile(rb'"timing_ms":\{[^}]*\}')
_PART = re.compile(rb'"(\w+)":([0-9.eE+-]+)')
_STARTS_S = 60.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Plan:
    """The load. rate: requests/s over all clients, 0: every client posts as soon as it is answered.

    warm_s: load before anything counts. timeout_s: an answer that takes longer is given up.
    """

    num_clients: int
    seconds: float
    rate: float = 0.0
    num_processes: int = 1
    warm_s: float = 0.5
    timeout_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a plan. latency_s: (N,) float64, sorted, of answers with 200 and of what was not sent in time.

    num_by_status: by "200", "429", ..., "closed", "timeout", "unsent", "unreadable". timing_ms: what answers
    say of the server's own time, medians by part; empty where they say nothing. cpu_share: of a core, that the
    generator's busiest process took: near 1, it is the generator that was measured.
    """

    plan: Plan
    latency_s: npt.NDArray[np.float64]
    num_by_status: dict[str, int]
    timing_ms: dict[str, float]
    cpu_share: float

    @property
    def requests_per_s(self) -> float:
        """Answers with 200 to requests of the measured time, a second of it."""
        return self.num_by_status.get("200", 0) / self.plan.seconds

    @property
    def num_failed(self) -> int:
        """Requests without a good answer, but for those that were told to come later (429)."""
        return sum(count for status, count in self.num_by_status.items() if status not in ("200", "429"))

    def percentile_ms(self, percentile: float) -> float:
        """NaN where there is no answer. Of the latencies that were seen: none is made up between two."""
        if not len(self.latency_s):
            return float("nan")
        return float(1e3 * np.percentile(self.latency_s, percentile, method="higher"))


def put_load(
    target: Target, requests: Sequence[bytes], plan: Plan, *, on_tick: Callable[[float], Any] = lambda _: None
) -> Result:
    """Carry a plan out. on_tick: told the seconds since it began, now and then. Raises UnreachableError.

    At most as many processes as clients; they share clients and rate as evenly as can be.
    """
    num_processes = min(plan.num_processes, plan.num_clients)
    shared = Order(
        host=target.host,
        port=target.port,
        is_tls=target.is_tls,
        num_clients=0,
        seconds=plan.seconds,
        warm_s=plan.warm_s,
        timeout_s=plan.timeout_s,
        num_bytes=[len(request) for request in requests],
        rate=plan.rate / num_processes,
    )
    orders = [
        replace(
            shared,
            num_clients=(plan.num_clients + number) // num_processes,
            first_s=number / plan.rate if plan.rate else 0.0,
        )
        for number in range(num_processes)
    ]
    with ExitStack() as stack:
        children = [stack.enter_context(_generator(order, requests)) for order in orders]
        outputs = _finish(children, plan, on_tick)
    return _result(plan, outputs)


def ceiling_per_s(requests: Sequence[bytes], plan: Plan) -> float:
    """Requests/s that the generator reaches with this plan against a server on this machine that does nothing."""
    size = len(requests[0])
    with _sink(size) as port:
        alike = [request for request in requests if len(request) == size]
        result = put_load(Target("127.0.0.1", port), alike, replace(plan, seconds=CEILING_S, warm_s=0.2, rate=0.0))
    return result.requests_per_s


@dataclass(frozen=True, slots=True)
class _Child:
    """A generator's process; what it writes goes into files, which hold any amount."""

    process: "subprocess.Popen[bytes]"
    output: IO[bytes]
    errors: IO[bytes]


@contextmanager
def _generator(order: Order, requests: Sequence[bytes]) -> Iterator[_Child]:
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.client.load.generator"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=errors,
        )
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin:  # its own error says more
                process.stdin.write(order.encode() + b"".join(requests))
            yield _Child(process, output, errors)
        finally:
            process.kill()
            process.wait()


def _finish(children: Sequence[_Child], plan: Plan, on_tick: Callable[[float], Any]) -> list[bytes]:
    """What the processes wrote. Raises UnreachableError."""
    began_s = time.monotonic()
    deadline_s = began_s + plan.warm_s + plan.seconds + 2 * plan.timeout_s + _STARTS_S
    for child in children:
        while True:
            on_tick(time.monotonic() - began_s)
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(_POLL_S)
                break
            if time.monotonic() > deadline_s:
                raise UnreachableError("the load generator did not end", remedy="try fewer clients")
        if child.process.returncode:
            last = _content(child.errors).decode(errors="replace").strip().splitlines()[-1:]
            raise UnreachableError(
                f"the server takes no load: {last[0] if last else 'its clients ended without a word'}",
                remedy="is it running, and the address right?",
            )
    return [_content(child.output) for child in children]


def _content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _result(plan: Plan, outputs: Sequence[bytes]) -> Result:
    records = [np.load(io.BytesIO(output), allow_pickle=False) for output in outputs]
    latency_s = np.concatenate([record["latency_s"] for record in records])
    status = np.concatenate([record["status"] for record in records])
    counts = {int(code): int(count) for code, count in zip(*np.unique(status, return_counts=True), strict=True)}
    loaded_s = plan.warm_s + plan.seconds
    return Result(
        plan=plan,
        latency_s=np.sort(latency_s[(status == 200) | (status == UNSENT)]),
        num_by_status={NAMES.get(code, str(code)): count for code, count in counts.items()},
        timing_ms=_timing_ms([tail for record in records for tail in record["tails"].tolist()]),
        cpu_share=max(float(record["cpu_s"]) for record in records) / loaded_s,
    )


def _timing_ms(tails: Sequence[bytes]) -> dict[str, float]:
    """Medians of what answers end with: "timing_ms":{"decode":0.02, ...}."""
    found: dict[str, list[float]] = {}
    for tail in tails:
        match = _TIMING.search(tail)
        for name, value in _PART.findall(match[0]) if match else ():
            found.setdefault(name.decode(), []).append(float(value))
    return {name: float(np.median(found[name])) for name in TIMING_PARTS if name in found}


@contextmanager
def _sink(num_bytes: int) -> Iterator[int]:
    child = subprocess.Popen(
        [sys.executable, "-m", "services.client.load.sink", str(num_bytes)], stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise ClientError("the server that does nothing did not start", remedy="measure with --no-ceiling")
        yield int(line)
    finally:
        child.kill()
        child.communicate()
