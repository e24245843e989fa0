"""Small JSON events for people and dashboards. It does not know what they are about."""

import socket
import time
from collections.abc import Iterable
from typing import Any, cast

import orjson
from redis.exceptions import RedisClusterException, RedisError

from services.core import codec
from services.core.errors import StreamsError
from services.core.streams.client import (
    EVENTS,
    EVENTS_MAX_ENTRIES,
    Client,
    SyncClient,
    check_url,
    connect_sync,
    disconnect_sync,
    entries_by_key,
    passing_as_lost,
    translated,
)


class EventLog:
    """Small JSON events for people and dashboards, capped, best effort: a lost server never stops a worker."""

    def __init__(self, url: str, *, source: str) -> None:
        """Nothing is sent yet. Raises StreamsError for a bad URL."""
        self._url = check_url(url)
        self._source = source
        self._host = socket.gethostname()
        self._connected: SyncClient | None = None

    @property
    def _client(self) -> SyncClient:
        """Made when first needed: the client of a cluster asks its nodes at once."""
        if self._connected is None:
            self._connected = connect_sync(self._url, timeout_s=2.0)
        return self._connected

    def emit(self, kind: str, **values: Any) -> bool:
        """Publish one event; False when the server did not take it."""
        event = {"source": self._source, "kind": kind, "host": self._host, "at_s": round(time.time(), 3), **values}
        body = orjson.dumps(event, option=orjson.OPT_SERIALIZE_NUMPY)
        try:
            self._client.xadd(EVENTS, {"event": body}, maxlen=EVENTS_MAX_ENTRIES, approximate=True)
        except (RedisError, RedisClusterException, StreamsError):
            return False
        return True

    def since(self, last_id: str, *, block_ms: int | None = None) -> tuple[str, list[dict[str, Any]]]:
        """Events after `last_id` ("$": from now) and the id to go on from. Raises StreamsLost errors.

        Entries that hold no JSON object are passed over.
        """
        with translated():
            if last_id == "$":
                newest = cast(list[Any], self._client.xrevrange(EVENTS, count=1))
                return (newest[0][0].decode() if newest else "0-0"), []
            reply = self._client.xread({EVENTS: last_id}, count=500, block=block_ms)
        entries = [entry for _, page in entries_by_key(reply) for entry in page]
        return (entries[-1][0].decode() if entries else last_id), _objects(entries)

    def latest(self, count: int = 200) -> list[dict[str, Any]]:
        """The newest events, oldest of them first. Raises StreamsLost errors."""
        with translated():
            return _objects(reversed(cast(list[Any], self._client.xrevrange(EVENTS, count=count))))

    def close(self) -> None:
        if self._connected is not None:
            disconnect_sync(self._connected)


class EventReader:
    """Reads along, for asyncio: events with the ids of their entries, from any place on."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @passing_as_lost()
    async def newest_id(self) -> str:
        """The id after which only what is to come is read. Raises StreamsLost errors."""
        newest: Any = await self._client.xrevrange(EVENTS, count=1)
        return newest[0][0].decode() if newest else "0-0"

    @passing_as_lost()
    async def after(
        self, last_id: str, *, count: int = 500, block_ms: int | None = None
    ) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
        """The id to go on from, and the next events after `last_id` with theirs. Raises StreamsLost errors.

        Entries that hold no JSON object are passed over.
        """
        reply = await self._client.xread({EVENTS: last_id}, count=count, block=block_ms)
        entries = [entry for _, page in entries_by_key(reply) for entry in page]
        events = [
            (entry_id.decode(), event) for entry_id, fields in entries for event in _objects([(entry_id, fields)])
        ]
        return (entries[-1][0].decode() if entries else last_id), events


def _objects(entries: Iterable[tuple[bytes, codec.Entry | None]]) -> list[dict[str, Any]]:
    """The JSON objects among entries of the events stream; anybody can write anything there."""
    events = []
    for _, fields in entries:
        try:
            event = orjson.loads((fields or {}).get(b"event", b""))
        except orjson.JSONDecodeError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events
