"""A plain ASGI endpoint, for the hot routes: FastAPI's layers and pydantic cost more than a small model does.

It answers its own problems and counts its own answers. Its OpenAPI operation is written out in `api.operations`.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from starlette.types import Receive, Scope, Send

from api import problems
from api.metrics import Metrics
from api.problems import ProblemError
from api.reading import ClientGoneError
from services.core.logs import logger

Headers = list[tuple[bytes, bytes]]

JSON = (b"content-type", b"application/json")
_PROBLEM = (b"content-type", problems.MEDIA_TYPE.encode())


class Reply(NamedTuple):
    """A whole answer. headers: all but content-length."""

    headers: Headers
    body: bytes
    status: int = 200


class Endpoint(ABC):
    """What a hot route derives from."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    @abstractmethod
    async def answer(self, scope: Scope, receive: Receive) -> Reply:
        """The answer to one request. Whatever it raises becomes a problem."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers, body, status = await self.answer(scope, receive)
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
