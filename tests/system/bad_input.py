"""Entries that no sensor should send: every way to break the streams' contract that we could think of.

Each has a name, to find it by in a failure, and a fate: buried (dead letters), alone (within the contract, but so
far off in time that nobody can be its partner) or kept (a label, which needs no frame). It knows no server.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import orjson

from services.core.streams import Kind

Fate = Literal["buried", "alone", "kept"]
YEAR_2200_NS = 7_258_118_400 * 10**9
JPEG = b"\xff\xd8\xff\xe0" + bytes(60) + b"\xff\xd9"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(60) + b"IEND\xaeB`\x82"
_ODD_NUMBERS: tuple[Any, ...] = (-1, 2**63, 2**64, 10**400, 1.5, 1e300, "7", "", None, True, [], {})
"""What stands in `seq` and `captured_at_ns` and is no 63-bit count."""


@dataclass(frozen=True, slots=True)
class Bad:
    """One entry for stream `kind`."""

    name: str
    kind: Kind
    fields: dict[bytes, bytes]
    fate: Fate = "buried"


def bad_entries(rng: np.random.Generator, *, at_ns: int) -> list[Bad]:
    """One of each, in a random order. at_ns: a time that the good frames have now."""
    entries = [
        *_bad_headers(rng, at_ns),
        *_bad_fields(rng, at_ns),
        *_bad_heatmaps(rng, at_ns),
        *_bad_images(rng, at_ns),
        *_bad_labels(at_ns),
    ]
    return [entries[at] for at in rng.permutation(len(entries))]


def far_frames(number: int) -> tuple[Bad, Bad]:
    """A radar and a camera frame far off in time, hours from each other and from all with another number.

    Two in a row of one sensor would be a clock that was set: put a good frame between.
    """
    radar_ns = (0, YEAR_2200_NS, 1, 2**63 - 1)[number % 4]
    camera_ns = (YEAR_2200_NS, 3_600 * 10**9, 2**63 - 7_200 * 10**9, 10**15)[number % 4]
    far_ns = number * 4 * 3_600 * 10**9
    radar_ns = radar_ns - far_ns if radar_ns > YEAR_2200_NS // 2 else radar_ns + far_ns
    camera_ns = camera_ns - far_ns if camera_ns > YEAR_2200_NS // 2 else camera_ns + far_ns
    return (
        Bad("far radar", "radar", _radar(radar_ns), "alone"),
        Bad(
            "far camera, corrupt between its markers",
            "camera",
            _camera(camera_ns + 1_800 * 10**9 * (number % 4 != 2)),
            "alone",
        ),
    )


def huge_entries(at_ns: int) -> list[Bad]:
    """Entries of megabytes: what they claim, they have."""
    side = 1536
    return [
        Bad("huge heatmap", "radar", _radar(at_ns, bytes(side * side * 4), dtype="float32", shape=[side, side])),
        Bad("huge image", "camera", _camera(at_ns, JPEG[:4] + bytes(16 * 1024**2) + JPEG[-2:])),
        Bad("huge header", "radar", {b"header": b" " * 2**20 + b"{", b"data": b""}),
    ]


def _header(**values: Any) -> bytes:
    """orjson refuses numbers beyond 64 bits, which is what we want to send."""
    return orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY) if _fits(values) else _long_json(values)


def _fits(values: dict[str, Any]) -> bool:
    return not any(isinstance(value, int) and abs(value) >= 2**63 for value in values.values())


def _long_json(values: dict[str, Any]) -> bytes:
    parts = [
        orjson.dumps(key) + b":" + (str(value).encode() if type(value) is int else orjson.dumps(value))
        for key, value in values.items()
    ]
    return b"{" + b",".join(parts) + b"}"


def _radar(at_ns: Any, data: bytes = bytes(64), **values: Any) -> dict[bytes, bytes]:
    header = {"v": 1, "sensor": "radar", "seq": 0, "captured_at_ns": at_ns, "dtype": "uint8", "shape": [8, 8],
              "axes": ["range", "azimuth"]}  # fmt: skip
    return {b"header": _header(**header | values), b"data": data}


def _camera(at_ns: Any, data: bytes = JPEG, **values: Any) -> dict[bytes, bytes]:
    header = {
        "v": 1,
        "sensor": "camera",
        "seq": 0,
        "captured_at_ns": at_ns,
        "encoding": "jpeg",
        "shape": [8, 8, 3],
    }
    return {b"header": _header(**header | values), b"data": data}


def _label(at_ns: Any, **values: Any) -> dict[bytes, bytes]:
    header = {"v": 1, "sensor": "label", "seq": 0, "captured_at_ns": at_ns, "label": "car", "source": "soak"}
    return {b"header": _header(**header | values), b"data": b""}


def _bad_headers(rng: np.random.Generator, at_ns: int) -> Iterator[Bad]:
    whole = _radar(at_ns)[b"header"]
    texts = {
        "no bytes": b"",
        "random bytes": rng.bytes(int(rng.integers(1, 400))),
        "half a header": whole[: int(rng.integers(1, len(whole)))],
        "invalid UTF-8": whole.replace(b'"radar"', b'"ra\xff\xfedar"'),
        "a NUL": b"\0" + whole,
        "UTF-16": whole.decode().encode("utf-16"),
        "two objects": whole + whole,
        "an array": b"[1, 2, 3]",
        "a number": b"17",
        "null": b"null",
        "NaN": whole.replace(b":0,", b":NaN,"),
        "deep arrays": b"[" * 100_000,
        "deep arrays, closed": b"[" * 50_000 + b"]" * 50_000,
        "deep in a member": whole[:-1] + b',"x":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        "deep objects": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
        "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.",
    }
    for name, text in texts.items():
        yield Bad(f"header is {name}", "radar", {b"header": text, b"data": bytes(64)})
    for version in (0, 2, -1, 2**70, "1.0", None):
        yield Bad(f"version {version!r}", "radar", _radar(at_ns, v=version))
        yield Bad(f"version {version!r}", "camera", _camera(at_ns, v=version))
    for number in _ODD_NUMBERS[:6]:
        yield Bad(f"seq {str(number)[:20]}", "radar", _radar(at_ns, seq=number))
        yield Bad(f"time {str(number)[:20]}", "camera", _camera(number))
    for sensor in ("lidar", "camera", "", None):
        yield Bad(f"sensor {sensor!r}", "radar", _radar(at_ns, sensor=sensor))


def _bad_fields(rng: np.random.Generator, at_ns: int) -> Iterator[Bad]:
    whole = _radar(at_ns)
    yield Bad("no header", "radar", {b"data": whole[b"data"]})
    yield Bad("no data", "radar", {b"header": whole[b"header"]})
    yield Bad("other fields", "camera", {b"frame": rng.bytes(100), b"\xff\xfe": b"", b"": b"nameless"})
    yield Bad("many fields", "radar", {b"%d" % at: b"x" for at in range(500)})
    yield Bad("a name of 64 KiB", "radar", {b"n" * 65536: b""})
    yield Bad("upper case", "radar", {b"HEADER": whole[b"header"], b"DATA": whole[b"data"]})


def _bad_heatmaps(rng: np.random.Generator, at_ns: int) -> Iterator[Bad]:
    shapes: tuple[Any, ...] = (
        [],
        [64],
        [0, 64],
        [-8, -8],
        [8, 8, 1, 1],
        [16384, 16384],
        [16385, 1],
        [2**40, 2**40],
        ["8", "x"],
        [8.5, 8],
        None,
        "8x8",
    )
    for shape in shapes:
        yield Bad(f"shape {shape}", "radar", _radar(at_ns, shape=shape))
    for dtype in ("float64", "object", "O", ">f4", "int8", "", None):
        yield Bad(f"dtype {dtype!r}", "radar", _radar(at_ns, dtype=dtype))
    yield Bad("three axes for two", "radar", _radar(at_ns, axes=["channel", "range", "azimuth"]))
    yield Bad("half a heatmap", "radar", _radar(at_ns, rng.bytes(int(rng.integers(0, 64)))))
    yield Bad("a heatmap and more", "radar", _radar(at_ns, rng.bytes(int(rng.integers(65, 500)))))
    for value in (float("nan"), float("inf"), float("-inf"), 3e38, -20_000.0):
        heatmap = rng.normal(size=64).astype("<f4")
        heatmap[rng.integers(64)] = value
        yield Bad(f"value {value}", "radar", _radar(at_ns, heatmap.tobytes(), dtype="float32"))
    for bits in (0x7E00, 0x7C00, 0xFC00):
        heatmap_bytes = struct.pack("<63H", *range(63)) + struct.pack("<H", bits)
        yield Bad(f"float16 {bits:#x}", "radar", _radar(at_ns, heatmap_bytes, dtype="float16"))


def _bad_images(rng: np.random.Generator, at_ns: int) -> Iterator[Bad]:
    images = {
        "no bytes": b"",
        "random bytes": rng.bytes(int(rng.integers(1, 3000))),
        "a JPEG cut short": JPEG[: int(rng.integers(3, len(JPEG) - 1))],
        "a PNG": PNG,
        "text": b"<html>503 Service Unavailable</html>",
        "a JPEG without its start": JPEG[3:],
    }
    for name, image in images.items():
        yield Bad(f"image is {name}", "camera", _camera(at_ns, image))
    yield Bad("PNG is cut short", "camera", _camera(at_ns, PNG[:-12], encoding="png"))
    yield Bad("PNG is a JPEG", "camera", _camera(at_ns, JPEG, encoding="png"))
    for shape in ([0, 0, 3], [8, 8], [8, 8, 4], [2**31, 2**31, 3], [-1, 8, 3]):
        yield Bad(f"image shape {shape}", "camera", _camera(at_ns, shape=shape))
    yield Bad("image encoding gif", "camera", _camera(at_ns, encoding="gif"))


def _bad_labels(at_ns: int) -> Iterator[Bad]:
    for name in ("dragon", "", "Car", "car\0", None, 3, ["car"]):
        yield Bad(f"label {name!r}", "labels", _label(at_ns, label=name))
    yield Bad("label source of 65 letters", "labels", _label(at_ns, source="s" * 65))
    yield Bad("label of a time below zero", "labels", _label(-1))
    yield Bad("label of a frame that nobody sent", "labels", _label(YEAR_2200_NS), fate="kept")
