"""What Prometheus sees of ingest: the worker's own counters, read when somebody asks, never on a hot path.

Names follow Prometheus' conventions: counters end in _total, units are seconds and bytes.
"""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from services.core.metrics import serve_metrics
from services.ingest.sites import Sites

_LATENCY_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)


class IngestMetrics(Collector):
    """The metrics of one ingest process. Counters never go back, also when a site goes to another replica."""

    def __init__(self, sites: Sites, *, num_trimmed: Callable[[], dict[str, int]]) -> None:
        self._sites = sites
        self._num_trimmed = num_trimmed
        self.registry = CollectorRegistry()
        self.latency = Histogram(
            "echosight_ingest_latency_seconds",
            "From a radar frame's arrival in its stream to its pair being durable.",
            ["site"],
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.registry.register(self)

    def serve(self, *, host: str, port: int) -> Callable[[], None]:
        """Answer at http://host:port/metrics until the returned function is called; port 0: nothing to do.

        Raises SettingsError if the port is taken.
        """
        return serve_metrics(self.registry, host=host, port=port, variable="ECHOSIGHT_INGEST_METRICS_PORT")

    def describe(self) -> list[Any]:
        return []  # names depend on nothing; this only keeps registration from collecting

    def collect(self) -> Iterator[Any]:
        frames = CounterMetricFamily(
            "echosight_ingest_frames", "Frames that left ingest, by reason.", labels=["site", "sensor", "reason"]
        )
        stored = CounterMetricFamily("echosight_ingest_stored_pairs", "New pairs made durable.", labels=["site"])
        evicted = CounterMetricFamily(
            "echosight_store_evicted_pairs", "Pairs dropped by the limits.", labels=["site"]
        )
        trimmed = CounterMetricFamily(
            "echosight_streams_trimmed_entries", "Entries trimmed away before they were read.", labels=["site"]
        )
        pairs = GaugeMetricFamily("echosight_store_pairs", "Pairs on disk.", labels=["site"])
        size = GaugeMetricFamily("echosight_store_bytes", "Bytes on disk.", labels=["site"])
        waiting = GaugeMetricFamily("echosight_ingest_waiting_bytes", "Frames held in memory.", labels=["site"])
        offset = GaugeMetricFamily(
            "echosight_ingest_clock_offset_seconds", "Camera clock minus radar clock, estimated.", labels=["site"]
        )
        lost = CounterMetricFamily(
            "echosight_streams_lost_entries", "Unfinished entries trimmed to save memory.", labels=["site"]
        )
        for name, tally in list(self._sites.tallies.items()):
            for (kind, reason), num in list(tally.frames.items()):
                frames.add_metric([name, kind, reason], num)
            stored.add_metric([name], tally.num_stored)
            evicted.add_metric([name], self._sites.num_evicted(name))
            lost.add_metric([name], tally.num_lost)
        curated = CounterMetricFamily(
            "echosight_curation_pairs", "Pairs by what curation made of them.", labels=["site", "outcome"]
        )
        if self._sites.curator is not None:
            for (name, outcome), num in list(self._sites.curator.counts.items()):
                curated.add_metric([name, outcome], num)
        for name, num in self._num_trimmed().items():
            trimmed.add_metric([name], num)
        for name, one in list(self._sites.ours.items()):
            pairs.add_metric([name], len(one.writer))
            size.add_metric([name], one.writer.num_bytes)
            waiting.add_metric([name], one.num_waiting_bytes + one.num_decided_bytes)
            if one.clock:
                offset.add_metric([name], one.clock.offset_ns / 1e9)
        replicas = GaugeMetricFamily("echosight_ingest_replicas", "Ingest processes that share the sites.")
        replicas.add_metric([], self._sites.num_replicas)
        yield from (frames, stored, evicted, trimmed, lost, curated, pairs, size, waiting, offset, replicas)
