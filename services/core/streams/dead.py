"""Dead letters, for a person: what was refused and why, and how to give it another chance or be rid of it.

It does not know what was wrong: the reason is the consumer's words.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from services.core import codec
from services.core.errors import BadFrameError, StreamsError
from services.core.frames import check_site
from services.core.streams.client import (
    KINDS,
    SyncClient,
    check_url,
    connect_sync,
    disconnect_sync,
    stream_key,
    translated,
)
from services.core.streams.scripts import MAX_VALUES, Call, Script, call_sync

_ANY_DEAD_KEY = re.compile(rb"echosight:\{(.*)\}:dead", re.DOTALL)
_ID = re.compile(r"\d{1,20}-\d{1,20}")
_FIELD = b"field:"

_REQUEUE = Script("""
local letter = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
if not letter then return 0 end
local fields = {}
for i = 1, #letter[2], 2 do
  if letter[2][i]:sub(1, 6) == 'field:' then
    table.insert(fields, letter[2][i]:sub(7))
    table.insert(fields, letter[2][i + 1])
  end
end
redis.call('XADD', KEYS[2], '*', unpack(fields))
return redis.call('XDEL', KEYS[1], ARGV[1])
""")
"""KEYS: dead letters, the stream it came from. ARGV: the letter's id. The payload does not leave the server."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An entry that was refused.

    id: of the letter. entry_id: that it had in stream `kind`, "radar" for instance. fields: the entry, as it came.
    num_bytes: size of its field names and values. buried_at_ms: by the server's clock, since 1970.
    """

    site: str
    id: str
    kind: str
    entry_id: str
    reason: str
    fields: codec.Entry
    num_bytes: int
    buried_at_ms: int


Letters = list[DeadLetter]


class DeadLetters:
    """The dead letters of all sites. Every method raises StreamsError, and StreamsLost errors."""

    def __init__(self, url: str) -> None:
        """Nothing is sent yet. Raises StreamsError for a bad URL."""
        self._url = check_url(url)
        self._connected: SyncClient | None = None

    @property
    def _client(self) -> SyncClient:
        if self._connected is None:
            self._connected = connect_sync(self._url, timeout_s=15.0)
        return self._connected

    def sites(self) -> tuple[str, ...]:
        """The sites that have dead letters."""
        with translated():
            scan: Any = self._client.scan_iter(match="echosight:{*}:dead", count=1000, _type="stream")
            found = [match[1].decode(errors="replace") for key in scan if (match := _ANY_DEAD_KEY.fullmatch(key))]
            return tuple(sorted(site for site in found if self._client.xlen(stream_key(site, "dead"))))

    def list(self, site: str, *, count: int, after: str = "") -> Letters:
        """Up to `count` letters, oldest first, of those after the letter `after`."""
        key = self._key(site)
        start = f"({_checked(after)}" if after else "-"
        with translated():
            entries = cast(Any, self._client.xrange(key, min=start, count=count))
            if not entries and not after and not self._is_known(site):
                raise StreamsError(
                    f"site {site!r} has no streams on this server", remedy="see the list of sites, or REDIS_URL"
                )
        return [_letter(site, entry_id, fields) for entry_id, fields in entries]

    def show(self, site: str, id: str) -> DeadLetter:  # noqa: A002 - an id is called so everywhere
        """One letter."""
        key = self._key(site)
        with translated():
            entries = cast(Any, self._client.xrange(key, min=_checked(id), max=id))
        if not entries:
            raise _unknown(site, [id])
        return _letter(site, *entries[0])

    def requeue(self, site: str, ids: Iterable[str]) -> int:
        """Send letters again, each to the stream it came from, byte for byte; how many.

        Each is either a letter or an entry, at every moment. One that is still bad comes back as a new letter.
        Nothing is sent if one of `ids` is unknown. The producers and the janitor cap the streams, this does not:
        its own cap could cost entries that were not read yet.
        """
        key = self._key(site)
        letters = self._known(site, ids)
        for letter in letters:
            if letter.kind not in KINDS or not 0 < 2 * len(letter.fields) <= MAX_VALUES:
                raise StreamsError(
                    f"dead letter {letter.id} of site {site} names stream {letter.kind!r} "
                    f"and has {len(letter.fields)} fields of an entry",
                    remedy="drop it: no sensor's frame looks like that",
                )
        calls = [Call(_REQUEUE, (key, stream_key(site, letter.kind)), (letter.id,)) for letter in letters]
        return sum(int(call_sync(self._client, one)) for one in calls)

    def drop(self, site: str, ids: Iterable[str]) -> int:
        """Delete letters; how many. None is deleted if one of `ids` is unknown."""
        key = self._key(site)
        known = [letter.id for letter in self._known(site, ids)]
        with translated():
            return int(self._client.xdel(key, *known)) if known else 0

    def close(self) -> None:
        if self._connected is not None:
            disconnect_sync(self._connected)

    def _key(self, site: str) -> str:
        try:
            return stream_key(check_site(site), "dead")
        except BadFrameError as error:
            raise StreamsError(error.what, remedy=error.remedy) from None

    def _is_known(self, site: str) -> bool:
        return any(bool(self._client.exists(stream_key(site, kind))) for kind in (*KINDS, "dead"))

    def _known(self, site: str, ids: Iterable[str]) -> Letters:
        wanted = sorted({_checked(one) for one in ids}, key=_order)
        found: Letters = []
        unknown = []
        for one in wanted:
            try:
                found.append(self.show(site, one))
            except StreamsError:
                unknown.append(one)
        if unknown:
            raise _unknown(site, unknown)
        return found


def _letter(site: str, entry_id: bytes, letter: codec.Entry) -> DeadLetter:
    """A letter as a person's tool wants it; one that ingest did not write has holes, but is shown."""
    fields = {name.removeprefix(_FIELD): value for name, value in letter.items() if name.startswith(_FIELD)}
    return DeadLetter(
        site,
        entry_id.decode(),
        kind=letter.get(b"stream", b"").decode(errors="replace"),
        entry_id=letter.get(b"entry_id", b"").decode(errors="replace"),
        reason=letter.get(b"reason", b"").decode(errors="replace"),
        fields=fields,
        num_bytes=sum(len(name) + len(value) for name, value in fields.items()),
        buried_at_ms=int(entry_id.partition(b"-")[0]),
    )


def _checked(letter_id: str) -> str:
    if not _ID.fullmatch(letter_id):
        raise StreamsError(
            f"id of a dead letter is {letter_id!r}", remedy="use one as the list shows it, 1712000000123-0"
        )
    return letter_id


def _unknown(site: str, ids: Sequence[str]) -> StreamsError:
    return StreamsError(
        f"site {site} has no dead letter {', '.join(ids)}", remedy="list them again: old ones are removed"
    )


def _order(letter_id: str) -> tuple[int, int]:
    milliseconds, _, place = letter_id.partition("-")
    return int(milliseconds), int(place)
