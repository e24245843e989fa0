"""Someone who wants what is new: one stream of each of many sites, as they grow; no group, no acknowledgement.

Nothing waits for it, and it never repeats a read: what was trimmed or lost on the way is gone. It looks at how old
entries are by the server's clock, in which their ids are. It does not know what the entries hold.
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import redis.asyncio
from redis.exceptions import ResponseError

from services.core import codec
from services.core.streams.client import (
    Client,
    Command,
    StreamsLost,
    entries_by_key,
    passing_as_lost,
    send_all,
    sites_with,
    stream_key,
)
from services.core.streams.scripts import Call, Script, call

_FIRST_PAUSE_S = 0.002
_MAX_PAUSE_S = 0.02

_WHERE = Script("""
local now = redis.call('TIME')
local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
local kind = redis.call('TYPE', KEYS[1]).ok
if kind == 'none' then return {now_ms, '0-0'} end
if kind ~= 'stream' then return {now_ms, ''} end
local stream = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #stream, 2 do
  if stream[i] == 'last-generated-id' then return {now_ms, stream[i + 1]} end
end
""")
"""KEYS: a stream. Its server's time, and the newest id it gave; "" where the key is no stream."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One entry. age_ms: since the server took it, when it was read."""

    site: str
    entry_id: str
    age_ms: float
    fields: codec.Entry


class NewestReader:
    """Reads the streams of one kind of the sites that were joined."""

    def __init__(self, client: Client, *, kind: Literal["radar", "predictions"]) -> None:
        """Nothing is sent yet."""
        self._client = client
        self._kind = kind
        self._positions: dict[str, str] = {}
        self._ahead_ms: dict[str, float] = {}  # of the server's clock, to our monotonic one
        self.refused: dict[str, str] = {}
        """Key or site to why it is not read: what the last `find_sites` passed over."""

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self._positions)

    @passing_as_lost()
    async def find_sites(self) -> set[str]:
        """The sites that have such a stream. Raises StreamsLost errors."""
        sites, self.refused = await sites_with(self._client, self._kind)
        return sites

    @passing_as_lost()
    async def join(self, site: str, *, max_age_ms: int = 0, after: str = "") -> bool:
        """Read `site` from now on, and what came within `max_age_ms` before, if later than `after`.

        False where its key is no stream. Raises StreamsLost errors.
        """
        [(now_ms, newest)] = await self._ask([site])
        if not newest:
            return False
        start = f"{now_ms - max_age_ms}-0" if max_age_ms else newest
        self._positions[site] = min(max(start, after, key=_order), newest, key=_order)
        return True

    def leave(self, site: str) -> None:
        self._positions.pop(site, None)
        self._ahead_ms.pop(site, None)

    @passing_as_lost()
    async def look(self) -> None:
        """Follow the server's clock; go back where a stream did (flushed, failed over). Raises StreamsLost errors.

        Now and then, and not while it reads.
        """
        sites = list(self._positions)
        for site, (_, newest) in zip(sites, await self._ask(sites), strict=True):
            if site in self._positions and newest and _order(newest) < _order(self._positions[site]):
                self._positions[site] = newest

    @passing_as_lost()
    async def read(self, *, count: int, block_ms: int) -> list[Arrival]:
        """Up to `count` entries of each site, in each site's order; empty when none came within `block_ms`.

        block_ms 0: what is there now. A site whose key is no stream any more is left. Raises StreamsLost errors.
        """
        keys = {stream_key(site, self._kind).encode(): site for site in self._positions}
        if not keys:
            await asyncio.sleep(block_ms / 1e3)
            return []
        is_cluster = isinstance(self._client, redis.asyncio.RedisCluster)
        pages = None if is_cluster else await self._xread(keys, count, block_ms)
        if pages is None:  # site by site: no command spans two shards, nor a key that is no stream
            pages = await self._poll(keys, count, block_ms)
        now_ms = time.monotonic() * 1e3
        arrivals = []
        for key, entries in pages:
            site = keys[key]
            if site not in self._positions:  # left meanwhile
                continue
            for entry_id, fields in entries:
                name = self._positions[site] = entry_id.decode()
                age_ms = now_ms + self._ahead_ms[site] - int(name.partition("-")[0])
                arrivals.append(Arrival(site, name, max(age_ms, 0.0), fields or {}))
        return arrivals

    async def _xread(self, keys: dict[bytes, str], count: int, block_ms: int) -> Any:
        """Pages by key; None if one of the keys is no stream."""
        block = ("BLOCK", block_ms) if block_ms else ()
        words = ("XREAD", "COUNT", count, *block, "STREAMS", *keys, *(self._positions[s] for s in keys.values()))
        try:
            return entries_by_key(await self._client.execute_command(*words))
        except ResponseError as error:
            if isinstance(error, StreamsLost) or not str(error).startswith("WRONGTYPE"):
                raise
            return None

    async def _poll(self, keys: dict[bytes, str], count: int, block_ms: int) -> list[Any]:
        """Ask for each stream, all at once, until one has something: pauses grow while none has."""
        deadline_s, pause_s = time.monotonic() + block_ms / 1e3, _FIRST_PAUSE_S
        while True:
            commands: list[Command] = [
                (key.decode(), ("XREAD", "COUNT", count, "STREAMS", key, self._positions[site]))
                for key, site in keys.items()
            ]
            pages: list[Any] = []
            for site, result in zip(keys.values(), await send_all(self._client, commands), strict=True):
                if isinstance(result, ResponseError) and str(result).startswith("WRONGTYPE"):
                    self.leave(site)
                elif isinstance(result, Exception):
                    raise result
                else:
                    pages += entries_by_key(result)
            left_s = deadline_s - time.monotonic()
            if pages or left_s <= 0 or len(self._positions) < len(keys):
                return pages
            await asyncio.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    async def _ask(self, sites: Sequence[str]) -> list[tuple[int, str]]:
        """The server's time, and the newest id of each site's stream."""
        answers = await call(self._client, [Call(_WHERE, (key,)) for key in self._keys(sites)])
        mine_ms = time.monotonic() * 1e3
        found = [(int(now_ms), newest.decode()) for now_ms, newest in answers]
        self._ahead_ms |= {site: now_ms - mine_ms for site, (now_ms, _) in zip(sites, found, strict=True)}
        return found

    def _keys(self, sites: Iterable[str]) -> list[str]:
        return [stream_key(site, self._kind) for site in sites]


def _order(entry_id: str) -> tuple[int, int]:
    milliseconds, _, place = (entry_id or "0-0").partition("-")
    return int(milliseconds), int(place)
