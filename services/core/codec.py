"""Frames to stream entries and back: a small JSON header and the raw bytes, nothing else.

The contract is docs/asyncapi.yaml. Any language can write an entry; this module checks every one and says
what is wrong with it. It does not know Redis.
"""

import math
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.core.errors import BadFrameError
from services.core.frames import (
    HEATMAP_DTYPES,
    MAX_HEATMAP_BYTES,
    MAX_IMAGE_BYTES,
    CameraFrame,
    Frame,
    Label,
    RadarFrame,
    check_heatmap,
    check_label,
)

Entry = dict[bytes, bytes]

_LITTLE = {name: np.dtype(name).newbyteorder("<") for name in HEATMAP_DTYPES}
_JPEG_START = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"

_Ns = Annotated[int, Field(ge=0, lt=2**63)]
_Seq = Annotated[int, Field(ge=0, lt=2**63)]
_Size = Annotated[int, Field(ge=1, le=16384)]


class _Header(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    v: Literal[1]
    seq: _Seq
    captured_at_ns: _Ns


class RadarHeader(_Header):
    sensor: Literal["radar"]
    encoding: Literal["raw"] = "raw"
    dtype: Literal["float16", "float32", "uint8"]
    shape: Annotated[tuple[_Size, ...], Field(min_length=2, max_length=3)]
    axes: Annotated[tuple[str, ...], Field(min_length=2, max_length=3)]
    unit: Annotated[str, Field(max_length=32)] = "dB"
    channels: Annotated[tuple[str, ...], Field(max_length=64)] = ()


class CameraHeader(_Header):
    sensor: Literal["camera"]
    encoding: Literal["jpeg", "png"]
    shape: tuple[_Size, _Size, Literal[3]]


class LabelHeader(_Header):
    sensor: Literal["label"]
    label: str
    source: Annotated[str, Field(max_length=64)] = "annotator"


Header = RadarHeader | CameraHeader | LabelHeader

_HEADERS: dict[str, type[Header]] = {
    "radar": RadarHeader,
    "camera": CameraHeader,
    "labels": LabelHeader,
}
_KNOWN: dict[str, dict[bytes, Header]] = {kind: {} for kind in _HEADERS}
_MAX_KNOWN = 256
_MAX_KNOWN_BYTES = 1024


def encode(frame: Frame) -> dict[str, bytes | memoryview]:
    """One stream entry: `header` (JSON) and `data` (raw bytes; a view of the frame's own memory)."""
    header: BaseModel
    data: bytes | memoryview
    match frame:
        case RadarFrame(heatmap=heatmap):
            check_heatmap(heatmap)
            header = RadarHeader(
                v=1,
                sensor="radar",
                seq=frame.seq,
                captured_at_ns=frame.captured_at_ns,
                dtype=heatmap.dtype.name,  # type: ignore[arg-type]
                shape=heatmap.shape,
                axes=frame.axes,
                unit=frame.unit,
                channels=frame.channels,
            )
            little = np.ascontiguousarray(heatmap, dtype=heatmap.dtype.newbyteorder("<"))
            data = little.reshape(-1).view(np.uint8).data
        case CameraFrame():
            header = CameraHeader(
                v=1,
                sensor="camera",
                seq=frame.seq,
                captured_at_ns=frame.captured_at_ns,
                encoding=frame.encoding,
                shape=frame.shape,  # type: ignore[arg-type]
            )
            data = frame.image
        case Label():
            header = LabelHeader(
                v=1,
                sensor="label",
                seq=frame.seq,
                captured_at_ns=frame.captured_at_ns,
                label=check_label(frame.label),
                source=frame.source,
            )
            data = b""
    return {"header": header.model_dump_json().encode(), "data": data}


def decode(site: str, kind: str, fields: Entry) -> Frame:
    """The frame in one entry of stream `kind` ("radar", "camera" or "labels").

    A heatmap is a read-only view of the entry's bytes: no copy. Raises BadFrameError with the reason.
    """
    raw = fields.get(b"header")
    if raw is None:
        raise BadFrameError(f"entry has fields {sorted(fields)}", remedy="send the fields header and data")
    seq, captured_at_ns, header = _read_header(kind, raw)
    data = fields.get(b"data", b"")
    match header:
        case RadarHeader():
            if len(header.axes) != len(header.shape):
                raise BadFrameError(
                    f"axes {header.axes} do not fit shape {header.shape}", remedy="name one axis per dimension"
                )
            return RadarFrame(
                site,
                seq,
                captured_at_ns,
                heatmap=heatmap_from_bytes(data, dtype=header.dtype, shape=header.shape),
                axes=header.axes,
                unit=header.unit,
                channels=header.channels,
            )
        case CameraHeader():
            _check_image(data, header.encoding)
            return CameraFrame(site, seq, captured_at_ns, image=data, shape=header.shape, encoding=header.encoding)
        case LabelHeader():
            return Label(site, seq, captured_at_ns, label=check_label(header.label), source=header.source)


def _read_header(kind: str, raw: bytes) -> tuple[int, int, Header]:
    """Sequence number, capture time, and a checked header whose own two numbers may be another frame's.

    The headers of a stream differ only in these two, so the rest is checked once and then known by its bytes.
    """
    known = _KNOWN[kind]
    rest = b""
    try:
        values = orjson.loads(raw)
        seq, captured_at_ns = values.pop("seq"), values.pop("captured_at_ns")
        rest = orjson.dumps(values)
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError):
        pass  # no object, or one without the two: the model says so in words
    else:
        header = known.get(rest)
        if (
            header
            and type(seq) is type(captured_at_ns) is int
            and 0 <= seq < 2**63
            and 0 <= captured_at_ns < 2**63
        ):
            return seq, captured_at_ns, header
    try:
        header = _HEADERS[kind].model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "header"
        value = repr(first.get("input"))[:80]
        raise BadFrameError(
            f"{kind} header field {where} is {value}: {first['msg']}", remedy="see docs/asyncapi.yaml"
        ) from None
    if 0 < len(rest) <= _MAX_KNOWN_BYTES:
        if len(known) >= _MAX_KNOWN:
            known.clear()
        known[rest] = header
    return header.seq, header.captured_at_ns, header


def heatmap_from_bytes(data: bytes | memoryview, *, dtype: str, shape: tuple[int, ...]) -> Any:
    """A read-only, checked view of `data` as a heatmap. Raises BadFrameError where the length does not fit."""
    little = _LITTLE.get(dtype)
    if little is None:
        raise BadFrameError(f"heatmap dtype is {dtype}", remedy=f"send one of {', '.join(HEATMAP_DTYPES)}")
    expected = little.itemsize * math.prod(shape)
    if expected > MAX_HEATMAP_BYTES:
        raise BadFrameError(
            f"heatmap of shape {shape} and dtype {dtype} takes {expected} bytes",
            remedy=f"send at most {MAX_HEATMAP_BYTES} bytes; crop or resample at the sensor",
        )
    if len(data) != expected:
        raise BadFrameError(
            f"heatmap data has {len(data)} bytes, shape {shape} and dtype {dtype} need {expected}",
            remedy="send the whole array, C order, little-endian",
        )
    return check_heatmap(np.frombuffer(data, dtype=little).reshape(shape))


def _check_image(data: bytes, encoding: str) -> None:
    """Raises BadFrameError unless `data` starts and ends as a file of `encoding` does."""
    start, end = (_JPEG_START, _JPEG_END) if encoding == "jpeg" else (_PNG_START, _PNG_END)
    if len(data) > MAX_IMAGE_BYTES:
        raise BadFrameError(f"image has {len(data)} bytes", remedy=f"send at most {MAX_IMAGE_BYTES}")
    if not data.startswith(start):
        raise BadFrameError(
            f"data starts with {data[:4].hex()}, which is not {encoding}",
            remedy="send the compressed file as it is, and name its encoding",
        )
    if end not in data[-64:]:
        raise BadFrameError(
            f"{encoding} image of {len(data)} bytes has no end marker", remedy="send the whole file"
        )
