"""What was posted, made into what the model takes. Pure: bytes, a content type and a contract in, arrays out.

A body is one .npy array, the raw bytes of an array whose shape and dtype the headers tell, or a JSON object;
anything else is a problem that names the value and the remedy.
"""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import numpy.typing as npt
import orjson

from api.bodies.npy import MAGIC, read_npy
from api.problems import (
    BAD_SITE,
    NOT_FINITE,
    OUT_OF_RANGE,
    TOO_LARGE,
    UNREADABLE_BODY,
    WRONG_DTYPE,
    WRONG_MEDIA_TYPE,
    WRONG_SHAPE,
    ProblemError,
)
from services.core.errors import BadFrameError
from services.core.frames import MAX_ABS_VALUE, check_site, is_bounded
from services.core.registry import InputContract

NPY_TYPES = frozenset({"application/x-npy", "application/npy"})
RAW_TYPE = "application/octet-stream"
"""Raw bytes where x-shape and x-dtype say of what, .npy where they are missing."""
JSON_TYPE = "application/json"
FORM_TYPE = "application/x-www-form-urlencoded"
"""What curl says of any --data-binary: taken as unsaid."""

_MAX_QUERY_BYTES = 1024
_MAX_JSON_BYTES = 4 * 1024 * 1024
_REMEDY_TYPE = f"post a .npy array as application/x-npy, or a JSON object as {JSON_TYPE}"
_RAW_SHAPE = re.compile(rb" *\d{1,9}( *, *\d{1,9}){0,7} *")
_RAW_DTYPES = {
    name.encode(): np.dtype(name).newbyteorder("<") for name in ("float32", "float16", "float64", "uint8")
}

Heatmaps = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Posted:
    """heatmaps: (B, C, R, A) float32, finite, C order. site: "" where none was named. is_batch: how to answer."""

    heatmaps: Heatmaps
    site: str
    is_batch: bool


def decode(
    body: bytes, *, headers: Mapping[bytes, bytes], query: bytes, contract: InputContract, max_batch: int
) -> Posted:
    """The frames in `body`, checked against `contract`. headers: by names in lower case. Raises ProblemError."""
    if not body:
        raise ProblemError(UNREADABLE_BODY, "body is empty", remedy=_REMEDY_TYPE)
    site = site_of(query) if query else ""
    is_batch = None
    if _is_json(body, headers.get(b"content-type", b"").decode("latin-1")):
        array, site, is_batch = _read_json(body, site, contract, max_batch)
    else:
        is_raw = b"x-shape" in headers or b"x-dtype" in headers
        array, dtype_name = _read_raw(body, headers) if is_raw else read_npy(body)
        check_dtype(dtype_name, contract)
    heatmaps, has_batch_axis = as_batch(array, contract, max_batch, is_batch)
    return Posted(as_float32(heatmaps), site, has_batch_axis)


def site_of(query: bytes) -> str:
    """The site named by a query string, "" if none. Raises ProblemError if it is no name of a site."""
    if len(query) > _MAX_QUERY_BYTES:
        raise ProblemError(BAD_SITE, f"query has {len(query)} bytes", remedy="name one site: ?site=north")
    return _site_of(query)


@functools.lru_cache(maxsize=1024)
def _site_of(query: bytes) -> str:
    try:
        sites = parse_qs(query.decode("latin-1"), keep_blank_values=True, max_num_fields=16).get("site", [""])
    except ValueError:
        raise ProblemError(
            BAD_SITE, "query has more than 16 fields", remedy="name one site: ?site=north"
        ) from None
    if len(sites) > 1:
        raise ProblemError(BAD_SITE, f"query names {len(sites)} sites", remedy="name one site: ?site=north")
    return checked_site(sites[0])


def checked_site(site: Any) -> str:
    """`site` if it is "" or a name of a site. Raises ProblemError."""
    if site == "":
        return ""
    try:
        return check_site(site if isinstance(site, str) else str(site)[:64] + " (no string)")
    except BadFrameError as error:
        raise ProblemError(BAD_SITE, error.what[:120], remedy=error.remedy) from None


def _is_json(body: bytes, content_type: str) -> bool:
    """JSON or .npy, by what the sender says and, where it says nothing, by how the body starts."""
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type in NPY_TYPES or media_type == RAW_TYPE:
        return False
    if media_type == JSON_TYPE or media_type.endswith("+json"):
        return True
    if media_type in ("", FORM_TYPE):
        if body.startswith(MAGIC):
            return False
        said = "no content type is given, and the body is not .npy"
        raise ProblemError(WRONG_MEDIA_TYPE, said, remedy=_REMEDY_TYPE)
    raise ProblemError(WRONG_MEDIA_TYPE, f"content type is {media_type[:80]!r}", remedy=_REMEDY_TYPE)


def _read_raw(body: bytes, headers: Mapping[bytes, bytes]) -> tuple[npt.NDArray[Any], str]:
    """A read-only view of `body` as x-shape and x-dtype describe it, and the name of its dtype."""
    shape_text, dtype_text = headers.get(b"x-shape", b""), headers.get(b"x-dtype", b"")
    if not _RAW_SHAPE.fullmatch(shape_text):
        raise ProblemError(
            WRONG_SHAPE,
            f"x-shape is {shape_text[:40].decode('latin-1')!r}",
            remedy="say it as in x-shape: 2,128,64",
        )
    dtype = _RAW_DTYPES.get(dtype_text)
    if dtype is None:
        raise ProblemError(
            WRONG_DTYPE,
            f"x-dtype is {dtype_text[:40].decode('latin-1')!r}",
            remedy="say one of float32, float16, uint8; the bytes are little-endian",
        )
    shape = tuple(int(size) for size in shape_text.split(b","))
    num_bytes = dtype.itemsize * math.prod(shape)
    if len(body) != num_bytes:
        raise ProblemError(
            UNREADABLE_BODY,
            f"body has {len(body)} bytes, shape {shape} of {dtype.name} takes {num_bytes}",
            remedy="send the whole array in C order, and nothing else",
        )
    return np.frombuffer(body, dtype).reshape(shape), dtype.name


def _read_json(
    body: bytes, site: str, contract: InputContract, max_batch: int
) -> tuple[npt.NDArray[Any], str, bool]:
    """The array, the site, and whether a batch was posted."""
    check_json_length(body)
    remedy = 'send {"heatmap": [[...]], "site": "north"}, or {"heatmaps": [...]} for several'
    try:
        posted = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ProblemError(
            UNREADABLE_BODY,
            f"JSON is broken at line {error.lineno}, column {error.colno}: {error.msg}",
            remedy=remedy,
        ) from None
    if not isinstance(posted, dict):
        raise ProblemError(UNREADABLE_BODY, f"JSON is a {type(posted).__name__}, not an object", remedy=remedy)
    named = checked_site(posted.get("site", ""))
    if named and site and named != site:
        raise ProblemError(BAD_SITE, f"body says {named!r}, query says {site!r}", remedy="name one site")
    members = [member for member in ("heatmap", "heatmaps") if member in posted]
    if len(members) != 1:
        has = ", ".join(map(repr, list(posted)[:8])) or "no members"
        raise ProblemError(UNREADABLE_BODY, f"JSON object has {has[:120]}", remedy=remedy)
    member = members[0]
    is_batch = member == "heatmaps"
    return _array_of(posted[member], member, contract, max_batch, is_batch), named or site, is_batch


def check_json_length(body: bytes) -> None:
    """Raises ProblemError for a JSON text that is too long: as Python objects it takes ten times as much."""
    if len(body) > _MAX_JSON_BYTES:
        raise ProblemError(
            TOO_LARGE,
            f"JSON has {len(body)} bytes",
            remedy=f"send at most {_MAX_JSON_BYTES}, or binary arrays: .npy, or the binary data of /v2",
        )


def _array_of(
    nested: Any, member: str, contract: InputContract, max_batch: int, is_batch: bool
) -> npt.NDArray[np.float32]:
    leaf, lengths = nested, []
    while isinstance(leaf, list):
        lengths.append(len(leaf))
        if not leaf:
            break
        leaf = leaf[0]
    if not isinstance(nested, list) or not isinstance(leaf, int | float | list):
        raise ProblemError(
            WRONG_DTYPE, f"{member} holds {str(leaf)[:40]!r}", remedy="send nested lists of numbers"
        )
    _num_frames(tuple(lengths), contract, max_batch, is_batch)  # before anything is made of it
    try:
        with np.errstate(all="ignore"):  # what overflows becomes infinite, and is counted as such
            return np.array(nested, dtype=np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise ProblemError(
            WRONG_SHAPE,
            f"{member} is no regular array of numbers: {str(error)[:160]}",
            remedy=f"make every row equally long, {_shape_text(contract)} in all",
        ) from None


def check_dtype(name: str, contract: InputContract) -> None:
    """Raises ProblemError unless heatmaps of this dtype are welcome."""
    if name not in contract.dtypes:
        raise ProblemError(
            WRONG_DTYPE,
            f"heatmap dtype is {name}",
            remedy=f"send one of {', '.join(contract.dtypes)}: heatmap.astype(numpy.{contract.dtypes[0]})",
        )


def as_batch(
    array: npt.NDArray[Any], contract: InputContract, max_batch: int, is_batch: bool | None = None
) -> tuple[npt.NDArray[Any], bool]:
    """`array` as (B, C, R, A), and whether it came as a batch. is_batch None: let the dimensions say it."""
    if is_batch is None:
        is_batch = array.ndim == 4
    num_frames = _num_frames(array.shape, contract, max_batch, is_batch)
    return array.reshape(num_frames, *contract.shape), is_batch


def _num_frames(shape: tuple[int, ...], contract: InputContract, max_batch: int, is_batch: bool) -> int:
    """How many frames an array of this shape holds. Raises ProblemError."""
    channels, num_range, num_azimuth = contract.shape
    one = shape[1:] if is_batch else shape
    fits = one == contract.shape or (channels == 1 and one == (num_range, num_azimuth))
    if not fits:
        what = f"heatmap shape is {shape}"[:120]
        if len(one) == 3 and one[1:] == contract.shape[1:]:
            named = f" ({', '.join(contract.channels)})" if contract.channels else ""
            what = f"heatmap has {one[0]} channels, the model takes {channels}{named}; its shape is {shape}"[:300]
        raise ProblemError(WRONG_SHAPE, what, remedy=f"send {_shape_text(contract)}")
    num_frames = shape[0] if is_batch else 1
    if not 1 <= num_frames <= max_batch:
        raise ProblemError(
            WRONG_SHAPE, f"batch has {num_frames} frames", remedy=f"send 1 to {max_batch} in one request"
        )
    return num_frames


def as_float32(heatmaps: npt.NDArray[Any]) -> Heatmaps:
    """A C-ordered, aligned float32 array, checked to be bounded. No copy where it is one already."""
    given = heatmaps
    if not heatmaps.flags.aligned:  # data after a JSON header of any length: numpy is slow where a copy is not
        heatmaps = heatmaps.copy()
    if heatmaps.dtype.kind == "f" and heatmaps.itemsize > 4:
        with np.errstate(over="ignore"):  # what overflows becomes infinite, and is counted as such
            heatmaps = heatmaps.astype(np.float32)
    if heatmaps.dtype.kind == "f" and not is_bounded(heatmaps):
        num_bad = int(np.count_nonzero(~np.isfinite(given)))
        if num_bad:
            raise ProblemError(
                NOT_FINITE,
                f"{num_bad} of {given.size} values are NaN or infinite",
                remedy="replace them before posting, by the noise floor for instance",
            )
        raise ProblemError(
            OUT_OF_RANGE,
            f"heatmap reaches {np.abs(given.astype(np.float64)).max():g}",
            remedy=f"keep within {MAX_ABS_VALUE:g}, as the sensors must; send dB rather than power",
        )
    return np.ascontiguousarray(heatmaps, dtype=np.float32)


def _shape_text(contract: InputContract) -> str:
    channels, num_range, num_azimuth = contract.shape
    one = f"({channels}, {num_range}, {num_azimuth})"
    short = f"({num_range}, {num_azimuth}) or " if channels == 1 else ""
    return f"{short}{one} for one frame, (batch, {channels}, {num_range}, {num_azimuth}) for several"
