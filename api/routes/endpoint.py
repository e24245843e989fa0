"""A plain ASGI endpoint, for the hot routes: FastAPI's layers and pydantic cost more than a small model does.

It passes the gate by itself and answers its own problems. Its OpenAPI operation stands in `api.routes.operations`.
"""

import asyncio
from abc import ABC, abstractmethod
from typing import NamedTuple

from starlette.types import Receive, Scope, Send

from api import problems
from api.access.gate import CLIENT_GONE, Gate
from api.asked import Asked
from api.bodies.reading import ClientGoneError
from api.problems import ProblemError
from services.core.logs import logger

Headers = list[tuple[bytes, bytes]]

JSON = (b"content-type", b"application/json")
_PROBLEM = (b"content-type", problems.MEDIA_TYPE.encode())


class Reply(NamedTuple):
    """A whole answer. headers: all but content-length and those that every answer has."""

    headers: Headers
    body: bytes
    status: int = 200


class Endpoint(ABC):
    """What a hot route derives from. route: its path, parameters unfilled."""

    def __init__(self, gate: Gate, route: str) -> None:
        self._gate = gate
        self.route = route

    @abstractmethod
    async def answer(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> Reply:
        """The answer to one request. headers: the request's. Whatever it raises becomes a problem."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gate, asking = self._gate, dict(scope["headers"])
        asked = gate.enter(scope, asking)
        try:
            gate.admit(scope, asked, asking)
            headers, body, status = await self.answer(scope, asking, receive)
        except ClientGoneError:
            gate.leave(scope, asked, route=self.route, status=CLIENT_GONE)
            return
        except asyncio.CancelledError:  # a gRPC call whose deadline passed, or whose client let go of it
            gate.leave(scope, asked, route=self.route, status=CLIENT_GONE)
            raise
        except Exception as error:
            headers, body, status = _refusal(error, scope, asked)
        gate.leave(scope, asked, route=self.route, status=status)
        headers += gate.headers(asked, asking)
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _refusal(error: Exception, scope: Scope, asked: Asked) -> Reply:
    """The answer to whom `error` was raised for.

    On its own: a name for the error in the frame that caught it is a cycle, and keeps the body until Python looks
    for those.
    """
    problem = error if isinstance(error, ProblemError) else problems.unexpected(error)
    asked.problem = problem.kind.name
    if problem is not error:
        asked.error = type(error).__name__
        logger("api").error("request failed", path=scope["path"], exc_info=error)
    headers = [_PROBLEM, *((k.lower().encode(), v.encode()) for k, v in problem.headers.items())]
    return Reply(headers, problem.body(scope["path"], asked.request_id), problem.kind.status)
