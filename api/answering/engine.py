"""Runs model calls: in the event loop where that is faster than a thread, else in batches on a few threads.

A thread that is free takes its part of what is in line at that moment, so batches grow with the load and a lone
client never waits for company. Only where a batch is cheaper than its frames one by one, and only after a batch of
several calls, does a thread wait a little for those who were just answered to come back.
"""

import asyncio
import math
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from api import problems
from api.answering.calls import Call, Line, Outputs, Slice, Terms
from api.bodies.frames import Heatmaps
from api.models.classifier import Classifier
from api.problems import ProblemError

MIN_BATCH_GAIN = 1.1
"""A model that gains less than this from a batch is not worth waiting for one."""
ANYBODY = Terms()

CountBatch = Callable[[Classifier, int, int], None]
"""Told of each batch on the event loop's thread: the model, the rows, the ns in the model."""
Part = list[npt.NDArray[Any]] | Exception
"""What the model gave for a slice, or why it gave nothing."""


class Limits(NamedTuple):
    """max_rows: of a batch; max_waiting_rows: in line; the others as in ApiSettings."""

    max_rows: int
    max_waiting_rows: int
    batch_wait_ms: float
    answer_timeout_s: float


class Engine:
    """A thread a core. What they share is guarded by `_changed`; futures and timers are the event loop's."""

    def __init__(
        self,
        *,
        threads: int,
        in_loop_below_ms: float,
        limits: Limits,
        count_batch: CountBatch = lambda *_: None,
    ) -> None:
        self.threads = threads
        self._limits = limits
        self._in_loop_below_ms = in_loop_below_ms
        self._count_batch = count_batch
        self._line = Line(self._limits.max_waiting_rows)
        self._changed = threading.Condition()
        self._num_busy_cores = 0
        self._expected_rows = 0
        self._expected_until_ns = 0
        self._is_closed = False
        self._threads: list[threading.Thread] = []

    @property
    def num_waiting_rows(self) -> int:
        return self._line.num_rows

    async def run(
        self,
        model: Classifier,
        heatmaps: Heatmaps,
        sites: npt.NDArray[np.int64],
        outputs: tuple[str, ...],
        terms: Terms = ANYBODY,
    ) -> Outputs:
        """The named outputs. heatmaps: (B, C, R, A) float32; sites: (B,) int64.

        Raises ProblemError: no place in line, or no answer before the deadline; and what the model raises.
        """
        asked_ns = time.monotonic_ns()
        is_quick = model.frame_ms * len(heatmaps) < self._in_loop_below_ms
        if terms.deadline_ns or not is_quick:
            terms = self._with_deadline(terms, asked_ns)
        if is_quick:
            values = model.run(heatmaps, sites, outputs)
            took_ns = time.monotonic_ns() - asked_ns
            self._count_batch(model, len(heatmaps), took_ns)
            return Outputs(values, 0, took_ns)
        loop = asyncio.get_running_loop()
        call = Call(model, heatmaps, sites, outputs, terms, loop.create_future(), asked_ns)
        self._push(call, loop)
        timer = loop.call_later((terms.deadline_ns - asked_ns) / 1e9, _expire, call)
        try:
            return await call.answer
        finally:
            timer.cancel()
            if call.num_taken < call.num_rows:
                with self._changed:
                    self._line.remove(call)

    def close(self) -> None:
        """End the threads; what is still in line gets no answer."""
        with self._changed:
            self._is_closed = True
            left = self._line.clear()
            self._changed.notify_all()
        for call in left:
            _fail(call, _stopping())

    def _with_deadline(self, terms: Terms, now_ns: int) -> Terms:
        terms = terms.sooner(now_ns + int(self._limits.answer_timeout_s * 1e9))
        if terms.deadline_ns <= now_ns:
            late_ms = (now_ns - terms.deadline_ns) / 1e6
            raise _too_late(f"the deadline passed {late_ms:.1f} ms before the model was asked")
        return terms

    def _push(self, call: Call, loop: asyncio.AbstractEventLoop) -> None:
        with self._changed:
            if self._is_closed:
                raise _stopping()
            for index in range(len(self._threads), self.threads):  # with the first call that needs one
                self._threads.append(threading.Thread(target=self._work, args=(loop,), name=f"inference-{index}"))
                self._threads[-1].daemon = True
                self._threads[-1].start()
            lost = self._line.push(call)
            self._changed.notify()
        for without_place in lost:
            _fail(without_place, self._overloaded(without_place))

    def _overloaded(self, call: Call) -> ProblemError:
        waiting = self._line.num_rows
        wait_s = max(1, math.ceil(waiting * call.model.frame_ms / 1e3 / self.threads))
        return ProblemError(
            problems.OVERLOADED,
            f"{waiting} frames wait for the model, {self._limits.max_waiting_rows} may",
            remedy=f"try again in {wait_s} s or so, or send fewer frames",
            headers={"retry-after": str(wait_s)},
        )

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        """One thread: batch after batch, until the engine is closed."""
        while True:
            with self._changed:
                batch = self._next()
            if not batch:
                return
            model = batch[0].call.model
            started_ns = time.monotonic_ns()
            parts = _run(model, batch)
            ended_ns = time.monotonic_ns()
            with self._changed:
                self._num_busy_cores -= model.threads
                num_rows = sum(stop - start for _, start, stop in batch)
                self._expected_rows = num_rows + self._line.num_rows if len(batch) > 1 else 0
                self._expected_until_ns = ended_ns + int(self._limits.batch_wait_ms * 1e6)
                if self._line.num_rows:
                    self._changed.notify()
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._deliver, batch, parts, started_ns, ended_ns)

    def _next(self) -> list[Slice]:
        """The next batch, as soon as there is one and a core for it; none: closed."""
        while not self._is_closed:
            wait_s = self._wait_s()
            if wait_s == 0:
                batch = self._take()
                if self._line.num_rows:
                    self._changed.notify()  # what is left is another thread's part
                if batch:
                    self._num_busy_cores += batch[0].call.model.threads
                    return batch
            else:
                self._changed.wait(wait_s)
        return []

    def _wait_s(self) -> float | None:
        """How long to wait before the next batch is taken. None: until something changes."""
        if not self._line.num_rows:
            return None
        model = self._line.first.model
        if self._num_busy_cores and self._num_busy_cores + model.threads > self.threads:
            return None
        if model.batch_gain < MIN_BATCH_GAIN:
            return 0
        if self._line.num_rows >= min(self._expected_rows, self._limits.max_rows):
            return 0
        return max(0, (self._expected_until_ns - time.monotonic_ns()) / 1e9)

    def _take(self) -> list[Slice]:
        """This thread's part of what is in line, without what nobody waits for or what would come too late.

        Guided self-scheduling (Polychronopoulos and Kuck, 1987): large parts first, so that all end together.
        """
        model = self._line.first.model
        num_threads = max(1, self.threads // model.threads)
        rows = self._line.take(min(self._limits.max_rows, math.ceil(self._line.num_rows / num_threads)))
        earliest_ns = time.monotonic_ns() + int(model.frame_ms * 1e6)
        return [row for row in rows if earliest_ns < row.call.terms.deadline_ns and not row.call.answer.done()]

    def _deliver(self, batch: list[Slice], parts: list[Part], started_ns: int, ended_ns: int) -> None:
        """On the event loop: count the batch, and answer the calls that are complete."""
        self._count_batch(batch[0].call.model, sum(row.stop - row.start for row in batch), ended_ns - started_ns)
        for (call, start, stop), part in zip(batch, parts, strict=True):
            if isinstance(part, Exception):
                _fail(call, part)
                continue
            call.parts[start] = part
            call.num_done += stop - start
            call.started_ns = min(call.started_ns or started_ns, started_ns)
            call.inference_ns += ended_ns - started_ns
            if call.num_done == call.num_rows and not call.answer.done():
                queue_ns = call.started_ns - call.asked_ns
                call.answer.set_result(Outputs(_joined(call), queue_ns, call.inference_ns))


def _run(model: Classifier, batch: list[Slice]) -> list[Part]:
    """One call of the model; where that fails, one a slice, so that nobody pays for what another has sent."""
    try:
        outputs = model.run(
            _stacked([row.call.heatmaps[row.start : row.stop] for row in batch]),
            _stacked([row.call.sites[row.start : row.stop] for row in batch]),
            batch[0].call.outputs,
        )
    except Exception as error:  # onnxruntime's errors have no common class
        return [error] if len(batch) == 1 else [part for row in batch for part in _run(model, [row])]
    parts: list[Part] = []
    first = 0
    for row in batch:
        last = first + row.stop - row.start
        parts.append([output[first:last] for output in outputs])
        first = last
    return parts


def _stacked(arrays: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _joined(call: Call) -> list[npt.NDArray[Any]]:
    parts = [call.parts[start] for start in sorted(call.parts)]
    return parts[0] if len(parts) == 1 else [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


def _fail(call: Call, error: Exception) -> None:
    """On the event loop."""
    if not call.answer.done():
        call.answer.set_exception(error)


def _expire(call: Call) -> None:
    waited_ms = (time.monotonic_ns() - call.asked_ns) / 1e6
    where = "in line" if call.num_taken == 0 else "in line and in the model"
    _fail(call, _too_late(f"the deadline passed after {waited_ms:.0f} ms {where}"))


def _too_late(what: str) -> ProblemError:
    return ProblemError(problems.TOO_LATE, what, remedy="give it more time (x-timeout-ms), or send fewer frames")


def _stopping() -> ProblemError:
    return ProblemError(
        problems.NOT_READY, "the server is stopping", remedy="ask another server", headers={"retry-after": "2"}
    )
