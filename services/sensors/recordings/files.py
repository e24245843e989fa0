"""Single files of recordings: images as they are, heatmaps as arrays, times as exact integers.

Everything raises RecordingError with a remedy, or FileNotFoundError; nothing is unpickled. It knows no format's
layout.
"""

from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg

from services.core.errors import RecordingError
from services.core.frames import MAX_HEATMAP_BYTES, MAX_IMAGE_BYTES, Heatmap, ImageEncoding

_JPEG_START = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"
_END_WITHIN_BYTES = 64

HEATMAP_SUFFIXES = (".npy", ".png")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


class ImageFile(NamedTuple):
    """A compressed image, untouched. shape: (H, W, 3) once decoded."""

    data: bytes
    shape: tuple[int, int, int]
    encoding: ImageEncoding


def read_image(path: Path) -> ImageFile:
    """The file's bytes, with size and encoding out of its header; pixels are not decoded."""
    data = _read_bytes(path, most=MAX_IMAGE_BYTES)
    tail = data[-_END_WITHIN_BYTES:]
    if data.startswith(_PNG_START) and data[12:16] == b"IHDR":
        if _PNG_END not in tail:
            raise RecordingError(f"PNG of {len(data)} bytes has no end", remedy="copy the file again")
        width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
        return ImageFile(data, (height, width, 3), "png")
    if data.startswith(_JPEG_START):
        if _JPEG_END not in tail:
            raise RecordingError(f"JPEG of {len(data)} bytes has no end", remedy="copy the file again")
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise RecordingError(f"JPEG header cannot be read: {error}", remedy="copy the file again") from None
        return ImageFile(data, (int(height), int(width), 3), "jpeg")
    raise RecordingError(
        f"image starts with {data[:4].hex() or 'nothing'}", remedy="only PNG and JPEG are understood"
    )


def decode_image(data: bytes) -> npt.NDArray[np.uint8]:
    """returns: (H, W, 3) uint8, RGB. Raises RecordingError where the pixels cannot be decoded."""
    pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise RecordingError("pixels cannot be decoded", remedy="copy the file again")
    return np.ascontiguousarray(pixels[:, :, ::-1], dtype=np.uint8)


def read_array(path: Path) -> npt.NDArray[Any]:
    """The array in an .npy file, as it is. Object arrays are refused, never unpickled."""
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise
    except (ValueError, EOFError, OSError) as error:
        raise RecordingError(f"array cannot be read: {error}", remedy="save it with numpy.save") from None
    if not isinstance(array, np.ndarray):
        raise RecordingError("file is an archive of arrays", remedy="save one array per file with numpy.save")
    return array


def read_heatmap(path: Path) -> Heatmap:
    """A heatmap from .npy or an 8- or 16-bit grey .png.

    returns: uint8, float16 or float32; wider real types become float32. Its shape is not judged here.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        heatmap = read_array(path)
    elif suffix == ".png":
        data = _read_bytes(path, most=MAX_HEATMAP_BYTES)
        if not data.startswith(_PNG_START) or _PNG_END not in data[-_END_WITHIN_BYTES:]:
            raise RecordingError(f"{len(data)} bytes are no whole PNG", remedy="copy the file again")
        decoded = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
        if decoded is None:
            raise RecordingError("pixels cannot be decoded", remedy="copy the file again")
        if decoded.ndim != 2:
            raise RecordingError(f"radar PNG has shape {decoded.shape}", remedy="save one grey channel")
        heatmap = decoded
    else:
        raise RecordingError(f"radar file ends in {suffix!r}", remedy=f"use one of {', '.join(HEATMAP_SUFFIXES)}")
    if heatmap.dtype.kind not in "uif":
        raise RecordingError(
            f"radar array has dtype {heatmap.dtype.name}", remedy="save real values, such as power in dB"
        )
    if heatmap.dtype.name in ("uint8", "float16", "float32"):
        return heatmap
    return heatmap.astype(np.float32)


def unix_ns(text: str) -> int:
    """Unix seconds as text -> nanoseconds, exactly: a float would round to about 200 ns. Raises RecordingError."""
    try:
        nanoseconds = int(Decimal(text.strip()).scaleb(9).to_integral_value())
    except (InvalidOperation, ValueError, OverflowError):
        nanoseconds = -1
    if not 0 <= nanoseconds < 2**63:
        raise RecordingError(f"time is {text.strip()[:40]!r}", remedy="write unix seconds, 1574859771.744660272")
    return nanoseconds


def _read_bytes(path: Path, *, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RecordingError(f"file cannot be read: {error.strerror}", remedy="check its permissions") from None
    if len(data) > most:
        raise RecordingError(f"file has more than {most} bytes", remedy="crop or resample it")
    return data
