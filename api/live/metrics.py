"""What the live classification counts."""

from collections import Counter, deque
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Gauge, Histogram
from prometheus_client import Counter as Metric

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_MAX_LATENCY_MS = 60_000.0
"""Beyond it, or below zero, the sensor's clock is not ours: that is no latency."""
_REMEMBERED = 1000


class LiveMetrics:
    """The counters of one app, for Prometheus and for the event that it reports."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._predictions = Metric(
            "echosight_live_predictions",
            "Streamed frames classified, by the label of the vote",
            ["site", "label"],
            registry=registry,
        )
        self._abstained = Metric(
            "echosight_live_abstained",
            "Streamed frames classified without giving an answer",
            ["site", "reason"],
            registry=registry,
        )
        self._skipped = Metric(
            "echosight_live_skipped",
            "Streamed frames read and not classified",
            ["site", "reason"],
            registry=registry,
        )
        self._latency_s = Histogram(
            "echosight_live_latency_seconds",
            "Until a prediction was published: since the frame was captured, arrived in the stream, was read",
            ["since"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.sites = Gauge("echosight_live_sites", "Sites whose frames this replica classifies", registry=registry)
        self.interruptions = Metric(
            "echosight_live_interruptions",
            "Times that the live classification had to back off",
            registry=registry,
        )
        self._num: Counter[str] = Counter()
        self._skips: Counter[str] = Counter()
        self._abstentions: Counter[str] = Counter()
        self._latencies_ms: deque[float] = deque(maxlen=_REMEMBERED)

    def count(self, site: str, *, label: str, abstained: str) -> None:
        self._num[site] += 1
        self._predictions.labels(site, label).inc()
        if abstained:
            self._abstentions[abstained] += 1
            self._abstained.labels(site, abstained).inc()

    def skip(self, site: str, reason: str, num: int = 1) -> None:
        self._skips[reason] += num
        self._skipped.labels(site, reason).inc(num)

    def observe(self, **since_ms: float) -> None:
        """captured, arrived, read: milliseconds from then to when the prediction was published."""
        for since, latency_ms in since_ms.items():
            if 0 <= latency_ms <= _MAX_LATENCY_MS:
                self._latency_s.labels(since).observe(latency_ms / 1e3)
        if 0 <= since_ms["captured"] <= _MAX_LATENCY_MS:
            self._latencies_ms.append(since_ms["captured"])

    def describe(self) -> dict[str, Any]:
        """For an event: totals since the start, latency of the last frames since they were captured."""
        described: dict[str, Any] = {
            "predictions": self._num.total(),
            "sites": dict(self._num),
            "abstained": dict(self._abstentions),
            "skipped": dict(self._skips),
        }
        if self._latencies_ms:
            p50, p99 = np.percentile(self._latencies_ms, (50, 99))
            described |= {"p50_ms": round(float(p50), 1), "p99_ms": round(float(p99), 1)}
        return described
