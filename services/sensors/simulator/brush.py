"""A painter on one picture: polygons and rounded limbs from site metres, in sub-pixel steps, with antialiasing."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt

from services.sensors.simulator.pinhole import NEAR_M, Pinhole

Picture = npt.NDArray[np.uint8]
Points = npt.NDArray[np.float64]
Color = tuple[float, float, float]

_SHIFT = 4
_ONE = 1 << _SHIFT
_FAR_PX = 20000.0
_CIRCLE = np.stack((np.cos(np.arange(12) * np.pi / 6), np.sin(np.arange(12) * np.pi / 6)), axis=1)
_LAYERS = ((1.0, 0.0, 0.62), (0.84, 0.12, 0.80), (0.64, 0.24, 0.95), (0.34, 0.40, 1.08))  # width, shift, light


def shade(color: Color | Sequence[int], factor: float, lift: float = 0.0) -> Color:
    """The colour under `factor` of the light, with `lift` (0..255) of white reflection on top."""
    red, green, blue = (min(255.0, max(0.0, c * factor + lift)) for c in color)
    return red, green, blue


@dataclass(frozen=True, slots=True)
class Brush:
    """canvas: (S, S, 3) uint8, painted in place. light: unit vector towards the sun, site axes.

    lamps: centre and radius in pixels, and colour, of every lamp painted that shines this way.
    """

    canvas: npt.NDArray[np.uint8]
    eye: Pinhole
    light: Points
    lamps: list[tuple[Points, float, Color]] = field(default_factory=list)

    def pixels(self, points_m: Points) -> Points:
        return self.eye.project(points_m)[0]

    def polygon(self, points_m: Points, color: Color) -> None:
        """Fill the flat polygon (n, 3). Nothing is painted where a corner is behind the camera."""
        pixels, depth = self.eye.project(points_m)
        if depth.min() > NEAR_M:
            self.fill(pixels, color)

    def fill(self, pixels: Points, color: Color) -> None:
        cv2.fillPoly(self.canvas, [_fixed(pixels)], color, cv2.LINE_AA, _SHIFT)

    def line(self, points_m: Points, color: Color, *, width_m: float, closed: bool = False) -> None:
        """A line through (n, 3) as wide as width_m looks at its mean distance, one pixel at least."""
        pixels, depth = self.eye.project(points_m)
        if depth.min() > NEAR_M:
            width = max(1, round(self.eye.focal_px * width_m / float(depth.mean())))
            cv2.polylines(self.canvas, [_fixed(pixels)], closed, color, width, cv2.LINE_AA, _SHIFT)

    def disc(self, pixel: Points, radius_px: float, color: Color) -> None:
        x, y = _fixed(pixel[None])[0]
        cv2.circle(
            self.canvas, (int(x), int(y)), max(1, round(radius_px * _ONE)), color, cv2.FILLED, cv2.LINE_AA, _SHIFT
        )

    def lamp(self, point_m: Points, radius_m: float, color: Color, *, shines: bool) -> None:
        """A disc that shines by night, where it shines this way."""
        pixel, depth = self.eye.project(point_m)
        if depth <= NEAR_M:
            return
        radius_px = self.eye.focal_px * radius_m / float(depth)
        self.disc(pixel, radius_px, color)
        if shines:
            self.lamps.append((pixel, radius_px, color))

    def limb(self, start_m: Points, end_m: Points, radii_m: tuple[float, float], color: Color) -> None:
        """A rounded, tapering limb, shaded across: dark edge, body colour, light towards the sun."""
        pixels, depth = self.eye.project(np.stack((start_m, end_m)))
        if depth.min() <= NEAR_M:
            return
        first, second = (self.eye.focal_px * r / d for r, d in zip(radii_m, depth, strict=True))
        toward = 1.0 if self.light[0] >= 0 else -1.0
        for share, offset, factor in _LAYERS:
            self._capsule(
                pixels, first * share, second * share, toward * offset * max(first, second), shade(color, factor)
            )

    def bulk(self, points_m: Points, radii_m: Sequence[float], color: Color) -> None:
        """The rounded hull of balls at (n, 3), shaded as a limb is: a torso, a coat."""
        pixels, depth = self.eye.project(points_m)
        if depth.min() <= NEAR_M:
            return
        radii = self.eye.focal_px * np.asarray(radii_m) / depth
        edge = (pixels[:, None] + radii[:, None, None] * _CIRCLE).reshape(-1, 2)
        hull = cv2.convexHull(edge.astype(np.float32))[:, 0].astype(np.float64)
        middle, toward = hull.mean(axis=0), 1.0 if self.light[0] >= 0 else -1.0
        shift = np.array((toward, -0.3)) * float(radii.mean())
        for share, offset, factor in _LAYERS:
            self.fill(middle + (hull - middle) * (share, 0.5 + 0.5 * share) + shift * offset, shade(color, factor))

    def _capsule(self, pixels: Points, first: float, second: float, shift_px: float, color: Color) -> None:
        start, end = pixels + np.array((shift_px, -0.4 * abs(shift_px)))
        way = end - start
        length = float(np.hypot(way[0], way[1]))
        self.disc(start, first, color)
        self.disc(end, second, color)
        if length > 0.3:
            across = np.array((-way[1], way[0])) / length
            self.fill(
                np.stack(
                    (start + across * first, end + across * second, end - across * second, start - across * first)
                ),
                color,
            )


def _fixed(pixels: Points) -> npt.NDArray[np.int32]:
    return np.rint(np.clip(pixels, -_FAR_PX, _FAR_PX) * _ONE).astype(np.int32)
