"""What the model server can be told. Built once, in `__main__`."""

from pydantic import Field

from api.live_settings import LiveSettings


class ApiSettings(LiveSettings):
    """Settings of `python -m api`."""

    api_host: str = Field(default="127.0.0.1", description="address that the API listens on; 0.0.0.0: every one")
    api_port: int = Field(
        default=8000, ge=0, le=65535, description="port that the API listens on; 0: any free one"
    )
    grpc_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="port of the gRPC server, beside the HTTP one; 0: none. Needs `echosight[grpc]`",
    )
    max_connections: int = Field(
        default=1024, ge=1, description="connections that the API serves at a time; one more is answered by 503"
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
