"""Bars on a terminal; elsewhere a line whenever something took long. Always on stderr: stdout is for results."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_EVERY_S = 30.0


class Bars:
    """Says what is being done and how far it is."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bars = Progress(
            *columns, console=self._console, disable=not self._console.is_terminal, transient=True
        )
        self._tasks: dict[str, TaskID] = {}
        self._said_s = time.monotonic()

    def advance(self, what: str, done: int, total: int) -> None:
        """`done` of `total` of `what` are done; a finished bar goes away."""
        if self._console.is_terminal:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=total)
            self._bars.update(self._tasks[what], completed=done, total=total)
            if done >= total:
                self._bars.remove_task(self._tasks.pop(what))
        elif time.monotonic() - self._said_s > _LINE_EVERY_S:
            self._said_s = time.monotonic()
            self._console.print(f"{what}: {done} of {total}", highlight=False, soft_wrap=True)

    @contextmanager
    def shown(self) -> Iterator["Bars"]:
        with self._bars:
            yield self
