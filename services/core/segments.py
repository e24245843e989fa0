"""One segment of the rolling store: a data file and an index file, both append-only.

    NAME.seg   16-byte header, then payloads: meta (JSON) + radar bytes + image bytes
    NAME.idx   64-byte header, then one 64-byte row a pair: its id, where its payload is, two checksums

A row counts only if it is whole and its checksum holds, so a crash between any two writes costs at most the
pairs that were never acknowledged. A row of zeros is void: recovery leaves one where a payload is damaged.
Segments know nothing of sites, limits or eviction; the store does.
"""

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from services.core.codec import heatmap_from_bytes
from services.core.errors import StoreError
from services.core.files import sync_directory
from services.core.frames import CameraFrame, FrameId, RadarFrame

FORMAT_VERSION = 1
_SEG_MAGIC = b"ECHOSEG" + bytes([FORMAT_VERSION]) + bytes(8)
_IDX_MAGIC = b"ECHOIDX" + bytes([FORMAT_VERSION]) + bytes(56)
ROW = np.dtype(
    [
        ("captured_at_ns", "<i8"),
        ("seq", "<i8"),
        ("camera_at_ns", "<i8"),
        ("offset", "<u8"),
        ("meta_bytes", "<u4"),
        ("radar_bytes", "<u4"),
        ("image_bytes", "<u4"),
        ("image_crc", "<u4"),
        ("reserved", "<u8"),
        ("crc", "<u4"),  # over the row before it, meta and radar
        ("padding", "<u4"),
    ]
)
_CHECKED = struct.Struct("<qqqQIIIIQ")  # the fields of ROW up to its checksum
_CHECK = struct.Struct("<II")
Rows = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Pair:
    """A radar frame and the camera frame that saw the same instant."""

    radar: RadarFrame
    camera: CameraFrame

    @property
    def id(self) -> FrameId:
        return self.radar.id

    @property
    def sync_error_ns(self) -> int:
        """Camera time minus radar time."""
        return self.camera.captured_at_ns - self.radar.captured_at_ns


class SegmentWriter:
    """Appends groups of pairs durably. Opening an existing segment first cuts off what a crash left behind."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self._idx_path = directory / f"{name}.idx"
        seg_path = directory / f"{name}.seg"
        is_new = not self._idx_path.exists()
        with contextlib.ExitStack() as opened:
            self._seg = os.open(seg_path, os.O_RDWR | os.O_CREAT, 0o644)
            opened.callback(os.close, self._seg)
            if is_new:  # 1. the data file with its header, 2. the index: a reader finds segments by their index
                os.pwrite(self._seg, _SEG_MAGIC, 0)
                os.fsync(self._seg)
            self._idx = os.open(self._idx_path, os.O_RDWR | os.O_CREAT, 0o644)
            opened.callback(os.close, self._idx)
            if os.fstat(self._idx).st_size < len(_IDX_MAGIC):
                os.pwrite(self._idx, _IDX_MAGIC, 0)
                os.fsync(self._idx)
                sync_directory(directory)
            self._recover(directory)
            opened.pop_all()

    def _recover(self, directory: Path) -> None:
        """Check every row: disks take pages in any order. Cut the damaged end off, void damage before it."""
        with contextlib.closing(SegmentReader(directory, self.name)) as reader:
            good = [row for row in range(reader.refresh()) if reader.is_intact(row)]
            rows = reader.rows
        self.ids: list[FrameId] = [_row_id(rows[row]) for row in good]
        self._num_rows = good[-1] + 1 if good else 0
        self._end = len(_SEG_MAGIC)
        if good:
            last = rows[good[-1]]
            self._end = int(last["offset"]) + sum(
                int(last[name]) for name in ("meta_bytes", "radar_bytes", "image_bytes")
            )
        self._truncate()
        damaged = sorted(set(range(self._num_rows)) - set(good))
        for row in damaged:
            os.pwrite(self._idx, bytes(ROW.itemsize), _row_offset(row))
        if damaged:
            os.fdatasync(self._idx)

    def _truncate(self) -> None:
        for fd, size in ((self._idx, _row_offset(self._num_rows)), (self._seg, self._end)):
            if os.fstat(fd).st_size != size:  # else the file would look as if it had just been written
                os.ftruncate(fd, size)

    @property
    def num_rows(self) -> int:
        """Rows in the index, void ones too; `ids` has those that count."""
        return self._num_rows

    @property
    def num_bytes(self) -> int:
        return self._end + _row_offset(self._num_rows)

    def append(self, pairs: Sequence[Pair]) -> None:
        """Write `pairs` and return once they are on disk: all or, after an OSError, none."""
        rows: list[bytes] = []
        chunks: list[Any] = []
        end = self._end
        for pair in pairs:
            meta, image = _meta(pair), pair.camera.image
            radar = np.ascontiguousarray(pair.radar.heatmap).reshape(-1).view(np.uint8).data
            row = _CHECKED.pack(
                *pair.id, pair.camera.captured_at_ns, end, len(meta), len(radar), len(image), zlib.crc32(image), 0
            )
            rows.append(row + _CHECK.pack(zlib.crc32(radar, zlib.crc32(meta, zlib.crc32(row))), 0))
            chunks += [meta, radar, image]
            end += len(meta) + len(radar) + len(image)
        try:
            # The order is the correctness: 1. payloads, 2. rows, 3. both to disk. A row that reaches the disk
            # before its payload fails its checksum and is dropped on recovery.
            _write_all(self._seg, chunks, self._end)
            _write_all(self._idx, [b"".join(rows)], _row_offset(self._num_rows))
            os.fdatasync(self._seg)
            os.fdatasync(self._idx)
        except OSError:
            with contextlib.suppress(OSError):
                self._truncate()
            raise
        self._end = end
        self._num_rows += len(pairs)
        self.ids += [pair.id for pair in pairs]

    def close(self) -> None:
        os.close(self._seg)
        os.close(self._idx)


class SegmentReader:
    """Random access to the whole pairs of a segment, in this or another process, while it is written."""

    def __init__(self, directory: Path, name: str) -> None:
        """Raises FileNotFoundError if the segment was evicted, StoreError for an unknown version."""
        self.name = name
        self._idx = os.open(directory / f"{name}.idx", os.O_RDONLY)
        try:
            self._seg = os.open(directory / f"{name}.seg", os.O_RDONLY)
        except OSError:
            os.close(self._idx)
            raise
        header = os.pread(self._idx, len(_IDX_MAGIC), 0)
        if len(header) == len(_IDX_MAGIC) and header != _IDX_MAGIC:
            self.close()
            raise StoreError(
                f"segment {directory / name} starts with {header[:8]!r}, expected {_IDX_MAGIC[:8]!r}",
                remedy="it was written by another version; move it away or upgrade",
            )
        self.rows: Rows = np.zeros(0, ROW)
        self.is_reloaded = False

    def refresh(self) -> int:
        """Take in rows that were appended since; return how many there are.

        `is_reloaded` tells whether known rows had changed, so that all were read anew: the writer takes a failed
        append back and may write others in its place.
        """
        known = self.rows[-1:]
        fresh = self._read_rows(len(self.rows) - len(known))
        self.is_reloaded = fresh[: len(known)].tobytes() != known.tobytes()
        if self.is_reloaded:
            self.rows = self._read_rows(0)
        elif len(fresh) > len(known):
            self.rows = np.concatenate([self.rows, fresh[len(known) :]])
        return len(self.rows)

    def _read_rows(self, first: int) -> Rows:
        start = _row_offset(first)
        raw = os.pread(self._idx, max(0, os.fstat(self._idx).st_size - start), start)
        return np.frombuffer(raw[: len(raw) // ROW.itemsize * ROW.itemsize], ROW)

    def ids(self, *, first: int = 0) -> Iterator[tuple[int, FrameId]]:
        """Row and id of every pair from row `first` on; void rows are passed over."""
        for row in range(first, len(self.rows)):
            if self.rows[row]["meta_bytes"]:
                yield row, _row_id(self.rows[row])

    @property
    def num_bytes(self) -> int:
        return os.fstat(self._seg).st_size + os.fstat(self._idx).st_size

    def read_radar(self, index: int, *, site: str) -> RadarFrame | None:
        """The radar frame of one row, or None if its checksum does not hold."""
        row = self.rows[index]
        meta_bytes = int(row["meta_bytes"])
        data = self._read(int(row["offset"]), meta_bytes + int(row["radar_bytes"]))
        if not meta_bytes or zlib.crc32(data, zlib.crc32(row.tobytes()[: _CHECKED.size])) != int(row["crc"]):
            return None
        meta = orjson.loads(data[:meta_bytes])["radar"]
        heatmap = heatmap_from_bytes(
            memoryview(data)[meta_bytes:], dtype=meta["dtype"], shape=tuple(meta["shape"])
        )
        return RadarFrame(
            site,
            int(row["seq"]),
            int(row["captured_at_ns"]),
            heatmap=heatmap,
            axes=tuple(meta["axes"]),
            unit=meta["unit"],
            channels=tuple(meta["channels"]),
        )

    def read_camera(self, index: int, *, site: str) -> CameraFrame | None:
        """The camera frame of one row, or None if its checksum does not hold."""
        row = self.rows[index]
        meta_bytes, radar_bytes = int(row["meta_bytes"]), int(row["radar_bytes"])
        offset = int(row["offset"])
        image = self._read(offset + meta_bytes + radar_bytes, int(row["image_bytes"]))
        if len(image) != int(row["image_bytes"]) or zlib.crc32(image) != int(row["image_crc"]):
            return None
        try:
            meta = orjson.loads(self._read(offset, meta_bytes))["camera"]
        except (orjson.JSONDecodeError, KeyError):  # its checksum is with the radar frame's
            return None
        return CameraFrame(
            site,
            meta["seq"],
            int(row["camera_at_ns"]),
            image=image,
            shape=tuple(meta["shape"]),
            encoding=meta["encoding"],
        )

    def _read(self, offset: int, num_bytes: int) -> bytes:
        """Bytes of the data file; none if a damaged row points outside it."""
        is_inside = offset + num_bytes <= os.fstat(self._seg).st_size
        return os.pread(self._seg, num_bytes, offset) if is_inside else b""

    def is_intact(self, index: int) -> bool:
        return self.read_radar(index, site="-") is not None and self.read_camera(index, site="-") is not None

    def close(self) -> None:
        os.close(self._idx)
        os.close(self._seg)


def _row_offset(row: int) -> int:
    return len(_IDX_MAGIC) + row * ROW.itemsize


def _row_id(row: np.void) -> FrameId:
    return FrameId(int(row["captured_at_ns"]), int(row["seq"]))


def _meta(pair: Pair) -> bytes:
    radar, camera = pair.radar, pair.camera
    return orjson.dumps(
        {
            "radar": {
                "dtype": radar.heatmap.dtype.name,
                "shape": radar.heatmap.shape,
                "axes": radar.axes,
                "unit": radar.unit,
                "channels": radar.channels,
            },
            "camera": {"seq": camera.seq, "shape": camera.shape, "encoding": camera.encoding},
        }
    )


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
