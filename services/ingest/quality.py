"""A glance at one compressed image: does it unpack, can anything be seen in it, has the scene changed.

A millisecond or less for a small image. It knows no detector, no site, and not what is kept.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg

from services.core.frames import CameraFrame

Image = npt.NDArray[np.uint8]
Cells = npt.NDArray[np.float32]

THUMBNAIL_PX = 128
"""Longer side of what the flags are judged on: coarse enough to average a sensor's noise away."""
MAX_PIXELS = 32_000_000
DARK_BELOW = 40
"""Of 255. In a dark image not even a twentieth of the picture reaches it."""
SHARP_FROM = 0.25
"""Standard deviation of the Laplacian over that of the image. Sharp images have 0.4 and more, hazy ones too."""
CONTRAST_FROM = 4.0
"""Standard deviation, of 255. Below it there is nothing but noise: thick fog, a covered lens."""
CHANGED_FROM = 8.0
"""Grey levels, of 255, by which one cell differs more than the middle one. Noise and leaves reach about 5."""
_NUM_CELLS = 32  # a side


@dataclass(frozen=True, slots=True, eq=False)
class Glance:
    """What one glance told.

    flags: what is wrong with the image, out of "dark" and "blurred" (out of focus, fogged, a wet or covered lens).
    cells: (32, 32) float32, mean grey value of each cell, 0 to 255.
    """

    flags: tuple[str, ...]
    cells: Cells

    def has_changed(self, *, since: Cells) -> bool:
        """Whether a part of the scene differs; a change of brightness all over does not count."""
        change = self.cells - since
        change -= np.median(change)
        return bool(np.abs(change).max() >= CHANGED_FROM)


def glance(camera: CameraFrame) -> Glance | None:
    """Flags and cells of an image; None where it does not unpack or is not of the size it was sent as."""
    height, width = camera.shape[:2]
    scale = min(1.0, THUMBNAIL_PX / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    grey = unpack(camera, is_grey=True, min_height=size[1], min_width=size[0])
    if grey is None:
        return None
    thumbnail = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    cells = cv2.resize(thumbnail, (_NUM_CELLS, _NUM_CELLS), interpolation=cv2.INTER_AREA)
    return Glance(_flags(thumbnail), cells.astype(np.float32))


def unpack(camera: CameraFrame, *, is_grey: bool, min_height: int = 0, min_width: int = 0) -> Image | None:
    """(H, W) uint8 grey or (H, W, 3) uint8 BGR; None where the image is damaged, huge or of another size.

    A JPEG is unpacked at the smallest scale that has at least `min_height` and `min_width`; 0 asks for all of it.
    Its whole body is read at any scale, so that damage is found.
    """
    try:
        if _size_of(camera) != camera.shape[:2] or camera.shape[0] * camera.shape[1] > MAX_PIXELS:
            return None
        if camera.encoding == "jpeg":
            image = simplejpeg.decode_jpeg(
                camera.image,
                colorspace="GRAY" if is_grey else "BGR",
                min_height=min_height,
                min_width=min_width,
            )
            return np.asarray(image[..., 0] if is_grey else image)
        mode = cv2.IMREAD_GRAYSCALE if is_grey else cv2.IMREAD_COLOR
        png = cv2.imdecode(np.frombuffer(camera.image, np.uint8), mode)
    except (ValueError, cv2.error):
        return None
    return None if png is None else np.asarray(png, np.uint8)


def _size_of(camera: CameraFrame) -> tuple[int, int]:
    """(H, W) as the compressed file has it. Raises ValueError where there is none."""
    if camera.encoding == "jpeg":
        height, width, *_ = simplejpeg.decode_jpeg_header(camera.image)
        return int(height), int(width)
    if camera.image[12:16] != b"IHDR":
        raise ValueError("no IHDR")
    return int.from_bytes(camera.image[20:24], "big"), int.from_bytes(camera.image[16:20], "big")


def _flags(thumbnail: npt.NDArray[Any]) -> tuple[str, ...]:
    if np.count_nonzero(thumbnail >= DARK_BELOW) < thumbnail.size / 20:
        return ("dark",)  # what detail there is would be noise
    contrast = float(cv2.meanStdDev(thumbnail)[1][0, 0])
    detail = float(cv2.meanStdDev(cv2.Laplacian(thumbnail, cv2.CV_16S))[1][0, 0])
    return ("blurred",) if contrast < CONTRAST_FROM or detail < SHARP_FROM * contrast else ()
