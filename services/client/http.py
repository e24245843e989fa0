"""One connection that stays open, and tries again where that can help. It does not know what is asked."""

import http.client
import json
import math
import re
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from services.client.errors import ClientError, RefusedError, UnreachableError, error_from

BUSY = (429, 503)
MAX_RETRY_AFTER_S = 30.0
_FIRST_PAUSE_S = 0.25


class Connection:
    """To one server. For one thread at a time."""

    def __init__(self, url: str, *, timeout_s: float, retries: int, api_key: str = "") -> None:
        """Nothing is sent yet. api_key: sent with every request, "" for none.

        Raises UnreachableError for what is no URL of HTTP, RefusedError for what cannot be a key.
        """
        if not re.fullmatch(r"[!-~]*", api_key):  # the key itself is not for messages
            raise RefusedError(
                "the API key has spaces or characters beyond ASCII", remedy="give it as it was printed"
            )
        parts = urlsplit(url if "//" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise UnreachableError(f"URL is {url!r}", remedy="use http://host:port")
        self.url = url
        self.scheme, self.host, self.port = parts.scheme, parts.hostname, port
        self.prefix = parts.path.rstrip("/")
        self.timeout_s = timeout_s
        self._api_key = api_key
        self.headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._retries = retries
        kind = http.client.HTTPSConnection if self.scheme == "https" else http.client.HTTPConnection
        self._http = kind(self.host, port, timeout=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def ask(
        self, method: str, path: str, *, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """The good answer and its body. What is asked may arrive twice: ask for nothing that must not.

        Busy servers are asked again after their Retry-After, a closed connection is opened again.
        Raises ClientError.
        """
        for attempt in range(self._retries + 1):
            try:
                response, content = self._once(method, path, body, self.headers | dict(headers or {}))
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if attempt == self._retries:
                    raise UnreachableError(
                        f"no answer from {self.url}: {error or type(error).__name__}",
                        remedy="start the server (`echosight serve`), or name another",
                    ) from None
                if not isinstance(error, http.client.RemoteDisconnected | ConnectionResetError | BrokenPipeError):
                    time.sleep(pause_s(attempt, None))  # the server is away: there is nothing to wait on
                continue
            if response.status < 400:
                return response, content
            if response.status not in BUSY or attempt == self._retries:
                raise error_from(response.status, read_json(content, or_else=None))
            time.sleep(pause_s(attempt, response.headers.get("retry-after")))  # as the server asked
        raise AssertionError("the last attempt returns or raises")

    def another(self) -> "Connection":
        """One more to the same server."""
        return Connection(self.url, timeout_s=self.timeout_s, retries=self._retries, api_key=self._api_key)

    def listen(self, path: str) -> http.client.HTTPResponse:
        """The good answer to GET, whose body is still to come, as long as this connection is open.

        Raises ClientError; it is not tried again.
        """
        try:
            self._http.request("GET", self.prefix + path, headers=self.headers)
            response = self._http.getresponse()
            problem = response.read() if response.status >= 400 else b""
        except (OSError, http.client.HTTPException) as error:
            raise UnreachableError(
                f"no answer from {self.url}: {error or type(error).__name__}",
                remedy="start the server (`echosight serve`), or name another",
            ) from None
        if response.status >= 400:
            raise error_from(response.status, read_json(problem, or_else=None))
        return response

    def _once(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        self._http.request(method, self.prefix + path, body=body, headers=headers)
        response = self._http.getresponse()
        return response, response.read()


def pause_s(attempt: int, retry_after: str | None) -> float:
    """How long to wait before the next try, seconds: as the server says, else twice as long each time."""
    try:
        asked_s = float(retry_after or "nan")
    except ValueError:  # a date: as good as nothing, for clocks differ
        asked_s = math.nan
    return min(_FIRST_PAUSE_S * 2.0**attempt if math.isnan(asked_s) else max(asked_s, 0.0), MAX_RETRY_AFTER_S)


def read_json(content: bytes, *, or_else: Any = ClientError) -> Any:
    """The JSON of an answer. Raises UnreachableError if it is none and nothing else was wished for."""
    try:
        return json.loads(content)
    except ValueError:
        if or_else is not ClientError:
            return or_else
        raise UnreachableError(
            f"the answer starts with {content[:40]!r}", remedy="is this the address of an Echosight API?"
        ) from None
