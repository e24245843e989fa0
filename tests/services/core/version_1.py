"""A segment as version 1 of the store wrote it: the tests keep a writer of what must stay readable."""

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import orjson

from services.core.records import Pair


def write_version_1(site_dir: Path, pairs: Sequence[Pair], *, name: str = "00000001") -> None:
    """NAME.seg: 16-byte header, then meta, radar, image of each pair. NAME.idx: 64-byte header, 64-byte rows."""
    site_dir.mkdir(parents=True, exist_ok=True)
    seg, idx = b"ECHOSEG\x01" + bytes(8), b"ECHOIDX\x01" + bytes(56)
    for pair in pairs:
        heatmap, camera = pair.radar.heatmap, pair.camera
        meta = orjson.dumps(
            {
                "radar": {
                    "dtype": heatmap.dtype.name,
                    "shape": heatmap.shape,
                    "axes": pair.radar.axes,
                    "unit": pair.radar.unit,
                    "channels": pair.radar.channels,
                },
                "camera": {"seq": camera.seq, "shape": camera.shape, "encoding": camera.encoding},
            }
        )
        radar, image = heatmap.tobytes(), camera.image
        sizes = len(meta), len(radar), len(image)
        row = struct.pack("<qqqQIIIIQ", *pair.id, camera.captured_at_ns, len(seg), *sizes, zlib.crc32(image), 0)
        idx += row + struct.pack("<II", zlib.crc32(radar, zlib.crc32(meta, zlib.crc32(row))), 0)
        seg += meta + radar + image
    (site_dir / f"{name}.seg").write_bytes(seg)
    (site_dir / f"{name}.idx").write_bytes(idx)
