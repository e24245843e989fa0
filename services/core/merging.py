"""Small segments made into one: each writer that takes a site over seals what the one before had open.

A process that is restarted for ever, or sites that change hands often, must not fill the store with segments of a
few pairs. The new segment is made aside and appears whole; only then do the old ones go. Whoever finds both, after
a crash, drops those whose pairs are all in a later one.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.core.records import Record
from services.core.segments import SegmentReader, SegmentWriter

ASIDE = ".merged"
_MIN_SEGMENTS = 8
_GROUP = 256


@dataclass(frozen=True, slots=True)
class Small:
    """A sealed segment, as far as merging it goes. mtime_s: of its last append."""

    name: str
    num_bytes: int
    opened_at_s: float
    mtime_s: float


def worth_merging(segments: Sequence[Small], *, max_bytes: int, max_span_s: float) -> list[Small]:
    """The newest of `segments` (oldest first) that together stay small and close in time; none if they are few."""
    found: list[Small] = []
    for segment in reversed(segments):
        span_s = max(s.mtime_s for s in [segment, *found]) - segment.opened_at_s
        if sum(s.num_bytes for s in [segment, *found]) > max_bytes or span_s > max_span_s:
            break
        found.append(segment)
    return found[::-1] if len(found) >= _MIN_SEGMENTS else []


def merge(
    directory: Path,
    segments: Sequence[Small],
    *,
    into: str,
    token: int,
    is_current: Callable[[str, Record], bool],
) -> list[Record]:
    """Copy the records of `segments` that are current into a new, sealed segment; return them, in order.

    The payloads of what is returned are empty. Raises OSError.
    """
    opened_at_s = min(segment.opened_at_s for segment in segments)
    writer = SegmentWriter(directory, into, token=token, suffix=ASIDE, opened_at_s=opened_at_s)
    copied: list[Record] = []
    with contextlib.closing(writer):
        for segment in segments:
            group: list[Record] = []
            with contextlib.closing(SegmentReader(directory, segment.name)) as reader:
                reader.refresh()
                for row, _ in reader.ids():
                    record = reader.read_record(row)
                    if record is not None and is_current(segment.name, record):
                        group.append(record)
                    if len(group) >= _GROUP:
                        writer.append(group)
                        copied += [_bare(record) for record in group]
                        group = []
            if group:
                writer.append(group)
                copied += [_bare(record) for record in group]
        writer.publish(mtime_s=max(segment.mtime_s for segment in segments))
    return copied


def _bare(record: Record) -> Record:
    ids = record.captured_at_ns, record.seq, record.camera_at_ns, record.clock_offset_ns
    return Record(*ids, b"", b"", b"", record.flags)
