"""One segment of the rolling store: a data file and its index, both append-only while one writer has them open.

    NAME.seg   64-byte header (version, token, time it was opened), then records: row, meta, radar, image
    NAME.idx   64-byte header, then a copy of each row, so that readers need not walk the data file
    NAME.end   once it is sealed: how much of both counts (`services.core.sealing`)

Only the data file is synced at an append; the index follows once the data is on disk, and can be made from it
again (`services.core.recovery`). A record counts only if its checksums hold. A row of zeros is void: recovery
leaves one where a record is damaged. Segments of version 1 are read, never written: their rows are in the index
alone. Segments know nothing of sites, limits or eviction; the store does.
"""

import contextlib
import os
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from services.core.disks import erase, file_bytes
from services.core.errors import StoreError
from services.core.fence import is_held
from services.core.files import sync_directory
from services.core.frames import CameraFrame, FrameId, RadarFrame, Seen
from services.core.headers import (
    FORMAT_VERSION,
    HEADER_BYTES,
    data_header,
    index_bytes,
    index_header,
    maker_of,
    version_of,
)
from services.core.records import (
    ALIGNMENT,
    FLAGS_AT,
    IMAGE_DROPPED,
    ROW,
    Pair,
    Record,
    Row,
    Rows,
    aligned,
    camera_from,
    is_image_whole,
    is_whole,
    radar_from,
    row_bytes,
    rows_from_bytes,
    seen_from,
)
from services.core.sealing import Seal, read_seal, write_seal

__all__ = ["FORMAT_VERSION", "HEADER_BYTES", "ROW", "Pair", "SegmentReader", "SegmentWriter"]

_FLAGS = struct.Struct("<I")


class SegmentWriter:
    """Makes a segment and appends groups of records to it durably.

    After an append that failed nothing more goes into the segment: another writer may have seen, and counted, what
    got through. It is for the caller to seal it and to make a new one.
    """

    def __init__(
        self, directory: Path, name: str, *, token: int, suffix: str = "", opened_at_s: float | None = None
    ) -> None:
        """suffix: of names that no reader looks for. opened_at_s: None for now. Raises OSError."""
        self.name = name
        self._directory = directory
        self._suffix = suffix
        self.num_rows = 0
        self.end = HEADER_BYTES
        self.is_broken = False
        self.opened_at_s = time.time() if opened_at_s is None else opened_at_s
        seg_path = directory / f"{name}.seg{suffix}"
        with contextlib.ExitStack() as opened:
            # 1. the data file with its header, 2. the index: readers find segments by their index
            self._seg = os.open(seg_path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            opened.callback(os.close, self._seg)
            opened.callback(_unlink, seg_path)
            header = data_header(token=token, opened_at_ns=round(self.opened_at_s * 1e9))
            os.pwrite(self._seg, header, 0)
            os.fsync(self._seg)
            self._idx = os.open(
                seg_path.with_name(f"{name}.idx{suffix}"), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644
            )
            opened.callback(os.close, self._idx)
            opened.callback(_unlink, seg_path.with_name(f"{name}.idx{suffix}"))
            os.pwrite(self._idx, index_header(), 0)
            sync_directory(directory)
            opened.pop_all()

    @property
    def num_bytes(self) -> int:
        """What it takes of the disk, without what a failed append left behind."""
        stat = os.fstat(self._seg)
        return self.end - (stat.st_size - file_bytes(stat)) + index_bytes(self.num_rows)

    def append(self, records: Sequence[Record]) -> None:
        """Write `records` and return once they are on disk: all or, after an OSError, none that counts."""
        assert not self.is_broken
        rows: list[bytes] = []
        chunks: list[Any] = []
        end = self.end
        for record in records:
            rows.append(row_bytes(record, offset=end + ALIGNMENT))
            chunks += [rows[-1], record.meta, record.radar, record.image]
            size = record.num_bytes
            chunks.append(bytes(aligned(size) - size))
            end += aligned(size)
        self.is_broken = True
        # The order is the correctness: 1. records, 2. to disk, 3. the index. A reader never sees a row whose
        # record could still be lost; a row that a crash takes is made again from the record.
        _write_all(self._seg, chunks, self.end)
        os.fdatasync(self._seg)
        _write_all(self._idx, [b"".join(rows)], index_bytes(self.num_rows))
        self.is_broken = False
        self.end = end
        self.num_rows += len(records)

    def seal(self) -> Seal:
        """Say durably what counts; return what does, less if another writer said so first. Raises OSError."""
        self.is_broken = True  # a seal that fails half way may hold all the same
        os.fsync(self._idx)
        seal = write_seal(self._directory, self.name, Seal(self.num_rows, self.end))
        with contextlib.suppress(OSError):  # what lies behind is never read; its room is useful
            if os.fstat(self._seg).st_size > seal.num_bytes:
                os.ftruncate(self._seg, seal.num_bytes)
        return seal

    def publish(self, *, mtime_s: float) -> None:
        """Give a segment that was made aside its names, sealed, its age that of `mtime_s`. Raises OSError."""
        os.utime(self._idx, (mtime_s, mtime_s))
        os.fsync(self._idx)
        aside, path = (self._directory / f"{self.name}{suffix}" for suffix in (f".seg{self._suffix}", ".seg"))
        aside.rename(path)
        write_seal(self._directory, self.name, Seal(self.num_rows, self.end))
        aside.with_suffix("").with_suffix(f".idx{self._suffix}").rename(path.with_suffix(".idx"))  # now it is seen
        sync_directory(self._directory)

    def close(self) -> None:
        os.close(self._seg)
        os.close(self._idx)


class SegmentReader:
    """Random access to the whole pairs of a segment, in this or another process, while it is written.

    directory: where it lies now; whoever knows that it moved says so. token: of the writer that made it.
    """

    def __init__(self, directory: Path, name: str) -> None:
        """Raises FileNotFoundError if the segment was evicted, StoreError for an unknown version."""
        self.name = name
        self.directory = directory
        self._seg = -1
        self._known_bytes = 0  # the data file has been that large
        self._idx = os.open(directory / f"{name}.idx", os.O_RDONLY)
        try:
            self._seg = os.open(directory / f"{name}.seg", os.O_RDONLY)
            self._read_header(directory / name)
        except BaseException:
            self.close()
            raise
        self.rows: Rows = np.zeros(0, ROW)
        self.seal: Seal | None = None
        self.is_reloaded = False

    def _read_header(self, path: Path) -> None:
        seg, idx = os.pread(self._seg, HEADER_BYTES, 0), os.pread(self._idx, HEADER_BYTES, 0)
        versions = {version_of(seg, path=path), version_of(idx, path=path)} - {0}
        self.version = min(versions, default=FORMAT_VERSION)
        self.token, self.opened_at_ns = maker_of(seg) if self.version != 1 else (0, 0)

    @property
    def is_sealed(self) -> bool:
        return self.seal is not None

    def refresh(self) -> int:
        """Take in rows that were appended since; return how many there are.

        `is_reloaded` tells whether known rows were taken back, so that all were read anew: the seal left out an
        append that had failed.
        """
        self.is_reloaded = False
        if self.seal is not None:
            return len(self.rows)
        # The order is the correctness: 1. rows, 2. the seal, 3. who writes. Rows without a seal count if the site
        # was still their writer's after they were read: then whoever takes it over finds them too.
        fresh = self.read_rows(len(self.rows))
        self.seal = read_seal(self.directory, self.name)
        if self.seal is None and len(fresh) and not is_held(_site_dir(self.directory), token=self.token):
            return len(self.rows)
        if self.seal is not None:
            self.is_reloaded = self.seal.num_rows < len(self.rows)
            fresh = fresh[: max(0, self.seal.num_rows - len(self.rows))]
            self.rows = self.rows[: self.seal.num_rows]
        if len(fresh):
            self.rows = np.concatenate([self.rows, fresh])
        if self.seal is not None and self.version != 1:
            os.close(self._idx)  # never read again; many sites have many segments
            self._idx = -1
        return len(self.rows)

    def read_rows(self, first: int) -> Rows:
        """Rows of the index from `first` on, whether or not they count."""
        start = index_bytes(first)
        raw = os.pread(self._idx, max(0, os.fstat(self._idx).st_size - start), start)
        return rows_from_bytes(raw[: len(raw) // ROW.itemsize * ROW.itemsize], version=self.version)

    def ids(self, *, first: int = 0) -> Iterator[tuple[int, FrameId]]:
        """Row and id of every pair from row `first` on; void rows are passed over."""
        part = self.rows[first:]
        columns = (part[name].tolist() for name in ("captured_at_ns", "seq", "meta_bytes"))
        for row, (at_ns, seq, meta_bytes) in enumerate(zip(*columns, strict=True), first):
            if meta_bytes:
                yield row, FrameId(at_ns, seq)

    @property
    def num_bytes(self) -> int:
        """What it takes of the disk."""
        idx_bytes = index_bytes(len(self.rows)) if self._idx < 0 else os.fstat(self._idx).st_size
        return file_bytes(os.fstat(self._seg)) + idx_bytes

    def read_radar(self, index: int, *, site: str) -> RadarFrame | None:
        """The radar frame of one row, or None if its checksum does not hold."""
        row = Row.of(self.rows[index])
        payload = self._payload(row)
        return None if payload is None else radar_from(row, payload, site=site)

    def read_camera(self, index: int, *, site: str) -> CameraFrame | None:
        """The camera frame of one row, or None if its checksum does not hold or its image was dropped."""
        row = Row.of(self.rows[index])
        image = self._image(row)
        if not is_image_whole(row, image, version=self.version) or not self.has_image(index):
            return None
        return camera_from(row, self._meta(row), image, site=site)

    def read_seen(self, index: int) -> Seen | None:
        """What a detector saw in the image of one row."""
        return seen_from(self._meta(Row.of(self.rows[index])))

    def read_record(self, index: int) -> Record | None:
        """One row to be written elsewhere, without its image if that was dropped; None if it is damaged."""
        row = Row.of(self.rows[index])
        payload = self._payload(row)
        image = self._image(row)
        flags = self.flags(index)
        if payload is None or not (is_image_whole(row, image, version=self.version) or self._is_dropped(row)):
            return None
        if self._is_dropped(row):  # asked after the image was read: it may just have gone
            image, flags = b"", flags | IMAGE_DROPPED
        meta, radar = payload[: row.meta_bytes], memoryview(payload)[row.meta_bytes :]
        return Record(*row[:4], meta, radar, image, flags)

    def flags(self, index: int) -> int:
        """What was known of a row when it was written, and whether its image was dropped since."""
        row = Row.of(self.rows[index])
        return row.flags | (IMAGE_DROPPED if self._is_dropped(row) else 0)

    def has_image(self, index: int) -> bool:
        row = Row.of(self.rows[index])
        return row.image_bytes > 0 and not self._is_dropped(row)

    def is_intact(self, index: int) -> bool:
        return self.is_row_intact(self.rows[index])

    def is_row_intact(self, row: np.void) -> bool:
        """Whether the record that `row` points to is whole. A dropped image is no damage."""
        fields = Row.of(row)
        if self._payload(fields) is None:
            return False
        return self.is_row_image_whole(row) or self._is_dropped(fields)

    def is_row_image_whole(self, row: np.void) -> bool:
        fields = Row.of(row)
        return is_image_whole(fields, self._image(fields), version=self.version)

    def drop_images(self, indices: Sequence[int]) -> int:
        """Remove the images of rows for good; return how many were still there. Raises OSError.

        1. mark them, durably, 2. remove the bytes. After a crash between the two, call it again.
        """
        num_marked = 0
        suffix = "idx" if self.version == 1 else "seg"
        flags_fd = os.open(self.directory / f"{self.name}.{suffix}", os.O_RDWR)
        try:
            times = os.fstat(flags_fd)
            seg_fd = os.open(self.directory / f"{self.name}.seg", os.O_RDWR)
            try:
                rows = [Row.of(self.rows[index]) for index in indices]
                for row in rows:
                    if not self._is_dropped(row):
                        os.pwrite(flags_fd, _FLAGS.pack(row.flags | IMAGE_DROPPED), self._flags_at(row))
                        num_marked += row.image_bytes > 0
                os.fdatasync(flags_fd)
                for row in rows:
                    erase(seg_fd, row.image_at, row.image_bytes)
                os.fdatasync(seg_fd)
            finally:
                os.close(seg_fd)
            if self.version == 1:  # the age of a segment is that of its index
                os.utime(flags_fd, ns=(times.st_atime_ns, times.st_mtime_ns))
        finally:
            os.close(flags_fd)
        return num_marked

    def close(self) -> None:
        for fd in (self._idx, self._seg):
            if fd >= 0:
                os.close(fd)
        self._idx = self._seg = -1

    def _payload(self, row: Row) -> bytes | None:
        """Meta and radar bytes of a row, if their checksum holds."""
        data = self.read_bytes(row.offset, row.meta_bytes + row.radar_bytes)
        return data if is_whole(row, data, version=self.version) else None

    def _meta(self, row: Row) -> bytes:
        return self.read_bytes(row.offset, row.meta_bytes)

    def _image(self, row: Row) -> bytes:
        return self.read_bytes(row.image_at, row.image_bytes)

    def _is_dropped(self, row: Row) -> bool:
        """As the file says now."""
        at = self._flags_at(row)
        if self.version == 1:
            raw = os.pread(self._idx, _FLAGS.size, at) if self._idx >= 0 else b""
        else:
            raw = self.read_bytes(at, _FLAGS.size)
        return len(raw) == _FLAGS.size and bool(_FLAGS.unpack(raw)[0] & IMAGE_DROPPED)

    def _flags_at(self, row: Row) -> int:
        if self.version != 1:
            return max(row.offset - ROW.itemsize, 0) + FLAGS_AT
        rows = self.rows if len(self.rows) else self.read_rows(0)
        return index_bytes(int(np.argmax(rows["offset"] == row.offset))) + FLAGS_AT

    def read_bytes(self, offset: int, num_bytes: int) -> bytes:
        """Bytes of the data file; none if a damaged row points outside it, or the segment is closed.

        Raises StoreError if the disk refuses.
        """
        if self._seg < 0:
            return b""
        try:
            if offset + num_bytes > self._known_bytes:
                self._known_bytes = os.fstat(self._seg).st_size
            return os.pread(self._seg, num_bytes, offset) if offset + num_bytes <= self._known_bytes else b""
        except OSError as error:
            raise StoreError(
                f"cannot read segment {self.directory / self.name}: {error.strerror}", remedy="check the disk"
            ) from error


def _site_dir(directory: Path) -> Path:
    return directory.parent if directory.name.startswith("writer-") else directory


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _write_all(fd: int, chunks: Sequence[Any], offset: int) -> None:
    """pwritev until everything is written; the kernel takes at most 1,024 chunks and may write less."""
    pending = [memoryview(chunk).cast("B") for chunk in chunks if len(chunk)]
    while pending:
        written = os.pwritev(fd, pending[:512], offset)
        offset += written
        done = 0
        while done < len(pending) and written >= pending[done].nbytes:
            written -= pending[done].nbytes
            done += 1
        pending = pending[done:]
        if written:
            pending[0] = pending[0][written:]
