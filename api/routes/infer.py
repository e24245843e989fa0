"""POST /v2/models/{name}[/versions/{version}]/infer, the other hot route: read -> parse -> infer -> write."""

import time

from starlette.types import Receive, Scope

from api.access.gate import Gate
from api.access.tracing import timed
from api.answering.serving import Serving
from api.asked import asked_of
from api.bodies.reading import BodyReader
from api.problems import NO_SUCH_MODEL, NOT_FOUND, ProblemError
from api.releases.versions import Versions
from api.routes.classify import DECODE_IN_LOOP_BYTES, on_decoder
from api.routes.endpoint import JSON, Endpoint, Headers, Reply
from api.routes.inference import HEADER_LENGTH, Inference, read_inference, write_inference
from api.routes.terms import terms_of

ROUTE = "/v2/models/{name}/infer"
"""Under which both paths are counted."""
_BINARY = (b"content-type", b"application/octet-stream")


class Infer(Endpoint):
    """The endpoint."""

    def __init__(
        self,
        name: str,
        serving: Serving,
        versions: Versions,
        reader: BodyReader,
        gate: Gate,
        *,
        max_batch: int,
    ) -> None:
        super().__init__(gate, ROUTE)
        self._name = name
        self._serving = serving
        self._versions = versions
        self._reader = reader
        self._max_batch = max_batch

    async def answer(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> Reply:
        asked_ns = time.monotonic_ns()
        name, version = names_in(scope["path"])
        # First: an answer to half a request breaks a connection.
        body = await self._reader.read(scope, headers, receive)
        terms = terms_of(scope, headers, asked_ns)
        check_name(name, self._name)
        model = await self._versions.find(version)
        started_ns = time.perf_counter_ns()
        try:
            header_length = headers.get(HEADER_LENGTH)

            def read() -> Inference:
                return read_inference(body, header_length, model, max_batch=self._max_batch)

            inference = read() if len(body) < DECODE_IN_LOOP_BYTES else await on_decoder(read)
            decoded_ns = time.perf_counter_ns()
            if inference.timeout_us:
                terms = terms.sooner(asked_ns + inference.timeout_us * 1000)
            outputs = tuple(wanted.name for wanted in inference.wanted)
            found = await self._serving.infer(model, inference.heatmaps, inference.sites, outputs, terms)
            timed(
                asked_of(scope).span,
                decode_ns=decoded_ns - started_ns,
                queue_ns=found.queue_ns,
                inference_ns=found.inference_ns,
                version=model.version,
                frames=len(inference.heatmaps),
            )
            inferred_ns = time.perf_counter_ns()
            answer, json_bytes = write_inference(inference, dict(zip(outputs, found.values, strict=True)), model)
        except Exception:
            self._serving.statistics.count_failure(model.version, time.perf_counter_ns() - started_ns)
            raise
        self._serving.statistics.count_transport(
            model.version, decode_ns=decoded_ns - started_ns, encode_ns=time.perf_counter_ns() - inferred_ns
        )
        sent: Headers = [JSON] if json_bytes is None else [_BINARY, (HEADER_LENGTH, b"%d" % json_bytes)]
        return Reply(sent, answer)


def is_infer(path: str) -> bool:
    """Whether a path is one of this endpoint."""
    return path.endswith("/infer") and path.startswith("/v2/models/")


def names_in(path: str) -> tuple[str, str]:
    """The model's name and the version, "" if none, in a path of this endpoint. Raises ProblemError."""
    match path.split("/")[3:-1]:
        case [name]:
            return name, ""
        case [name, "versions", version] if version:
            return name, version
    raise ProblemError(NOT_FOUND, f"path is {path[:200]!r}", remedy="GET / lists what is here")


def check_name(name: str, served: str) -> None:
    """Raises ProblemError unless it is the name of the model that this server serves."""
    if name != served:
        raise ProblemError(NO_SUCH_MODEL, f"model is {name[:80]!r}", remedy=f"this server has {served!r}")
