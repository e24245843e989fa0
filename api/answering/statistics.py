"""What each version has answered since the server started, in the terms of protocol V2's statistics extension."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

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

    def include(self, other: "Duration") -> None:
        self.count += other.count
        self.ns += other.ns


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

    @classmethod
    def of_told(cls, told: Mapping[str, Any]) -> Self:
        """What `Statistics.untold` says of a version, after it was JSON."""
        return cls(
            num_frames=told["num_frames"],
            num_calls=told["num_calls"],
            last_at_ms=told["last_at_ms"],
            by_batch={int(size): Duration(**took) for size, took in told["by_batch"].items()},
            **{name: Duration(**told[name]) for name in _DURATIONS},
        )

    def include(self, other: "VersionCounts") -> None:
        """Add what was counted elsewhere."""
        self.num_frames += other.num_frames
        self.num_calls += other.num_calls
        self.last_at_ms = max(self.last_at_ms, other.last_at_ms)
        for name in _DURATIONS:
            getattr(self, name).include(getattr(other, name))
        for size, took in other.by_batch.items():
            self.by_batch.setdefault(size, Duration()).include(took)


_DURATIONS = ("queue", "inference", "decode", "encode", "fail")


class Statistics:
    """Counters by version. Only the event loop's thread counts."""

    def __init__(self) -> None:
        self._versions: dict[int, VersionCounts] = {}
        self._elsewhere: dict[int, dict[int, VersionCounts]] = {}
        self._untold: set[int] = set()

    def of(self, version: int) -> VersionCounts:
        """The counters of a version, of all processes; all zero if it has not answered yet."""
        total = VersionCounts()
        for versions in (self._versions, *self._elsewhere.values()):
            if version in versions:
                total.include(versions[version])
        return total

    def untold(self) -> dict[int, dict[str, Any]]:
        """The totals that another process, which adds them up, does not know: of what counted since `has_told`."""
        return {version: asdict(self._versions[version]) for version in self._untold if version in self._versions}

    def has_told(self) -> None:
        """What `untold` said has arrived."""
        self._untold.clear()

    def tell(self, process: int, told: Mapping[str, Mapping[str, Any]]) -> None:
        """What another process has counted of some versions, in place of what it told of them before."""
        known = self._elsewhere.setdefault(process, {})
        for version, counts in told.items():
            known[int(version)] = VersionCounts.of_told(counts)
            _forget_oldest(known)

    def end(self, process: int) -> None:
        """Another process has ended: what it has counted stays."""
        for version, counts in self._elsewhere.pop(process, {}).items():
            self._counts(version).include(counts)

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
        self._untold.add(version)
        if counts is None:
            counts = self._versions[version] = VersionCounts()
            _forget_oldest(self._versions)
        return counts


def _forget_oldest(versions: dict[int, VersionCounts]) -> None:
    """Keep MAX_VERSIONS; one that has not answered yet is new."""
    if len(versions) > MAX_VERSIONS:
        del versions[min(versions, key=lambda version: versions[version].last_at_ms or 2**63)]
