"""The one who trims: what every consumer group has finished, and, where memory runs out, the oldest of the rest.

An acknowledged entry stays in memory until someone trims it, and trimming takes no notice of what is pending. So
one process does it for each site (the one that holds its lease) and counts what it had to take away. Producers cap
their streams besides, as the safety net. It reads no entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from services.core.streams.client import (
    DEAD_MAX_ENTRIES,
    INGEST_GROUP,
    KINDS,
    PREDICTIONS_MAX_BYTES,
    PREDICTIONS_MAX_ENTRIES,
    Client,
    Kind,
    passing_as_lost,
    stream_key,
)
from services.core.streams.scripts import Call, Script, call

_GROUP_IDLE_MS = 600_000
_CONSUMER_IDLE_MS = 3_600_000
_MAX_PASSES = 8
_TARGET = 0.9  # how full to leave the streams, so that not every turn has to take something away

_IDS = """
local function map(flat)
  local found = {}
  for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
  return found
end
local function less(a, b)  -- digits as text: an id may be larger than Lua's numbers are exact
  local a_ms, a_seq = a:match('^(%d+)-(%d+)$')
  local b_ms, b_seq = b:match('^(%d+)-(%d+)$')
  if a_ms ~= b_ms then return #a_ms < #b_ms or (#a_ms == #b_ms and a_ms < b_ms) end
  return #a_seq < #b_seq or (#a_seq == #b_seq and a_seq < b_seq)
end
local function after(id)
  local ms, seq = id:match('^(%d+)-(%d+)$')
  return ms .. '-' .. string.format('%.0f', seq + 1)
end
local function active_groups(key, ours, max_idle_ms)
  local found, has_ours = {}, false
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', key)) do
    local group = map(flat)
    local is_active = group.name == ours
    has_ours = has_ours or is_active
    for _, flat_of in ipairs(is_active and {} or redis.call('XINFO', 'CONSUMERS', key, group.name)) do
      is_active = is_active or map(flat_of).idle < max_idle_ms
    end
    if is_active then
      group.unread = after(group['last-delivered-id'])
      group.unfinished = group.unread
      if group.pending > 0 then group.unfinished = redis.call('XPENDING', key, group.name)[2] end
      table.insert(found, group)
    end
  end
  if not has_ours then table.insert(found, {unread = '0-1', unfinished = '0-1', pending = 0}) end
  return found
end
local function lowest(groups, field)
  local found
  for _, group in ipairs(groups) do
    if not found or less(group[field], found) then found = group[field] end
  end
  return found
end
"""
"""A group is active if it is ours, or if one of its consumers was heard of within max_idle_ms.

Before our group is there it has read nothing.
"""

_TIDY = Script(
    _IDS
    + """
if redis.call('TYPE', KEYS[1]).ok ~= 'stream' then return {0, 0, 0, 0, '0-0', '0-0'} end
local ours, cut = ARGV[1], ARGV[4]
for _, flat in ipairs(cut == '' and redis.pcall('XINFO', 'CONSUMERS', KEYS[1], ours) or {}) do
  local consumer = map(flat)
  if consumer.pending == 0 and consumer.idle > tonumber(ARGV[3]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ours, consumer.name)
  end
end

local groups = active_groups(KEYS[1], ours, tonumber(ARGV[2]))
local finished, lost = 0, 0
local needed = lowest(groups, 'unfinished')
if cut == '' then
  finished = redis.call('XTRIM', KEYS[1], 'MINID', '~', needed)
elseif not less(needed, cut) then
  finished = redis.call('XTRIM', KEYS[1], 'MINID', '=', cut)
else
  finished = redis.call('XTRIM', KEYS[1], 'MINID', '=', needed)
  local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
  if first then
    local unread = lowest(groups, 'unread')
    if less(cut, unread) then unread = cut end
    local seen = {}
    for _, group in ipairs(groups) do
      local from = first[1]
      while group.pending > 0 do
        local page = redis.call('XPENDING', KEYS[1], group.name, from, '(' .. unread, 1000)
        if #page == 0 then break end
        for _, entry in ipairs(page) do
          if not seen[entry[1]] then
            seen[entry[1]] = true
            lost = lost + 1
          end
          from = '(' .. entry[1]
        end
      end
    end
    finished = finished + redis.call('XTRIM', KEYS[1], 'MINID', '=', unread) - lost
    lost = lost + redis.call('XTRIM', KEYS[1], 'MINID', '=', cut)
  end
end

local stream = map(redis.call('XINFO', 'STREAM', KEYS[1]))
local first_entry = stream['first-entry']
return {finished, lost, stream.length, redis.call('MEMORY', 'USAGE', KEYS[1], 'SAMPLES', 20),
        first_entry and first_entry[1] or '0-0', stream['last-generated-id']}
"""
)
"""KEYS: a stream. ARGV: our group, group idle ms, consumer idle ms, first id to keep (empty: the unfinished)."""

_CAP = Script("""
if redis.call('TYPE', KEYS[1]).ok ~= 'stream' then return 0 end
local num = redis.call('XTRIM', KEYS[1], 'MAXLEN', '=', ARGV[1])
local length = redis.call('XLEN', KEYS[1])
while length > 0 and redis.call('MEMORY', 'USAGE', KEYS[1], 'SAMPLES', 0) > tonumber(ARGV[2]) do
  length = length - math.max(1, math.floor(length / 10))
  num = num + redis.call('XTRIM', KEYS[1], 'MAXLEN', '=', length)
end
return num
""")
"""KEYS: a stream without a group. ARGV: entries at most, bytes at most."""


@dataclass(frozen=True, slots=True)
class Tidied:
    """What one turn did for a site.

    num_finished: entries trimmed that nobody needed any more. num_lost: entries trimmed that some active group
    had not finished, by kind. num_bytes: memory that the site's radar, camera and labels take now, as the server
    estimates it. num_dead_dropped: dead letters that went because there were too many.
    """

    num_finished: int
    num_lost: dict[Kind, int]
    num_bytes: int
    num_dead_dropped: int = 0


@dataclass(frozen=True, slots=True)
class _Stream:
    length: int
    num_bytes: int
    first_ms: int
    last_ms: int


class Janitor:
    """Trims the streams of sites, one at a time. Only who holds a site's lease should ask it to."""

    def __init__(self, client: Client, *, max_stream_bytes: int, max_dead_bytes: int) -> None:
        """max_stream_bytes: memory for the radar, camera and label entries of one site together.

        max_dead_bytes: memory for the dead letters of one site.
        """
        self._client = client
        self._max_stream_bytes = max_stream_bytes
        self._max_dead_bytes = max_dead_bytes

    @passing_as_lost()
    async def tidy(self, site: str) -> Tidied:
        """Trim what every active group has finished; beyond the limit, the oldest of the rest, and count it.

        The ingest group always counts as active; another one only while one of its consumers was heard of in the
        last ten minutes: a forgotten group does not hold memory for ever. Consumers of the ingest group that have
        been silent for an hour and have nothing pending are removed. Raises StreamsLost errors.
        """
        dead = Call(_CAP, (stream_key(site, "dead"),), (DEAD_MAX_ENTRIES, self._max_dead_bytes))
        caps = (PREDICTIONS_MAX_ENTRIES, PREDICTIONS_MAX_BYTES)
        predictions = Call(_CAP, (stream_key(site, "predictions"),), caps)
        calls = [*self._calls(site, cut=""), predictions, dead]
        *answers, _, num_dead_dropped = await call(self._client, calls)
        num_finished, num_lost = 0, dict.fromkeys(KINDS, 0)
        for _ in range(_MAX_PASSES):
            for kind, (finished, lost, *_) in zip(KINDS, answers, strict=True):
                num_finished += finished
                num_lost[kind] += lost
            streams = [_Stream(num, size, _ms(first), _ms(last)) for _, _, num, size, first, last in answers]
            num_bytes = sum(stream.num_bytes for stream in streams)
            if num_bytes <= self._max_stream_bytes or not any(stream.length for stream in streams):
                break
            cut_ms = cut_at_ms(streams, surplus_bytes=num_bytes - round(_TARGET * self._max_stream_bytes))
            answers = await call(self._client, self._calls(site, cut=f"{cut_ms}-0"))
        return Tidied(num_finished, num_lost, num_bytes, num_dead_dropped)

    def _calls(self, site: str, *, cut: str) -> list[Call]:
        arguments = (INGEST_GROUP, _GROUP_IDLE_MS, _CONSUMER_IDLE_MS, cut)
        return [Call(_TIDY, (stream_key(site, kind),), arguments) for kind in KINDS]


def cut_at_ms(streams: Sequence[_Stream], *, surplus_bytes: int) -> int:
    """The moment before which all streams together hold `surplus_bytes`, if each came in evenly.

    One moment for all: a radar frame is worth little without the camera's of the same time.
    """
    filled = [stream for stream in streams if stream.length]
    low, high = min(stream.first_ms for stream in filled), max(stream.last_ms for stream in filled) + 1
    while low < high:
        middle = (low + high) // 2
        if sum(_bytes_before(stream, middle) for stream in filled) < surplus_bytes:
            low = middle + 1
        else:
            high = middle
    return low


def _bytes_before(stream: _Stream, at_ms: int) -> float:
    span_ms = stream.last_ms - stream.first_ms + 1
    return stream.num_bytes * min(max((at_ms - stream.first_ms) / span_ms, 0.0), 1.0)


def _ms(entry_id: bytes) -> int:
    return int(entry_id.partition(b"-")[0])
