"""Batches drawn ahead on a thread, so that a step does not wait for the disk.

Draws happen one after the other, in order: what is drawn is what would have been drawn without the thread.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Calls `draw` ahead, up to `depth` times; 0: when asked, on the caller's thread."""

    def __init__(self, draw: Callable[[], T], *, depth: int) -> None:
        self._draw = draw
        self._depth = depth
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._drawn: deque[Future[T]] = deque()

    def next(self) -> T:
        """The next draw. Raises what `draw` raised."""
        if not self._depth:
            return self._draw()
        while len(self._drawn) <= self._depth:
            self._drawn.append(self._pool.submit(self._draw))
        return self._drawn.popleft().result()

    def close(self) -> None:
        """Forget what was drawn; return once nothing is being drawn."""
        self._pool.shutdown(cancel_futures=True)
        self._drawn.clear()
