"""Pairs that wait to be encoded: over all sites, the newest first, since what is newest is learnt from most."""

import heapq

from services.core.frames import FrameId
from services.core.store import StoredPair

Key = tuple[str, FrameId]
"""A site, and a pair of it."""


class Pending:
    """In no order of arrival: `take` gives the newest."""

    def __init__(self) -> None:
        self._pairs: dict[Key, StoredPair] = {}
        self._heap: list[tuple[int, int, str]] = []  # and some that were let go

    def __len__(self) -> int:
        return len(self._pairs)

    def put(self, pair: StoredPair) -> None:
        key = (pair.site, pair.id)
        if key not in self._pairs:
            heapq.heappush(self._heap, _newest_first(key))
        self._pairs[key] = pair

    def discard(self, key: Key) -> None:
        self._pairs.pop(key, None)
        if len(self._heap) > 2 * len(self._pairs) + 1024:
            self._heap = [_newest_first(known) for known in self._pairs]
            heapq.heapify(self._heap)

    def take(self, num: int) -> list[StoredPair]:
        taken: list[StoredPair] = []
        while self._heap and len(taken) < num:
            at_ns, seq, site = heapq.heappop(self._heap)
            pair = self._pairs.pop((site, FrameId(-at_ns, -seq)), None)
            if pair is not None:
                taken.append(pair)
        return taken


def _newest_first(key: Key) -> tuple[int, int, str]:
    return -key[1].captured_at_ns, -key[1].seq, key[0]
