"""Someone who reads along: every entry of some sites from a position of its own, no group, no acknowledgement.

Ingest does not notice it, and nothing waits for it: what is trimmed away before it was read is counted, by site
and kind. It never waits for a lost server; its caller does, and calls again.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from redis.exceptions import ResponseError

from services.core import codec
from services.core.errors import BadFrameError
from services.core.frames import check_site
from services.core.streams.client import KINDS, Client, Kind, entries_by_key, passing_as_lost, stream_key

_ANY_KEY = re.compile(rb"echosight:\{(.*)\}:(?:radar|camera|labels)", re.DOTALL)
_START = b"0-0"


@dataclass(frozen=True, slots=True)
class FollowedEntry:
    """One stream entry, as it came."""

    site: str
    kind: Kind
    entry_id: bytes
    fields: codec.Entry

    @property
    def order(self) -> tuple[int, int]:
        """Arrival by the server's clock: milliseconds since 1970, and the place within the millisecond."""
        return _order(self.entry_id)


@dataclass(slots=True)
class _Position:
    """Where one stream was read to. num_added: entries ever added to it up to where this was last known."""

    kind: Kind
    entry_id: bytes
    num_added: int
    num_read: int = 0
    """Since then."""


class Follower:
    """Reads the streams of the given sites, or of all there are, from now on or from what is left of the past.

    A site that appears later is read from its beginning. Different sites can be read at the same time; what is of
    one site lies on one server, also of a cluster.
    """

    def __init__(
        self,
        client: Client,
        *,
        sites: Iterable[str] = (),
        from_start: bool = False,
    ) -> None:
        """Nothing is sent yet. Raises BadFrameError for a name that cannot be one of a site."""
        self._client = client
        self._given = tuple(check_site(site) for site in sites)
        self._from_start = from_start
        self._positions: dict[str, dict[bytes, _Position]] = {}
        self._has_begun = False
        self.num_trimmed: Counter[tuple[str, Kind]] = Counter()
        self.refused: dict[str, str] = {}
        """Key or site to why it is not read: what the last `find` passed over."""

    @passing_as_lost()
    async def find(self) -> tuple[str, ...]:
        """The sites that are followed, after a look for new ones. "Now" is the first call that comes back.

        Raises StreamsLost errors.
        """
        self.refused = {}
        for site in self._given or await self._sites_there():
            if site not in self._positions:
                await self._join(site)
        self._has_begun = True
        return tuple(sorted(self._positions))

    @passing_as_lost()
    async def absent(self) -> tuple[list[str], list[str]]:
        """The given sites that have no stream, and all sites that have one. Raises StreamsLost errors."""
        there = await self._sites_there()
        return sorted(set(self._given) - set(there)), there

    def follows(self, site: str) -> bool:
        """Whether there is something to read at `site`: a key that turns out to be no stream ends that."""
        return site in self._positions

    @passing_as_lost()
    async def read(self, site: str, *, count: int, block_ms: int) -> list[FollowedEntry]:
        """What came next at `site`, all kinds by arrival; empty when nothing came within `block_ms`.

        count: entries of each kind at most. Raises StreamsLost errors; the same entries come again then.
        """
        streams = self._positions.get(site, {})
        if not streams:
            return []
        wanted: dict[Any, Any] = {key: position.entry_id for key, position in streams.items()}
        try:
            reply = await self._client.xread(wanted, count=count, block=block_ms)
        except ResponseError as error:
            if not str(error).startswith("WRONGTYPE"):
                raise
            self._refuse(site)
            return []
        pages = entries_by_key(reply)
        # A full page may have been cut: what came after its end at the other kinds waits for the rest of it.
        ends = [_order(entries[-1][0]) for _, entries in pages if len(entries) >= count]
        found = []
        for key, entries in pages:
            position = streams[key]
            for entry_id, fields in entries:
                if ends and _order(entry_id) > min(ends):
                    break
                position.entry_id = entry_id
                position.num_read += 1
                found.append(FollowedEntry(site, position.kind, entry_id, fields or {}))
        return sorted(found, key=lambda entry: entry.order)

    @passing_as_lost()
    async def count_trimmed(self, site: str) -> None:
        """Add to `num_trimmed` what went away unread. Not while `site` is read; raises StreamsLost errors."""
        for key, position in self._positions.get(site, {}).items():
            try:
                info = await self._info(key)
            except ResponseError as error:
                if not str(error).startswith("WRONGTYPE"):
                    raise
                self._refuse(site)
                return
            if info is None:  # flushed: whatever comes there is the first of a new stream
                position.num_added, position.num_read = 0, 0
                continue
            added, newest = int(info["entries-added"]), bytes(info["last-generated-id"])
            if _order(newest) < _order(position.entry_id):  # a replica took over that had not got all of it
                position.entry_id, position.num_added, position.num_read = newest, added, 0
                continue
            num_passed = _num_passed(info, position.entry_id)
            if num_passed is None:  # there is more to read; the server cannot tell how far we are
                continue
            missed = num_passed - position.num_added - position.num_read
            if missed > 0:
                self.num_trimmed[site, position.kind] += missed
            position.num_added, position.num_read = num_passed, 0

    async def _sites_there(self) -> list[str]:
        found = set()
        async for key in self._client.scan_iter(match="echosight:{*}:*", count=1000, _type="stream"):
            match = _ANY_KEY.fullmatch(key)
            if match is None:
                continue
            try:
                found.add(check_site(match[1].decode(errors="backslashreplace")))
            except BadFrameError as error:
                self.refused[key.decode(errors="backslashreplace")] = str(error)
        return sorted(found)

    async def _join(self, site: str) -> None:
        positions = {}
        for kind in KINDS:
            key = stream_key(site, kind).encode()
            try:
                info = await self._info(key)
            except ResponseError as error:
                if not str(error).startswith("WRONGTYPE"):
                    raise
                self._refuse(site)
                return
            if info is None or self._has_begun:
                positions[key] = _Position(kind, _START, 0)
            elif self._from_start:
                positions[key] = _Position(kind, _START, int(info["entries-added"]) - int(info["length"]))
            else:
                positions[key] = _Position(kind, bytes(info["last-generated-id"]), int(info["entries-added"]))
        self._positions[site] = positions

    async def _info(self, key: bytes) -> dict[str, Any] | None:
        """XINFO STREAM; None where there is no such key."""
        try:
            return dict(await self._client.xinfo_stream(key))
        except ResponseError as error:
            if "no such key" in str(error):
                return None
            raise

    def _refuse(self, site: str) -> None:
        self._positions.pop(site, None)
        self.refused[site] = f"a key of site {site} is no stream; rename what is not Echosight's"


def _num_passed(info: dict[str, Any], entry_id: bytes) -> int | None:
    """How many of the entries ever added lie before what is next; None where the server cannot tell."""
    if bytes(info["last-generated-id"]) == entry_id:
        return int(info["entries-added"])
    first = info["first-entry"]
    if first is None or _order(bytes(first[0])) > _order(entry_id):  # all that is left comes next
        return int(info["entries-added"]) - int(info["length"])
    return None


def _order(entry_id: bytes) -> tuple[int, int]:
    milliseconds, _, place = entry_id.partition(b"-")
    return int(milliseconds), int(place or b"0")


__all__ = ["FollowedEntry", "Follower"]
