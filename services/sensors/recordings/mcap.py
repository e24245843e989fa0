"""Sessions in MCAP files, read: what came through the streams, in the order in which it came.

A file without an end (its recorder was killed), or damaged in places, is read as far as it goes, and the report
says so. It knows neither the streams nor how to pace a replay.
"""

import heapq
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, ClassVar

from mcap.exceptions import McapError
from mcap.opcode import Opcode
from mcap.reader import SeekingReader
from mcap.records import Channel, Chunk, McapRecord, Message
from mcap.stream_reader import StreamReader, breakup_chunk
from mcap.writer import MCAP0_MAGIC
from zstandard import ZstdError

from services.core import codec
from services.core.errors import BadFrameError, RecordingError
from services.core.frames import Frame, check_site
from services.core.streams import KINDS, Kind
from services.sensors.recordings.base import CorruptFile, RecordingReport
from services.sensors.recordings.foxglove_messages import to_entry
from services.sensors.recordings.mcap_writer import VERSION, Topic

_MAX_CHUNK_BYTES = 2**30
_DAMAGE = (
    McapError, struct.error, ZstdError, ValueError, OverflowError, MemoryError, RuntimeError, EOFError, OSError,
)  # fmt: skip
"""What the libraries raise on bytes that are no MCAP. ValueError: a wrong checksum; OSError: a wild offset."""

_Order = tuple[int, int, int]
"""Log time, offset of the chunk, place in the chunk."""


def is_mcap(path: Path) -> bool:
    """Whether the file starts as MCAP files do. Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(MCAP0_MAGIC)) == MCAP0_MAGIC


@dataclass(slots=True)
class _Index:
    """Where the chunks are, and what they hold. chunks: (start time, offset)."""

    channels: dict[int, Channel] = field(default_factory=dict)
    chunks: list[tuple[int, int]] = field(default_factory=list)
    num_messages: Counter[int] = field(default_factory=Counter)
    damaged: list[CorruptFile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class McapRecording:
    """A recorded session of one or more sites, by order of arrival."""

    format_name: ClassVar[str] = "mcap"

    def __init__(self, path: Path, *, site: str = "") -> None:
        """site: of a session of several sites only this one; that of a single site goes by this name.

        Raises RecordingError if nothing of ours can be read, BadFrameError for an impossible site name.
        """
        self._path = path
        try:
            self._index = _index_of(path)
            self._topics = _topics_of(self._index)
        except RecordingError as error:
            raise RecordingError(f"{path}: {error.what}", remedy=error.remedy) from None
        sites = sorted({topic.site for topic in self._topics.values()})
        self._renamed = ""
        if site and len(sites) == 1:
            sites, self._renamed = [check_site(site)], site
        elif site and site not in sites:
            raise RecordingError(f"{path} holds sites {', '.join(sites)}, not {site}", remedy="name one of them")
        elif site:
            sites = [site]
            self._topics = {number: topic for number, topic in self._topics.items() if topic.site == site}
        self.sites = tuple(sites)
        self._counts: Counter[Kind] = Counter()
        self._corrupt: list[CorruptFile] = []

    @property
    def site(self) -> str:
        """The first of `sites`."""
        return self.sites[0]

    @property
    def num_files(self) -> int:
        """How many radar and camera frames the index tells of; for progress bars."""
        return sum(
            count
            for number, count in self._index.num_messages.items()
            if number in self._topics and self._topics[number].kind != "labels"
        )

    def frames(self) -> Iterator[Frame]:
        """All frames by arrival: that is by capture time only as far as the sensors and the network kept it."""
        return (frame for _, frame in self.arrivals())

    def arrivals(self) -> Iterator[tuple[int, Frame]]:
        """All frames with their arrival, nanoseconds since 1970, in its order. What is damaged is passed over."""
        self._counts, self._corrupt = Counter(), []
        with self._path.open("rb") as file:
            for message in self._messages(file):
                topic = self._topics.get(message.channel_id)
                if topic is None:
                    continue
                try:
                    frame = codec.decode(
                        self._renamed or topic.site, topic.kind, to_entry(topic.kind, message.data)
                    )
                except BadFrameError as error:
                    self._corrupt.append(CorruptFile(f"{topic} at {message.log_time} ns", str(error)))
                    continue
                self._counts[topic.kind] += 1
                yield message.log_time, frame

    def report(self) -> RecordingReport:
        """What the last pass came across. The names of what is corrupt are offsets and topics."""
        return RecordingReport(
            self.site,
            {kind: self._counts[kind] for kind in KINDS},
            corrupt=(*self._index.damaged, *self._corrupt),
            notes=tuple(self._index.notes),
        )

    def _messages(self, file: IO[bytes]) -> Iterator[Message]:
        """Messages by log time. Only chunks that overlap in time are in memory together."""
        waiting: list[tuple[_Order, Message]] = []
        for starts_ns, offset in sorted(self._index.chunks):
            while waiting and waiting[0][0][0] < starts_ns:
                yield heapq.heappop(waiting)[1]
            try:
                records = _read_chunk(file, offset)
            except _DAMAGE as error:
                self._corrupt.append(_damaged_chunk(offset, error))
                continue
            for place, record in enumerate(records):
                if isinstance(record, Message):
                    heapq.heappush(waiting, ((record.log_time, offset, place), record))
        while waiting:
            yield heapq.heappop(waiting)[1]


def _topics_of(index: _Index) -> dict[int, Topic]:
    """Our channels by number. Raises RecordingError if there is none, or one of another version."""
    topics = {}
    for number, channel in index.channels.items():
        version = channel.metadata.get("echosight")
        if version is None:
            continue
        if version != VERSION:
            raise RecordingError(f"{channel.topic} has format version {version}", remedy="upgrade Echosight")
        kind = next((kind for kind in KINDS if kind == channel.metadata.get("kind")), None)
        if kind is not None:
            topics[number] = Topic(check_site(channel.metadata.get("site", "")), kind)
    if topics:
        return topics
    others = ", ".join(sorted(channel.topic for channel in index.channels.values())[:6])
    raise RecordingError(
        f"holds no frame of ours that can be read (its topics: {others or 'none'})",
        remedy="play what `echosight record` wrote",
    )


def _index_of(path: Path) -> _Index:
    """The file's own index; else what a look at all of it finds. Raises RecordingError if it is no MCAP file."""
    if not is_mcap(path):
        raise RecordingError("is no MCAP file", remedy="give the folder that holds the recording, or an MCAP file")
    with path.open("rb") as file:
        try:
            summary = SeekingReader(file, validate_crcs=True, record_size_limit=_limit(path)).get_summary()
        except _DAMAGE:
            summary = None
        if summary is None or summary.statistics is None or not summary.chunk_indexes:
            return _scan(file, path)
        index = _Index(summary.channels, num_messages=Counter(summary.statistics.channel_message_counts))
        index.chunks = [(chunk.message_start_time, chunk.chunk_start_offset) for chunk in summary.chunk_indexes]
        return index


def _scan(file: IO[bytes], path: Path) -> _Index:
    """An index of whatever whole chunks there are, up to where the file cannot be followed any more."""
    index = _Index()
    file.seek(0)
    reader = StreamReader(file, emit_chunks=True, record_size_limit=_limit(path))
    records, is_whole, offset = iter(reader.records), False, 0
    try:
        while True:
            offset = file.tell() or len(MCAP0_MAGIC)
            record = next(records, None)
            if record is None:
                is_whole = True
                break
            if isinstance(record, Chunk):
                _take_in(index, record, offset)
    except _DAMAGE:
        pass
    if not is_whole:
        num = sum(index.num_messages.values())
        index.notes.append(
            f"the file has no end: its recorder was killed, or the copy is not whole; {num} messages can be read"
        )
    return index


def _take_in(index: _Index, chunk: Chunk, offset: int) -> None:
    try:
        records = breakup_chunk(chunk, validate_crc=True)
    except _DAMAGE as error:
        index.damaged.append(_damaged_chunk(offset, error))
        return
    index.chunks.append((chunk.message_start_time, offset))
    for record in records:
        if isinstance(record, Channel):
            index.channels[record.id] = record
        elif isinstance(record, Message):
            index.num_messages[record.channel_id] += 1


def _read_chunk(file: IO[bytes], offset: int) -> list[McapRecord]:
    """The records of the chunk at `offset`, its checksum checked. Raises one of _DAMAGE."""
    file.seek(offset)
    records = StreamReader(file, skip_magic=True, emit_chunks=True, record_size_limit=_MAX_CHUNK_BYTES).records
    chunk = next(iter(records), None)
    if not isinstance(chunk, Chunk):
        raise McapError(f"there is no {Opcode.CHUNK.name.lower()} there")
    return breakup_chunk(chunk, validate_crc=True)


def _damaged_chunk(offset: int, error: BaseException) -> CorruptFile:
    return CorruptFile(f"chunk at byte {offset}", str(error) or type(error).__name__)


def _limit(path: Path) -> int:
    """No record is longer than its file: a length that says so is damage, not a reason to ask for memory."""
    return min(path.stat().st_size, _MAX_CHUNK_BYTES)
