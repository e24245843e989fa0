"""Reads a request's body: never more of it than is allowed, never longer than is allowed, whatever it claims.

gzip and deflate are undone up to the same limit. It does not know what a body means.
"""

import asyncio
import zlib
from collections.abc import Mapping

from starlette.types import Receive, Scope

from api import problems
from api.asked import is_whole
from api.problems import ProblemError
from api.settings import ApiSettings

_ENCODINGS = (b"gzip", b"deflate")
_ANY_ZLIB_HEADER = 47
"""zlib's wbits for a stream of either sort, of any window."""


class ClientGoneError(Exception):
    """The client went away before its body was there: nobody is left to answer."""


class BodyReader:
    """The limits of one server."""

    def __init__(self, settings: ApiSettings) -> None:
        self._max_body_bytes = settings.max_body_bytes
        self._body_timeout_s = settings.body_timeout_s
        self.allowed_origins = settings.origins

    async def read(self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        """The whole body, uncompressed. headers: by their names in lower case.

        Refuses by the headers alone what need not be read, and a chunked body as soon as it is too long.
        Raises ProblemError, ClientGoneError.
        """
        encoding = headers.get(b"content-encoding", b"").lower()
        if encoding not in (b"", b"identity", *_ENCODINGS):
            raise ProblemError(
                problems.WRONG_MEDIA_TYPE,
                f"content encoding is {encoding[:40].decode('latin-1')!r}",
                remedy="send the body as it is, or compressed with gzip or deflate",
            )
        self._check_length(int(headers.get(b"content-length", 0)))  # the HTTP parser lets digits through only
        chunks: list[bytes] = []
        if is_whole(scope):  # a timer costs more than to read it
            body = await self._receive(receive, chunks)
        else:
            body = await self._receive_in_time(receive, chunks)
        return await asyncio.to_thread(self._inflate, body) if encoding in _ENCODINGS else body

    def _check_length(self, num_bytes: int) -> None:
        if num_bytes > self._max_body_bytes:
            raise ProblemError(
                problems.TOO_LARGE,
                f"body has {num_bytes} bytes or more",
                remedy=f"send at most {self._max_body_bytes}: fewer frames a request, or float16",
            )

    async def _receive(self, receive: Receive, chunks: list[bytes]) -> bytes:
        """chunks: gets what comes, as it comes."""
        num_bytes = 0
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

    async def _receive_in_time(self, receive: Receive, chunks: list[bytes]) -> bytes:
        try:
            async with asyncio.timeout(self._body_timeout_s):
                return await self._receive(receive, chunks)
        except TimeoutError:
            num_bytes = sum(map(len, chunks))
            raise ProblemError(
                problems.SLOW_BODY,
                f"{num_bytes} bytes of the body came within {self._body_timeout_s:g} s",
                remedy="send it faster or in smaller requests",
                headers={"connection": "close"},
            ) from None

    def _inflate(self, body: bytes) -> bytes:
        """Never more than the limit, however much a small body would become."""
        unzip = zlib.decompressobj(_ANY_ZLIB_HEADER)
        try:
            whole = unzip.decompress(body, self._max_body_bytes + 1)
        except zlib.error as error:
            raise ProblemError(
                problems.UNREADABLE_BODY, f"compressed body is damaged: {error}", remedy="compress it anew"
            ) from None
        self._check_length(len(whole))
        if not unzip.eof or unzip.unused_data:
            state = "has bytes left over" if unzip.eof else "is truncated"
            raise ProblemError(
                problems.UNREADABLE_BODY, f"compressed body {state}", remedy="send one whole gzip or zlib stream"
            )
        return whole
