"""Load against servers whose answers are known: what is counted, and from when."""

import asyncio
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from services.client.errors import UnreachableError
from services.client.load.requests import BODIES, Target, request_for
from services.client.load.run import Plan, Result, ceiling_per_s, put_load

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s"
GOOD = b'{"label":"car","timing_ms":{"decode":0.5,"queue":0.25,"inference":2.0,"total":2.8}}'
REQUEST = b"POST / HTTP/1.1\r\ncontent-length: 3\r\n\r\nabc"


def ok(body: bytes = GOOD) -> bytes:
    return ANSWER % (len(body), body)


class Scripted(asyncio.Protocol):
    """answer: by the number of the request, from 0; None: never, b"": close."""

    def __init__(self, answer: Callable[[int], bytes | None], seen: list[float]) -> None:
        self._answer = answer
        self._seen = seen

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        assert data == REQUEST
        self._seen.append(time.perf_counter())
        answer = self._answer(len(self._seen) - 1)
        if answer == b"":
            self._transport.abort()
        elif answer is not None:
            self._transport.write(answer[:30])
            self._transport.write(answer[30:])


@contextmanager
def scripted(answer: Callable[[int], bytes | None]) -> Iterator[tuple[Target, list[float]]]:
    """A server on a thread; yields where it is and when each request came."""
    seen: list[float] = []
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(loop.create_server(lambda: Scripted(answer, seen), "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield Target("127.0.0.1", server.sockets[0].getsockname()[1]), seen
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.close()


def load(target: Target, plan: Plan) -> Result:
    return put_load(target, [REQUEST], plan)


def test_closed_loop_counts_every_answer_and_reads_what_it_says_of_its_times() -> None:
    with scripted(lambda _: ok()) as (target, seen):
        result = load(target, Plan(3, 0.3, num_processes=2, warm_s=0.1))
    assert result.num_by_status.keys() == {"200"}
    assert 0 < result.num_by_status["200"] == len(result.latency_s) < len(seen)
    assert result.requests_per_s == pytest.approx(result.num_by_status["200"] / 0.3)
    assert result.timing_ms == {"decode": 0.5, "queue": 0.25, "inference": 2.0}
    assert 0 < result.percentile_ms(50) <= result.percentile_ms(99.9) <= result.percentile_ms(100)
    assert result.num_failed == 0


def test_a_rate_is_kept_by_all_processes_together() -> None:
    with scripted(lambda _: ok()) as (target, seen):
        result = load(target, Plan(8, 1.0, rate=100.0, num_processes=2, warm_s=0.2))
    assert sum(result.num_by_status.values()) == pytest.approx(100, abs=2)
    assert len(seen) <= 122


def test_latency_at_a_rate_counts_from_when_a_request_was_meant_to_be_sent() -> None:
    """One client, one stall of 0.4 s: all that were due meanwhile have waited, not the one alone."""

    def stall_once(number: int) -> bytes:
        if number == 20:
            time.sleep(0.4)  # it is the stall
        return ok()

    with scripted(stall_once) as (target, _):
        closed = load(target, Plan(1, 1.0, warm_s=0.0))
    with scripted(stall_once) as (target, _):
        opened = load(target, Plan(1, 1.0, rate=100.0, warm_s=0.0))
    assert sum(closed.latency_s > 0.1) < 10
    assert sum(opened.latency_s > 0.1) > 20


def test_what_no_client_was_free_to_send_is_told_and_counts_as_waiting() -> None:
    with scripted(lambda number: ok() if number < 5 else None) as (target, _):
        result = load(target, Plan(1, 0.5, rate=100.0, warm_s=0.0, timeout_s=0.5))
    assert result.num_by_status["timeout"] >= 1
    assert result.num_by_status["unsent"] > 20
    assert result.num_failed == result.num_by_status["timeout"] + result.num_by_status["unsent"]
    assert result.percentile_ms(90) > 100


def test_refusals_closed_connections_and_rubbish_are_told_apart() -> None:
    answers = [
        b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        b"",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ]
    with scripted(lambda number: answers[number] if number < 4 else ok()) as (target, _):
        result = load(target, Plan(1, 0.5, warm_s=0.0))
    good = result.num_by_status.pop("200")
    assert result.num_by_status == {"429": 1, "503": 1, "closed": 1, "unreadable": 1}
    assert result.num_failed == 3
    assert len(result.latency_s) == good > 0


def test_a_server_that_is_not_there_is_said() -> None:
    with scripted(lambda _: ok()) as (target, _):
        pass
    with pytest.raises(UnreachableError, match="takes no load"):
        load(target, Plan(1, 0.1))


def test_the_ceiling_is_what_the_generator_reaches_where_nothing_is_done() -> None:
    assert ceiling_per_s([REQUEST], Plan(4, 5.0)) > 100


@pytest.mark.parametrize("body", BODIES)
def test_a_request_says_how_long_it_is_and_bears_the_key(body: str) -> None:
    frames = np.zeros((2, 2, 4, 3), np.float32)
    request = request_for(body, frames, Target("api", 80, prefix="/radar", key="secret"))
    head, _, content = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /radar/v")
    assert b"authorization: Bearer secret" in head
    assert re.findall(rb"content-length: (\d+)$", head) == [b"%d" % len(content)]
