"""Keys, the connection, and what to catch: all that every user of the streams shares."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterDownError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.core import codec
from services.core.errors import StreamsError

Kind = Literal["radar", "camera", "labels"]
KINDS: tuple[Kind, ...] = ("radar", "camera", "labels")
INGEST_GROUP = "ingest"
EVENTS = "echosight:events"
EVENTS_MAX_ENTRIES = 2000
DEAD_MAX_ENTRIES = 1000
MIN_SERVER = (7, 0)

ANY_RADAR_KEY = re.compile(rb"echosight:\{(.*)\}:radar", re.DOTALL)
_PASSING = re.compile(r"(?:^|caused error: \W*)(?:MISCONF|NOREPLICAS)\b")

StreamsLost = (
    RedisConnectionError, RedisTimeoutError, OutOfMemoryError, ReadOnlyError,
    ClusterDownError, MasterDownError, TryAgainError,
)  # fmt: skip
"""What to catch to back off and keep state while the server is away, full, read-only or reorganising."""


def stream_key(site: str, kind: str) -> str:
    """The hash tag keeps all streams of a site on one shard of a cluster."""
    return f"echosight:{{{site}}}:{kind}"


def connect(url: str) -> "redis.asyncio.Redis":
    """An asyncio client that keeps bytes as bytes. Nothing is sent yet. Raises StreamsError for a bad URL.

    It never repeats a command by itself: a read that was repeated after a lost answer would skip the entries of
    that answer, and only its caller knows.
    """
    try:
        return redis.asyncio.Redis.from_url(
            url,
            socket_connect_timeout=3.0,
            socket_timeout=15.0,
            health_check_interval=30,
            retry=AsyncRetry(NoBackoff(), 0),
        )
    except ValueError as error:
        raise bad_url(url, error) from None


def bad_url(url: str, error: ValueError) -> StreamsError:
    return StreamsError(f"REDIS_URL is {url!r}: {error}", remedy="use redis://host:port/db")


async def check_server(client: "redis.asyncio.Redis") -> str:
    """The server's version. Raises StreamsError if it is older than 7.0."""
    info = await client.info("server")
    version = str(info["redis_version"])
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_SERVER:
        raise StreamsError(
            f"server is version {version}",
            remedy="use 7.0 or newer: older ones never clear trimmed entries from the pending list",
        )
    return version


async def wait_for_server(client: "redis.asyncio.Redis", *, timeout_s: float) -> str:
    """Wait until the server answers; return its version. Raises StreamsError after `timeout_s`."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while True:
        try:
            return await check_server(client)
        except RedisError as error:
            if asyncio.get_running_loop().time() > deadline:
                raise StreamsError(
                    f"no Redis-compatible server answered within {timeout_s:.0f} s: {error}",
                    remedy="start one, or point REDIS_URL at it",
                ) from None
        await asyncio.sleep(0.2)


@asynccontextmanager
async def passing_as_lost() -> AsyncIterator[None]:
    """Raise refusals that pass by themselves (disk of the server full, replicas away) as one of StreamsLost."""
    try:
        yield
    except ResponseError as error:
        if _PASSING.search(str(error)):
            raise RedisConnectionError(str(error)) from error
        raise


def entries_by_key(reply: Any) -> list[tuple[bytes, list[tuple[bytes, codec.Entry | None]]]]:
    """XREADGROUP's reply as a list of (key, entries), whichever protocol the connection speaks."""
    if not reply:
        return []
    if isinstance(reply, dict):
        return [(key, [entry for page in pages for entry in page]) for key, pages in reply.items()]
    return [(key, entries) for key, entries in reply]
