"""What Prometheus sees of the trainer: its counters, and the gauges as they were last read. It computes nothing.

Names follow Prometheus' conventions: counters end in _total, units are seconds and bytes, shares are ratios.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from services.core.metrics import serve_metrics

_PREFIX = "echosight_trainer_"
_COUNTERS = {
    "steps": "Optimizer steps.",
    "learnt_pairs": "Pairs learnt, each as often as it was in a batch.",
    "encoded_images": "Images encoded by this process.",
    "rollbacks": "Times that a loss, a gradient or weights were not finite: back to the last checkpoint.",
}
_NOW = {
    "pairs": "Encoded pairs to learn from.",
    "pending_pairs": "Pairs whose image is not encoded yet.",
    "skipped_pairs": "Pairs that are damaged, or of another radar than the model's.",
    "checkpoint_age_seconds": "Since the state for a resume was saved.",
    "device_memory_bytes": "Tensors on the GPU.",
}
_READ = {
    "cost_share": ("gauges_cost_ratio", "Share of the trainer's time that reading the gauges takes."),
    "held_out_pairs": ("held_out_pairs", "Held-out pairs that the gauges were read on."),
    "alignment": ("alignment", "Mean squared distance of a pair's encodings; 2: unrelated."),
    "uniformity": ("uniformity", "log of the mean Gaussian potential of radar encodings; 0: all the same."),
    "rank": ("effective_rank", "Directions that the radar features use."),
    "std": ("feature_std", "Spread of the radar features; 1: spread, 0: collapsed."),
}
_BOTH_PARTS = {
    "loss": "InfoNCE of radar to image, nats.",
    "chance": "What an encoder that has learnt nothing would get, nats.",
    "mi_nats": "Lower bound of what radar and image encodings share, nats.",
}
_OF_SITE = {
    "lag_ms": ("sync_lag_seconds", "Camera's clock minus radar's, by what both see."),
    "lag_low_ms": ("sync_lag_low_seconds", "Lower end of the sync lag's 90 % interval."),
    "lag_high_ms": ("sync_lag_high_seconds", "Upper end of the sync lag's 90 % interval."),
}


class TrainerMetrics(Collector):
    """counters: numbers of now. readings: what `Judge.readings` holds; both are asked when somebody scrapes."""

    def __init__(
        self, counters: Callable[[], Mapping[str, float]], readings: Callable[[], Mapping[str, Any]]
    ) -> None:
        self._counters = counters
        self._readings = readings
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def serve(self, *, host: str, port: int) -> Callable[[], None]:
        """Answer at http://host:port/metrics until the returned function is called; port 0: nothing to do.

        Raises SettingsError if the port is taken.
        """
        return serve_metrics(self.registry, host=host, port=port, variable="ECHOSIGHT_TRAINER_METRICS_PORT")

    def describe(self) -> list[Any]:
        return []  # names depend on nothing; this only keeps registration from collecting

    def collect(self) -> Iterator[Any]:
        counters, readings = self._counters(), self._readings()
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(_PREFIX + name, text, value=counters[name])
        for name, text in _NOW.items():
            if name in counters:
                yield GaugeMetricFamily(_PREFIX + name, text, value=counters[name])
        for key, (name, text) in _READ.items():
            if key in readings:
                yield GaugeMetricFamily(_PREFIX + name, text, value=readings[key])
        for key, text in _BOTH_PARTS.items():
            yield _family(
                "mutual_information_nats" if key == "mi_nats" else f"{key}_nats",
                text,
                ["pairs"],
                [(("learnt",), readings.get(key)), (("held_out",), readings.get(f"held_out_{key}"))],
            )
        recalls = [((num,), readings.get(f"r{num}")) for num in ("1", "5")]
        yield _family(
            "retrieval_ratio", "Held-out radar frames whose image is among the best.", ["among"], recalls
        )
        chances = [((num,), readings.get(f"r{num}_chance")) for num in ("1", "5")]
        yield _family("retrieval_chance_ratio", "What a blind guess would retrieve.", ["among"], chances)
        yield from _probes(readings.get("probe") or {})
        yield from _sites(readings.get("sites") or {})
        alarms = [((name.partition(" ")[0], name.partition(" ")[2]), 1) for name in readings.get("alarms", ())]
        yield _family("alarm", "1 while a gauge is beyond its limit.", ["gauge", "site"], alarms)


def _family(
    name: str, text: str, labels: list[str], values: Iterable[tuple[tuple[str, ...], Any]]
) -> GaugeMetricFamily:
    """One gauge; a value of None is left out."""
    family = GaugeMetricFamily(_PREFIX + name, text, labels=labels)
    for at, value in values:
        if value is not None:
            family.add_metric(list(at), value)
    return family


def _probes(probe: Mapping[str, Any]) -> Iterator[GaugeMetricFamily]:
    kinds = [kind for kind in ("linear", "knn") if kind in probe]
    accuracy = [((kind,), probe[kind]["accuracy"]) for kind in kinds]
    yield _family("probe_accuracy_ratio", "Held-out labels that a probe got right.", ["probe"], accuracy)
    recall = [((kind, name), value) for kind in kinds for name, value in probe[kind]["recall"].items()]
    yield _family("probe_recall_ratio", "The same by class.", ["probe", "class"], recall)


def _sites(sites: Mapping[str, Mapping[str, Any]]) -> Iterator[Any]:
    for key, (name, text) in _OF_SITE.items():
        yield _family(name, text, ["site"], [((site,), of[key] / 1e3) for site, of in sites.items() if key in of])
    changes = CounterMetricFamily(_PREFIX + "drift_changes", "Changes told.", labels=["site", "part"])
    for site, of in sites.items():
        for part, num in of["changes"].items():
            changes.add_metric([site, part], num)
    yield changes
    levels = [((site, name), value) for site, of in sites.items() for name, value in of["levels"].items()]
    yield _family("level", "What the drift gauge follows, as it was last seen.", ["site", "of"], levels)
