"""How often a caller may ask: a token bucket each, kept as the one moment at which it will be full again.

It counts requests, and messages of a WebSocket, not frames: that is decided before a body is read, and how many
frames a request may have is bounded already.
"""

import math
import time
from collections.abc import Callable

from api.problems import RATE_LIMITED, ProblemError
from api.settings import ApiSettings

MAX_CALLERS = 10_000
MAX_INTERVAL_S = 1e9


class Rates:
    """The buckets of one server. clock: seconds, monotonic."""

    def __init__(self, settings: ApiSettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._default_per_s = settings.rate_limit
        self._burst_s = settings.rate_burst_s
        self._clock = clock
        self._full_at_s: dict[str, float] = {}

    def take(self, caller: str, requests_per_s: float | None) -> None:
        """Count one request. requests_per_s: of this caller, if it has a limit of its own. Raises ProblemError."""
        per_s = self._limit_per_s(requests_per_s)
        if not per_s:
            return
        interval_s = min(1.0 / per_s, MAX_INTERVAL_S)
        now_s = self._clock()
        full_at_s = max(self._full_at_s.get(caller, now_s), now_s) + interval_s
        wait_s = full_at_s - now_s - max(self._burst_s, interval_s)
        if wait_s > 1e-9:
            seconds = max(1, math.ceil(wait_s))
            raise ProblemError(
                RATE_LIMITED,
                f"{caller or 'this caller'} may ask {per_s:g} times a second",
                remedy=f"wait {seconds} s, or have the limit of the key or ECHOSIGHT_RATE_LIMIT raised",
                headers={"retry-after": str(seconds)},
            )
        if caller not in self._full_at_s and len(self._full_at_s) >= MAX_CALLERS:
            self._forget(now_s)
        self._full_at_s[caller] = full_at_s

    def applies(self, requests_per_s: float | None) -> bool:
        """Whether a caller with this limit of its own, if it has one, has any."""
        return bool(self._limit_per_s(requests_per_s))

    def _limit_per_s(self, own_per_s: float | None) -> float:
        return self._default_per_s if own_per_s is None else own_per_s

    def _forget(self, now_s: float) -> None:
        """Make room: a bucket that is full is as good as none; if most are not, all are forgotten."""
        kept = {caller: full_at_s for caller, full_at_s in self._full_at_s.items() if full_at_s > now_s}
        self._full_at_s = kept if len(kept) <= MAX_CALLERS // 2 else {}
