"""The gRPC server: a second door to the same app, in the same event loop.

A call becomes a request to the app (`api.rpc.transcoding`), with what its metadata says of who asks and with its
deadline; a problem becomes a status with the same words. gRPC cancels a call whose client is gone,
and with it what waits in line for the model.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import unquote

import grpc
import orjson
from starlette.types import ASGIApp, Message, Scope

from api.problems import ProblemError, unexpected
from api.routes.terms import TIMEOUT_HEADER
from api.rpc import open_inference_pb2 as pb
from api.rpc.transcoding import CALLS, INFER, SERVICE, Call, Reply, Request
from api.settings import ApiSettings
from services.core.errors import SettingsError
from services.core.logs import logger

STREAM = "ModelStreamInfer"
FORWARDED = frozenset({"authorization", "x-api-key", "x-request-id", "traceparent", "tracestate"})
"""Metadata that the app gets as headers: who asks, and what for."""

_HEADER_BYTES = 64 * 1024
"""Of a message, beside the tensors that may be as long as a body."""
_MAX_TIMEOUT_MS = 10**9 - 1
_LAST_MESSAGES_S = 0.5
"""So long a stopping server takes what a stream's client had sent before it could know."""
_CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    405: grpc.StatusCode.UNIMPLEMENTED,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_Context = Any
"""grpc.aio.ServicerContext, which has no types."""
_Failure = tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]
"""Status, words, and trailing metadata."""


class RpcServer:
    """Listens from `start` to `stop`."""

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self._app = app
        host = f"[{settings.api_host}]" if ":" in settings.api_host else settings.api_host
        self._address = f"{host}:{settings.grpc_port}"
        self._stop_grace_s = settings.stop_grace_s
        self._max_message_bytes = settings.max_body_bytes + _HEADER_BYTES
        self._max_calls = settings.max_connections
        self._server: Any = None
        self._is_stopping = asyncio.Event()

    async def start(self) -> None:
        """Raises SettingsError where the port is taken."""
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self._max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ],
            maximum_concurrent_rpcs=self._max_calls,
        )
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                self._unary(call),
                request_deserializer=call.asked.FromString,
                response_serializer=call.answered.SerializeToString,
            )
            for name, call in CALLS.items()
        }
        handlers[STREAM] = grpc.stream_stream_rpc_method_handler(
            self._stream,
            request_deserializer=pb.ModelInferRequest.FromString,
            response_serializer=pb.ModelStreamInferResponse.SerializeToString,
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        try:
            self._server.add_insecure_port(self._address)
        except RuntimeError:
            raise SettingsError(
                f"gRPC cannot listen at {self._address}",
                remedy="set ECHOSIGHT_GRPC_PORT to a port that is free, or to 0 for none",
            ) from None
        await self._server.start()
        logger("api").info("listening for gRPC", address=self._address)

    async def stop(self) -> None:
        """Take no more calls, let those in flight finish for a while. May be called again meanwhile."""
        self._is_stopping.set()
        if self._server is not None:
            await self._server.stop(self._stop_grace_s)

    def _unary(self, call: Call) -> Callable[[Any, _Context], Awaitable[Any]]:
        async def answer(asked: Any, context: _Context) -> Any:
            answered = await self._answer(call, asked, context)
            if isinstance(answered, tuple):
                code, words, trailing = answered
                await context.abort(code, words, trailing)
            return answered

        return answer

    async def _stream(self, requests: AsyncIterator[Any], context: _Context) -> AsyncIterator[Any]:
        """Inferences in order; one that fails does not end the stream, a server that stops does."""
        while True:
            asked = await self._next(requests)
            if asked is None:
                break
            answered = await self._answer(CALLS[INFER], asked, context)
            if isinstance(answered, tuple):
                failed = pb.ModelInferResponse(id=asked.id)
                yield pb.ModelStreamInferResponse(error_message=answered[1], infer_response=failed)
            else:
                yield pb.ModelStreamInferResponse(infer_response=answered)

        if self._is_stopping.is_set():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping; ask another server")

    async def _next(self, requests: AsyncIterator[Any]) -> Any:
        """A stream's next message; None: there is none any more, or the server stops."""
        reading = asyncio.ensure_future(anext(requests, None))
        stopping = asyncio.ensure_future(self._is_stopping.wait())
        try:
            await asyncio.wait({reading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({reading}, timeout=_LAST_MESSAGES_S)
            return reading.result() if reading.done() else None
        finally:
            stopping.cancel()
            reading.cancel()

    async def _answer(self, call: Call, asked: Any, context: _Context) -> Any:
        """The message that answers, or a _Failure."""
        try:
            reply = await _ask(self._app, call.to_http(asked), context)
            answered = call.from_http(asked, reply)
        except ProblemError as error:  # what the app never saw
            return _failure(error.kind.status, error.kind.name, str(error))
        except Exception as error:
            logger("api").error("gRPC call failed", exc_info=error)
            problem = unexpected(error)
            return _failure(problem.kind.status, problem.kind.name, str(problem))
        return answered if answered is not None else _failure_of(reply)


async def _ask(app: ASGIApp, request: Request, context: _Context) -> Reply:
    """What the app answers to whoever is behind `context`, within the deadline that came with the call."""
    headers = [*request.headers, (b"host", b"grpc")]
    metadata = context.invocation_metadata() or ()
    headers += [(name.encode(), value.encode()) for name, value in metadata if name in FORWARDED]
    remaining_s = context.time_remaining()
    if remaining_s is not None:
        timeout_ms = min(max(1, int(1e3 * remaining_s)), _MAX_TIMEOUT_MS)
        headers.append((TIMEOUT_HEADER, b"%d" % timeout_ms))
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "2",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": (_peer_host(context.peer()), 0),
        "server": None,
    }
    messages = [{"type": "http.request", "body": request.body}]
    sent: list[Message] = []

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start, *parts = sent
    body = b"".join(part.get("body", b"") for part in parts)
    return Reply(start["status"], {name.lower(): value for name, value in start["headers"]}, body)


def _peer_host(peer: str) -> str:
    """ipv4:10.0.0.1:4711 or ipv6:%5B::1%5D:4711 as HTTP would say it."""
    _, _, address = unquote(peer).partition(":")
    return address.rpartition(":")[0].strip("[]")


def _failure_of(reply: Reply) -> _Failure:
    """A problem (RFC 9457) as the app answered it."""
    try:
        problem = orjson.loads(reply.body)
        kind, words = str(problem["type"]).rpartition(":")[2], str(problem["error"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        kind, words = "", f"the server answered {reply.status}"
    retry = reply.headers.get(b"retry-after")
    return _failure(reply.status, kind, words, *([("retry-after", retry.decode())] if retry else []))


def _failure(status: int, kind: str, words: str, *trailing: tuple[str, str]) -> _Failure:
    is_clients = 400 <= status < 500
    code = _CODES.get(status, grpc.StatusCode.INVALID_ARGUMENT if is_clients else grpc.StatusCode.INTERNAL)
    return code, words, (("problem", kind), *trailing)
