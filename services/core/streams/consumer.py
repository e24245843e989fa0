"""The ingest group's side: join, read, claim, acknowledge, bury, count what was trimmed away.

It never acknowledges by itself.
"""

import asyncio
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, cast

import redis
import redis.asyncio
from redis.exceptions import (
    ResponseError,
)

from services.core import codec
from services.core.errors import BadFrameError
from services.core.frames import Frame, check_site
from services.core.streams.client import (
    ANY_RADAR_KEY,
    DEAD_MAX_ENTRIES,
    INGEST_GROUP,
    KINDS,
    Kind,
    StreamsLost,
    entries_by_key,
    passing_as_lost,
    stream_key,
)


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

    @passing_as_lost()
    async def find_sites(self) -> tuple[str, ...]:
        """The sites that could be joined: those given, or all that have a radar stream."""
        self.refused = {}
        if self._fixed:
            return tuple(sorted(set(self._fixed)))
        sites = set()
        async for key in self._client.scan_iter(match="echosight:{*}:radar", count=1000, _type="stream"):
            found = ANY_RADAR_KEY.fullmatch(key)
            site = found[1].decode(errors="backslashreplace") if found else ""
            try:
                sites.add(check_site(site))
            except BadFrameError as error:
                self.refused[key.decode(errors="backslashreplace")] = str(error)
        return tuple(sorted(sites))

    @passing_as_lost()
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

    @passing_as_lost()
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
        pages = entries_by_key(reply)
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
                entries = [entry for _, page in entries_by_key(reply) for entry in page]
                if not entries:
                    break
                cursor = entries[-1][0]
                deliveries += self._decode(key, entries)
            self._fresh.discard(key)
        return deliveries

    @passing_as_lost()
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

    @passing_as_lost()
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

    @passing_as_lost()
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

    @passing_as_lost()
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
