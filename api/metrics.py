"""What the model server counts, for Prometheus. One registry an app, so that several can live in one process.

What other processes of the server have counted of requests is added when it is read.
"""

import math
import platform
import time
from importlib.metadata import version

import onnxruntime
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from api.problems import KINDS
from api.tallies import Row, Tallies, rows_of

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters of one app."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        Info("echosight_build", "What runs", registry=self.registry).info(
            {
                "version": version("echosight"),
                "python_version": platform.python_version(),
                "onnxruntime_version": onnxruntime.__version__,
            }
        )
        self._requests = Counter(
            "echosight_api_requests",
            "Answered HTTP requests by route and status; 499: the client went away; 101: a WebSocket was opened",
            ["route", "status"],
            registry=self.registry,
        )
        self._request_s = Histogram(
            "echosight_api_request_duration_seconds",
            "Time from the head of a request to the head of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._by_route_and_status: dict[tuple[str, int], Counter] = {}
        self._by_route: dict[str, Histogram] = {}
        self._problems = Counter(
            "echosight_api_problems",
            "Requests, and messages of WebSockets, that were answered with a problem, by its kind",
            ["kind"],
            registry=self.registry,
        )
        for kind in KINDS:
            self._problems.labels(kind.name)
        self._exceptions = Counter(
            "echosight_api_exceptions", "Errors that nobody foresaw, by class", ["type"], registry=self.registry
        )
        self.inference_s = Histogram(
            "echosight_api_inference_seconds",
            "Time in the model of one call, whatever its batch",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.queue_s = Histogram(
            "echosight_api_queue_seconds",
            "Time that a request's frames waited for a thread",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_frames = Histogram(
            "echosight_api_batch_frames",
            "Heatmaps in one call of the model",
            buckets=_BATCHES,
            registry=self.registry,
        )
        self.waiting_frames = Gauge(
            "echosight_api_waiting_frames", "Heatmaps that wait for a thread now", registry=self.registry
        )
        self.frames = Counter("echosight_api_frames", "Heatmaps classified", registry=self.registry)
        self._live_version = Gauge(
            "echosight_api_live_model_version", "Version that answers; 0: none yet", registry=self.registry
        )
        age = Gauge(
            "echosight_api_live_model_age_seconds",
            "Time since the version that answers was published by the trainer; NaN: none yet",
            registry=self.registry,
        )
        age.set_function(lambda: time.time() - self._live_created_at_s)
        self._live_created_at_s = math.nan
        self._swaps = Counter("echosight_api_model_swaps", "Models that went live", registry=self.registry)
        self.refusals = Counter(
            "echosight_api_export_refusals", "Versions that were refused", registry=self.registry
        )
        self.open_streams = Gauge(
            "echosight_api_open_streams", "Clients that stream frames over a WebSocket", registry=self.registry
        )
        self.open_listeners = Gauge(
            "echosight_api_open_listeners", "Clients that listen to /v1/events", registry=self.registry
        )
        self.unheard_predictions = Counter(
            "echosight_api_unheard_predictions",
            "Predictions left out for clients of /v1/events that read too slowly",
            registry=self.registry,
        )
        self._execution = Gauge(
            "echosight_api_execution_info",
            "What runs the live model: always 1",
            ["variant", "threads", "onnxruntime"],
            registry=self.registry,
        )
        self.processes = Gauge(
            "echosight_api_processes", "Processes that answer, this one included", registry=self.registry
        )
        self.processes.set(1)
        self.lost_processes = Counter(
            "echosight_api_lost_processes", "Processes that ended without being told to", registry=self.registry
        )
        self.tallies = Tallies()
        self._num_requests = 0

    @property
    def num_requests(self) -> int:
        """Answered so far, by all processes."""
        return self._num_requests + int(self.tallies.total("echosight_api_requests_total"))

    def set_execution(self, variant: str, *, threads: int) -> None:
        """Say what runs the live model, and nothing of what ran the one before."""
        self._execution.clear()
        self._execution.labels(variant, str(threads), onnxruntime.__version__).set(1)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """One answer. route: its path, parameters unfilled."""
        self._num_requests += 1
        counter = self._by_route_and_status.get((route, status))
        if counter is None:
            counter = self._requests.labels(route, str(status))
            self._by_route_and_status[route, status] = counter
            self._by_route[route] = self._request_s.labels(route)
        counter.inc()
        self._by_route[route].observe(seconds)

    def count_problem(self, kind: str) -> None:
        self._problems.labels(kind).inc()

    def count_exception(self, name: str) -> None:
        """name: of its class."""
        self._exceptions.labels(name).inc()

    def model_went_live(self, version: int, created_at_s: float) -> None:
        """created_at_s: seconds since 1970, when the trainer published it."""
        self._swaps.inc()
        self._live_version.set(version)
        self._live_created_at_s = created_at_s

    def rows(self) -> list[Row]:
        """What this process tells another one that adds it up."""
        return rows_of(self.registry)

    def text(self) -> bytes:
        return generate_latest(self.tallies.added_to(self.registry))
