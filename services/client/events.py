"""What a server tells as it happens: server-sent events, as JSON objects."""

import http.client
import json
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from services.client.errors import StreamClosedError
from services.client.http import Connection


class EventStream:
    """Iterate over it: each event's object, whose member `kind` says what it is about. For one thread."""

    def __init__(self, connection: Connection, path: str) -> None:
        """Raises ClientError if the server refuses or nobody answers. It closes `connection` in the end."""
        self._connection = connection
        try:
            self._response = connection.listen(path)
        except BaseException:
            connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Waits for what comes next. Raises StreamClosedError when the server ends it, or is gone."""
        kind, data = "", ""
        while True:
            line = self._line()
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "event":
                kind = value
            elif name == "data":
                data += value
            elif not line and data:
                if kind == "too_slow":
                    raise StreamClosedError("events were read too slowly", remedy="ask for fewer kinds, or sites")
                yield _object(data)
                kind, data = "", ""

    def close(self) -> None:
        self._connection.close()
        self._response.close()

    def _line(self) -> str:
        try:
            line = self._response.readline()
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: closed by another thread
            raise StreamClosedError(f"the events are broken off: {error}", remedy="ask again") from None
        if not line:
            raise StreamClosedError("the server has ended the events", remedy="ask again")
        return line.decode(errors="replace").rstrip("\r\n")


def _object(data: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise StreamClosedError(f"an event is {data[:40]!r}", remedy="is this the address of an Echosight API?")
    return found
