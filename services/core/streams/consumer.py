"""The ingest group's side: join, recover what is pending, read on, be done with it, count what was trimmed away.

It never acknowledges by itself. Whoever reads a site must hold its lease: all that is pending there is taken over,
whichever consumer had read it.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import redis.asyncio
from redis.exceptions import ResponseError

from services.core import codec
from services.core.errors import BadFrameError
from services.core.frames import Frame, check_site
from services.core.streams.client import (
    INGEST_GROUP,
    KINDS,
    Client,
    Command,
    Kind,
    StreamsLost,
    disconnect,
    entries_by_key,
    passing_as_lost,
    process_name,
    send_all,
    sites_with,
    stream_key,
)
from services.core.streams.delivery import Delivery, acknowledge, bury
from services.core.streams.progress import Progress
from services.core.streams.scripts import Call, Script, call

_MAX_PAUSE_S = 0.05
_MAX_BACK_OFF_S = 1.0

_STRAYS = Script("""
local found = {}
for _, key in ipairs(KEYS) do
  local pending = redis.pcall('XPENDING', key, ARGV[1])
  for _, of in ipairs(pending[4] or {}) do
    if of[1] ~= ARGV[2] then
      found[#found + 1] = key
      break
    end
  end
end
return found
""")
"""KEYS: streams of one shard. ARGV: group, consumer. Those that have entries pending with other consumers."""


class Consumer:
    """Reads all joined sites' streams in one consumer group. It never acknowledges by itself."""

    def __init__(self, client: Client, *, name: str, sites: Iterable[str] = ()) -> None:
        """name: what XINFO CONSUMERS shows, with a suffix of this process.

        sites: the ones to read; none: every site that has a radar stream, looked up by `find_sites`.

        Raises BadFrameError for a name that cannot be one of a site.
        """
        self._client = client
        self._name = process_name(name)
        self._fixed = tuple(check_site(site) for site in sites)
        self._streams: dict[bytes, tuple[str, Kind]] = {}
        self._recovering: dict[bytes, bytes] = {}  # streams with pending entries to take over: from which id on
        self._doubtful: dict[str, float] = {}  # sites whose groups are gone, or may be: when to make them anew
        self._num_refusals: Counter[str] = Counter()  # in a row
        self._progress = Progress(client, group=INGEST_GROUP, consumer=self._name)
        self.num_trimmed: Counter[str] = Counter()
        """Site to entries that went away before they were acknowledged, or before anyone had read them."""
        self.refused: dict[str, str] = {}
        """Key or site to why it is not read: what the last `find_sites` and `join` passed over."""

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(sorted({site for site, _ in self._streams.values()}))

    async def discover(self) -> tuple[str, ...]:
        """Join the group on all streams of the sites that are there; return the sites. Cheap to repeat."""
        for site in await self.find_sites():
            if not self._fixed or site in self._fixed:
                await self.join(site)
        return self.sites

    @passing_as_lost()
    async def find_sites(self) -> tuple[str, ...]:
        """The sites that have a radar stream, and those given, whether or not they have one.

        `refused` tells of keys that look like a site's and are none, unless sites were given.
        """
        sites, refused = await sites_with(self._client, "radar")
        self.refused = {} if self._fixed else refused
        return tuple(sorted(sites | set(self._fixed)))

    @passing_as_lost()
    async def join(self, site: str) -> bool:
        """Join the group on all streams of `site`; False, and none of them is read, if a key is no stream."""
        keys = _keys(site)
        if keys.keys() <= self._streams.keys():
            return True
        created = await self._create_groups(site)
        if created is None:
            return False
        await self._progress.begin([key.decode() for key in keys])
        self._streams |= keys
        self._recovering |= dict.fromkeys(keys, b"0-0")
        return True

    def leave(self, site: str) -> None:
        """Stop reading `site`. What is not acknowledged stays pending, for who joins it next."""
        self._doubtful.pop(site, None)
        for key in _keys(site):
            self._streams.pop(key, None)
            self._recovering.pop(key, None)
            self._progress.forget(key.decode())

    async def _create_groups(self, site: str) -> set[bytes] | None:
        """The streams whose group was not there yet; None, and `refused` says why, if a key is no stream."""
        keys = [key.decode() for key in _keys(site)]
        dead = stream_key(site, "dead")
        commands: list[Command] = [(key, ("XGROUP CREATE", key, INGEST_GROUP, "0", "MKSTREAM")) for key in keys]
        *results, of_dead = await send_all(self._client, [*commands, (dead, ("XLEN", dead))])
        for result in (*results, of_dead):
            if str(result).startswith("WRONGTYPE"):
                self.refused[site] = f"a key of site {site} is no stream; rename what is not Echosight's"
                return None
            if isinstance(result, Exception) and not str(result).startswith("BUSYGROUP"):
                raise result
        pairs = zip(keys, results, strict=True)
        return {key.encode() for key, result in pairs if not isinstance(result, Exception)}

    @passing_as_lost()
    async def read(self, *, count: int, block_ms: int, skip: Collection[tuple[str, Kind]] = ()) -> list[Delivery]:
        """Up to `count` entries a stream: after a join, or a lost answer, first all that is pending there.

        Empty when none came within `block_ms`. A group lost to a flush is made anew, from the beginning;
        sites with a key that is no stream any more are left. Raises StreamsLost errors; what was on its way then
        is read again, so that an entry can come twice.
        skip: (site, kind) of streams to leave alone this time.
        """
        try:
            await self._restore()
            recovered = await self._recover(count, skip)
            wanted = self._ready(skip)
            if not wanted and not recovered:
                await asyncio.sleep(block_ms / 1e3)
            if not wanted:
                return recovered
            return recovered + await self._read_new(wanted, count, block_ms=0 if recovered else block_ms)
        except BaseException:  # also when cancelled: what was on its way is pending
            self._recovering = dict.fromkeys(self._streams, b"0-0")
            raise

    def is_behind(self, site: str) -> bool:
        """Whether streams of `site` are not read on, as what is pending at one of them comes first."""
        return site in self._doubtful or any(self._streams[key][0] == site for key in self._recovering)

    def _ready(self, skip: Collection[tuple[str, Kind]]) -> dict[str, list[bytes]]:
        """Site to the streams to read on in: none of a site that is still recovering.

        Except where all that is left to recover is skipped: then the caller waits for the site's other streams.
        """
        busy = {self._streams[key][0] for key in self._recovering if self._streams[key] not in skip}
        busy |= self._doubtful.keys()
        wanted: dict[str, list[bytes]] = {}
        for key, stream in self._streams.items():
            if stream not in skip and stream[0] not in busy and key not in self._recovering:
                wanted.setdefault(stream[0], []).append(key)
        return wanted

    async def _recover(self, count: int, skip: Collection[tuple[str, Kind]]) -> list[Delivery]:
        """A page of what is pending, whoever had read it, of each stream that is not through with it."""
        streams = {key: self._streams[key] for key in self._recovering}
        keys = [key for key, stream in streams.items() if stream not in skip and stream[0] not in self._doubtful]
        commands: list[Command] = []
        for key in keys:
            claim = ("XAUTOCLAIM", key, INGEST_GROUP, self._name, 0, self._recovering[key], "COUNT", count)
            commands.append((key.decode(), claim))
        deliveries: list[Delivery] = []
        for key, result in zip(keys, await send_all(self._client, commands), strict=True):
            if key not in self._streams:  # left meanwhile: it stays pending
                continue
            if isinstance(result, Exception):
                self._doubt([key], result)
                continue
            following, entries, gone = result
            self.num_trimmed[self._streams[key][0]] += len(gone)
            self._progress.add_recovered(key.decode(), [*(entry_id for entry_id, _ in entries), *gone])
            deliveries += self._decode(key, entries)
            if following == b"0-0":
                del self._recovering[key]
            else:
                self._recovering[key] = following
        return deliveries

    async def _read_new(self, wanted: dict[str, list[bytes]], count: int, *, block_ms: int) -> list[Delivery]:
        """Entries that nobody has read yet; of a cluster's sites one by one, as no command spans two shards."""
        if isinstance(self._client, redis.asyncio.RedisCluster):
            groups = list(wanted.values())
            results = await self._poll(groups, count, block_ms=block_ms)
        else:
            groups = [[key for keys in wanted.values() for key in keys]]
            block = ("BLOCK", block_ms) if block_ms else ()
            try:
                words = self._xreadgroup(groups[0], count, block)
                results = [await self._client.execute_command(*words)]  # type: ignore[no-untyped-call]
            except ResponseError as error:
                if isinstance(error, StreamsLost):
                    raise
                results = [error]
        robbed = await self._robbed(groups)
        deliveries = []
        for keys, result in zip(groups, results, strict=True):
            if isinstance(result, Exception):
                self._doubt(keys, result)
                continue
            for key in keys:
                self._num_refusals.pop(self._streams.get(key, ("", ""))[0], None)
            for key, entries in entries_by_key(result):
                if key in self._streams and self._streams[key][0] not in robbed:  # not left meanwhile
                    self._progress.add_read(key.decode(), len(entries), entries[-1][0])
                    deliveries += self._decode(key, entries)
        return deliveries

    async def _robbed(self, groups: list[list[bytes]]) -> set[str]:
        """Sites of which another consumer holds entries: older than what was just read, or their partners.

        It was stopped between its last look at the leases and its read. Later they would find their partners gone.
        So all that is pending is recovered first, in order, and what was just read with it.
        """
        calls = [
            Call(_STRAYS, [key.decode() for key in keys], (INGEST_GROUP, self._name)) for keys in groups if keys
        ]
        strays = [key for found in await call(self._client, calls) for key in found if key in self._streams]
        robbed = {self._streams[key][0] for key in strays}
        for site in robbed:
            self._recovering |= dict.fromkeys(_keys(site), b"0-0")
        return robbed

    async def _poll(self, groups: list[list[bytes]], count: int, *, block_ms: int) -> list[Any]:
        """Ask for each group, all at once, until one has something: pauses grow while none has."""
        loop = asyncio.get_running_loop()
        deadline, pause_s = loop.time() + block_ms / 1e3, _MAX_PAUSE_S / 16
        commands = [(keys[0].decode(), self._xreadgroup(keys, count)) for keys in groups]
        while True:
            results = await send_all(self._client, commands)
            left_s = deadline - loop.time()
            if left_s <= 0 or any(results):  # an error counts, too
                return results
            await asyncio.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    def _xreadgroup(self, keys: Sequence[bytes], count: int, block: tuple[Any, ...] = ()) -> tuple[Any, ...]:
        head = ("XREADGROUP", "GROUP", INGEST_GROUP, self._name, "COUNT", count)
        return (*head, *block, "STREAMS", *keys, *[">"] * len(keys))

    def _doubt(self, keys: Iterable[bytes], error: Exception) -> None:
        """Leave the sites of `keys` alone until the next read has made sure of their groups.

        The one that the error names waits longer each time in a row: never in a hot loop.
        """
        if not str(error).startswith(("NOGROUP", "WRONGTYPE")):
            raise error
        known = {key: self._streams[key][0] for key in keys if key in self._streams}
        named = {site for key, site in known.items() if f"'{key.decode()}'" in str(error)} or set(known.values())
        now_s = time.monotonic()
        for site in known.values():
            delay_s = 0.05 * (2 ** self._num_refusals[site] - 1) if site in named else 0.0
            self._doubtful[site] = now_s + min(delay_s, _MAX_BACK_OFF_S)
        for site in named:
            self._num_refusals[site] = min(self._num_refusals[site] + 1, 10)

    async def _restore(self) -> None:
        """Make lost groups anew, from the beginning. A site that has a key that is no stream is left."""
        now_s = time.monotonic()
        for site in [site for site, at_s in self._doubtful.items() if at_s <= now_s]:
            created = await self._create_groups(site)
            if site not in self._doubtful:  # left meanwhile
                continue
            if created is None:
                self.leave(site)
                continue
            for key in created:  # nothing is pending in a group that was not there
                self._recovering.pop(key, None)
            await self._progress.begin([key.decode() for key in created])
            self._doubtful.pop(site, None)

    @passing_as_lost()
    async def acknowledge(self, deliveries: Iterable[Delivery]) -> None:
        """Say that `deliveries` are done with: of each site all or none. Only once their pairs are durably stored.

        One round trip to each server.
        """
        await acknowledge(self._client, deliveries, group=INGEST_GROUP)

    @passing_as_lost()
    async def bury(self, refused: Sequence[tuple[Delivery, str]]) -> list[bool]:
        """Move entries to their sites' dead letters, each with its reason, and acknowledge them: both or neither.

        Returns which went there now: repeated after a lost answer it leaves alone what is there. Raises
        StreamsLost errors, and StreamsError if the key of the dead letters is no stream.
        """
        return await bury(self._client, refused, group=INGEST_GROUP)

    def _decode(self, key: bytes, entries: Iterable[tuple[bytes, codec.Entry | None]]) -> list[Delivery]:
        site, kind = self._streams[key]
        deliveries = []
        for entry_id, found in entries:
            fields = found or {}
            frame: Frame | BadFrameError
            try:
                frame = codec.decode(site, kind, fields)
            except BadFrameError as error:
                frame = error
            deliveries.append(Delivery(site, kind, entry_id, frame, fields))
        return deliveries

    @passing_as_lost()
    async def count_trimmed(self) -> None:
        """Add to `num_trimmed` what was trimmed away before anyone had read it.

        Also takes over what another consumer has read since `join`: one that had lost the site unawares.
        """
        keys = [key for key in self._streams if key not in self._recovering]
        noticed = await self._progress.take([key.decode() for key in keys])
        for key in keys:
            if key in self._streams and (found := noticed.get(key.decode())):
                self.num_trimmed[self._streams[key][0]] += found.num_trimmed
                if found.num_strays:
                    self._recovering[key] = b"0-0"

    async def close(self) -> None:
        await disconnect(self._client)


def _keys(site: str) -> dict[bytes, tuple[str, Kind]]:
    return {stream_key(site, kind).encode(): (site, kind) for kind in KINDS}
