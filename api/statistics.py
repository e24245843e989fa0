"""What each version has answered since the server started, in the terms of protocol V2's statistics extension."""

import time
from dataclasses import dataclass, field

MAX_VERSIONS = 32
"""Versions that are counted apart; those that answered longest ago go first."""


@dataclass(slots=True)
class Duration:
    """How often, and how long in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns


@dataclass(slots=True)
class VersionCounts:
    """The counters of one version. by_batch: number of frames in a call of the model to the time it took."""

    num_frames: int = 0
    num_calls: int = 0
    last_at_ms: int = 0
    queue: Duration = field(default_factory=Duration)
    inference: Duration = field(default_factory=Duration)
    decode: Duration = field(default_factory=Duration)
    encode: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    by_batch: dict[int, Duration] = field(default_factory=dict)


class Statistics:
    """Counters by version. Only the event loop's thread counts."""

    def __init__(self) -> None:
        self._versions: dict[int, VersionCounts] = {}

    def of(self, version: int) -> VersionCounts:
        """The counters of a version, all zero if it has not answered yet."""
        return self._versions.get(version, VersionCounts())

    def count(self, version: int, num_frames: int, *, queue_ns: int, inference_ns: int) -> None:
        """One request's frames, answered."""
        counts = self._counts(version)
        counts.num_frames += num_frames
        counts.last_at_ms = int(time.time() * 1e3)
        counts.queue.add(queue_ns)
        counts.inference.add(inference_ns)

    def count_batch(self, version: int, num_frames: int, inference_ns: int) -> None:
        """One call of the model, for whichever requests were in it."""
        counts = self._counts(version)
        counts.num_calls += 1
        batch = counts.by_batch.get(num_frames)
        if batch is None:
            batch = counts.by_batch[num_frames] = Duration()
        batch.add(inference_ns)

    def count_transport(self, version: int, *, decode_ns: int, encode_ns: int) -> None:
        """What one request took beside the model."""
        counts = self._counts(version)
        counts.decode.add(decode_ns)
        counts.encode.add(encode_ns)

    def count_failure(self, version: int, ns: int) -> None:
        """One request that got no answer from this version."""
        self._counts(version).fail.add(ns)

    def _counts(self, version: int) -> VersionCounts:
        counts = self._versions.get(version)
        if counts is None:
            counts = self._versions[version] = VersionCounts()
            if len(self._versions) > MAX_VERSIONS:
                oldest = min(self._versions, key=lambda known: self._versions[known].last_at_ms or 2**63)
                del self._versions[oldest]
        return counts
