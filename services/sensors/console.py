"""What the commands share towards people: progress, periodic counters, signals, errors in one line."""

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from services.core.errors import EchosightError
from services.core.logs import logger
from services.sensors.publish import Published

_COUNTERS_EVERY_S = 10.0


@contextmanager
def progress(what: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal (total None: only a count); elsewhere nothing, so that logs and scripts stay clean."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        task = bars.add_task(what, total=total)
        yield lambda done: bars.update(task, completed=done)


def counters(site: str) -> Callable[[Published], None]:
    """Logs one line of counters now and then, for a worker that nobody watches."""
    log = logger("sensors")
    next_at_s = time.monotonic() + _COUNTERS_EVERY_S

    def count(done: Published) -> None:
        nonlocal next_at_s
        if time.monotonic() >= next_at_s:
            next_at_s = time.monotonic() + _COUNTERS_EVERY_S
            log.info("publishing", site=site, **done.counts, bytes=done.num_bytes, retries=done.num_retries)

    return count


def stop_on_signals() -> asyncio.Event:
    """An event that SIGINT or SIGTERM sets: whoever runs finishes what is in hand and exits 0."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    return stop


def print_error(error: EchosightError) -> None:
    """One line of what, one of what to try, on stderr."""
    console = Console(stderr=True, highlight=False)
    console.print(f"[bold red]error:[/bold red] {escape(error.what)}", soft_wrap=True)
    if error.remedy:
        console.print(f"[bold]try:[/bold] {escape(error.remedy)}", soft_wrap=True)
