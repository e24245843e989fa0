"""One entry as it was read, and the two ways to be done with it: acknowledged, or buried with a reason.

Both happen whole or not at all, on one server as on a cluster. It does not know who reads.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from redis.exceptions import ResponseError

from services.core import codec
from services.core.errors import BadFrameError, StreamsError
from services.core.frames import Frame
from services.core.streams.client import DEAD_MAX_ENTRIES, Client, Kind, stream_key
from services.core.streams.scripts import MAX_VALUES, Call, Script, call

_ACKNOWLEDGE = Script("""
local at = 2
for _, key in ipairs(KEYS) do
  local last = at + ARGV[at]
  if redis.call('TYPE', key).ok == 'stream' then
    for first = at + 1, last, 1000 do
      redis.call('XACK', key, ARGV[1], unpack(ARGV, first, math.min(first + 999, last)))
    end
  end
  at = last + 1
end
""")
"""KEYS: streams. ARGV: group; for each stream how many entries, and their ids."""

_BURY = Script("""
local pending = redis.pcall('XPENDING', KEYS[2], ARGV[1], ARGV[2], ARGV[2], 1)
if pending.err or #pending == 0 then return 0 end
redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[3], '*', unpack(ARGV, 4))
return redis.call('XACK', KEYS[2], ARGV[1], ARGV[2])
""")
"""KEYS: dead letters, stream. ARGV: group, entry id, cap, the letter's fields and values.

What is not pending any more was buried before (an answer got lost), or belongs to who has the site now.
"""


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

    @property
    def arrived_ms(self) -> int:
        """When the server took the entry, milliseconds since 1970 by its clock."""
        return int(self.entry_id.partition(b"-")[0])


async def acknowledge(client: Client, deliveries: Iterable[Delivery], *, group: str) -> None:
    """Of each site all or none, in one round trip to each server. Raises StreamsLost errors."""
    by_site: dict[str, dict[str, list[bytes]]] = {}
    for delivery in deliveries:
        by_site.setdefault(delivery.site, {}).setdefault(delivery.key, []).append(delivery.entry_id)
    calls = []
    for by_key in by_site.values():
        ids = [word for entry_ids in by_key.values() for word in (len(entry_ids), *entry_ids)]
        calls.append(Call(_ACKNOWLEDGE, tuple(by_key), (group, *ids)))
    await call(client, calls)


async def bury(client: Client, refused: Sequence[tuple[Delivery, str]], *, group: str) -> list[bool]:
    """Each delivery into its site's dead letters, with its reason, in one round trip; which went there now.

    One that is not pending any more is left alone. Raises StreamsLost errors, and StreamsError if the key of
    the dead letters holds something else.
    """
    calls, are_news = [], [True] * len(refused)
    called = []
    try:
        for at, (delivery, reason) in enumerate(refused):
            letter = _letter(delivery, reason)
            dead = stream_key(delivery.site, "dead")
            if len(letter) <= MAX_VALUES:
                arguments = (group, delivery.entry_id, DEAD_MAX_ENTRIES, *letter)
                calls.append(Call(_BURY, (dead, delivery.key), arguments))
                called.append(at)
            else:  # too many fields for a script: a letter may come twice then, but is never lost
                await client.execute_command("XADD", dead, "MAXLEN", "~", DEAD_MAX_ENTRIES, "*", *letter)
                await acknowledge(client, [delivery], group=group)
        for at, answer in zip(called, await call(client, calls), strict=True):
            are_news[at] = bool(answer)
        return are_news
    except ResponseError as error:
        if "WRONGTYPE" not in str(error):
            raise
        dead = ", ".join(sorted({stream_key(delivery.site, "dead") for delivery, _ in refused}))
        raise StreamsError(f"{dead} is no stream", remedy="rename or delete what is not Echosight's") from None


def _letter(delivery: Delivery, reason: str) -> list[Any]:
    letter: list[Any] = ["reason", reason, "stream", delivery.kind, "entry_id", delivery.entry_id]
    for name, value in delivery.fields.items():
        letter += (b"field:" + name, value)
    return letter
