"""Which pages of other servers may ask this one from a browser (CORS, as the Fetch standard has it): none, or
those that the settings list. There are no cookies here: a page sends an API key or nothing."""

from collections.abc import Mapping

from starlette.types import Scope

from api.problems import FOREIGN_ORIGIN, ProblemError

Headers = list[tuple[bytes, bytes]]

_VARY = (b"vary", b"origin")
_EXPOSED = b"x-request-id, x-model-version, inference-header-content-length, retry-after, www-authenticate"
_METHODS = b"GET, POST"
_SENT = (
    b"authorization, x-api-key, content-type, content-encoding, accept, x-shape, x-dtype, x-timeout-ms, "
    b"inference-header-content-length, last-event-id, x-request-id, traceparent, tracestate"
)
_MAX_AGE_S = b"600"


class Origins:
    """allowed: as browsers send them, in lower case."""

    def __init__(self, allowed: frozenset[bytes]) -> None:
        self._allowed = allowed

    def preflight(self, scope: Scope, headers: Mapping[bytes, bytes]) -> Headers | None:
        """What a browser is told that asks whether it may ask; None if it may not, or asks no such thing."""
        if scope["method"] != "OPTIONS" or b"access-control-request-method" not in headers:
            return None
        if headers.get(b"origin", b"").lower() not in self._allowed:
            return None
        return [
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-allow-headers", _SENT),
            (b"access-control-max-age", _MAX_AGE_S),
        ]

    def headers(self, asking: Mapping[bytes, bytes]) -> Headers:
        """What lets a browser give the answer to the page that asked. asking: the request's headers."""
        if not self._allowed:
            return []
        origin = asking.get(b"origin", b"")
        if origin.lower() not in self._allowed:
            return [_VARY]
        return [_VARY, (b"access-control-allow-origin", origin), (b"access-control-expose-headers", _EXPOSED)]


def check_origin(headers: Mapping[bytes, bytes], allowed: frozenset[bytes]) -> None:
    """Raises ProblemError for what a browser sends on behalf of a page of another server that is not allowed."""
    origin, host = headers.get(b"origin"), headers.get(b"host", b"")
    if origin is None or origin.lower() in allowed:
        return
    if origin.partition(b"://")[2].lower() != host.lower():
        raise ProblemError(
            FOREIGN_ORIGIN,
            f"origin is {origin[:80].decode('latin-1')!r}, this is {host[:80].decode('latin-1')!r}",
            remedy="ask from a page of this server or without a browser, or list it in ECHOSIGHT_ALLOWED_ORIGINS",
        )
