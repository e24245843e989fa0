"""What every request passes, the hot ones too: it gets an id, is asked for its key and held to its rate; its
answer gets the headers that keep browsers careful, and is counted, logged and traced.

Pure ASGI, since a layer of a framework costs more than all of this. It does not know what a route does.
"""

import time
from collections.abc import Callable, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from api import problems
from api.access.hosts import Hosts
from api.access.keys import Access
from api.access.origins import Origins
from api.access.rates import Rates
from api.access.tracing import Tracing
from api.asked import REQUEST_ID, Asked, asked_of, peer_of, put_asked, request_id_from
from api.metrics import Metrics
from api.problems import ProblemError
from api.settings import ApiSettings
from services.core.logs import logger

Headers = list[tuple[bytes, bytes]]

CLIENT_GONE = 499
"""Stands in metrics and logs for who did not wait for an answer; it is never sent."""
NO_ROUTE = "none"
"""Of what is answered before a route is looked for, or finds none."""
MAX_LINES_PER_S = 100
_NO_SNIFFING = (b"x-content-type-options", b"nosniff")
_NO_STORE = (b"cache-control", b"no-store")
_CAREFUL: Headers = [
    _NO_SNIFFING,
    _NO_STORE,
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
]
"""For what a browser may show. A page that needs more, as /docs, says so itself."""


class Gate:
    """The gate of one server."""

    def __init__(self, settings: ApiSettings, access: Access, metrics: Metrics, tracing: Tracing | None) -> None:
        self.access = access
        self.metrics = metrics
        self.tracing = tracing
        self._rates = Rates(settings)
        self._origins = Origins(settings.origins)
        self._hosts = Hosts(settings.hosts, is_open=not access.is_on)
        self._logs_all = settings.log_level == "debug"
        self._lines = Lines()

    def enter(self, scope: Scope, headers: Mapping[bytes, bytes]) -> Asked:
        """Everything is known of the request from now on; nothing is decided yet. headers: the request's."""
        key = self.access.key_of(headers)
        asked = Asked(request_id_from(headers.get(REQUEST_ID)), key.name if key else peer_of(scope), key)
        put_asked(scope, asked)
        if self.tracing is not None:
            self.tracing.begin(asked, scope, headers)
        return asked

    def admit(self, scope: Scope, asked: Asked, headers: Mapping[bytes, bytes]) -> None:
        """Raises ProblemError for who may not do this, not here, or not so often. Before the body is read."""
        method = scope.get("method", "GET")  # a WebSocket begins as one
        if self.access.check(asked, headers, method, scope["path"]):
            self._hosts.check(headers)
            self._rates.take(asked.caller, asked.key.requests_per_s if asked.key else None)

    def has_limit(self, headers: Headers) -> bool:
        """Whether a request with these headers counts against a rate."""
        key = self.access.key_of(dict(headers)) if self.access.is_on else None
        return self._rates.applies(key.requests_per_s if key else None)

    def take_message(self, scope: Scope) -> None:
        """Count a message of a WebSocket as a request. Raises ProblemError."""
        asked = asked_of(scope)
        self._rates.take(asked.caller, asked.key.requests_per_s if asked.key else None)

    def is_welcome(self, scope: Scope) -> bool:
        """Whether the key that a long answer or a stream began with is still one."""
        return self.access.is_current(asked_of(scope).key)

    def headers(self, asked: Asked, headers: Mapping[bytes, bytes]) -> Headers:
        """What every answer has. headers: the request's."""
        return [
            _NO_SNIFFING,
            _NO_STORE,
            (REQUEST_ID, asked.request_id.encode()),
            *self._origins.headers(headers),
        ]

    def leave(self, scope: Scope, asked: Asked, *, route: str, status: int) -> None:
        """The answer is known: count it, log it if it is none of the good ones, end its span."""
        method = scope.get("method", "GET")
        elapsed_ns = time.perf_counter_ns() - asked.started_ns
        self.metrics.count_request(route, status, elapsed_ns / 1e9)
        if asked.problem:
            self.metrics.count_problem(asked.problem)
        if asked.error:
            self.metrics.count_exception(asked.error)
        is_good = 200 <= status < 300 or status == 101
        if self._logs_all or (not is_good and self._lines.may_write()):
            log = logger("api").debug if is_good else logger("api").info
            log(
                "answered",
                method=method,
                path=scope["path"][:200].encode("unicode_escape").decode(),  # one line, whatever was sent
                status=status,
                problem=asked.problem,
                caller=asked.caller,
                ms=round(elapsed_ns / 1e6, 3),
                **self._lines.left_out(),
            )
        if self.tracing is not None:
            self.tracing.end(asked, name=f"{method} {route}", route=route, status=status)

    async def http(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """A request of a route that is not hot."""
        headers = dict(scope["headers"])
        asked = self.enter(scope, headers)
        is_open = True

        async def send_on(message: Message) -> None:
            nonlocal is_open
            if message["type"] == "http.response.start":
                is_open = False
                has = {name for name, _ in message["headers"]}
                careful = [header for header in _CAREFUL if header[0] not in has]
                own = [(REQUEST_ID, asked.request_id.encode()), *self._origins.headers(headers)]
                message["headers"] = [*message["headers"], *careful, *own]
                self.leave(scope, asked, route=_route(scope), status=message["status"])
            await send(message)

        answer: ASGIApp = app
        preflight = self._origins.preflight(scope, headers)
        if preflight is not None:
            answer = _Empty(preflight)
        else:
            try:
                self.admit(scope, asked, headers)
            except ProblemError as error:
                answer = problems.response(error, scope)
        try:
            await answer(scope, receive, send_on)
        finally:
            if is_open:
                self.leave(scope, asked, route=_route(scope), status=CLIENT_GONE)

    async def websocket(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """A handshake, and what follows if it is accepted."""
        headers = dict(scope["headers"])
        asked = self.enter(scope, headers)
        is_open = True

        async def send_on(message: Message) -> None:
            nonlocal is_open
            if is_open:
                is_open = False
                kind = message["type"]
                if kind != "websocket.close":
                    message["headers"] = [*message.get("headers", []), (REQUEST_ID, asked.request_id.encode())]
                status = {"websocket.accept": 101, "websocket.close": 403}.get(kind) or message["status"]
                self.leave(scope, asked, route=_route(scope), status=status)
            await send(message)

        try:
            self.admit(scope, asked, headers)
        except ProblemError as error:
            await WebSocket(scope, receive, send_on).send_denial_response(problems.response(error, scope))
            return
        try:
            await app(scope, receive, send_on)
        finally:
            if is_open:
                self.leave(scope, asked, route=_route(scope), status=CLIENT_GONE)


class Lines:
    """How many lines of refused requests the log gets: a flood of them must not fill a disk, nor wait for it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._second = 0
        self._num_written = 0
        self._num_left_out = 0

    def may_write(self) -> bool:
        """Whether one more line may be written in this second."""
        second = int(self._clock())
        if second != self._second:
            self._second, self._num_written = second, 0
        self._num_written += 1
        if self._num_written <= MAX_LINES_PER_S:
            return True
        self._num_left_out += 1
        return False

    def left_out(self) -> dict[str, int]:
        """What the next line says of those that were not written before it."""
        if not self._num_left_out:
            return {}
        num_left_out, self._num_left_out = self._num_left_out, 0
        return {"num_left_out": num_left_out}


class _Empty:
    """An answer of headers alone."""

    def __init__(self, headers: Headers) -> None:
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's
        await send({"type": "http.response.start", "status": 204, "headers": self._headers})
        await send({"type": "http.response.body", "body": b""})


def _route(scope: Scope) -> str:
    """The path of the route that answers, its parameters unfilled: as many as there are routes."""
    route, endpoint = scope.get("route"), scope.get("endpoint")
    if route is not None:  # one of FastAPI's
        return str(route.path)
    if scope["type"] == "websocket" and endpoint is not None:
        return str(scope["path"])
    return getattr(endpoint, "route", NO_ROUTE)
