"""WebSocket /v1/stream: a client sends frame after frame on one connection, answers come back in that order.

A binary message is a .npy array, a text one the JSON of /v1/classify. One message is answered before the next is
read: what a client sends too fast waits in its own socket, not here. A message that is wrong is answered by a
problem in its place, and the stream goes on.
"""

import asyncio
import contextlib
import time

import orjson
from starlette.types import Message, Scope
from starlette.websockets import WebSocket, WebSocketDisconnect

from api import problems
from api.access.gate import Gate
from api.access.keys import caller_of
from api.access.origins import check_origin
from api.answering.calls import Terms
from api.answering.serving import Serving, not_ready
from api.asked import asked_of
from api.bodies.frames import site_of
from api.problems import ProblemError
from api.routes.classify import decode_posted, encode
from api.settings import ApiSettings
from services.core.logs import logger

PATH = "/v1/stream"
IDLE, BROKEN = 1000, 1008
"""Close codes (RFC 6455, section 7.4.1): normal, and a broken rule. A stopping server closes with 1012."""
_CLOSE_S = 1.0
"""So long may the reason of an end take to be sent: a client that does not read never gets it."""
_NPY = {b"content-type": b"application/x-npy"}
_JSON = {b"content-type": b"application/json"}


class Stream:
    """The endpoint. Pings, and the size of a message, are the protocol implementation's business."""

    def __init__(self, settings: ApiSettings, serving: Serving, gate: Gate) -> None:
        self._max_batch = settings.max_batch
        self._max_streams = settings.max_streams
        self._idle_s = settings.stream_idle_s
        self._send_timeout_s = settings.body_timeout_s
        self._serving = serving
        self._gate = gate
        self._metrics = gate.metrics
        self._allowed_origins = settings.origins
        self._num_open = 0

    async def serve(self, websocket: WebSocket) -> None:
        """One connection, from its handshake to its end."""
        try:
            site = self._admit(websocket)
        except ProblemError as error:
            await websocket.send_denial_response(problems.response(error, websocket.scope))
            return
        self._num_open += 1
        self._metrics.open_streams.set(self._num_open)
        try:
            await websocket.accept()
            await self._answer_all(websocket, site)
        except WebSocketDisconnect:
            pass  # whichever side went
        finally:
            self._num_open -= 1
            self._metrics.open_streams.set(self._num_open)

    def _admit(self, websocket: WebSocket) -> str:
        """The site of the stream. Raises ProblemError for whom there is no place."""
        check_origin(dict(websocket.scope["headers"]), self._allowed_origins)
        if self._num_open >= self._max_streams:
            raise ProblemError(
                problems.TOO_MANY_CLIENTS,
                f"{self._num_open} clients stream already",
                remedy="raise ECHOSIGHT_MAX_STREAMS, or POST single frames",
                headers={"retry-after": "10"},
            )
        if not self._serving.live.is_ready:
            raise not_ready(self._serving.live)
        return site_of(websocket.scope["query_string"])

    async def _answer_all(self, websocket: WebSocket, site: str) -> None:
        terms = Terms(caller_of(websocket.scope))
        index = 0
        while True:
            try:
                async with asyncio.timeout(self._idle_s):
                    message = await websocket.receive()
            except TimeoutError:
                await _close(websocket, IDLE, f"no frame for {self._idle_s:g} s")
                return
            if message["type"] == "websocket.disconnect":
                return
            if not self._gate.is_welcome(websocket.scope):
                await _close(websocket, BROKEN, "the API key is no longer valid")
                return
            answer = await self._answer(websocket.scope, message, site, terms, index)
            try:
                async with asyncio.timeout(self._send_timeout_s):
                    await websocket.send_text(orjson.dumps(answer).decode())
            except TimeoutError:
                await _close(websocket, BROKEN, "answers are not read")
                return
            index += 1

    async def _answer(
        self, scope: Scope, message: Message, site: str, terms: Terms, index: int
    ) -> dict[str, object]:
        started_ns = time.perf_counter_ns()
        query = b"site=" + site.encode() if site else b""
        data, text = message.get("bytes"), message.get("text")
        try:
            self._gate.take_message(scope)
            model = self._serving.model
            body, headers = (data, _NPY) if data is not None else ((text or "").encode(), _JSON)
            posted = await decode_posted(body, headers, query, model, max_batch=self._max_batch)
            decoded_ns = time.perf_counter_ns()
            answer = await self._serving.predict(model, posted.heatmaps, posted.site, terms)
        except ProblemError as error:
            return {"index": index, **self._problem(scope, error)}
        except Exception as error:
            logger("api").error("frame of a stream failed", exc_info=error)
            self._metrics.count_exception(type(error).__name__)
            return {"index": index, **self._problem(scope, problems.unexpected(error))}
        timing_ms = {
            "decode": (decoded_ns - started_ns) / 1e6,
            "queue": answer.queue_ns / 1e6,
            "inference": answer.inference_ns / 1e6,
            "total": (time.perf_counter_ns() - started_ns) / 1e6,
        }
        return {"index": index, **encode(model, posted, answer), "timing_ms": timing_ms}

    def _problem(self, scope: Scope, error: ProblemError) -> dict[str, object]:
        self._metrics.count_problem(error.kind.name)
        return error.members(PATH, asked_of(scope).request_id)


async def _close(websocket: WebSocket, code: int, reason: str) -> None:
    """Say why it ends, if the client reads it; in any case it ends."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_CLOSE_S):
            await websocket.close(code, reason)
