"""The camera's geometry: where a point of the site falls in the picture, and where a pixel looks."""

from dataclasses import dataclass
from math import cos, radians, sin, tan

import numpy as np
import numpy.typing as npt

from services.sensors.simulator.sites import Mount

Points = npt.NDArray[np.float64]
NEAR_M = 0.25


@dataclass(frozen=True, slots=True)
class Pinhole:
    """A camera without distortion over the origin of the site. size_px: of its square picture."""

    height_m: float
    pitch_rad: float
    focal_px: float
    size_px: int

    @staticmethod
    def of(mount: Mount, *, size_px: int) -> "Pinhole":
        focal_px = size_px / 2 / tan(radians(mount.fov_deg) / 2)
        return Pinhole(mount.height_m, radians(mount.pitch_deg), focal_px, size_px)

    def project(self, points_m: Points) -> tuple[Points, Points]:
        """(..., 3) site metres to (..., 2) pixels right and down, and (...) depth along the optical axis."""
        c, s = cos(self.pitch_rad), sin(self.pitch_rad)
        up = points_m[..., 2] - self.height_m
        depth = points_m[..., 1] * c - up * s
        down = -points_m[..., 1] * s - up * c
        ahead = np.maximum(depth, NEAR_M)
        px = self.size_px / 2 + self.focal_px * points_m[..., 0] / ahead
        py = self.size_px / 2 + self.focal_px * down / ahead
        return np.stack((px, py), axis=-1), depth

    def rays(self, pixels: Points) -> Points:
        """(..., 2) pixels to (..., 3) directions in site axes with depth 1."""
        right = (pixels[..., 0] - self.size_px / 2) / self.focal_px
        down = (pixels[..., 1] - self.size_px / 2) / self.focal_px
        c, s = cos(self.pitch_rad), sin(self.pitch_rad)
        return np.stack((right, c - down * s, -s - down * c), axis=-1)

    def azimuth_rad(self, px: float, py: float) -> float:
        """Where a pixel looks, from boresight to the right, in the ground plane."""
        x, y, _ = self.rays(np.array((px, py)))
        return float(np.arctan2(x, y))
