"""A span for each request, in OpenTelemetry's terms, if a collector is named: one way for the hot routes, which go
past FastAPI, and for all others. Its API comes with FastAPI; what exports spans is `pip install echosight[otel]`.

Everything else that OTEL_* variables can say (headers, sampler, resource, timeouts) the SDK reads itself.
"""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from threading import Timer
from typing import TYPE_CHECKING

from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope
from structlog.contextvars import bind_contextvars

from api.asked import Asked
from api.settings import ApiSettings
from services.core.logs import logger

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

CLOSE_S = 2.0
_CARRIED = (b"traceparent", b"tracestate")


class Tracing:
    """Spans of one server. provider: is shut down with it; give_up: ends tries to send what is left."""

    def __init__(self, provider: "TracerProvider", give_up: Callable[[], None] = lambda: None) -> None:
        self._provider = provider
        self._give_up = give_up
        self._tracer = provider.get_tracer("echosight.api", version("echosight"))
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, asked: Asked, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        """A trace that the client began goes on. Log lines of the request get its id."""
        method = scope.get("method", "GET")
        carrier = {name.decode(): headers[name].decode("latin-1") for name in _CARRIED if name in headers}
        asked.span = self._tracer.start_span(
            method,
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": method,
                "url.path": scope["path"],
                "url.scheme": scope.get("scheme", "http"),
                "echosight.request_id": asked.request_id,
                "echosight.caller": asked.caller,
            },
        )
        bind_contextvars(trace_id=format(asked.span.get_span_context().trace_id, "032x"))

    def end(self, asked: Asked, *, name: str, route: str, status: int) -> None:
        """Named after its route, which is known by now."""
        span = asked.span
        assert span is not None
        span.update_name(name)
        span.set_attributes({"http.route": route, "http.response.status_code": status})
        if asked.problem:
            span.set_attribute("echosight.problem", asked.problem)
        if status >= 500:
            span.set_attribute("error.type", asked.error or str(status))
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def close(self) -> None:
        """Send what is left, or give up after CLOSE_S: a server that stops does not wait for a dead collector."""
        timer = Timer(CLOSE_S, self._give_up)
        timer.start()
        self._provider.shutdown()
        timer.cancel()


def timed(
    span: Span | None, *, decode_ns: int, queue_ns: int, inference_ns: int, version: int, frames: int
) -> None:
    """Say where the time of an answer went."""
    if span is not None:
        span.set_attributes(
            {
                "echosight.decode_ms": decode_ns / 1e6,
                "echosight.queue_ms": queue_ns / 1e6,
                "echosight.inference_ms": inference_ns / 1e6,
                "echosight.model_version": version,
                "echosight.frames": frames,
            }
        )


def make_tracing(settings: ApiSettings) -> Tracing | None:
    """None if no collector is named, or if the extra is not installed, which the log then says."""
    if not settings.otel_exporter_otlp_endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        logger("api").warning("no tracing: its packages are missing", remedy="pip install echosight[otel]")
        return None
    ours = Resource({"service.name": "echosight-api", "service.version": version("echosight")})
    provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=f"{settings.otel_exporter_otlp_endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider, exporter.shutdown)
