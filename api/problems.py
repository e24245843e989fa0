"""Every answer that is not the wished one: RFC 9457 problems that name the value and the remedy.

{"type": "urn:echosight:problem:wrong-shape", "title": ..., "status": 422,
 "detail": "heatmap shape is (2, 64, 64)", "remedy": "send (2, 128, 64)", "instance": "/v1/classify",
 "request_id": "9c1e07aa12-5f"}

Below /v2 there is one member more, "error", with detail and remedy in one sentence: the one that clients of the
Open Inference Protocol read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from api.asked import asked_of
from services.core.errors import EchosightError
from services.core.logs import logger

MEDIA_TYPE = "application/problem+json"


@dataclass(frozen=True, slots=True)
class Kind:
    """What one sort of problem has in common. name: the end of its type URI."""

    name: str
    status: int
    title: str


UNREADABLE_BODY = Kind("unreadable-body", 400, "The body cannot be read")
NOT_HTTP = Kind("not-http", 400, "This is no HTTP")
NO_KEY = Kind("no-key", 401, "This needs an API key")
FOREIGN_ORIGIN = Kind("foreign-origin", 403, "Pages of other sites may not do this")
MISSING_SCOPE = Kind("missing-scope", 403, "The API key may not do this")
NOT_FOUND = Kind("not-found", 404, "There is nothing here")
NO_SUCH_MODEL = Kind("no-such-model", 404, "There is no such model or version")
NOT_LOADED = Kind("not-loaded", 404, "This version is not loaded")
WRONG_METHOD = Kind("wrong-method", 405, "This method does not work here")
SLOW_BODY = Kind("slow-body", 408, "The body did not arrive in time")
CONFLICT = Kind("conflict", 409, "The registry does not allow this")
TOO_LARGE = Kind("too-large", 413, "The body is too large")
WRONG_MEDIA_TYPE = Kind("wrong-media-type", 415, "This kind of body is not understood")
UNKNOWN_HOST = Kind("unknown-host", 421, "The server does not go by this name")
WRONG_SHAPE = Kind("wrong-shape", 422, "The heatmap has the wrong shape")
WRONG_DTYPE = Kind("wrong-dtype", 422, "The heatmap has the wrong element type")
NOT_FINITE = Kind("not-finite", 422, "The heatmap has values that are no numbers")
OUT_OF_RANGE = Kind("out-of-range", 422, "The heatmap has values beyond any radar's")
BAD_SITE = Kind("bad-site", 422, "This is no name of a site")
BAD_REQUEST_VALUE = Kind("bad-value", 422, "A value of the request is wrong")
NO_WEBSOCKET = Kind("no-websocket", 426, "This is a WebSocket")
OVERLOADED = Kind("overloaded", 429, "More is asked than the model can answer")
RATE_LIMITED = Kind("rate-limited", 429, "This caller asks too often")
INTERNAL = Kind("internal", 500, "The server failed")
NOT_READY = Kind("not-ready", 503, "No model is live yet")
STARTING = Kind("starting", 503, "The server is starting")
NO_STREAMS = Kind("no-streams", 503, "The streams' server cannot be reached")
TOO_MANY_CLIENTS = Kind("too-many-clients", 503, "Too many clients listen already")
TOO_MANY_CONNECTIONS = Kind("too-many-connections", 503, "The server has no connection left")
TOO_LATE = Kind("too-late", 504, "No answer before the deadline")

KINDS = (
    UNREADABLE_BODY,
    NOT_HTTP,
    NO_KEY,
    FOREIGN_ORIGIN,
    MISSING_SCOPE,
    NOT_FOUND,
    NO_SUCH_MODEL,
    NOT_LOADED,
    WRONG_METHOD,
    SLOW_BODY,
    CONFLICT,
    TOO_LARGE,
    WRONG_MEDIA_TYPE,
    UNKNOWN_HOST,
    WRONG_SHAPE,
    WRONG_DTYPE,
    NOT_FINITE,
    OUT_OF_RANGE,
    BAD_SITE,
    BAD_REQUEST_VALUE,
    NO_WEBSOCKET,
    OVERLOADED,
    RATE_LIMITED,
    INTERNAL,
    NOT_READY,
    STARTING,
    NO_STREAMS,
    TOO_MANY_CLIENTS,
    TOO_MANY_CONNECTIONS,
    TOO_LATE,
)


class ProblemError(EchosightError):
    """What a handler raises to answer with a problem. what: names the offending value."""

    def __init__(self, kind: Kind, what: str, *, remedy: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(what, remedy=remedy)
        self.kind = kind
        self.headers = dict(headers or {})

    def body(self, instance: str, request_id: str) -> bytes:
        """The JSON of RFC 9457, section 3. instance: the path that was asked."""
        return orjson.dumps(self.members(instance, request_id))

    def members(self, instance: str, request_id: str) -> dict[str, Any]:
        """The members of that JSON. request_id: as the log has it."""
        members = {
            "type": f"urn:echosight:problem:{self.kind.name}",
            "title": self.kind.title,
            "status": self.kind.status,
            "detail": self.what,
            "remedy": self.remedy,
            "instance": instance,
            "request_id": request_id,
        }
        return members | {"error": str(self)} if instance.startswith("/v2") else members


def response(error: ProblemError, scope: Scope) -> Response:
    """The answer to the request, or the handshake, behind a scope."""
    asked = asked_of(scope)
    asked.problem = error.kind.name
    return Response(error.body(scope["path"], asked.request_id), error.kind.status, error.headers, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Make every error of `app` a problem, those of the framework too."""
    app.add_exception_handler(ProblemError, _answer_problem)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(EchosightError, _answer_internal)
    app.add_exception_handler(Exception, _answer_internal)


def unexpected(error: Exception) -> ProblemError:
    """The problem for an error that nobody foresaw: an EchosightError says what it is, others stay inside."""
    if isinstance(error, EchosightError):
        return ProblemError(INTERNAL, error.what, remedy=error.remedy or "see the log of the API")
    return ProblemError(INTERNAL, f"{type(error).__name__} while answering", remedy="see the log of the API")


async def _answer_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, ProblemError)
    return response(error, request.scope)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    headers = error.headers
    if error.status_code == NOT_FOUND.status:
        problem = ProblemError(NOT_FOUND, f"path is {path[:200]!r}", remedy="GET / lists what is here")
    elif error.status_code == WRONG_METHOD.status:
        allowed = (headers or {}).get("Allow", "another one")
        problem = ProblemError(
            WRONG_METHOD, f"method is {request.method}", remedy=f"use {allowed}", headers=headers
        )
    else:
        kind = Kind("http", error.status_code, HTTPStatus(error.status_code).phrase)
        problem = ProblemError(kind, str(error.detail), remedy="see /openapi.json", headers=headers)
    return response(problem, request.scope)


async def _answer_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    what = f"{where} is {str(first.get('input'))[:80]!r}: {first['msg']}"
    return response(ProblemError(BAD_REQUEST_VALUE, what, remedy="see /openapi.json"), request.scope)


async def _answer_internal(request: Request, error: Exception) -> Response:
    logger("api").error("request failed", path=request.url.path, exc_info=error)
    asked_of(request.scope).error = type(error).__name__
    return response(unexpected(error), request.scope)
