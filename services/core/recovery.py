"""What a crash, or a writer that was fenced off, left of a segment: found out, put right, sealed.

The data file is the truth and the index a copy of its rows: each heals the other. Damage between whole records is
stepped over with whichever copy still tells how long the damaged one is. Only the writer that holds the site's
fence may call this.
"""

import contextlib
import os
from pathlib import Path

import numpy as np

from services.core.headers import HEADER_BYTES, index_bytes, index_header, version_of
from services.core.merging import ASIDE
from services.core.records import ALIGNMENT, FLAGS_AT, IMAGE_DROPPED, ROW, Rows, aligned, end_of, rows_from_bytes
from services.core.sealing import Seal, read_seal, write_seal
from services.core.segments import SegmentReader

SUFFIXES = (".seg", ".idx", ".end")
_VOID = bytes(ROW.itemsize)


def recover(directory: Path, name: str) -> Seal:
    """Check every record of a segment, make its index agree, and seal it if it is not; return the seal.

    A seal of no rows means that nothing in it counts. Raises OSError, StoreError for an unknown version.
    """
    index = directory / f"{name}.idx"
    if not index.exists() or index.stat().st_size < HEADER_BYTES:
        version = version_of(_head(directory / f"{name}.seg"), path=directory / name)
        if version == 1:  # its rows are lost with its index
            return write_seal(directory, name, Seal(0, 0))
        _write(index, index_header(), 0)
    seal = read_seal(directory, name)
    with contextlib.closing(SegmentReader(directory, name)) as reader:
        reader.rows = reader.read_rows(0)
        if reader.version == 1:
            rows = _walk_version_1(reader, index.read_bytes()[HEADER_BYTES:])
        else:
            limit = seal.num_bytes if seal else (directory / f"{name}.seg").stat().st_size
            rows = _walk(reader, limit=limit, healed=directory / f"{name}.seg")
        while rows and rows[-1] == _VOID:
            rows.pop()
        end = _end(rows, version=reader.version)
        if seal:
            rows = (rows + [_VOID] * seal.num_rows)[: seal.num_rows]
        header = index_header() if reader.version != 1 else index.read_bytes()[:HEADER_BYTES]
    _sync(directory / f"{name}.seg")  # what a paused writer got through by now counts: keep it
    _agree(index, header + b"".join(rows))
    return seal or _seal(directory, name, Seal(len(rows), end))


def recover_all(directory: Path) -> list[str]:
    """Seal every segment of a site, remove what no segment needs; return the names that count, oldest first.

    Raises OSError, StoreError for an unknown version.
    """
    for path in directory.iterdir():
        if path.name.endswith((ASIDE, ".aside")):
            path.unlink()
    names = []
    for name in sorted({path.stem for path in directory.iterdir() if path.suffix in SUFFIXES}):
        if not (directory / f"{name}.seg").exists():  # an eviction was cut short
            remove(directory, name)
            continue
        seal = read_seal(directory, name)
        if seal is None or not _has_rows(directory / f"{name}.idx", seal.num_rows):
            seal = recover(directory, name)
        if seal.num_rows and (directory / f"{name}.idx").exists():
            names.append(name)
        else:
            remove(directory, name)
    return names


def remove(directory: Path, name: str) -> None:
    """Remove a segment, its data first: without them it is gone. Raises OSError."""
    for suffix in SUFFIXES:
        (directory / f"{name}{suffix}").unlink(missing_ok=True)


def _seal(directory: Path, name: str, seal: Seal) -> Seal:
    held = write_seal(directory, name, seal)
    path = directory / f"{name}.seg"
    if 0 < held.num_bytes < path.stat().st_size:
        os.truncate(path, held.num_bytes)
    return held


def _walk(reader: SegmentReader, *, limit: int, healed: Path) -> list[bytes]:
    """Rows of a version 2 data file, in order, void where a record is damaged."""
    copies = reader.rows
    rows: list[bytes] = []
    position = HEADER_BYTES
    while position + ROW.itemsize <= limit:
        raw = reader.read_bytes(position, ROW.itemsize)
        row = rows_from_bytes(raw, version=2)[0] if raw else None
        copy = copies[len(rows)] if len(rows) < len(copies) else None
        if row is not None and _is_at(row, position, limit) and reader.is_row_intact(row):
            # The index keeps the flags as they were written; that an image was dropped stands in the data file.
            rows.append(raw[:FLAGS_AT] + (int(row["flags"]) & ~IMAGE_DROPPED).to_bytes(4, "little"))
            position = aligned(end_of(row))
        elif copy is not None and _is_at(copy, position, limit) and reader.is_row_intact(copy):
            rows.append(copy.tobytes())
            flags = int(copy["flags"]) | (0 if reader.is_row_image_whole(copy) else IMAGE_DROPPED)
            _write(healed, rows[-1][:FLAGS_AT] + flags.to_bytes(4, "little"), position)
            position = aligned(end_of(copy))
        else:
            found = _step_over(row, copies, len(rows), position, limit)
            if found is None:
                break
            num_void, position = found
            rows += [_VOID] * num_void
    return rows


def _step_over(row: np.void | None, copies: Rows, at: int, position: int, limit: int) -> tuple[int, int] | None:
    """How many records are damaged from `position` on, and where the next one starts; None if there is none."""
    for candidate in (copies[at] if at < len(copies) else None, row):
        if candidate is not None and _is_at(candidate, position, limit):
            return 1, aligned(end_of(candidate))
    for later in range(at + 1, len(copies)):
        start = int(copies[later]["offset"]) - ALIGNMENT
        if start > position and _is_at(copies[later], start, limit):
            return later - at, start
    return None


def _is_at(row: np.void, position: int, limit: int) -> bool:
    return int(row["meta_bytes"]) > 0 and int(row["offset"]) == position + ALIGNMENT and end_of(row) <= limit


def _walk_version_1(reader: SegmentReader, raw: bytes) -> list[bytes]:
    """Rows of a version 1 index, as they stand on disk, void where a record is damaged."""
    size = ROW.itemsize
    return [
        raw[index * size : (index + 1) * size] if reader.is_row_intact(row) else _VOID
        for index, row in enumerate(reader.rows)
    ]


def _end(rows: list[bytes], *, version: int) -> int:
    if not rows:
        return HEADER_BYTES
    end = end_of(rows_from_bytes(rows[-1], version=version)[0])
    return end if version == 1 else aligned(end)


def _agree(index: Path, wanted: bytes) -> None:
    """Make an index start with `wanted`, in place: readers have it open. Its age stays what it was."""
    fd = os.open(index, os.O_RDWR)
    try:
        times = os.fstat(fd)
        if os.pread(fd, len(wanted), 0) != wanted:
            os.pwrite(fd, wanted, 0)
            os.utime(fd, ns=(times.st_atime_ns, times.st_mtime_ns))
        os.fsync(fd)
    finally:
        os.close(fd)


def _has_rows(index: Path, num_rows: int) -> bool:
    return index.exists() and index.stat().st_size >= index_bytes(num_rows)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEADER_BYTES)


def _write(path: Path, data: bytes, offset: int) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
