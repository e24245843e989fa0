"""Handoff 1: Redis streams. The only module that knows redis, and the only one that spells a key.

Producers cap their streams (MAXLEN); the consumer group acknowledges after the caller has stored; what cannot
be decoded is buried in the site's dead-letter stream with its reason. docs/asyncapi.yaml is the contract.
"""

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import orjson
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
from redis.retry import Retry

from services.core import codec
from services.core.errors import BadFrameError, StreamsError
from services.core.frames import CameraFrame, Frame, Label, RadarFrame, check_site

Kind = Literal["radar", "camera", "labels"]
KINDS: tuple[Kind, ...] = ("radar", "camera", "labels")
INGEST_GROUP = "ingest"
EVENTS = "echosight:events"
EVENTS_MAX_ENTRIES = 2000
DEAD_MAX_ENTRIES = 1000
MIN_SERVER = (7, 0)

_ANY_RADAR_KEY = re.compile(rb"echosight:\{(.*)\}:radar", re.DOTALL)
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
        raise _bad_url(url, error) from None


def _bad_url(url: str, error: ValueError) -> StreamsError:
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
async def _passing_as_lost() -> AsyncIterator[None]:
    """Raise refusals that pass by themselves (disk of the server full, replicas away) as one of StreamsLost."""
    try:
        yield
    except ResponseError as error:
        if _PASSING.search(str(error)):
            raise RedisConnectionError(str(error)) from error
        raise


class Publisher:
    """Writes frames to their sites' streams, pipelined, each stream capped."""

    def __init__(self, client: "redis.asyncio.Redis", *, max_entries: int) -> None:
        self._client = client
        self._max_entries = max_entries

    @classmethod
    async def connect(cls, url: str, *, max_entries: int = 2000, timeout_s: float = 30.0) -> Self:
        """A publisher on a server that answers. Raises StreamsError."""
        client = connect(url)
        await wait_for_server(client, timeout_s=timeout_s)
        return cls(client, max_entries=max_entries)

    @_passing_as_lost()
    async def publish(self, frames: Sequence[Frame]) -> None:
        """Append `frames` to their streams in one round trip. Raises BadFrameError before anything is sent."""
        if not frames:
            return
        pipeline = self._client.pipeline(transaction=False)
        for frame in frames:
            key = stream_key(check_site(frame.site), _kind_of(frame))
            entry = cast(dict[Any, Any], codec.encode(frame))
            pipeline.xadd(key, entry, maxlen=self._max_entries, approximate=True)
        await pipeline.execute()

    async def backlog(self, site: str) -> int:
        """Entries of `site` that the ingest group has not acknowledged yet: unread plus pending."""
        return sum([await self._backlog_of(stream_key(site, kind)) for kind in KINDS])

    async def _backlog_of(self, key: str) -> int:
        try:
            groups = await self._client.xinfo_groups(key)
        except ResponseError:  # no such stream: nothing waits
            return 0
        for group in groups:
            if group["name"] == INGEST_GROUP.encode():
                lag = group.get("lag")  # None after deletions: the server cannot tell
                return int(group["pending"]) + int(lag or 0)
        return int(await self._client.xlen(key))

    async def close(self) -> None:
        await self._client.aclose()


def _kind_of(frame: Frame) -> Kind:
    match frame:
        case RadarFrame():
            return "radar"
        case CameraFrame():
            return "camera"
        case Label():
            return "labels"


@dataclass(frozen=True, slots=True)
class Delivery:
    """One stream entry as read: the frame, or why it is none. fields: the raw entry, kept for a burial."""

    site: str
    kind: Kind
    entry_id: bytes
    frame: Frame | BadFrameError
    fields: codec.Entry

    @property
    def key(self) -> str:
        return stream_key(self.site, self.kind)


class Consumer:
    """Reads all sites' streams in one consumer group. It never acknowledges by itself."""

    def __init__(self, client: "redis.asyncio.Redis", *, name: str, sites: Iterable[str] = ()) -> None:
        """sites: the ones to read; none: every site that has a radar stream, looked up by `find_sites`.

        Raises BadFrameError for a name that cannot be one of a site.
        """
        self._client = client
        self._name = name
        self._fixed = tuple(check_site(site) for site in sites)
        self._streams: dict[bytes, tuple[str, Kind]] = {}
        self._fresh: set[bytes] = set()  # streams whose own pending entries were not read again yet
        self._counted_to: dict[bytes, int] = {}  # entries ever added that are read or counted as trimmed
        self._num_read: Counter[bytes] = Counter()  # since then
        self.num_trimmed = 0
        self.refused: dict[str, str] = {}
        """Key or site to why it is not read: what the last `find_sites` and `join` passed over."""

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(sorted({site for site, _ in self._streams.values()}))

    async def discover(self) -> tuple[str, ...]:
        """Join the group on all streams of the sites that are there; return the sites. Cheap to repeat."""
        for site in await self.find_sites():
            await self.join(site)
        return self.sites

    @_passing_as_lost()
    async def find_sites(self) -> tuple[str, ...]:
        """The sites that could be joined: those given, or all that have a radar stream."""
        self.refused = {}
        if self._fixed:
            return tuple(sorted(set(self._fixed)))
        sites = set()
        async for key in self._client.scan_iter(match="echosight:{*}:radar", count=1000, _type="stream"):
            found = _ANY_RADAR_KEY.fullmatch(key)
            site = found[1].decode(errors="backslashreplace") if found else ""
            try:
                sites.add(check_site(site))
            except BadFrameError as error:
                self.refused[key.decode(errors="backslashreplace")] = str(error)
        return tuple(sorted(sites))

    @_passing_as_lost()
    async def join(self, site: str) -> bool:
        """Join the group on all streams of `site`; False, and none of them is read, if a key is no stream."""
        streams: dict[bytes, tuple[str, Kind]] = {stream_key(site, kind).encode(): (site, kind) for kind in KINDS}
        if streams.keys() <= self._streams.keys():
            return True
        try:
            await self._create_groups(streams)
        except ResponseError as error:
            if not str(error).startswith("WRONGTYPE"):
                raise
            self.refused[site] = f"a key of site {site} is no stream; rename what is not Echosight's"
            return False
        for key in streams:
            await self._count_trimmed(key)
        self._streams |= streams
        self._fresh |= streams.keys()
        return True

    async def _create_groups(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            try:
                await self._client.xgroup_create(key, INGEST_GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise

    @_passing_as_lost()
    async def read(self, *, count: int, block_ms: int, skip: Collection[tuple[str, Kind]] = ()) -> list[Delivery]:
        """Up to `count` entries a stream: after a (re)start first those that this consumer never acknowledged.

        Empty when none came within `block_ms`. A group lost to a flush is made anew, from the beginning;
        sites with a key that is no stream any more are left.
        skip: (site, kind) of streams to leave alone this time.
        """
        wanted = {key: ">" for key, stream in self._streams.items() if stream not in skip}
        if not wanted:
            await asyncio.sleep(block_ms / 1e3)
            return []
        try:
            if self._fresh and (pending := await self._read_own_pending(count)):
                return pending
            reply = await self._client.xreadgroup(
                INGEST_GROUP, self._name, cast(dict[Any, Any], wanted), count=count, block=block_ms
            )
        except StreamsLost:
            self._fresh = set(self._streams)  # what was delivered into the void is pending: read it again
            self._recount()
            raise
        except ResponseError as error:
            if not str(error).startswith(("NOGROUP", "WRONGTYPE")):
                raise
            await asyncio.sleep(block_ms / 1e3)  # never spin while someone flushes
            sites = self.sites
            self._streams.clear()
            self._fresh.clear()
            self._recount()
            for site in sites:
                await self.join(site)
            return []
        pages = _pairs(reply)
        self._num_read.update({key: len(entries) for key, entries in pages})
        return [delivery for key, entries in pages for delivery in self._decode(key, entries)]

    async def _read_own_pending(self, count: int) -> list[Delivery]:
        """All own pending entries of the fresh streams, in pages of `count`; the streams are not fresh then.

        The caller acknowledges or holds what it gets, so the cursor advances past what was delivered here.
        """
        deliveries: list[Delivery] = []
        for key in sorted(self._fresh):
            cursor: bytes = b"0"
            while True:
                reply = await self._client.xreadgroup(
                    INGEST_GROUP, self._name, {key: cursor}, count=count, block=None
                )
                entries = [entry for _, page in _pairs(reply) for entry in page]
                if not entries:
                    break
                cursor = entries[-1][0]
                deliveries += self._decode(key, entries)
            self._fresh.discard(key)
        return deliveries

    @_passing_as_lost()
    async def claim_stale(self, *, min_idle_ms: int, count: int, held: set[tuple[str, bytes]]) -> list[Delivery]:
        """Take over entries that another consumer left unacknowledged for `min_idle_ms`.

        held: (key, entry id) of entries that this process itself still works on; they are left alone.
        """
        claimed: list[Delivery] = []
        for key in list(self._streams):
            try:
                reply = await self._client.xautoclaim(
                    key, INGEST_GROUP, self._name, min_idle_time=min_idle_ms, start_id="0-0", count=count
                )
            except ResponseError as error:
                if str(error).startswith(("NOGROUP", "WRONGTYPE")):
                    continue  # read() makes it anew, or leaves the site
                raise
            self.num_trimmed += len(reply[2]) if len(reply) > 2 else 0
            text = key.decode()
            fresh = [(entry_id, fields) for entry_id, fields in reply[1] if (text, entry_id) not in held]
            claimed += self._decode(key, fresh)
        return claimed

    @_passing_as_lost()
    async def acknowledge(self, deliveries: Iterable[Delivery]) -> None:
        """Say that `deliveries` are done with, in one round trip. Only after their pairs are durably stored."""
        by_key: dict[str, list[bytes]] = {}
        for delivery in deliveries:
            by_key.setdefault(delivery.key, []).append(delivery.entry_id)
        if not by_key:
            return
        pipeline = self._client.pipeline(transaction=False)
        for key, entry_ids in by_key.items():
            pipeline.xack(key, INGEST_GROUP, *entry_ids)
        await pipeline.execute()

    @_passing_as_lost()
    async def bury(self, delivery: Delivery, reason: str) -> None:
        """Move an entry to its site's dead letters, with the reason, and acknowledge it: both or neither."""
        pipeline = self._client.pipeline(transaction=True)
        letter: dict[Any, Any] = {
            "reason": reason,
            "stream": delivery.kind,
            "entry_id": delivery.entry_id,
            **{f"field:{name.decode(errors='replace')}": value for name, value in delivery.fields.items()},
        }
        pipeline.xadd(stream_key(delivery.site, "dead"), letter, maxlen=DEAD_MAX_ENTRIES, approximate=True)
        pipeline.xack(delivery.key, INGEST_GROUP, delivery.entry_id)
        await pipeline.execute()

    def _decode(self, key: bytes, entries: Iterable[tuple[bytes, codec.Entry | None]]) -> list[Delivery]:
        site, kind = self._streams[key]
        deliveries = []
        for entry_id, fields in entries:
            frame: Frame | BadFrameError
            if not fields:  # trimmed away while it was pending: nothing is left of it
                self.num_trimmed += 1
                frame = BadFrameError("entry was trimmed before it was read", remedy="raise the stream's cap")
                fields = {}
            else:
                try:
                    frame = codec.decode(site, kind, fields)
                except BadFrameError as error:
                    frame = error
            deliveries.append(Delivery(site, kind, entry_id, frame, fields))
        return deliveries

    @_passing_as_lost()
    async def count_trimmed(self) -> None:
        """Add to `num_trimmed` what the producers' caps trimmed away before anyone had read it."""
        for key in self._streams:
            await self._count_trimmed(key)

    async def _count_trimmed(self, key: bytes) -> None:
        """How far the group has come among all entries ever added, less what was read on the way there."""
        pipeline = self._client.pipeline(transaction=True)
        pipeline.xinfo_stream(key)
        pipeline.xinfo_groups(key)
        try:
            stream, groups = await pipeline.execute()
        except ResponseError:  # flushed, or replaced: read() notices
            return
        for group in groups:
            if group["name"] == INGEST_GROUP.encode():
                num_passed = _num_passed(stream, group)
                if num_passed is None:  # the server cannot tell now; it can once all is read
                    return
                num_missed = num_passed - self._counted_to.get(key, num_passed) - self._num_read[key]
                if key in self._counted_to:
                    self.num_trimmed += max(num_missed, 0)
                self._counted_to[key] = num_passed
                self._num_read[key] = 0

    def _recount(self) -> None:
        """Count anew from here: what was read since the last count is not known for sure."""
        self._counted_to.clear()
        self._num_read.clear()

    async def close(self) -> None:
        await self._client.aclose()


def _num_passed(stream: dict[str, Any], group: dict[str, Any]) -> int | None:
    """How many of the entries ever added lie at or before the group's position; None if the server cannot tell."""
    if group["last-delivered-id"] == stream["last-generated-id"]:
        return int(stream["entries-added"])
    if group["last-delivered-id"] == b"0-0":  # nothing read yet: all that is not there any more was passed by
        return int(stream["entries-added"]) - int(stream["length"])
    num_read = group.get("entries-read")
    return None if num_read is None else int(num_read)


def _pairs(reply: Any) -> list[tuple[bytes, list[tuple[bytes, codec.Entry | None]]]]:
    """XREADGROUP's reply as a list of (key, entries), whichever protocol the connection speaks."""
    if not reply:
        return []
    if isinstance(reply, dict):
        return [(key, [entry for page in pages for entry in page]) for key, pages in reply.items()]
    return [(key, entries) for key, entries in reply]


class EventLog:
    """Small JSON events for people and dashboards, capped, best effort: a lost server never stops a worker."""

    def __init__(self, url: str, *, source: str) -> None:
        """Nothing is sent yet. Raises StreamsError for a bad URL."""
        try:
            self._client = redis.Redis.from_url(
                url, socket_connect_timeout=1.0, socket_timeout=2.0, retry=Retry(NoBackoff(), 0)
            )
        except ValueError as error:
            raise _bad_url(url, error) from None
        self._source = source

    def emit(self, kind: str, **values: Any) -> bool:
        """Publish one event; False when the server did not take it."""
        event = {"source": self._source, "kind": kind, "at_s": round(time.time(), 3), **values}
        body = orjson.dumps(event, option=orjson.OPT_SERIALIZE_NUMPY)
        try:
            self._client.xadd(EVENTS, {"event": body}, maxlen=EVENTS_MAX_ENTRIES, approximate=True)
        except RedisError:
            return False
        return True

    def since(self, last_id: str, *, block_ms: int | None = None) -> tuple[str, list[dict[str, Any]]]:
        """Events after `last_id` ("$": from now) and the id to go on from. Raises StreamsLost errors.

        Entries that hold no JSON object are passed over.
        """
        if last_id == "$":
            newest = cast(list[Any], self._client.xrevrange(EVENTS, count=1))
            return (newest[0][0].decode() if newest else "0-0"), []
        reply = self._client.xread({EVENTS: last_id}, count=500, block=block_ms)
        entries = [entry for _, page in _pairs(reply) for entry in page]
        return (entries[-1][0].decode() if entries else last_id), _objects(entries)

    def latest(self, count: int = 200) -> list[dict[str, Any]]:
        """The newest events, oldest of them first. Raises StreamsLost errors."""
        return _objects(reversed(cast(list[Any], self._client.xrevrange(EVENTS, count=count))))

    def close(self) -> None:
        self._client.close()


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
