"""What the other processes of a server have counted of requests, to be added to the first one's own counters.

Each tells its totals now and then. What tells of a process or of the live model is the first one's alone.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.samples import Sample

COUNTERS = frozenset(
    {
        "echosight_api_requests",
        "echosight_api_request_duration_seconds",
        "echosight_api_problems",
        "echosight_api_exceptions",
        "echosight_api_inference_seconds",
        "echosight_api_queue_seconds",
        "echosight_api_batch_frames",
        "echosight_api_frames",
    }
)
WAITING = "echosight_api_waiting_frames"
"""The one gauge that is added; who has ended has nothing waiting."""

Labels = tuple[tuple[str, str], ...]
Row = tuple[str, Labels, float]
"""A sample's name, its labels in their order, its value."""


def rows_of(registry: CollectorRegistry) -> list[Row]:
    """What a process tells of its own counters; nothing of those that are zero."""
    return [
        (sample.name, tuple(sample.labels.items()), sample.value)
        for family in registry.collect()
        if family.name in COUNTERS or family.name == WAITING
        for sample in family.samples
        if sample.value and not sample.name.endswith("_created")
    ]


class Tallies:
    """The totals of the others. Only the event loop's thread calls."""

    def __init__(self) -> None:
        self._told: dict[int, Counter[tuple[str, Labels]]] = {}
        self._ended: Counter[tuple[str, Labels]] = Counter()

    def tell(self, process: int, rows: Iterable[Row]) -> None:
        """The totals of a process, in place of what it told before."""
        self._told[process] = Counter(
            {(name, tuple((key, value) for key, value in labels)): number for name, labels, number in rows}
        )

    def end(self, process: int) -> None:
        """A process has ended: what it has counted stays."""
        told = self._told.pop(process, Counter())
        self._ended.update({row: number for row, number in told.items() if row[0] != WAITING})

    def total(self, name: str) -> float:
        """Of all samples of one name."""
        return sum(number for (found, _), number in self._all().items() if found == name)

    def added_to(self, registry: CollectorRegistry) -> "Sum":
        """What prometheus_client can write as it writes a registry."""
        return Sum(registry, self._all())

    def _all(self) -> Counter[tuple[str, Labels]]:
        total = Counter(self._ended)
        for told in self._told.values():
            total.update(told)
        return total


class Sum:
    """A registry, and what is to be added to its samples."""

    def __init__(self, registry: CollectorRegistry, others: Counter[tuple[str, Labels]]) -> None:
        self._registry = registry
        self._others = others

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            if self._others and (family.name in COUNTERS or family.name == WAITING):
                family.samples = list(self._summed(family.samples, family.name))
            yield family

    def _summed(self, own: Iterable[Sample], family: str) -> Iterator[Sample]:
        suffixes = ("", "_total", "_bucket", "_count", "_sum")
        names = {family + suffix for suffix in suffixes}
        left = {row: number for row, number in self._others.items() if row[0] in names}
        for sample in own:
            also = left.pop((sample.name, tuple(sample.labels.items())), 0.0)
            yield sample._replace(value=sample.value + also)
        for (name, labels), number in left.items():
            yield Sample(name, dict(labels), number)
