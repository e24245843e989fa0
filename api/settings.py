"""What the model server can be told. Built once, in `__main__`."""

import ipaddress
import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, field_validator

from api.live_settings import LiveSettings

_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}")


class ApiSettings(LiveSettings):
    """Settings of `python -m api`."""

    api_host: str = Field(default="127.0.0.1", description="address that the API listens on; 0.0.0.0: every one")
    api_published_host: str = Field(
        default="", description="address at which the port of its container is published; empty: api_host"
    )
    api_port: int = Field(
        default=8000, ge=0, le=65535, description="port that the API listens on; 0: any free one"
    )
    api_keys_file: str = Field(
        default="", description="file of API keys (`echosight keys`), read again when it changes; empty: no keys"
    )
    api_open: bool = Field(
        default=False,
        description="true: serve everybody without keys, even where others than this machine can ask",
    )
    rate_limit: float = Field(
        default=0.0, ge=0, description="requests a second of one key, or of one address without keys; 0: no limit"
    )
    rate_burst_s: float = Field(
        default=2.0, gt=0, le=3600, description="at once as many requests as the limit allows in so many seconds"
    )
    allowed_origins: str = Field(
        default="", description="comma-separated origins whose web pages may ask: https://a.example; empty: none"
    )
    allowed_hosts: str = Field(
        default="",
        description="comma-separated names of a server without keys, beside addresses and local names; *: any",
    )
    otel_exporter_otlp_endpoint: str = Field(
        default="",
        validation_alias=AliasChoices("OTEL_EXPORTER_OTLP_ENDPOINT"),
        description="OTLP/HTTP collector for a span a request, needs echosight[otel]; empty: no tracing",
    )
    grpc_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="port of the gRPC server, beside the HTTP one; 0: none. Needs `echosight[grpc]`",
    )
    api_processes: int = Field(
        default=1,
        ge=1,
        le=64,
        description="processes that answer the hot routes; they share the cores and the frames that may wait",
    )
    max_connections: int = Field(
        default=1024,
        ge=1,
        description="connections that one process of the API serves at a time; one more is answered by 503",
    )
    max_body_bytes: int = Field(
        default=16 * 1024 * 1024, ge=1024, description="largest request body that the API reads"
    )
    max_batch: int = Field(default=64, ge=1, le=4096, description="most frames in one request")
    body_timeout_s: float = Field(default=30.0, gt=0, description="how long a client may take to send its body")
    max_loaded_versions: int = Field(
        default=2,
        ge=1,
        le=64,
        description="versions that may be loaded beside the live one, to be asked by number",
    )
    max_streams: int = Field(
        default=64, ge=1, description="clients that may stream frames over a WebSocket at a time"
    )
    stream_idle_s: float = Field(
        default=300.0, gt=0, description="a WebSocket on which no frame came for so long is closed"
    )
    max_event_clients: int = Field(default=64, ge=1, description="clients that may listen to /v1/events at a time")
    heartbeat_s: float = Field(
        default=15.0, gt=0, description="silence after which /v1/events and a WebSocket show that they are alive"
    )
    poll_interval_s: float = Field(
        default=2.0, gt=0, description="how often the API looks for a new or another model in the registry"
    )
    export_timeout_s: float = Field(
        default=600.0, gt=0, description="how long one export may take before it is stopped and put off"
    )
    max_frame_ms: float = Field(
        default=2000.0, gt=0, description="a version that takes longer for one frame when it is loaded is refused"
    )
    shadow_frames: int = Field(
        default=0, ge=0, description="frames on which a candidate is compared with the live model, unseen; 0: none"
    )
    shadow_timeout_s: float = Field(
        default=300.0, gt=0, description="how long that comparison may wait for frames; then those seen count"
    )
    shadow_min_agreement: float = Field(
        default=0.7, ge=0, le=1, description="share of those frames with the same class below which it is refused"
    )
    export_threads: int = Field(
        default=1, ge=1, description="threads of the export child, which runs at low priority beside the serving"
    )
    export_int8: bool = Field(
        default=True, description="an export makes an int8 graph as well, kept only if it is as accurate"
    )
    execution: Literal[
        "auto",
        "cpu-fp32",
        "cpu-int8",
        "openvino-fp32",
        "openvino-bf16",
        "openvino-int8",
        "cuda",
        "tensorrt",
    ] = Field(default="auto", description="what runs a model; auto: the fastest on this machine, as measured")
    max_waiting_frames: int = Field(
        default=512, ge=1, description="frames that may wait for the model; who asks for more is answered by 429"
    )
    batch_wait_ms: float = Field(
        default=2.0,
        ge=0,
        le=100,
        description="how long a thread waits for a fuller batch, where it is cheaper and several clients ask",
    )
    answer_timeout_s: float = Field(
        default=30.0, gt=0, description="a frame that has no answer by then gets 504; a client may ask for less"
    )
    inference_threads: int = Field(
        default=0, ge=0, description="model calls at a time; 0: as many as the cgroup and the affinity give cores"
    )
    in_loop_below_ms: float = Field(
        default=0.5, ge=0, description="a model call faster than this runs in the event loop, without a thread"
    )
    events_interval_s: float = Field(
        default=5.0, gt=0, description="how often the API publishes its counters as an event, with redis_url"
    )
    stop_grace_s: int = Field(
        default=20, ge=1, description="how long requests in flight may take to finish when the API is stopped"
    )

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, given: str) -> str:
        for origin in _listed(given):
            parts = urlsplit(origin)
            if (
                parts.scheme not in ("http", "https")
                or not parts.netloc
                or origin != f"{parts.scheme}://{parts.netloc}"
            ):
                raise ValueError(f"{origin!r} is no origin; use https://host or https://host:port")
        return given

    @field_validator("allowed_hosts")
    @classmethod
    def _check_hosts(cls, given: str) -> str:
        for host in _listed(given):
            if host != "*" and not _HOST.fullmatch(host):
                raise ValueError(f"{host!r} is no name of a host; use radar.example, without scheme and port")
        return given

    @property
    def hosts(self) -> frozenset[str]:
        """`allowed_hosts`, and the name that the API listens at, in lower case."""
        return frozenset(host.lower() for host in [*_listed(self.allowed_hosts), self.api_host])

    @property
    def origins(self) -> frozenset[bytes]:
        """`allowed_origins` as browsers send them."""
        return frozenset(origin.lower().encode() for origin in _listed(self.allowed_origins))

    @property
    def reached_at(self) -> str:
        """The address at which others find the API: in a container, the one that its port is published at."""
        return self.api_published_host or self.api_host

    @property
    def is_on_loopback(self) -> bool:
        """Whether nobody beyond this machine can reach the API."""
        if self.reached_at == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.reached_at).is_loopback
        except ValueError:
            return False


def _listed(given: str) -> list[str]:
    return [part.strip() for part in given.split(",") if part.strip()]
