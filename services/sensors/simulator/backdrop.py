"""The still part of the picture, painted once per site: sky, ground, walls, trees, posts, boxes, and its depth.

It does not know the weather nor who comes by; the camera lights it and paints them in.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import cos, radians, sin

import cv2
import numpy as np
import numpy.typing as npt

from services.sensors.simulator import textures
from services.sensors.simulator.brush import Brush, shade
from services.sensors.simulator.pinhole import NEAR_M, Pinhole
from services.sensors.simulator.sites import Box, Pole, Site, Tree, Wall

Picture = npt.NDArray[np.uint8]
Float = npt.NDArray[np.float32]
Points = npt.NDArray[np.float64]

SKY_M = 400.0


@dataclass(frozen=True, slots=True, eq=False)
class Backdrop:
    """color: (S, S, 3) uint8 in daylight. depth_m: (S, S) float32; standing_m: the same without the ground.

    glow: (S, S, 3) uint8, windows and lamps at night. lamp: (S, S) float32 0..1, lamp light that falls here.
    """

    color: Picture
    depth_m: Float
    standing_m: Float
    glow: Picture
    lamp: Float


def sun_direction(site: Site) -> Points:
    """(3,) unit vector towards the sun, site axes. Azimuth counts from behind the camera, to the right."""
    azimuth, elevation = radians(site.light.sun_azimuth_deg), radians(site.light.sun_elevation_deg)
    return np.array((sin(azimuth) * cos(elevation), -cos(azimuth) * cos(elevation), sin(elevation)))


@lru_cache(maxsize=16)
def paint_backdrop(site: Site, *, size_px: int) -> Backdrop:
    """Paint the site. Takes a few tenths of a second; the same site gives the same picture."""
    return _Painter(site, size_px).paint()


class _Painter:
    def __init__(self, site: Site, size_px: int) -> None:
        self.site, self.size = site, size_px
        self.eye = Pinhole.of(site.mount, size_px=size_px)
        self.rng = np.random.default_rng((site.seed, 40))
        self.light = sun_direction(site)
        rays = self.eye.rays(np.stack(np.meshgrid(np.arange(size_px) + 0.5, np.arange(size_px) + 0.5), axis=-1))
        down = np.minimum(rays[..., 2], -1e-4)
        self.ground_m = rays[..., :2] * (site.mount.height_m / -down)[..., None]
        self.is_ground = rays[..., 2] < -1.0e-3
        self.depth = np.where(self.is_ground, site.mount.height_m / -down, SKY_M).astype(np.float32)
        horizon = int(np.argmax(self.is_ground[:, size_px // 2]))
        self.canvas = textures.sky(self.rng, size_px, horizon=horizon)
        self.horizon = horizon
        self.glow = np.zeros((size_px, size_px, 3), np.uint8)

    def paint(self) -> Backdrop:
        self._skyline()
        self._ground()
        self._markings()
        self._still_shadows()
        self.picture = np.clip(self.canvas, 0, 255).astype(np.uint8)
        before = self.depth.copy()
        parts: list[Wall | Pole | Tree | Box] = [
            *self.site.walls,
            *self.site.poles,
            *self.site.trees,
            *self.site.boxes,
        ]
        for part in sorted(parts, key=lambda part: -_distance(part)):
            match part:
                case Wall():
                    self._wall(part)
                case Pole():
                    self._pole(part)
                case Tree():
                    self._tree(part)
                case Box():
                    self._box(part)
        standing = np.where(self.depth < before - 1e-3, self.depth, np.float32(SKY_M))
        return Backdrop(self.picture, self.depth, standing, self.glow, self._lamp_light())

    def _skyline(self) -> None:
        """Far roofs and hills, hazy."""
        y, top = self.horizon, np.zeros(self.size)
        x = np.arange(self.size)
        hills = 10 + 6 * textures.noise(self.rng, (1, self.size), octaves=3, coarsest=3)[0]
        top = np.maximum(top, hills * self.size / 448)
        for _ in range(9):
            at, wide = self.rng.uniform(0, self.size), self.rng.uniform(0.04, 0.12) * self.size
            inside = np.abs(x - at) < wide / 2
            top[inside] = np.maximum(top[inside], self.rng.uniform(0.03, 0.08) * self.size)
        rows = np.arange(self.size)[:, None]
        mask = (rows < y) & (rows > y - top[None])
        self.canvas[mask] = 0.35 * self.canvas[mask] + 0.65 * np.array((136, 146, 150), np.float32)

    def _ground(self) -> None:
        ground = self.site.ground
        kinds = {ground.kind: ground.tone}
        tone = {
            "grass": (98, 126, 68),
            "gravel": (156, 148, 134),
            "paving": (164, 160, 152),
            "asphalt": (120, 120, 120),
        }
        self._lay(textures.ground(self.rng, ground.kind, kinds[ground.kind]), self.is_ground)
        beyond = self.is_ground & (self.ground_m[..., 1] > ground.verge_from_m)
        if beyond.any():
            self._lay(textures.ground(self.rng, ground.verge, tone[ground.verge]), beyond)
            kerb = np.abs(self.ground_m[..., 1] - ground.verge_from_m) < 0.12
            self.canvas[kerb & self.is_ground] *= 0.7

    def _lay(self, tile: Float, where: npt.NDArray[np.bool_]) -> None:
        """Perspective-correct, with the tile smoothed more the farther it lies."""
        cells = (self.ground_m * (textures.GROUND_PX / textures.GROUND_M)).astype(np.float32)
        x, y = cells[..., 0] % textures.GROUND_PX, cells[..., 1] % textures.GROUND_PX
        near = cv2.remap(tile, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        soft = cv2.remap(cv2.GaussianBlur(tile, (0, 0), 5), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        part = np.clip((self.depth - 7) / 10, 0, 0.85)[..., None]
        self.canvas[where] = (near * (1 - part) + soft * part)[where]

    def _markings(self) -> None:
        x, y = self.ground_m[..., 0], self.ground_m[..., 1]
        match self.site.ground.markings:
            case "lane":
                line = (np.abs(y - 7.8) < 0.07) & (x % 4.0 < 2.2) | (
                    np.abs(y - self.site.ground.verge_from_m + 0.5) < 0.06
                )
            case "parking":
                line = (np.abs(x % 2.6 - 1.3) < 0.06) & (y > 8.5) & (y < 13.2) | (np.abs(y - 8.5) < 0.06)
            case "crossing":
                line = (x % 1.0 < 0.5) & (y > 6.5) & (y < 9.5)
            case _:
                return
        worn = 0.75 + 0.2 * textures.noise(self.rng, (self.size, self.size))
        line &= self.is_ground & (self.depth < 40)
        mask = cv2.GaussianBlur(line.astype(np.float32), (3, 3), 0) * np.clip(worn, 0.3, 1)
        self.canvas += (np.array((226, 224, 214), np.float32) - self.canvas) * mask[..., None]

    def _still_shadows(self) -> None:
        dark = np.ones((self.size, self.size), np.float32)
        spots = [(tree.at, 0.5 * tree.height_m, tree.crown_m) for tree in self.site.trees]
        spots += [(box.at, 0.5 * box.size_m[2], 0.6 * box.size_m[0]) for box in self.site.boxes]
        for at, height, size in spots:
            centre = np.array(at) - self.light[:2] / self.light[2] * height
            away = np.hypot(*(self.ground_m - centre).transpose(2, 0, 1)) / size
            dark *= 1 - 0.34 * np.exp(-(away**4)).astype(np.float32) * self.is_ground
        self.canvas *= dark[..., None]

    def _brush(self) -> tuple[Brush, Picture]:
        return Brush(self.picture, self.eye, self.light), self.picture.copy()

    def _deepen(self, before: Picture, depth_m: float) -> None:
        changed = (self.picture != before).any(axis=2)
        self.depth[changed] = np.minimum(self.depth[changed], depth_m)
        self.glow[changed] = 0

    def _wall(self, wall: Wall) -> None:
        start, end = np.array((*wall.start, 0.0)), np.array((*wall.end, 0.0))
        length = float(np.linalg.norm(end - start))
        surface, glow = textures.wall(self.rng, wall, length_m=length)
        clipped = _clip_to_view(start, end)
        if clipped is None:
            return
        first, last = clipped
        up = np.array((0, 0, wall.height_m))
        a, b = start + (end - start) * first, start + (end - start) * last
        corners, _ = self.eye.project(np.stack((a + up, b + up, b, a)))
        height, width = surface.shape[:2]
        flat = [(first * width, 0), (last * width, 0), (last * width, height), (first * width, height)]
        matrix = cv2.getPerspectiveTransform(np.array(flat, np.float32), corners.astype(np.float32))
        size = (self.size, self.size)
        seen = cv2.warpPerspective(surface, matrix, size, flags=cv2.INTER_AREA)
        shining = cv2.warpPerspective(glow, matrix, size, flags=cv2.INTER_LINEAR)
        normal = np.array((-(end - start)[1], (end - start)[0], 0)) / length
        normal *= -np.sign(normal[:2] @ start[:2]) or 1.0
        lit = 0.68 + 0.32 * max(0.0, float(normal @ self.light))
        self._depth_of_plane(seen[..., 3] > 127, normal, start)
        alpha = seen[..., 3:].astype(np.float32) / 255
        self.picture[:] = (self.picture * (1 - alpha) + seen[..., :3] * lit * alpha).astype(np.uint8)
        self.glow[:] = np.where(seen[..., 3:] > 127, shining, self.glow)

    def _depth_of_plane(self, mask: npt.NDArray[np.bool_], normal: Points, point: Points) -> None:
        pixels = np.argwhere(mask)[:, ::-1].astype(np.float64) + 0.5
        rays = self.eye.rays(pixels)
        reach = float(normal @ (point - (0, 0, self.site.mount.height_m))) / np.minimum(rays @ normal, -1e-6)
        self.depth[mask] = np.minimum(self.depth[mask], reach)

    def _pole(self, pole: Pole) -> None:
        brush, before = self._brush()
        foot, top = np.array((*pole.at, 0.0)), np.array((*pole.at, pole.height_m))
        for width, factor, right in ((0.15, 0.7, 0.0), (0.08, 1.1, 0.02)):
            offset = np.array((right, 0, 0))
            brush.line(np.stack((foot + offset, top + offset)), shade((96, 100, 104), factor), width_m=width)
        if pole.lamp:
            arm = top + np.array((-0.8 * np.sign(pole.at[0]), -0.3, 0.1))
            brush.line(np.stack((top, arm)), (84, 88, 92), width_m=0.1)
            brush.limb(arm, arm + np.array((0.35, 0, 0)), (0.1, 0.1), (196, 198, 190))
        self._deepen(before, pole.at[1])
        if pole.lamp:
            glowing = Brush(self.glow, self.eye, self.light)
            glowing.limb(arm, arm + np.array((0.35, 0, 0)), (0.12, 0.12), (255, 236, 190))

    def _tree(self, tree: Tree) -> None:
        brush, before = self._brush()
        foot = np.array((*tree.at, 0.0))
        crown = np.array((*tree.at, tree.height_m - tree.crown_m))
        brush.limb(foot, crown, (0.17, 0.10), (92, 74, 58))
        for _ in range(4):
            tip = crown + np.clip(self.rng.normal(0, 0.35, 3), -0.55, 0.55) * tree.crown_m
            brush.limb(crown - np.array((0, 0, 0.6)), tip, (0.06, 0.03), (84, 68, 54))
        leaves = self.rng.normal(0, 1, (int(700 * tree.crown_m), 3))
        leaves *= (tree.crown_m * self.rng.random(len(leaves)) ** 0.4 / np.linalg.norm(leaves, axis=1))[:, None]
        leaves = leaves[np.argsort(-leaves[:, 1])]
        for leaf in leaves:
            sunny = 0.72 + 0.34 * float(leaf @ self.light) / tree.crown_m + 0.10 * self.rng.standard_normal()
            pixel, depth = self.eye.project(crown + leaf)
            radius = self.eye.focal_px * self.rng.uniform(0.04, 0.12) / float(depth)
            brush.disc(pixel, radius, shade(tree.color, sunny * self.rng.uniform(0.85, 1.15)))
        self._deepen(before, tree.at[1])

    def _box(self, box: Box) -> None:
        brush, before = self._brush()
        c, s = cos(radians(box.turned_deg)), sin(radians(box.turned_deg))
        right, back, up = (
            np.array(axis) * size
            for axis, size in zip(((c, s, 0), (-s, c, 0), (0, 0, 1.0)), box.size_m, strict=True)
        )
        foot = np.array((*box.at, 0.0)) - 0.5 * right - 0.5 * back
        eye = np.array((0, 0, self.site.mount.height_m))
        faces = (
            (foot, right, up, -back), (foot + back, right, up, back),
            (foot, back, up, -right), (foot + right, back, up, right), (foot + up, right, back, up),
        )  # fmt: skip
        for corner, u, v, normal in faces:
            if float(normal @ (eye - corner)) <= 0:
                continue
            unit = normal / np.linalg.norm(normal)
            lit = 0.6 + 0.45 * max(0.0, float(unit @ self.light))
            brush.polygon(np.stack((corner, corner + u, corner + u + v, corner + v)), shade(box.color, lit))
            for part in (0.2, 0.5, 0.8):
                brush.line(
                    np.stack((corner + v * part, corner + u + v * part)),
                    shade(box.color, lit * 0.75),
                    width_m=0.02,
                )
        self._deepen(before, box.at[1])

    def _lamp_light(self) -> Float:
        """Lamps light what is near them; a little light is everywhere in a town."""
        light = np.full((self.size, self.size), 0.12, np.float32)
        rays = self.eye.rays(
            np.stack(np.meshgrid(np.arange(self.size) + 0.5, np.arange(self.size) + 0.5), axis=-1)
        )
        points = rays * self.depth[..., None] + (0, 0, self.site.mount.height_m)
        for pole in self.site.poles:
            if pole.lamp:
                lamp = np.array((*pole.at, pole.height_m))
                light += (22.0 / (9.0 + ((points - lamp) ** 2).sum(axis=-1))).astype(np.float32)
        light += (7.0 / (9.0 + (points**2).sum(axis=-1) * 0.35)).astype(np.float32)  # the sensors' own post
        return np.minimum(light, 1.0)


def _distance(part: Wall | Pole | Tree | Box) -> float:
    if isinstance(part, Wall):
        return 0.5 * (part.start[1] + part.end[1])
    return float(np.hypot(*part.at))


def _clip_to_view(start: Points, end: Points) -> tuple[float, float] | None:
    """The part of a wall (shares of its length) that lies before the camera."""
    near = max(1.5, 2 * NEAR_M)
    a, b = float(start[1]), float(end[1])
    if max(a, b) <= near:
        return None
    cut = (near - a) / (b - a) if a != b else 0.0
    return (cut if a < near else 0.0), (cut if b < near else 1.0)
