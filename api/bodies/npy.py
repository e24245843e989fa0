"""NumPy's .npy format, versions 1 to 3, from bytes to a view: no file object, no copy, nothing unpickled.

Source: numpy.lib.format. `np.load` takes 40 us a frame, mostly for the header; senders repeat theirs, so a parsed
one is kept. It does not know what a heatmap is.
"""

import ast
import functools
import math
import struct
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from api.problems import UNREADABLE_BODY, WRONG_DTYPE, WRONG_SHAPE, ProblemError

MAGIC = b"\x93NUMPY"
MAX_HEADER_BYTES = 4096
MAX_DIMENSIONS = 8
_SAVE = "write it with numpy.save(file, heatmap)"
_KEYS = {"descr", "fortran_order", "shape"}


@dataclass(frozen=True, slots=True)
class NpyHeader:
    """What the data after it is. dtype_name: without byte order; num_bytes: of the data."""

    dtype: np.dtype[Any]
    dtype_name: str
    shape: tuple[int, ...]
    is_fortran: bool
    num_bytes: int


def read_npy(body: bytes) -> tuple[npt.NDArray[Any], str]:
    """The array in `body`, as a read-only view, and its dtype's name, which numpy is slow to spell.

    Raises ProblemError for anything but one whole plain array.
    """
    start = _data_start(body)
    header = parse_header(body[:start])
    num_bytes = len(body) - start
    if num_bytes != header.num_bytes:
        state = "is truncated" if num_bytes < header.num_bytes else "has bytes left over"
        raise ProblemError(
            UNREADABLE_BODY,
            f".npy body {state}: {num_bytes} data bytes, "
            f"shape {header.shape} of {header.dtype_name} takes {header.num_bytes}",
            remedy="send the whole file and nothing else",
        )
    flat = np.frombuffer(body, dtype=header.dtype, offset=start)
    return flat.reshape(header.shape, order="F" if header.is_fortran else "C"), header.dtype_name


def _data_start(body: bytes) -> int:
    if not body.startswith(MAGIC):
        raise ProblemError(
            UNREADABLE_BODY, f"body starts with {body[:6].hex(' ')}, which is not .npy", remedy=_SAVE
        )
    if len(body) < 12:
        raise ProblemError(UNREADABLE_BODY, f".npy body has only {len(body)} bytes", remedy="send the whole file")
    major = body[6]
    if major == 1:
        start = 10 + int(struct.unpack_from("<H", body, 8)[0])
    elif major in (2, 3):
        start = 12 + int(struct.unpack_from("<I", body, 8)[0])
    else:
        raise ProblemError(UNREADABLE_BODY, f".npy format version is {major}", remedy="write version 1, 2 or 3")
    if start > MAX_HEADER_BYTES:
        raise ProblemError(
            UNREADABLE_BODY, f".npy header takes {start} bytes", remedy=f"at most {MAX_HEADER_BYTES}; {_SAVE}"
        )
    if len(body) < start:
        raise ProblemError(
            UNREADABLE_BODY,
            f".npy body is truncated: {len(body)} bytes, its header alone takes {start}",
            remedy="send the whole file",
        )
    return start


@functools.lru_cache(maxsize=256)
def parse_header(header: bytes) -> NpyHeader:
    """All bytes before the data, checked. Raises ProblemError; what it raises for is not kept."""
    text = header[10 if header[6] == 1 else 12 :].decode("latin-1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            fields = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or set(fields) != _KEYS or not isinstance(fields["fortran_order"], bool):
        raise ProblemError(
            UNREADABLE_BODY,
            f".npy header is {text[:80]!r}",
            remedy=f"it must be a literal of descr, fortran_order and shape; {_SAVE}",
        )
    dtype = _dtype(fields["descr"])
    shape = _shape(fields["shape"])
    num_bytes = dtype.itemsize * math.prod(shape)
    return NpyHeader(dtype, dtype.name, shape, fields["fortran_order"], num_bytes)


def _dtype(descr: Any) -> np.dtype[Any]:
    """Plain numbers only: no objects (they would need unpickling), no records, no strings."""
    try:
        dtype = np.dtype(descr) if isinstance(descr, str) and len(descr) <= 8 else None
    except (TypeError, ValueError, SyntaxError):
        dtype = None
    if dtype is None or dtype.kind not in "biuf" or dtype.itemsize == 0:
        raise ProblemError(
            WRONG_DTYPE,
            f".npy dtype is {str(descr)[:80]!r}",
            remedy="send plain numbers: heatmap.astype(numpy.float32)",
        )
    return dtype


def _shape(shape: Any) -> tuple[int, ...]:
    is_shape = isinstance(shape, tuple) and all(type(size) is int and 0 <= size < 2**31 for size in shape)
    if not is_shape or len(shape) > MAX_DIMENSIONS:
        raise ProblemError(
            WRONG_SHAPE,
            f".npy shape is {str(shape)[:80]}",
            remedy="use a tuple of a few counts that are not negative",
        )
    return tuple(shape)
