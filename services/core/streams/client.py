"""Keys, the connection, and what to catch: all that every user of the streams shares.

It speaks to one server and to a Redis Cluster. It does not know what the streams hold.
"""

import asyncio
import os
import re
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Literal
from urllib.parse import urlsplit

import redis
import redis.asyncio
import redis.asyncio.cluster
import redis.cluster
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    ClusterCrossSlotError,
    ClusterDownError,
    ClusterError,
    MasterDownError,
    MovedError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    SlotNotCoveredError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from services.core import codec
from services.core.errors import BadFrameError, StreamsError
from services.core.frames import check_site

Client = redis.asyncio.Redis | redis.asyncio.RedisCluster
SyncClient = redis.Redis | redis.RedisCluster
Kind = Literal["radar", "camera", "labels"]
KINDS: tuple[Kind, ...] = ("radar", "camera", "labels")
INGEST_GROUP = "ingest"
EVENTS = "echosight:events"
EVENTS_MAX_ENTRIES = 2000
DEAD_MAX_ENTRIES = 1000
PREDICTIONS_MAX_ENTRIES = 1000
PREDICTIONS_MAX_BYTES = 4 * 1024**2
MIN_SERVER = (7, 0)

_ANY_KEY = re.compile(rb"echosight:\{(.*)\}:[a-z]+", re.DOTALL)
_CLUSTER_URL = re.compile(r"(rediss?)\+cluster://(.*@)?([^/?@]+)(.*)")
_PASSING = re.compile(r"(?:^|caused error: \W*)(?:BUSY|MISCONF|NOREPLICAS|UNBLOCKED)\b")

StreamsLost = (
    RedisConnectionError, RedisTimeoutError, OutOfMemoryError, ReadOnlyError,
    ClusterDownError, MasterDownError, TryAgainError, ClusterError, SlotNotCoveredError,
)  # fmt: skip
"""What to catch to back off and keep state while the server is away, full, read-only or reorganising."""

Command = tuple[str, tuple[Any, ...]]
"""A key, which says whose shard the command is for, and the command's words."""


def stream_key(site: str, kind: str) -> str:
    """The hash tag keeps all streams of a site on one shard of a cluster."""
    return f"echosight:{{{site}}}:{kind}"


async def sites_with(client: Client, kind: str) -> tuple[set[str], dict[str, str]]:
    """The sites that have a stream of this kind; and keys that look like one, with what is wrong with them."""
    sites, refused = set(), {}
    async for key in client.scan_iter(match=f"echosight:{{*}}:{kind}", count=1000):
        found = _ANY_KEY.fullmatch(key)
        try:
            sites.add(check_site(found[1].decode(errors="backslashreplace") if found else ""))
        except BadFrameError as error:
            refused[key.decode(errors="backslashreplace")] = str(error)
    keys = {stream_key(site, kind): site for site in sites}
    for key, what in (await _of_other_type(client, dict.fromkeys(keys, "stream"))).items():
        sites.remove(keys[key])
        refused[keys[key]] = str(_named({key: what}))
    return sites, refused


def process_name(name: str) -> str:
    """`name`, told apart from any other process that has it, also on the same machine."""
    return f"{name}#{os.getpid()}-{secrets.token_hex(4)}"


def connect(url: str) -> Client:
    """An asyncio client that keeps bytes as bytes. Nothing is sent yet. Raises StreamsError for a bad URL.

    redis://host:port/db is one server, redis+cluster://host:port,host:port a cluster, found through any of the
    nodes named; rediss:// and rediss+cluster:// speak TLS. It never repeats a command by itself: a read that was
    repeated after a lost answer would skip the entries of that answer, and only its caller knows.
    """
    first, others = _nodes(url)
    options: dict[str, Any] = {
        "socket_connect_timeout": 3.0,
        "socket_timeout": 15.0,
        "health_check_interval": 30,
        "retry": AsyncRetry(NoBackoff(), 0),
    }
    if others is None:
        return redis.asyncio.Redis.from_url(first, **options)
    nodes = [redis.asyncio.cluster.ClusterNode(host, port) for host, port in others]
    return redis.asyncio.RedisCluster.from_url(first, startup_nodes=nodes, **options)


def connect_sync(url: str, *, timeout_s: float) -> SyncClient:
    """As `connect`, for threads and commands. Of a cluster it asks the nodes at once.

    Raises StreamsError for a bad URL, StreamsLost errors while no node of a cluster answers.
    """
    first, others = _nodes(url)
    options: dict[str, Any] = {"socket_connect_timeout": timeout_s / 2, "socket_timeout": timeout_s}
    if others is None:
        return redis.Redis.from_url(first, retry=Retry(NoBackoff(), 0), **options)
    nodes = [redis.cluster.ClusterNode(host, port) for host, port in others]  # type: ignore[no-untyped-call]
    try:
        with translated():
            return redis.RedisCluster(url=first, startup_nodes=nodes, retry=Retry(NoBackoff(), 0), **options)
    except BaseException:
        for node in nodes:  # the client, which would close them, did not come to be
            if node.redis_connection is not None:
                node.redis_connection.connection_pool.disconnect()
        raise


def disconnect_sync(client: SyncClient) -> None:
    """Close all connections of `client`; that of a cluster leaves its nodes' open by itself."""
    if isinstance(client, redis.RedisCluster):
        client.disconnect_connection_pools()  # type: ignore[no-untyped-call]
    client.close()


def check_url(url: str) -> str:
    """Return `url` if it can be one of a server or a cluster. Raises StreamsError; a password is never shown."""
    _nodes(url)
    return url


def _nodes(url: str) -> tuple[str, list[tuple[str, int]] | None]:
    """The address of one server, or that of a cluster's first node and (host, port) of the other nodes named."""
    try:
        found = _CLUSTER_URL.fullmatch(url)
        if found is None:
            parse_url(url)
            return url, None
        scheme, user, hosts, tail = found.groups(default="")
        first, *others = hosts.split(",")
        database = parse_url(f"{scheme}://{user}{first}{tail}").get("db", 0)
        if database:
            raise ValueError(f"a cluster has no database {database}")
        parts = [urlsplit(f"//{other}") for other in others]
        return f"{scheme}://{user}{first}{tail}", [(part.hostname or "", part.port or 6379) for part in parts]
    except ValueError as error:
        # The reason quotes what it took for a port: a piece of the password, where that was not escaped.
        reason = "user and password must be percent-encoded" if "@" in url else error
        raise StreamsError(
            f"REDIS_URL is {masked(url)!r}: {reason}",
            remedy="use redis://host:port/db, or redis+cluster://host:port,host:port for a cluster",
        ) from None


def masked(url: str) -> str:
    """`url` as it may be shown: without user and password."""
    return re.sub(r"(password=)[^&]*", r"\1***", re.sub(r"//.*@", "//***@", url, flags=re.DOTALL))


async def check_server(client: Client) -> str:
    """The server's version. Raises StreamsError if it is older than 7.0, or part of a cluster and not meant so."""
    async with passing_as_lost():
        info = await client.info("server")
    version = str(info["redis_version"])
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_SERVER:
        raise StreamsError(
            f"server is version {version}",
            remedy="use 7.0 or newer: older ones never clear trimmed entries from the pending list",
        )
    mode = info.get("server_mode", info.get("redis_mode"))
    if mode == "cluster" and not isinstance(client, redis.asyncio.RedisCluster):
        raise _is_cluster()
    return version


async def wait_for_server(client: Client, *, timeout_s: float) -> str:
    """Wait until the server answers; return its version. Raises StreamsError after `timeout_s`."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while True:
        try:
            return await check_server(client)
        except (RedisError, SlotNotCoveredError) as error:
            if asyncio.get_running_loop().time() > deadline:
                raise StreamsError(
                    f"no Redis-compatible server answered within {timeout_s:.0f} s: {error}",
                    remedy="start one, or point REDIS_URL at it",
                ) from None
        await asyncio.sleep(0.2)


async def send_all(client: Client, commands: Sequence[Command]) -> list[Any]:
    """Results of `commands` in their order, in one round trip to each server. Raises StreamsLost errors.

    Any other error stands in its command's place: the others were carried out.
    """
    if not commands:
        return []
    pipeline = client.pipeline(transaction=False)
    try:
        if isinstance(client, redis.asyncio.RedisCluster):
            await client.initialize()
            for key, words in commands:  # the client would ask a server where the key of some commands stands
                pipeline.execute_command(*words, target_nodes=client.get_node_from_key(key))
        else:
            for _, words in commands:
                pipeline.execute_command(*words)
        results = await pipeline.execute(raise_on_error=False)
        for result in results:
            if isinstance(result, StreamsLost) or (
                isinstance(result, ResponseError) and _PASSING.search(str(result))
            ):
                raise result
            if isinstance(result, MovedError | AskError | ClusterCrossSlotError):
                raise result
    except (*StreamsLost, RedisClusterException):
        await _look_around(client)
        raise
    return list(results)


async def disconnect(client: Client) -> None:
    """Close all connections of `client`; after an error, that of a cluster leaves some open by itself."""
    await client.aclose()
    if isinstance(client, redis.asyncio.RedisCluster):
        await client.nodes_manager.aclose()
        await client.nodes_manager.aclose("startup_nodes")


async def _look_around(client: Client) -> None:
    """Learn anew which node of a cluster has what: a pipeline does not do that by itself, and one may be gone."""
    if isinstance(client, redis.asyncio.RedisCluster):
        with suppress(RedisError, RedisClusterException, OSError):
            await client.nodes_manager.initialize()


async def explained(client: Client, error: ResponseError, wanted: Mapping[str, str]) -> Exception:
    """What to raise for a refusal. wanted: the keys that it may be about, and the types that they should have."""
    return (await wrong_types(client, wanted) or error) if "WRONGTYPE" in str(error) else error


async def wrong_types(client: Client, wanted: Mapping[str, str]) -> StreamsError | None:
    """What names those of the keys that hold another type than wanted; None where none does."""
    wrong = await _of_other_type(client, wanted)
    return _named(wrong) if wrong else None


async def _of_other_type(client: Client, wanted: Mapping[str, str]) -> dict[str, str]:
    """The keys that hold another type than wanted, with what is wrong; not those that we may not ask for."""
    found = await send_all(client, [(key, ("TYPE", key)) for key in wanted])
    held = {key: kind.decode() for key, kind in zip(wanted, found, strict=True) if isinstance(kind, bytes)}
    return {
        key: f"{key} is a {kind}, expected a {wanted[key]}"
        for key, kind in held.items()
        if kind not in ("none", wanted[key])
    }


def _named(wrong: Mapping[str, str]) -> StreamsError:
    return StreamsError(
        " and ".join(wrong.values()), remedy=f"delete it: redis-cli DEL {' '.join(repr(key) for key in wrong)}"
    )


@asynccontextmanager
async def passing_as_lost() -> AsyncIterator[None]:
    """Raise refusals that pass by themselves (disk of the server full, replicas away) as one of StreamsLost."""
    with translated():
        yield


@contextmanager
def translated() -> Iterator[None]:
    """As `passing_as_lost`, without asyncio. A server of another kind than the URL says raises StreamsError."""
    try:
        yield
    except (MovedError, AskError, ClusterCrossSlotError):
        raise _is_cluster() from None
    except ResponseError as error:
        if not isinstance(error, StreamsLost) and _PASSING.search(str(error)):
            raise RedisConnectionError(str(error)) from error
        raise
    except SlotNotCoveredError:
        raise
    except RedisClusterException as error:
        if "Cluster mode is not enabled" in str(error):
            raise StreamsError(
                "the server that REDIS_URL names is no cluster", remedy="write redis://host:port/db"
            ) from None
        if "cannot be connected" in str(error) or "not covered" in str(error):
            raise RedisConnectionError(str(error)) from error
        raise


def _is_cluster() -> StreamsError:
    return StreamsError(
        "the server that REDIS_URL names is a node of a cluster", remedy="write redis+cluster://host:port"
    )


def entries_by_key(reply: Any) -> list[tuple[bytes, list[tuple[bytes, codec.Entry | None]]]]:
    """XREADGROUP's reply as a list of (key, entries), whichever protocol the connection speaks."""
    if not reply:
        return []
    if isinstance(reply, dict):
        return [(key, [entry for page in pages for entry in page]) for key, pages in reply.items()]
    return [(key, entries) for key, entries in reply]
