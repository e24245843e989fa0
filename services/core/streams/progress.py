"""How far a consumer group has come among all entries ever added, and so: how many it never got to read.

It does not read entries; who does tells it what came.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from services.core.streams.client import Client
from services.core.streams.scripts import Call, Script, call

_PROGRESS = Script("""
local function map(flat)
  local found = {}
  for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
  return found
end
if redis.call('TYPE', KEYS[1]).ok ~= 'stream' then return false end
local stream = map(redis.call('XINFO', 'STREAM', KEYS[1]))
for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local group = map(flat)
  if group.name == ARGV[1] then
    local num_strays = 0
    for _, of in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1])[4] or {}) do
      if of[1] ~= ARGV[2] then num_strays = num_strays + of[2] end
    end
    local num_added, newest = stream['entries-added'], stream['last-generated-id']
    if group['last-delivered-id'] == newest and group['entries-read'] ~= num_added then
      redis.pcall('XGROUP', 'SETID', KEYS[1], ARGV[1], newest, 'ENTRIESREAD', num_added)
    end
    return {stream['entries-added'], stream['length'], stream['last-generated-id'],
            group['last-delivered-id'], group['entries-read'] or false, num_strays}
  end
end
return false
""")
"""KEYS: a stream. ARGV: group, consumer.

In a script, so that all answers are of one moment, and the entries that one of them holds stay there. A server
that starts again from its append-only file has forgotten how many entries a group has read, and would say for
ever that as many wait: where nothing waits it is told.
"""


@dataclass(frozen=True, slots=True)
class Noticed:
    """num_trimmed: entries trimmed unread since the last time. num_strays: pending with other consumers."""

    num_trimmed: int
    num_strays: int


class Progress:
    """Counts, for each stream, the entries that a group passed by because they were trimmed away unread."""

    def __init__(self, client: Client, *, group: str, consumer: str) -> None:
        self._client = client
        self._arguments = (group, consumer)
        self._counted_to: dict[str, int] = {}  # entries ever added that are read or counted as trimmed
        self._num_read: Counter[str] = Counter()  # since then
        self._newest: dict[str, tuple[int, int]] = {}  # id of the newest entry that counts as read

    async def begin(self, keys: Sequence[str]) -> None:
        """Count from where the group stands now. Raises StreamsLost errors."""
        for key, answer in zip(keys, await self._ask(keys), strict=True):
            self.forget(key)
            if answer is not None:
                self._newest[key] = _order(answer[3])
                num_passed = _num_passed(answer)
                if num_passed is not None:
                    self._counted_to[key] = num_passed

    def forget(self, key: str) -> None:
        self._counted_to.pop(key, None)
        self._num_read.pop(key, None)
        self._newest.pop(key, None)

    def add_read(self, key: str, num: int, newest_id: bytes) -> None:
        """`num` entries were read, `newest_id` the last of them."""
        self._num_read[key] += num
        self._newest[key] = _order(newest_id)

    def add_recovered(self, key: str, entry_ids: Iterable[bytes]) -> None:
        """Pending entries came again: those newer than all that was read came for the first time."""
        known = self._newest.get(key, (0, 0))
        orders = [order for entry_id in entry_ids if (order := _order(entry_id)) > known]
        if orders:
            self._num_read[key] += len(orders)
            self._newest[key] = max(orders)

    async def take(self, keys: Sequence[str]) -> dict[str, Noticed]:
        """What is to be said of each stream that is there. Raises StreamsLost errors.

        Not while one of `keys` is read: what is on its way would count as trimmed.
        """
        return {
            key: Noticed(self._count(key, answer), int(answer[5]))
            for key, answer in zip(keys, await self._ask(keys), strict=True)
            if answer is not None  # flushed or replaced otherwise
        }

    def _count(self, key: str, answer: Sequence[Any]) -> int:
        num_passed = _num_passed(answer)
        if num_passed is None or answer[5]:  # the server can tell once all is read; strays are still to be counted
            return 0
        missed = num_passed - self._counted_to.get(key, num_passed) - self._num_read[key]
        if missed < 0 and answer[3] != answer[2]:  # fewer than we read: it has started again, and will know soon
            return 0
        is_first = key not in self._counted_to
        self._counted_to[key] = num_passed
        self._num_read[key] = 0
        return 0 if is_first else max(missed, 0)

    async def _ask(self, keys: Sequence[str]) -> list[Any]:
        return await call(self._client, [Call(_PROGRESS, (key,), self._arguments) for key in keys])


def _num_passed(answer: Sequence[Any]) -> int | None:
    """How many of the entries ever added lie at or before the group's position; None if the server cannot tell."""
    num_added, length, newest_id, delivered_id, num_read, _ = answer
    if delivered_id == newest_id:
        return int(num_added)
    if delivered_id == b"0-0":  # nothing read yet: all that is not there any more was passed by
        return int(num_added) - int(length)
    return None if num_read is None else int(num_read)


def _order(entry_id: bytes) -> tuple[int, int]:
    milliseconds, _, place = entry_id.partition(b"-")
    return int(milliseconds), int(place)
