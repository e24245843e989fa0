"""One segment of the rolling store: a data file and an index file, both append-only.

    NAME.seg   16-byte header, then payloads: meta (JSON) + radar bytes + image bytes
    NAME.idx   64-byte header, then one 64-byte row a pair: its id, where its payload is, two checksums

A row counts only if it is whole and its checksum holds, so a crash between any two writes costs at most the
pairs that were never acknowledged. Segments know nothing of sites, limits or eviction; the store does.
"""

import contextlib
import os
import struct
import zlib
from collections.abc import Sequence
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
        self._seg = os.open(seg_path, os.O_RDWR | os.O_CREAT, 0o644)
        if is_new:  # 1. the data file with its header, 2. the index: a reader finds segments by their index
            os.pwrite(self._seg, _SEG_MAGIC, 0)
            os.fsync(self._seg)
        self._idx = os.open(self._idx_path, os.O_RDWR | os.O_CREAT, 0o644)
        if os.fstat(self._idx).st_size < len(_IDX_MAGIC):
            os.pwrite(self._idx, _IDX_MAGIC, 0)
            os.fsync(self._idx)
            sync_directory(directory)
        self._recover(directory)

    def _recover(self, directory: Path) -> None:
        reader = SegmentReader(directory, self.name)
        num_good = reader.refresh()
        while num_good and not reader.is_intact(num_good - 1):
            num_good -= 1
        rows = reader.rows[:num_good]
        reader.close()
        self.ids: list[FrameId] = [FrameId(int(row["captured_at_ns"]), int(row["seq"])) for row in rows]
        self._end = len(_SEG_MAGIC)
        if num_good:
            last = rows[-1]
            self._end = int(last["offset"]) + sum(
                int(last[name]) for name in ("meta_bytes", "radar_bytes", "image_bytes")
            )
        self._truncate()

    def _truncate(self) -> None:
        os.ftruncate(self._idx, len(_IDX_MAGIC) + len(self.ids) * ROW.itemsize)
        os.ftruncate(self._seg, self._end)

    @property
    def num_bytes(self) -> int:
        return self._end + len(_IDX_MAGIC) + len(self.ids) * ROW.itemsize

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
            _write_all(self._idx, [b"".join(rows)], len(_IDX_MAGIC) + len(self.ids) * ROW.itemsize)
            os.fdatasync(self._seg)
            os.fdatasync(self._idx)
        except OSError:
            with contextlib.suppress(OSError):
                self._truncate()
            raise
        self._end = end
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

    def refresh(self) -> int:
        """Take in rows that were appended since; return how many there are."""
        size = os.fstat(self._idx).st_size - len(_IDX_MAGIC)
        num_rows = max(0, size // ROW.itemsize)
        if num_rows < len(self.rows):
            self.rows = self.rows[:num_rows]  # a failed append was taken back
        elif num_rows > len(self.rows):
            start = len(_IDX_MAGIC) + len(self.rows) * ROW.itemsize
            raw = os.pread(self._idx, (num_rows - len(self.rows)) * ROW.itemsize, start)
            fresh = np.frombuffer(raw[: len(raw) // ROW.itemsize * ROW.itemsize], ROW)
            self.rows = np.concatenate([self.rows, fresh])
        return len(self.rows)

    @property
    def num_bytes(self) -> int:
        return os.fstat(self._seg).st_size + os.fstat(self._idx).st_size

    def read_radar(self, index: int, *, site: str) -> RadarFrame | None:
        """The radar frame of one row, or None if its checksum does not hold."""
        row = self.rows[index]
        meta_bytes = int(row["meta_bytes"])
        data = os.pread(self._seg, meta_bytes + int(row["radar_bytes"]), int(row["offset"]))
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
        image = os.pread(self._seg, int(row["image_bytes"]), offset + meta_bytes + radar_bytes)
        if len(image) != int(row["image_bytes"]) or zlib.crc32(image) != int(row["image_crc"]):
            return None
        meta = orjson.loads(os.pread(self._seg, meta_bytes, offset))["camera"]
        return CameraFrame(
            site,
            meta["seq"],
            int(row["camera_at_ns"]),
            image=image,
            shape=tuple(meta["shape"]),
            encoding=meta["encoding"],
        )

    def is_intact(self, index: int) -> bool:
        return self.read_radar(index, site="-") is not None and self.read_camera(index, site="-") is not None

    def close(self) -> None:
        os.close(self._idx)
        os.close(self._seg)


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
