"""Frames as sensors deliver them, and what a person may say about one.

Plain values only: nothing here knows how they travel (codec, streams) or where they are kept (store).
"""

import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from services.core.errors import BadFrameError

CLASSES = ("empty", "pedestrian", "cyclist", "car")
"""What a scene is called, in the order of every probability vector."""

Heatmap = npt.NDArray[Any]
ImageEncoding = Literal["jpeg", "png"]

HEATMAP_DTYPES = ("float16", "float32", "uint8")
MAX_HEATMAP_BYTES = 8 * 1024 * 1024
MAX_IMAGE_BYTES = 16 * 1024 * 1024
MAX_ABS_VALUE = 10_000.0
"""One absurd cell would stand in its site's clutter map for a long time."""
DEFAULT_WINDOW_MS = 50
_HEATMAP_DTYPES = {np.dtype(name) for name in HEATMAP_DTYPES} | {
    np.dtype(name).newbyteorder() for name in HEATMAP_DTYPES
}
_BITS = {
    2: (np.int16, np.uint16, int(np.float16(MAX_ABS_VALUE).view(np.int16)), 1 << 15),
    4: (np.int32, np.uint32, int(np.float32(MAX_ABS_VALUE).view(np.int32)), 1 << 31),
}
SITE_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class FrameId(NamedTuple):
    """What makes a frame of one site the same frame wherever it turns up, however often."""

    captured_at_ns: int
    seq: int


@dataclass(frozen=True, slots=True)
class RadarFrame:
    """One radar heatmap.

    heatmap: (R, A) or (C, R, A), float16 | float32 | uint8, finite; `unit` says of what ("dB", "counts").
    axes: one name per dimension, out of channel, range, azimuth.
    channels: what each channel is, ("integrated", "moving") for instance; empty for one unnamed channel. One whose
    name ends in "_mps" is a speed in m/s, whatever `unit` says (is_speed).
    """

    site: str
    seq: int
    captured_at_ns: int
    heatmap: Heatmap
    axes: tuple[str, ...] = ("range", "azimuth")
    unit: str = "dB"
    channels: tuple[str, ...] = ()

    @property
    def id(self) -> FrameId:
        return FrameId(self.captured_at_ns, self.seq)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, R, A) of the heatmap; a map without channels is one channel."""
        return self.heatmap.shape if self.heatmap.ndim == 3 else (1, *self.heatmap.shape)


@dataclass(frozen=True, slots=True)
class CameraFrame:
    """One compressed camera image, as the camera wrote it. shape: (H, W, 3) once decoded to RGB."""

    site: str
    seq: int
    captured_at_ns: int
    image: bytes
    shape: tuple[int, int, int]
    encoding: ImageEncoding = "jpeg"

    @property
    def id(self) -> FrameId:
        return FrameId(self.captured_at_ns, self.seq)


@dataclass(frozen=True, slots=True)
class Label:
    """What someone says about the radar frame `(site, captured_at_ns, seq)`. label: one of CLASSES."""

    site: str
    seq: int
    captured_at_ns: int
    label: str
    source: str = "annotator"

    @property
    def id(self) -> FrameId:
        return FrameId(self.captured_at_ns, self.seq)


@dataclass(frozen=True, slots=True)
class SeenObject:
    """One road user that a detector found. box: (left, top, right, bottom), pixels of the image as it was sent."""

    label: str
    confidence: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Seen:
    """What a detector saw in a camera image: good for a pseudo-label, not as good as a person's word.

    label: one of CLASSES, or "" for no opinion. confidence: of `label`, 0 to 1. flags: what is wrong with the
    image, out of "dark" and "blurred". detector: which network said so.
    """

    label: str
    confidence: float
    objects: tuple[SeenObject, ...] = ()
    flags: tuple[str, ...] = ()
    detector: str = ""


Frame = RadarFrame | CameraFrame | Label


def window_ns(window_ms: int) -> int:
    """How far apart two frames may be and still be one instant, in whole milliseconds: 31 takes 31.9, not 32.0."""
    return (window_ms + 1) * 1_000_000 - 1


def is_speed(channel: str) -> bool:
    """Whether a channel of this name is a speed in m/s: what changes an echo's power leaves it alone."""
    return channel.endswith("_mps")


def check_site(site: str) -> str:
    """Return `site` if it can stand in a key and in a path. Raises BadFrameError."""
    if not SITE_PATTERN.fullmatch(site):
        raise BadFrameError(
            f"site is {site!r}",
            remedy="use 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit",
        )
    return site


def check_label(label: str) -> str:
    """Return `label` if it is one of CLASSES. Raises BadFrameError."""
    if label not in CLASSES:
        raise BadFrameError(f"label is {label!r}", remedy=f"use one of {', '.join(CLASSES)}")
    return label


def check_heatmap(heatmap: Heatmap) -> Heatmap:
    """Return `heatmap` if it is (R, A) or (C, R, A), of a known dtype and bounded. Raises BadFrameError."""
    if heatmap.dtype not in _HEATMAP_DTYPES:  # its `name` would take longer than all the rest
        raise BadFrameError(
            f"heatmap dtype is {heatmap.dtype.name}", remedy=f"send one of {', '.join(HEATMAP_DTYPES)}"
        )
    if heatmap.ndim not in (2, 3) or 0 in heatmap.shape:
        raise BadFrameError(
            f"heatmap shape is {heatmap.shape}", remedy="send (range, azimuth) or (channel, range, azimuth)"
        )
    if heatmap.itemsize > 1 and not is_bounded(heatmap):
        bad = int(np.count_nonzero(~np.isfinite(heatmap)))
        if bad:
            raise BadFrameError(
                f"heatmap has {bad} of {heatmap.size} values that are not finite",
                remedy="replace NaN and infinity before posting, by the noise floor for instance",
            )
        raise BadFrameError(
            f"heatmap reaches {np.abs(heatmap.astype(np.float64)).max():g}",
            remedy=f"keep within {MAX_ABS_VALUE:g}; send dB rather than power",
        )
    return heatmap


def is_bounded(heatmap: Heatmap) -> bool:
    """Whether all values of a float16 or float32 array are finite and within MAX_ABS_VALUE.

    Floats of one sign order as their bits do, NaN and infinity beyond all others: read as signed integers, the
    largest is the largest positive value; read as unsigned ones, it is the largest of the negative values.
    """
    signed, unsigned, limit, sign = _BITS[heatmap.itemsize]
    native = heatmap if heatmap.dtype.isnative else heatmap.astype(heatmap.dtype.newbyteorder("="))
    flat = native.reshape(-1)
    return bool(
        np.maximum.reduce(flat.view(signed)) <= limit and np.maximum.reduce(flat.view(unsigned)) <= sign | limit
    )
