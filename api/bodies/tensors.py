"""Tensors of the Open Inference Protocol V2, between bytes or JSON and numpy. Pure; it does not know any model.

Binary data is little-endian, C order, without padding; a BYTES element is a 4-byte length and so many bytes.
"""

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from api.problems import UNREADABLE_BODY, WRONG_DTYPE, WRONG_SHAPE, ProblemError

BYTES = "BYTES"
DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"UINT{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
}
"""All but BYTES, whose arrays here hold `bytes` objects."""
MAX_DIMENSIONS = 8
MAX_BYTES_ELEMENTS = 65536
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
_END = object()
_LENGTH = struct.Struct("<I")


def datatype_of(array: npt.NDArray[Any]) -> str:
    """The protocol's name for the elements of `array`, which are little-endian."""
    return BYTES if array.dtype.kind == "O" else _NAMES[array.dtype]


def check_shape(shape: Any, name: str) -> tuple[int, ...]:
    """`shape` as a tuple. Raises ProblemError unless it is a list of a few counts."""
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise ProblemError(
            WRONG_SHAPE, f"shape of {name} is {str(shape)[:80]}", remedy="send a list of counts, [1, 2, 128, 64]"
        )
    if len(shape) > MAX_DIMENSIONS:
        raise ProblemError(
            WRONG_SHAPE, f"{name} has {len(shape)} dimensions", remedy=f"use at most {MAX_DIMENSIONS}"
        )
    return tuple(shape)


def from_binary(data: memoryview, *, name: str, datatype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A read-only view of `data` (BYTES: a copy). Raises ProblemError where it is not what it should be."""
    if datatype == BYTES:
        return _split(data, name, shape)
    dtype = _dtype(datatype, name)
    num_bytes = dtype.itemsize * math.prod(shape)
    if len(data) != num_bytes:
        raise ProblemError(
            WRONG_SHAPE,
            f"{name} has {len(data)} bytes, shape {list(shape)} of {datatype} takes {num_bytes}",
            remedy="send the whole tensor in C order, and nothing else",
        )
    if datatype == "BOOL":
        dtype = np.dtype(np.uint8)
        return np.frombuffer(data, dtype).reshape(shape).astype(np.bool_)
    return np.frombuffer(data, dtype).reshape(shape)


def from_json(data: Any, *, name: str, datatype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Flat or nested lists as an array of `shape`. Raises ProblemError."""
    if not isinstance(data, list):
        raise ProblemError(
            WRONG_DTYPE, f"data of {name} is {str(data)[:40]!r}", remedy="send a list, flat or nested"
        )
    if datatype == BYTES:
        return _texts(data, name, shape)
    dtype = _dtype(datatype, name)
    try:
        with np.errstate(all="ignore"):  # what overflows becomes infinite; whoever needs finite values looks
            array = np.array(data)
            if array.dtype.kind not in "biuf":
                raise ValueError(f"it holds {str(_leaf(data))[:40]!r}")
            if dtype.kind in "iu":
                _check_integers(array, dtype)
            array = array.astype(dtype)
    except (ValueError, TypeError, OverflowError) as error:
        raise ProblemError(
            WRONG_DTYPE,
            f"{name} is no regular array of {datatype}: {str(error)[:160]}",
            remedy="send lists of equally many numbers of this kind",
        ) from None
    return _shaped(array, name, shape)


def to_binary(array: npt.NDArray[Any]) -> bytes:
    """The bytes of a tensor as the protocol wants them."""
    if array.dtype.kind == "O":
        return b"".join(_LENGTH.pack(len(item)) + item for item in array.ravel())
    return array.tobytes() if array.dtype in _NAMES else array.astype(array.dtype.newbyteorder("<")).tobytes()


def to_json(array: npt.NDArray[Any]) -> Any:
    """The elements of a tensor, flat, as orjson (OPT_SERIALIZE_NUMPY) writes them."""
    if array.dtype == object:
        return [item.decode(errors="replace") for item in array.ravel()]
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.tolist() if array.dtype == np.float16 else flat


def _dtype(datatype: str, name: str) -> np.dtype[Any]:
    dtype = DATATYPES.get(datatype)
    if dtype is None:
        raise ProblemError(
            WRONG_DTYPE,
            f"datatype of {name} is {str(datatype)[:40]!r}",
            remedy=f"send one of {', '.join((*DATATYPES, BYTES))}",
        )
    return dtype


def _check_integers(array: npt.NDArray[Any], dtype: np.dtype[Any]) -> None:
    """Raises ValueError for a value that `dtype` does not hold."""
    if array.dtype.kind == "f":
        raise ValueError("it holds numbers that are not whole")
    limits = np.iinfo(dtype)
    if array.size and not limits.min <= int(array.min()) <= int(array.max()) <= limits.max:
        raise ValueError(f"it reaches from {array.min()} to {array.max()}")


def _leaf(nested: Any) -> Any:
    while isinstance(nested, list) and nested:
        nested = nested[0]
    return nested


def _shaped(array: npt.NDArray[Any], name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if array.size != math.prod(shape) or (array.ndim > 1 and array.shape != shape):
        raise ProblemError(
            WRONG_SHAPE,
            f"data of {name} is {list(array.shape)}, shape says {list(shape)}",
            remedy="send as many numbers as the shape says, flat or nested like it",
        )
    return array.reshape(shape)


def _texts(data: Sequence[Any], name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    flat: list[bytes] = []
    stack = [iter(data)]
    while stack:
        item = next(stack[-1], _END)
        if item is _END:
            stack.pop()
        elif isinstance(item, list) and len(stack) < MAX_DIMENSIONS:
            stack.append(iter(item))
        elif isinstance(item, str) and len(flat) < MAX_BYTES_ELEMENTS:
            flat.append(item.encode(errors="replace"))
        else:
            raise ProblemError(
                WRONG_DTYPE, f"{name} holds {str(item)[:40]!r}", remedy="send lists of texts for BYTES"
            )
    return _shaped(_objects(flat), name, shape)


def _split(data: memoryview, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    items: list[bytes] = []
    position, num_wanted = 0, min(math.prod(shape), MAX_BYTES_ELEMENTS)
    while position < len(data) and len(items) < num_wanted:
        end = position + _LENGTH.size
        size = _LENGTH.unpack_from(data, position)[0] if end <= len(data) else len(data)
        position = end + size
        items.append(bytes(data[end:position]))
    if position != len(data) or len(items) != math.prod(shape):
        raise ProblemError(
            UNREADABLE_BODY,
            f"{name} has {len(items)} of {math.prod(shape)} elements in {len(data)} bytes",
            remedy="send a 4-byte little-endian length before each element, and nothing after the last",
        )
    return _objects(items).reshape(shape)


def _objects(items: list[bytes]) -> npt.NDArray[Any]:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array
