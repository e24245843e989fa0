"""Calls of a model that wait in line: bounded by rows, and fair between those who ask.

Callers take turns, by rows (after deficit round robin, Shreedhar and Varghese, 1996): who asks for little waits
for little, however much another has in line. When the line is full, whoever holds most of it loses his newest. A
batch takes rows, not calls: a long call goes through the model in slices. Pure; it does not know the clock.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from api.bodies.frames import Heatmaps
from api.models.classifier import Classifier


class Terms(NamedTuple):
    """How a call waits. caller: whom it is for; deadline_ns: on time.monotonic_ns, 0: none of its own."""

    caller: str = ""
    deadline_ns: int = 0

    def sooner(self, deadline_ns: int) -> "Terms":
        """With this deadline, if it is the earlier one."""
        return Terms(self.caller, min(self.deadline_ns or deadline_ns, deadline_ns))


class Outputs(NamedTuple):
    """values: arrays as the graph gives them, in the order asked for.

    queue_ns: waited for a thread; inference_ns: in the model, whoever else was in the batch.
    """

    values: list[npt.NDArray[Any]]
    queue_ns: int
    inference_ns: int


@dataclass(slots=True, eq=False)
class Call:
    """heatmaps: (B, C, R, A) float32; sites: (B,) int64; outputs: the graph's names. The rest is the engine's."""

    model: Classifier
    heatmaps: Heatmaps
    sites: npt.NDArray[np.int64]
    outputs: tuple[str, ...]
    terms: Terms
    answer: "asyncio.Future[Outputs]"
    asked_ns: int
    num_taken: int = 0
    num_done: int = 0
    started_ns: int = 0
    inference_ns: int = 0
    parts: dict[int, list[npt.NDArray[Any]]] = field(default_factory=dict)
    """By first row, what the model gave for a slice."""

    @property
    def num_rows(self) -> int:
        return len(self.heatmaps)

    @property
    def batch_key(self) -> Hashable:
        """Calls with the same one may share a batch."""
        return id(self.model), self.outputs


class Slice(NamedTuple):
    """Rows `start` to `stop` of a call."""

    call: Call
    start: int
    stop: int


class Line:
    """The calls that wait. Whoever uses it from several threads locks it."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.num_rows = 0
        self._calls: OrderedDict[str, deque[Call]] = OrderedDict()
        self._rows: dict[str, int] = {}

    @property
    def first(self) -> Call:
        """The call whose turn it is. The line is not empty."""
        return next(iter(self._calls.values()))[0]

    def push(self, call: Call) -> list[Call]:
        """Put a call into the line. returns: the calls that have no place; `call` itself may be the one."""
        caller, rows = call.terms.caller, call.num_rows
        lost: list[Call] = []
        too_many = self.num_rows + rows - self.max_rows
        if self.num_rows and too_many > 0:  # alone, a call may be longer than the line
            greediest = max(self._rows, key=self._rows.__getitem__)
            if self._rows[greediest] - too_many < self._rows.get(caller, 0) + rows:
                return [call]
            while self.num_rows + rows > self.max_rows:
                lost.append(self._calls[greediest][-1])
                self.remove(lost[-1])
        self._calls.setdefault(caller, deque()).append(call)
        self._add(caller, rows)
        return lost

    def take(self, max_rows: int) -> list[Slice]:
        """At most so many rows for one batch: of one model, the callers in turn, each caller's calls in order."""
        taken: list[Slice] = []
        if not self._calls:
            return taken
        quantum = max(1, max_rows // len(self._calls))
        key = self.first.batch_key
        passed: list[str] = []
        rows = 0
        while rows < max_rows and len(passed) < len(self._calls):
            caller = next(name for name in self._calls if name not in passed)
            if self._calls[caller][0].batch_key != key:
                passed.append(caller)
                continue
            rows += self._take_turn(caller, min(quantum, max_rows - rows), key, taken)
        return taken

    def _take_turn(self, caller: str, max_rows: int, key: Hashable, taken: list[Slice]) -> int:
        calls = self._calls[caller]
        rows = 0
        while calls and rows < max_rows and calls[0].batch_key == key:
            call = calls[0]
            start = call.num_taken
            call.num_taken = min(call.num_rows, start + max_rows - rows)
            taken.append(Slice(call, start, call.num_taken))
            rows += call.num_taken - start
            if call.num_taken == call.num_rows:
                calls.popleft()
        self._calls.move_to_end(caller)
        self._add(caller, -rows)
        return rows

    def remove(self, call: Call) -> None:
        """Take a call out of the line; nothing happens if none of it waits any more."""
        caller = call.terms.caller
        calls = self._calls.get(caller)
        if calls is None or call not in calls:
            return
        calls.remove(call)
        self._add(caller, call.num_taken - call.num_rows)

    def clear(self) -> list[Call]:
        """Empty the line. returns: what was in it."""
        calls = [call for waiting in self._calls.values() for call in waiting]
        self._calls.clear()
        self._rows.clear()
        self.num_rows = 0
        return calls

    def _add(self, caller: str, rows: int) -> None:
        self.num_rows += rows
        self._rows[caller] = self._rows.get(caller, 0) + rows
        if not self._calls[caller]:
            del self._calls[caller], self._rows[caller]
