"""Frames to stream entries and back: a small JSON header and the raw bytes, nothing else.

The contract is docs/asyncapi.yaml. Any language can write an entry; this module checks every one and says
what is wrong with it. It does not know Redis.
"""

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.core.errors import BadFrameError
from services.core.frames import (
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


_HEADERS: dict[str, type[RadarHeader] | type[CameraHeader] | type[LabelHeader]] = {
    "radar": RadarHeader,
    "camera": CameraHeader,
    "labels": LabelHeader,
}


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
    try:
        header = _HEADERS[kind].model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "header"
        value = repr(first.get("input"))[:80]
        raise BadFrameError(
            f"{kind} header field {where} is {value}: {first['msg']}", remedy="see docs/asyncapi.yaml"
        ) from None
    data = fields.get(b"data", b"")
    match header:
        case RadarHeader():
            return _decode_radar(site, header, data)
        case CameraHeader():
            return _decode_camera(site, header, data)
        case LabelHeader():
            label = check_label(header.label)
            return Label(site, header.seq, header.captured_at_ns, label=label, source=header.source)


def _decode_radar(site: str, header: RadarHeader, data: bytes) -> RadarFrame:
    if len(header.axes) != len(header.shape):
        raise BadFrameError(
            f"axes {header.axes} do not fit shape {header.shape}", remedy="name one axis per dimension"
        )
    heatmap = heatmap_from_bytes(data, dtype=header.dtype, shape=header.shape)
    return RadarFrame(
        site,
        header.seq,
        header.captured_at_ns,
        heatmap=heatmap,
        axes=header.axes,
        unit=header.unit,
        channels=header.channels,
    )


def heatmap_from_bytes(data: bytes | memoryview, *, dtype: str, shape: tuple[int, ...]) -> Any:
    """A read-only, checked view of `data` as a heatmap. Raises BadFrameError where the length does not fit."""
    little = np.dtype(dtype).newbyteorder("<")
    expected = little.itemsize
    for size in shape:
        expected *= size
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


def _decode_camera(site: str, header: CameraHeader, data: bytes) -> CameraFrame:
    start, end = (_JPEG_START, _JPEG_END) if header.encoding == "jpeg" else (_PNG_START, _PNG_END)
    if len(data) > MAX_IMAGE_BYTES:
        raise BadFrameError(f"image has {len(data)} bytes", remedy=f"send at most {MAX_IMAGE_BYTES}")
    if not data.startswith(start):
        raise BadFrameError(
            f"data starts with {data[:4].hex()}, which is not {header.encoding}",
            remedy="send the compressed file as it is, and name its encoding",
        )
    if end not in data[-64:]:
        raise BadFrameError(
            f"{header.encoding} image of {len(data)} bytes has no end marker", remedy="send the whole file"
        )
    return CameraFrame(
        site, header.seq, header.captured_at_ns, image=data, shape=header.shape, encoding=header.encoding
    )
