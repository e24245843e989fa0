"""POST /v1/classify, the hot route: read -> decode -> predict -> encode.

A plain ASGI endpoint: FastAPI's layers and pydantic would cost more than a small model does. It counts and answers
its own problems; its OpenAPI operation is written out in `api.openapi`.
"""

import asyncio
import time

import orjson
from starlette.types import Receive, Scope, Send

from api import problems
from api.bodies import Posted, decode
from api.classifier import Classifier
from api.engine import Answer, Engine
from api.metrics import Metrics
from api.models import LiveModel
from api.problems import ProblemError
from api.settings import ApiSettings
from services.core.logs import logger

PATH = "/v1/classify"
_DECODE_IN_LOOP_BYTES = 512 * 1024
_JSON = (b"content-type", b"application/json")
_PROBLEM = (b"content-type", problems.MEDIA_TYPE.encode())


class ClientGoneError(Exception):
    """The client went away before its body was there: nobody is left to answer."""


class Classify:
    """The endpoint."""

    def __init__(self, settings: ApiSettings, live: LiveModel, engine: Engine, metrics: Metrics) -> None:
        self._max_body_bytes = settings.max_body_bytes
        self._max_batch = settings.max_batch
        self._body_timeout_s = settings.body_timeout_s
        self._live = live
        self._engine = engine
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            status, headers, body = await self._answer(scope, receive)
        except ClientGoneError:
            return
        except Exception as error:
            problem = error if isinstance(error, ProblemError) else problems.unexpected(error)
            if problem is not error:
                logger("api").error("request failed", path=scope["path"], exc_info=error)
            status, body = problem.kind.status, problem.body(scope["path"])
            headers = [_PROBLEM, *((k.lower().encode(), v.encode()) for k, v in problem.headers.items())]
        self._metrics.count_request(status)
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope, receive: Receive) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        started_ns = time.perf_counter_ns()
        content_type = self._check_headers(scope)
        body = await self._read(receive)
        read_ns = time.perf_counter_ns()
        model = self._live.current
        if model is None:
            raise not_ready(self._live)
        posted = await self._decode(body, content_type, scope["query_string"], model)
        decoded_ns = time.perf_counter_ns()
        site_index, is_known = model.site(posted.site)
        answer = await self._engine.predict(model, posted.heatmaps, site_index)
        self._metrics.inference_s.observe(answer.inference_ns / 1e9)
        self._metrics.frames.inc(len(posted.heatmaps))
        content = _encode(model, posted, answer, is_known=is_known)
        content["timing_ms"] = {
            "decode": (decoded_ns - read_ns) / 1e6,
            "queue": answer.queue_ns / 1e6,
            "inference": answer.inference_ns / 1e6,
            "total": (time.perf_counter_ns() - started_ns) / 1e6,
        }
        return 200, [_JSON, (b"x-model-version", b"%d" % model.version)], orjson.dumps(content)

    def _check_headers(self, scope: Scope) -> str:
        """The content type. Refuses by the headers alone what need not be read."""
        content_type = ""
        for name, value in scope["headers"]:
            if name == b"content-type":
                content_type = value.decode("latin-1")
            elif name == b"content-length":
                self._check_length(int(value))  # the HTTP parser lets digits through only
            elif name == b"content-encoding" and value.lower() not in (b"", b"identity"):
                raise ProblemError(
                    problems.WRONG_MEDIA_TYPE,
                    f"content encoding is {value[:40].decode('latin-1')!r}",
                    remedy="send the body uncompressed",
                )
        return content_type

    def _check_length(self, num_bytes: int) -> None:
        if num_bytes > self._max_body_bytes:
            raise ProblemError(
                problems.TOO_LARGE,
                f"body has {num_bytes} bytes or more",
                remedy=f"send at most {self._max_body_bytes}: fewer frames a request, or float16",
            )

    async def _read(self, receive: Receive) -> bytes:
        """The whole body; a chunked one is refused as soon as it is too long."""
        chunks: list[bytes] = []
        num_bytes = 0
        try:
            async with asyncio.timeout(self._body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    chunk = message.get("body", b"")
                    num_bytes += len(chunk)
                    self._check_length(num_bytes)
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        return chunks[0] if len(chunks) == 1 else b"".join(chunks)
        except TimeoutError:
            raise ProblemError(
                problems.SLOW_BODY,
                f"{num_bytes} bytes of the body came within {self._body_timeout_s:g} s",
                remedy="send it faster or in smaller requests",
                headers={"connection": "close"},
            ) from None

    async def _decode(self, body: bytes, content_type: str, query: bytes, model: Classifier) -> Posted:
        """A long body is decoded on a thread, so that the others do not wait for it."""

        def run() -> Posted:
            return decode(
                body,
                content_type=content_type,
                query=query,
                contract=model.contract,
                max_batch=self._max_batch,
            )

        return run() if len(body) < _DECODE_IN_LOOP_BYTES else await asyncio.to_thread(run)


def not_ready(live: LiveModel) -> ProblemError:
    """The problem of a server that cannot answer (any more, or yet)."""
    what = "the server is stopping" if live.is_stopping else f"waiting for {live.waiting_for}"
    remedy = "ask another server" if live.is_stopping else "try again soon; GET /readyz says when"
    return ProblemError(problems.NOT_READY, what, remedy=remedy, headers={"retry-after": "2"})


def _encode(model: Classifier, posted: Posted, answer: Answer, *, is_known: bool) -> dict[str, object]:
    classes = model.classes
    rows: list[list[float]] = answer.probabilities.tolist()
    results = [
        {
            "label": classes[row.index(max(row))],
            "probabilities": {name: round(value, 7) for name, value in zip(classes, row, strict=True)},
        }
        for row in rows
    ]
    content: dict[str, object] = {"results": results} if posted.is_batch else dict(results[0])
    content["model"] = {"name": model.manifest.name, "version": model.version}
    content["site"] = {"name": posted.site, "known": is_known}
    return content
