"""The camera: the backdrop, whoever is there painted in by distance, then light, fog, lens and sensor noise."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from services.core.errors import SettingsError
from services.sensors.simulator.backdrop import paint_backdrop, sun_direction
from services.sensors.simulator.bodies import CARS, JOINT, Shape, cyclist, shape_of, to_world, walker
from services.sensors.simulator.brush import Brush
from services.sensors.simulator.figures import draw_cyclist, draw_walker
from services.sensors.simulator.pinhole import Pinhole
from services.sensors.simulator.sites import Site
from services.sensors.simulator.traffic import State, Track
from services.sensors.simulator.vehicles import draw_car
from services.sensors.simulator.weather import Weather

Picture = npt.NDArray[np.uint8]
Float = npt.NDArray[np.float32]
Points = npt.NDArray[np.float64]

_SUPER = 2
_NOISE_TILES = 8
_DUSK = 0.65  # lamps are lit below this daylight


@dataclass(frozen=True, slots=True)
class CameraSettings:
    """size_px: of the square picture. noise: deviation of the sensor's noise by day, of 255; more by night."""

    size_px: int = 224
    noise: float = 3.0
    jpeg_quality: int = 88

    def __post_init__(self) -> None:
        if not 32 <= self.size_px <= 2048:
            raise SettingsError(f"camera size_px is {self.size_px}", remedy="use 32 to 2048")
        if not 1 <= self.jpeg_quality <= 100:
            raise SettingsError(f"camera jpeg_quality is {self.jpeg_quality}", remedy="use 1 to 100")


class CameraRenderer:
    """Pictures of one site. What it gives for (tracks, weather, t_s, rng) depends on nothing else."""

    def __init__(self, site: Site, settings: CameraSettings) -> None:
        size = settings.size_px
        self._settings, self._site = settings, site
        self._eye = Pinhole.of(site.mount, size_px=size * _SUPER)
        self._light = sun_direction(site)
        self._backdrop = back = paint_backdrop(site, size_px=size * _SUPER)
        self._depth_m = _smaller(back.depth_m, size)
        self._glow = _smaller(back.glow, size)
        self._lamp = _smaller(back.lamp, size)
        noise = np.random.default_rng((site.seed, 50)).standard_normal(
            (_NOISE_TILES, size, size, 3), dtype=np.float32
        )
        self._noise = np.stack([cv2.GaussianBlur(tile, (0, 0), 0.6) * 2 for tile in noise])
        across = np.linspace(-1, 1, size, dtype=np.float32)
        self._vignette = (1 - 0.11 * (across[:, None] ** 2 + across**2))[..., None]

    def render(self, tracks: Sequence[Track], weather: Weather, t_s: float, rng: np.random.Generator) -> Picture:
        """(S, S, 3) uint8 RGB."""
        canvas = self._backdrop.color.copy()
        size = self._settings.size_px
        everyone = sorted(
            ((track, track.state(t_s)) for track in tracks), key=lambda pair: -np.hypot(*pair[1].xy_m)
        )
        cover = np.zeros(canvas.shape[:2], np.uint8)
        depth_m: Float = self._depth_m
        lamp: Float = self._lamp
        glow: Float = self._glow
        brush = Brush(canvas, self._eye, self._light)
        for track, state in everyone:
            self._shadow(canvas, track, state, weather, t_s)
        for track, state in everyone:
            painted = self._paint(brush, cover, track, state, t_s)
            if not painted:
                continue
            share = _smaller(cover, size) / 255
            depth_m = np.asarray(depth_m + (np.float32(state.xy_m[1]) - depth_m) * share, np.float32)
            lamp = np.asarray(lamp + (self._lamp_at(state) - lamp) * share, np.float32)
            glow = np.asarray(glow * (1 - share)[..., None], np.float32) if weather.daylight < _DUSK else glow
            cover[:] = 0
        if weather.daylight < _DUSK:
            glow = glow + self._shining(brush)
        picture = _smaller(canvas, size)
        return self._expose(picture, depth_m, lamp, glow, weather, rng)

    def _paint(self, brush: Brush, cover: Picture, track: Track, state: State, t_s: float) -> bool:
        """Paint one road user where nothing still stands before it; marks in `cover` where it shows."""
        shape = shape_of(track)
        window = self._window(outline(track, shape, state, t_s))
        if window is None:
            return False
        canvas = brush.canvas
        before = canvas[window].copy()
        match track.kind:
            case "pedestrian":
                draw_walker(brush, track, shape, state, t_s=t_s)
            case "cyclist":
                draw_cyclist(brush, track, shape, state)
            case "car":
                draw_car(brush, track, shape, state)
        behind = self._backdrop.standing_m[window] < state.xy_m[1] - 0.3
        if behind.any():
            canvas[window][behind] = before[behind]
        change = cv2.absdiff(canvas[window], before).max(axis=2)
        cover[window] = cv2.threshold(change, 1, 255, cv2.THRESH_BINARY)[1]
        return True

    def _shining(self, brush: Brush) -> Float:
        """(S, S, 3) float32: the lamps of road users, with a halo."""
        size = self._settings.size_px
        shine = np.zeros((size, size, 3), np.uint8)
        small = Brush(shine, self._eye, self._light)
        for pixel, radius_px, color in brush.lamps:
            small.disc(pixel / _SUPER, max(1.2, 1.3 * radius_px / _SUPER), color)
        halo = cv2.GaussianBlur(shine, (0, 0), 3.0)
        return shine.astype(np.float32) + 1.5 * halo

    def _window(self, points_m: Points) -> tuple[slice, slice] | None:
        pixels, depth = self._eye.project(points_m)
        if depth.min() < 0.5:
            return None
        size = self._eye.size_px
        pad = int(0.25 * self._eye.focal_px / depth.min()) + 4
        low = np.clip(np.floor(pixels.min(axis=0)).astype(int) - pad, 0, size)
        high = np.clip(np.ceil(pixels.max(axis=0)).astype(int) + pad, 0, size)
        if (high <= low).any():
            return None
        return slice(low[1], high[1]), slice(low[0], high[0])

    def _lamp_at(self, state: State) -> np.float32:
        light = 0.12 + 7.0 / (9.0 + float(state.xy_m @ state.xy_m) * 0.35)
        for pole in self._site.poles:
            if pole.lamp:
                gap = (*(np.array(pole.at) - state.xy_m), pole.height_m - 1)
                light += 22.0 / (9.0 + float(np.dot(gap, gap)))
        return np.float32(min(light, 1.0))

    def _shadow(self, canvas: Picture, track: Track, state: State, weather: Weather, t_s: float) -> None:
        """On the ground: the outline along the sun's rays, and the darkness below, whatever the light."""
        points = outline(track, shape_of(track), state, t_s)
        fallen = points.copy()
        fallen[:, :2] -= self._light[:2] / self._light[2] * points[:, 2:]
        fallen[:, 2] = 0.0
        under = points.copy()
        under[:, 2] = 0.0
        if track.kind != "car":
            under[:, :2] = state.xy_m + (under[:, :2] - state.xy_m) * 0.7
        for shape_m, strength in ((fallen, 0.42 * weather.sun), (under, 0.35)):
            window = self._window(shape_m)
            if window is None or strength < 0.03:
                continue
            pixels, _ = self._eye.project(shape_m)
            hull = cv2.convexHull(pixels.astype(np.float32))[:, 0] - (window[1].start, window[0].start)
            mask = np.zeros((window[0].stop - window[0].start, window[1].stop - window[1].start), np.uint8)
            cv2.fillPoly(mask, [np.rint(hull).astype(np.int32)], 255)
            soft = cv2.blur(mask, (9, 5)).astype(np.float32) * (-strength / 255) + 1
            ground = canvas[window]
            ground[:] = (ground * soft[..., None]).astype(np.uint8)

    def _expose(
        self, picture: Float, depth_m: Float, lamp: Float, glow: Float, weather: Weather, rng: np.random.Generator
    ) -> Picture:
        """Daylight, lamps and windows by night, fog between, vignette, exposure, noise."""
        night = 1 - weather.daylight
        day = np.array((1.0, 1.0, 1.0)) * (0.2 + 0.82 * weather.daylight) - np.array((0.05, 0.03, -0.02)) * night
        if weather.daylight < _DUSK:
            glare = np.array((1.0, 0.86, 0.64)) * (0.95 * (night - 0.2))
            light = lamp[..., None] * glare.astype(np.float32) + day.astype(np.float32)
            picture *= light
            picture += glow * np.float32(0.9 * (night - 0.2))
        else:
            picture *= day.astype(np.float32)
        if weather.fog_per_m > 0.005:
            clear = np.exp(depth_m * np.float32(-weather.fog_per_m))[..., None]
            fog = np.array((206, 210, 214)) * (0.2 + 0.8 * weather.daylight)
            picture -= fog.astype(np.float32)
            picture *= clear
            picture += fog.astype(np.float32)
        picture *= self._vignette * np.float32(weather.exposure * (1 + 0.35 * night))
        grain = self._noise[int(rng.integers(_NOISE_TILES))]
        dy, dx = (int(shift) for shift in rng.integers(0, self._settings.size_px, 2))
        grain = np.roll(grain, (dy, dx), axis=(0, 1))
        picture += grain * np.float32(self._settings.noise * (1 + 1.2 * night))
        return np.clip(picture, 0, 255).astype(np.uint8)


def _smaller(picture: npt.NDArray[np.uint8] | Float, size_px: int) -> Float:
    return np.asarray(cv2.resize(picture, (size_px, size_px), interpolation=cv2.INTER_AREA), np.float32)


def outline(track: Track, shape: Shape, state: State, t_s: float) -> Points:
    """(n, 3) site metres: the outermost points of a road user, whose projections bound its picture."""
    match track.kind:
        case "pedestrian":
            local = walker(shape, state, cruise_mps=track.cruise_mps, t_s=t_s)
            top = local[JOINT["head"]] + np.array((0, 0, 0.13))
            return to_world(state, np.vstack((local, top)))
        case "cyclist":
            local = cyclist(shape, state)
            top = local[JOINT["head"]] + np.array((0, 0, 0.13))
            wheels = np.array([(x, 0.0, z) for x in (-0.79, 0.93) for z in (0.0, 0.5)])
            return to_world(state, np.vstack((local, top, wheels)))
        case "car":
            car = CARS[shape.variant]
            half, w = car.length_m / 2, car.width_m / 2
            base = [(a * half, b * w, z) for a in (-1, 1) for b in (-1, 1) for z in (0.0, car.belt_m)]
            ends = (half - car.roof_front_m, half - car.roof_rear_m)
            roof = [(x, b * (w - 0.2), car.height_m) for x in ends for b in (-1, 1)]
            return to_world(state, np.array(base + roof))
