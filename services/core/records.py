"""One pair as bytes: the row that describes it, its meta, radar and image, and the checksums over them.

Version 2 keeps a record together in the data file: the 64-byte row, meta (JSON), radar, image, padded to 64.
Version 1 (read only) has its rows in the index alone, with the fields of `_ROW_V1`. In memory both are ROW.
Nothing here knows files.
"""

import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from services.core.errors import BadFrameError
from services.core.frames import CLASSES, HEATMAP_DTYPES, CameraFrame, FrameId, RadarFrame, Seen, SeenObject

ALIGNMENT = 64
ROW = np.dtype(
    [
        ("captured_at_ns", "<i8"),
        ("seq", "<i8"),
        ("camera_at_ns", "<i8"),
        ("clock_offset_ns", "<i8"),
        ("offset", "<u8"),  # of the meta, in the data file
        ("meta_bytes", "<u4"),
        ("radar_bytes", "<u4"),
        ("image_bytes", "<u4"),
        ("image_sum", "<u4"),
        ("sum", "<u4"),  # over the row before it, meta and radar
        ("flags", "<u4"),  # changes in place, so no checksum covers it
    ]
)
FLAGS_AT = 60
"""Where the flags stand in a row of either version."""
IMAGE_DROPPED = 1
"""Flag of the row that lies nearest to the truth: in the data file (version 2) or the index (version 1)."""
_SEEN_SHIFT = 8
PIN_CONFIDENCE = 0.5
"""A detector that is less sure than this does not pin a pair."""
_ROW_V1 = np.dtype(
    [
        ("captured_at_ns", "<i8"),
        ("seq", "<i8"),
        ("camera_at_ns", "<i8"),
        ("offset", "<u8"),
        ("meta_bytes", "<u4"),
        ("radar_bytes", "<u4"),
        ("image_bytes", "<u4"),
        ("image_sum", "<u4"),
        ("reserved", "<u8"),
        ("sum", "<u4"),
        ("flags", "<u4"),
    ]
)
_ROW_FIELDS = struct.Struct("<qqqqQIIIIII")
_HEAD = struct.Struct("<qqqqQIIII")  # the fields of ROW up to its checksum
_HEAD_V1 = struct.Struct("<qqqQIIIIQ")
_TAIL = struct.Struct("<II")
_RADAR_ENDS = b',"camera":'
"""Follows the radar's part of a meta, and stands nowhere inside it: a string would have its quotes escaped."""
_MAX_KNOWN = 256
Rows = npt.NDArray[np.void]
Buffer = bytes | memoryview


class Row(NamedTuple):
    """The fields of one ROW as plain numbers: to take them out of an array one by one costs ten times as much."""

    captured_at_ns: int
    seq: int
    camera_at_ns: int
    clock_offset_ns: int
    offset: int
    meta_bytes: int
    radar_bytes: int
    image_bytes: int
    image_sum: int
    sum: int
    flags: int

    @classmethod
    def of(cls, row: np.void) -> "Row":
        return cls._make(_ROW_FIELDS.unpack(row.tobytes()))

    @property
    def id(self) -> FrameId:
        return FrameId(self.captured_at_ns, self.seq)

    @property
    def image_at(self) -> int:
        return self.offset + self.meta_bytes + self.radar_bytes


@dataclass(frozen=True, slots=True)
class _RadarMeta:
    dtype: Any
    shape: tuple[int, ...]
    num_bytes: int
    axes: tuple[str, ...]
    unit: str
    channels: tuple[str, ...]


_known_metas: dict[bytes, _RadarMeta] = {}


@dataclass(frozen=True, slots=True)
class Pair:
    """A radar frame and the camera frame that saw the same instant.

    clock_offset_ns: what ingest subtracted from the camera's clock before pairing. seen: what a detector saw.
    """

    radar: RadarFrame
    camera: CameraFrame
    clock_offset_ns: int = 0
    seen: Seen | None = None

    @property
    def id(self) -> FrameId:
        return self.radar.id

    @property
    def sync_error_ns(self) -> int:
        """Camera time, on the radar's clock, minus radar time."""
        return self.camera.captured_at_ns - self.clock_offset_ns - self.radar.captured_at_ns


@dataclass(frozen=True, slots=True)
class Record:
    """A pair in parts that can be written without being understood."""

    captured_at_ns: int
    seq: int
    camera_at_ns: int
    clock_offset_ns: int
    meta: bytes
    radar: Buffer
    image: bytes
    flags: int

    @property
    def id(self) -> FrameId:
        return FrameId(self.captured_at_ns, self.seq)

    @property
    def seen(self) -> str:
        """The class that a sure detector saw, or ""."""
        return seen_class(self.flags)

    @property
    def num_bytes(self) -> int:
        return ROW.itemsize + len(self.meta) + memoryview(self.radar).nbytes + len(self.image)


def record_of(pair: Pair) -> Record:
    radar = np.ascontiguousarray(pair.radar.heatmap).reshape(-1).view(np.uint8).data
    at_ns, seq = pair.id
    return Record(
        at_ns,
        seq,
        pair.camera.captured_at_ns,
        pair.clock_offset_ns,
        meta=_meta(pair),
        radar=radar,
        image=pair.camera.image,
        flags=_flags(pair.seen),
    )


def row_bytes(record: Record, *, offset: int) -> bytes:
    """The row of a record whose meta will lie at `offset`."""
    radar = memoryview(record.radar)
    head = _HEAD.pack(
        record.captured_at_ns,
        record.seq,
        record.camera_at_ns,
        record.clock_offset_ns,
        offset,
        len(record.meta),
        radar.nbytes,
        len(record.image),
        _sum32(record.image),
    )
    return head + _TAIL.pack(_sum32(radar, seed=_sum32(head + record.meta)), record.flags)


def rows_from_bytes(data: bytes, *, version: int) -> Rows:
    """data: whole rows of an index. returns: (N,) ROW."""
    if version != 1:
        return np.frombuffer(data, ROW)
    old = np.frombuffer(data, _ROW_V1)
    rows = np.zeros(len(old), ROW)
    for name in rows.dtype.names or ():
        if name in (old.dtype.names or ()):
            rows[name] = old[name]
    return rows


def is_whole(row: Row, payload: bytes, *, version: int) -> bool:
    """Whether the checksum of a row holds. payload: meta and radar bytes."""
    if not row.meta_bytes or len(payload) != row.meta_bytes + row.radar_bytes:
        return False
    if version == 1:
        head = _HEAD_V1.pack(*row[:3], *row[4:9], 0)  # it had no clock offset
        return zlib.crc32(payload, zlib.crc32(head)) == row.sum
    seed = _sum32(_HEAD.pack(*row[:9]) + payload[: row.meta_bytes])
    return _sum32(memoryview(payload)[row.meta_bytes :], seed=seed) == row.sum


def is_image_whole(row: Row, image: bytes, *, version: int) -> bool:
    if len(image) != row.image_bytes:
        return False
    return (zlib.crc32(image) if version == 1 else _sum32(image)) == row.image_sum


def end_of(row: np.void) -> int:
    """Where the image of a row ends in the data file."""
    fields = Row.of(row)
    return fields.image_at + fields.image_bytes


def aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def seen_class(flags: int) -> str:
    code = flags >> _SEEN_SHIFT & 0xFF
    return CLASSES[code - 1] if 0 < code <= len(CLASSES) else ""


def radar_from(row: Row, payload: bytes, *, site: str) -> RadarFrame:
    """payload: meta and radar bytes, whose checksum holds. The heatmap is a read-only view of them.

    Its values were checked before they were written, and are the same ones, so they are not checked again.
    """
    meta = _radar_meta(payload[: row.meta_bytes])
    if meta.num_bytes != row.radar_bytes:
        raise BadFrameError(
            f"heatmap stored for site {site} has {row.radar_bytes} bytes, {meta.shape} needs {meta.num_bytes}",
            remedy="its writer was broken; move the segment away",
        )
    heatmap = np.ndarray(meta.shape, meta.dtype, payload, row.meta_bytes)
    return RadarFrame(site, row.seq, row.captured_at_ns, heatmap, meta.axes, meta.unit, meta.channels)


def _radar_meta(meta: bytes) -> _RadarMeta:
    """What a meta says of the radar. A radar says the same in every frame, so it is known by its bytes."""
    part, camera, _ = meta.partition(_RADAR_ENDS)
    known = _known_metas.get(part)
    if known is not None:
        return known
    radar = orjson.loads(part + b"}" if camera else meta)["radar"]
    if radar["dtype"] not in HEATMAP_DTYPES:
        raise BadFrameError(f"stored heatmap has dtype {radar['dtype']}", remedy="its writer was another version")
    dtype, shape = np.dtype(radar["dtype"]).newbyteorder("<"), tuple(radar["shape"])
    known = _RadarMeta(
        dtype,
        shape,
        dtype.itemsize * math.prod(shape),
        axes=tuple(radar["axes"]),
        unit=radar["unit"],
        channels=tuple(radar["channels"]),
    )
    if len(_known_metas) >= _MAX_KNOWN:
        _known_metas.clear()
    _known_metas[part] = known
    return known


def camera_from(row: Row, meta: bytes, image: bytes, *, site: str) -> CameraFrame | None:
    """None if the meta is damaged: its checksum is with the radar's."""
    try:
        camera = orjson.loads(meta)["camera"]
    except (orjson.JSONDecodeError, KeyError):
        return None
    return CameraFrame(
        site,
        camera["seq"],
        row.camera_at_ns,
        image=image,
        shape=tuple(camera["shape"]),
        encoding=camera["encoding"],
    )


def seen_from(meta: bytes) -> Seen | None:
    """What a detector saw; None if there was none, or the meta is damaged."""
    try:
        seen = orjson.loads(meta).get("seen")
    except orjson.JSONDecodeError:
        return None
    if seen is None:
        return None
    objects = (SeenObject(o["label"], o["confidence"], tuple(o["box"])) for o in seen["objects"])
    return Seen(seen["label"], seen["confidence"], tuple(objects), tuple(seen["flags"]), seen["detector"])


def _meta(pair: Pair) -> bytes:
    radar, camera = pair.radar, pair.camera
    meta: dict[str, Any] = {
        "radar": {
            "dtype": radar.heatmap.dtype.name,
            "shape": radar.heatmap.shape,
            "axes": radar.axes,
            "unit": radar.unit,
            "channels": radar.channels,
        },
        "camera": {"seq": camera.seq, "shape": camera.shape, "encoding": camera.encoding},
    }
    if pair.seen is not None:
        meta["seen"] = pair.seen
    return orjson.dumps(meta, option=orjson.OPT_SERIALIZE_NUMPY)


def _flags(seen: Seen | None) -> int:
    if seen is None or seen.confidence < PIN_CONFIDENCE or seen.label not in CLASSES:
        return 0
    return CLASSES.index(seen.label) + 1 << _SEEN_SHIFT


def _sum32(data: Buffer, *, seed: int = 0) -> int:
    return xxhash.xxh3_64_intdigest(data, seed) & 0xFFFFFFFF
