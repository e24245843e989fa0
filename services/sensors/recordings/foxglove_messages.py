"""Stream entries as messages that Foxglove shows, and back, bit for bit. It knows neither files nor streams.

    radar    foxglove.Grid              rows are range, columns azimuth, one field for each channel
    camera   foxglove.CompressedImage   the JPEG or PNG, byte for byte
    labels   echosight.Label            the entry's header itself, as JSON

A Grid knows no float16: those values travel as float32, which holds each of them exactly. What else a Foxglove
schema has no place for (seq, dtype, axes, unit, ...) is in one field more than the published schema has, `header`:
the entry's header, as it came. The schemas inside a file describe that field too.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from foxglove_schemas_protobuf.CompressedImage_pb2 import CompressedImage
from foxglove_schemas_protobuf.Grid_pb2 import Grid
from foxglove_schemas_protobuf.PackedElementField_pb2 import PackedElementField
from google.protobuf.descriptor_pb2 import FieldDescriptorProto  # type: ignore[import-untyped]
from google.protobuf.descriptor_pool import DescriptorPool  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from google.protobuf.message_factory import GetMessageClass  # type: ignore[import-untyped]
from mcap_protobuf.schema import build_file_descriptor_set
from pydantic import ValidationError

from services.core import codec
from services.core.errors import BadFrameError
from services.core.frames import CameraFrame, Frame, Label, RadarFrame
from services.core.streams import Kind

BIN_M = 0.1
"""A bin's size in Foxglove's 3D panel: what it is in the world, no header says."""

_HEADER_FIELD = 1000  # far from all numbers that Foxglove has given away
_NUMERIC_TYPES = {"uint8": PackedElementField.UINT8, "float32": PackedElementField.FLOAT32}


@dataclass(frozen=True, slots=True)
class MessageType:
    """What an MCAP file says of a kind of message, for readers that know nothing of us."""

    schema_name: str
    schema_encoding: str
    schema: bytes
    encoding: str


def to_message(frame: Frame, header: bytes) -> bytes:
    """The message for a valid frame. header: that of the frame's stream entry, kept as it is."""
    match frame:
        case RadarFrame():
            return _radar_message(frame, header)
        case CameraFrame():
            image = _CompressedImage(
                frame_id=f"{frame.site}_camera", format=frame.encoding, data=frame.image, header=header.decode()
            )
            _set_time(image, frame)
            return bytes(image.SerializeToString())
        case Label():
            return header


def to_entry(kind: Kind, message: bytes) -> codec.Entry:
    """The stream entry that a message was made of, for codec.decode. Raises BadFrameError where it is damaged."""
    try:
        match kind:
            case "radar":
                return _radar_entry(message)
            case "camera":
                image = _CompressedImage.FromString(message)
                return {b"header": image.header.encode(), b"data": image.data}
            case "labels":
                return {b"header": message, b"data": b""}
    except DecodeError as error:
        raise BadFrameError(f"message is damaged: {error}", remedy="copy the file again") from None


def _radar_message(frame: RadarFrame, header: bytes) -> bytes:
    heatmap = frame.heatmap
    cells = heatmap[..., np.newaxis] if heatmap.ndim == 2 else np.moveaxis(heatmap, 0, -1)
    if cells.dtype == np.float16:
        cells = cells.astype(np.float32)
    _, num_columns, num_channels = cells.shape
    grid = _Grid(
        frame_id=f"{frame.site}_radar",
        column_count=num_columns,
        cell_stride=num_channels * cells.itemsize,
        row_stride=num_columns * num_channels * cells.itemsize,
        data=cells.astype(cells.dtype.newbyteorder("<"), copy=False).tobytes(),
        header=header.decode(),
    )
    _set_time(grid, frame)
    grid.pose.position.x = -num_columns * BIN_M / 2  # straight ahead of the origin, as far as bins can tell
    grid.pose.orientation.w = 1.0
    grid.cell_size.x = grid.cell_size.y = BIN_M
    for channel in range(num_channels):
        name = frame.channels[channel] if len(frame.channels) == num_channels else f"channel_{channel}"
        grid.fields.add(
            name=name or f"channel_{channel}",
            offset=channel * cells.itemsize,
            type=_NUMERIC_TYPES[cells.dtype.name],
        )
    return bytes(grid.SerializeToString())


def _radar_entry(message: bytes) -> codec.Entry:
    grid = _Grid.FromString(message)
    raw = grid.header.encode()
    try:
        header = codec.RadarHeader.model_validate_json(raw)
        travelled = np.dtype("float32" if header.dtype == "float16" else header.dtype).newbyteorder("<")
        *channels, num_rows, num_columns = header.shape
        cells = np.frombuffer(grid.data, travelled).reshape(num_rows, num_columns, *channels)
    except ValidationError:
        return {b"header": raw, b"data": b""}  # codec.decode says what is wrong with it
    except ValueError as error:
        raise BadFrameError(
            f"grid of {len(grid.data)} bytes does not fit its header: {error}", remedy="copy the file again"
        ) from None
    heatmap = np.moveaxis(cells, -1, 0) if channels else cells
    return {b"header": raw, b"data": heatmap.astype(np.dtype(header.dtype).newbyteorder("<")).tobytes()}


def _set_time(message: Any, frame: Frame) -> None:
    message.timestamp.seconds, message.timestamp.nanos = divmod(frame.captured_at_ns, 1_000_000_000)


def _with_header(published: Any) -> tuple[Any, MessageType]:
    """A published Foxglove message type with the field `header` added, and how a file describes it."""
    files = build_file_descriptor_set(published)
    pool = DescriptorPool()
    for file in files.file:  # dependencies come first
        if file.name == published.DESCRIPTOR.file.name:
            [message] = [found for found in file.message_type if found.name == published.DESCRIPTOR.name]
            message.field.add(
                name="header",
                json_name="header",
                number=_HEADER_FIELD,
                type=FieldDescriptorProto.TYPE_STRING,
                label=FieldDescriptorProto.LABEL_OPTIONAL,
            )
        pool.Add(file)
    name = published.DESCRIPTOR.full_name
    described = MessageType(name, "protobuf", files.SerializeToString(), "protobuf")
    return GetMessageClass(pool.FindMessageTypeByName(name)), described


_LABEL_SCHEMA = {
    "title": "echosight.Label",
    "description": "What someone says about the radar frame of this captured_at_ns and seq.",
    "type": "object",
    "properties": {
        "v": {"type": "integer"},
        "sensor": {"type": "string"},
        "seq": {"type": "integer"},
        "captured_at_ns": {"type": "integer"},
        "label": {"type": "string"},
        "source": {"type": "string"},
    },
    "required": ["v", "sensor", "seq", "captured_at_ns", "label"],
}

_Grid, _GRID = _with_header(Grid)
_CompressedImage, _COMPRESSED_IMAGE = _with_header(CompressedImage)

MESSAGE_TYPES: dict[Kind, MessageType] = {
    "radar": _GRID,
    "camera": _COMPRESSED_IMAGE,
    "labels": MessageType("echosight.Label", "jsonschema", orjson.dumps(_LABEL_SCHEMA), "json"),
}
"""By the kind of stream that an entry comes from."""
