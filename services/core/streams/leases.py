"""Whose site is it: leases that run out by themselves, each with a fencing token, and which replicas live.

All times are the server's. A lease keeps two replicas off one site as long as processes and networks behave; when
they do not, the token does: the store refuses who writes with an older one. It does not know what a site is for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import orjson
from redis.exceptions import ResponseError

from services.core.streams.client import (
    Client,
    explained,
    passing_as_lost,
    process_name,
    send_all,
    stream_key,
)
from services.core.streams.scripts import Call, Script, call

Task = Literal["ingest", "live"]
_KEYS: dict[Task, tuple[str, str]] = {"ingest": ("lease", "token"), "live": ("live-lease", "live-token")}
REPLICAS = "echosight:ingest:replicas"
LIVE_REPLICAS = "echosight:live:replicas"
_REGISTERS: dict[Task, str] = {"ingest": REPLICAS, "live": LIVE_REPLICAS}

_ACQUIRE = Script("""
local held = redis.call('GET', KEYS[1])
if held and held:sub(held:find(':') + 1) ~= ARGV[1] then return false end
if tonumber(redis.call('GET', KEYS[2]) or 0) < tonumber(ARGV[2]) then redis.call('SET', KEYS[2], ARGV[2]) end
local token = redis.call('INCR', KEYS[2])
redis.call('SET', KEYS[1], string.format('%.0f', token) .. ':' .. ARGV[1], 'PX', ARGV[3])
return token
""")
"""KEYS: lease, token. ARGV: owner, floor, ttl_ms. Asked again by its owner (an answer got lost): a newer token."""

_RENEW = Script("""
local held = redis.pcall('GET', KEYS[1])
if held == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
if held or redis.pcall('GET', KEYS[2]) ~= ARGV[3] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
""")
"""KEYS: lease, token. ARGV: value, ttl_ms, token. One that ran out is ours still if no token was given since.

A key of another type is no lease: it is lost, and the other sites' are renewed all the same.
"""

_RELEASE = Script("""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
""")

_REGISTER = Script("""
local now = redis.call('TIME')
local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now_ms)
redis.call('ZADD', KEYS[1], now_ms + ARGV[2], ARGV[1])
return redis.call('ZRANGE', KEYS[1], 0, -1)
""")


@dataclass(frozen=True, slots=True)
class Replica:
    """A process that lives and takes sites. sites: the only ones that it takes; none given: any."""

    owner: str
    sites: frozenset[str] = frozenset()

    def may_hold(self, site: str) -> bool:
        return not self.sites or site in self.sites


class SiteLeases:
    """The leases of one process. Every method raises StreamsLost errors."""

    def __init__(
        self, client: Client, *, owner: str, ttl_ms: int, sites: Iterable[str] = (), task: Task = "ingest"
    ) -> None:
        """owner: its name; two processes of one name are told apart all the same.

        ttl_ms: how long a lease, or a replica's sign of life, holds without being renewed. sites: the only ones
        that this replica takes, which others must know to share fairly; none given: any. task: what the sites are
        shared for; each has leases of its own.
        """
        self._client = client
        self.owner = process_name(owner)
        self._ttl_ms = ttl_ms
        self._task = task
        self._registered = orjson.dumps([self.owner, *sorted(sites)])

    @passing_as_lost()
    async def acquire(self, site: str, *, floor: int) -> int | None:
        """A token greater than `floor` and than any given for `site` before; None while another holds the site.

        floor: the newest token that the site's store has seen. It makes up for a counter lost to a flush.
        Raises StreamsError where a key is of another type.
        """
        keys = self._keys(site)
        try:
            [token] = await call(self._client, [Call(_ACQUIRE, keys, (self.owner, floor, self._ttl_ms))])
        except ResponseError as error:
            raise await explained(self._client, error, dict.fromkeys(keys, "string")) from None
        return None if token is None else int(token)

    @passing_as_lost()
    async def renew(self, tokens: Mapping[str, int]) -> set[str]:
        """Hold on to the sites for another `ttl_ms`; those among them that are not ours any more."""
        calls = [
            Call(_RENEW, self._keys(site), (self.value(token), self._ttl_ms, token))
            for site, token in tokens.items()
        ]
        are_ours = await call(self._client, calls)
        return {site for site, is_ours in zip(tokens, are_ours, strict=True) if not is_ours}

    @passing_as_lost()
    async def release(self, site: str, *, token: int) -> None:
        """Let others have the site at once. Nothing happens if it is not ours any more."""
        await call(self._client, [Call(_RELEASE, self._keys(site)[:1], (self.value(token),))])

    @passing_as_lost()
    async def register(self) -> list[Replica]:
        """Say that this replica lives, for another `ttl_ms`; all that do, this one included.

        Raises StreamsError where the key is of another type.
        """
        key = _REGISTERS[self._task]
        try:
            [members] = await call(self._client, [Call(_REGISTER, (key,), (self._registered, self._ttl_ms))])
        except ResponseError as error:
            raise await explained(self._client, error, {key: "zset"}) from None
        return [_replica(member) for member in members]

    @passing_as_lost()
    async def resign(self) -> None:
        """Count no longer as one that lives. Its leases are released apart."""
        await self._client.zrem(_REGISTERS[self._task], self._registered)

    @passing_as_lost()
    async def holders(self, sites: Iterable[str]) -> dict[str, str]:
        """Site to `Replica.owner`, for those among `sites` that someone holds."""
        names = list(sites)
        keys = [self.key(site) for site in names]
        values = await send_all(self._client, [(key, ("GET", key)) for key in keys])
        return {
            site: value.decode(errors="replace").partition(":")[2]
            for site, value in zip(names, values, strict=True)
            if isinstance(value, bytes)
        }

    def key(self, site: str) -> str:
        """The key of a site's lease, for a script that does something only while it is ours."""
        return self._keys(site)[0]

    def value(self, token: int) -> str:
        """What stands there while it is ours."""
        return f"{token}:{self.owner}"

    def _keys(self, site: str) -> tuple[str, str]:
        lease, token = _KEYS[self._task]
        return stream_key(site, lease), stream_key(site, token)


def _replica(member: bytes) -> Replica:
    """What `register` wrote; or a bare name, as another version wrote it."""
    try:
        owner, *sites = orjson.loads(member)
        return Replica(str(owner), frozenset(str(site) for site in sites))
    except (ValueError, TypeError):
        return Replica(member.decode(errors="replace"))
