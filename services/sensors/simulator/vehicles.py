"""Pictures of cars: flat panels from the silhouette of its type, glass, lamps, a plate, wheels that turn."""

from functools import lru_cache
from math import cos, pi, sin

import numpy as np
import numpy.typing as npt

from services.sensors.simulator.bodies import CARS, CarShape, Shape, to_world, wheel_turn_rad
from services.sensors.simulator.brush import Brush, Color, shade
from services.sensors.simulator.traffic import State, Track

Points = npt.NDArray[np.float64]

_PAINTS = (
    (196, 198, 202), (232, 232, 230), (40, 42, 46), (108, 112, 118), (150, 26, 30), (34, 62, 122),
    (62, 92, 74), (184, 158, 116), (216, 128, 36), (92, 36, 44), (70, 130, 170),
)  # fmt: skip
_GLASS: Color = (44, 56, 66)
_TYRE: Color = (26, 26, 28)
_RIM: Color = (168, 170, 174)


@lru_cache(maxsize=64)
def paint_of(look: int) -> Color:
    """The colour of this car."""
    rng = np.random.default_rng((look, 4))
    paint = np.array(_PAINTS[rng.integers(len(_PAINTS))]) * rng.uniform(0.85, 1.12) * rng.normal(1, 0.03, 3)
    red, green, blue = np.clip(paint, 12, 245)
    return float(red), float(green), float(blue)


def draw_car(brush: Brush, track: Track, shape: Shape, state: State) -> None:
    """Paint the car: far wheels, lower body, cabin, near wheels; panels that look away are left out."""
    _CarPainter(brush, CARS[shape.variant], paint_of(track.look), state).paint()


class _CarPainter:
    """Local axes: forward from the middle of the car, left, up."""

    def __init__(self, brush: Brush, car: CarShape, paint: Color, state: State) -> None:
        self.brush, self.car, self.color, self.state = brush, car, paint, state
        c, s = cos(state.heading_rad), sin(state.heading_rad)
        self.turn = np.array(((c, s, 0.0), (-s, c, 0.0), (0.0, 0.0, 1.0)))
        eye = np.array((0.0, 0.0, brush.eye.height_m)) - np.array((*state.xy_m, 0.0))
        self.eye = self.turn @ eye
        self.light = self.turn @ brush.light

    def paint(self) -> None:
        car, front = self.car, self.car.length_m / 2
        w = car.width_m / 2
        near = 1.0 if self.eye[1] > 0 else -1.0
        self._belly()
        for side in (-near, near):
            for axle in car.axles:
                self._wheel(front - axle * car.length_m, side * (w - 0.1), is_near=False)
        self._lower_body()
        self._cabin()
        if abs(self.eye[1]) > w:
            self._side_details(near)
            for axle in car.axles:
                self._wheel(front - axle * car.length_m, near * w, is_near=True)

    def _quad(self, corners: list[tuple[float, float, float]], color: Color, gloss: float = 0.0) -> bool:
        """One flat panel, counter-clockwise from outside. Returns whether it faces the camera."""
        local = np.array(corners)
        normal = np.cross(local[1] - local[0], local[2] - local[0])
        normal = normal / max(float(np.linalg.norm(normal)), 1e-9)
        if float(normal @ (self.eye - local[0])) <= 0:
            return False
        lit = 0.52 + 0.40 * max(0.0, float(normal @ self.light)) + 0.16 * max(0.0, float(normal[2]))
        self.brush.polygon(to_world(self.state, local), shade(color, lit, gloss * 60 * max(0.0, float(normal[2]))))
        return True

    def _flat(self, corners: list[tuple[float, float, float]], color: Color) -> None:
        self.brush.polygon(to_world(self.state, np.array(corners)), color)

    def _strip(self, y: float, forward: tuple[float, float], up: tuple[float, float], color: Color) -> None:
        """A rectangle along the car's side."""
        (a, b), (low, high) = forward, up
        self._flat([(a, y, low), (b, y, low), (b, y, high), (a, y, high)], color)

    def _lamp(self, centre: tuple[float, float, float], radius_m: float, color: Color) -> None:
        self.brush.lamp(to_world(self.state, np.array([centre]))[0], radius_m, color, shines=True)

    def _belly(self) -> None:
        car = self.car
        half, w = car.length_m / 2 - 0.1, car.width_m / 2 - 0.05
        self._flat([(half, w, 0.02), (half, -w, 0.02), (-half, -w, 0.02), (-half, w, 0.02)], (22, 22, 24))

    def _silhouette(self) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
        """Lower body along its top from front to rear, and cabin the same way: (forward, up)."""
        car, f = self.car, self.car.length_m / 2
        lower = [
            (f - 0.05, 0.22), (f, 0.48), (f - 0.06, car.belt_m - 0.22), (f - 0.22, car.belt_m - 0.12),
            (f - car.bonnet_m, car.belt_m), (f - car.tail_m, car.belt_m + 0.02),
            (-f + 0.06, car.belt_m - 0.02), (-f, 0.50), (-f + 0.05, 0.26),
        ]  # fmt: skip
        cabin = [
            (f - car.bonnet_m, car.belt_m), (f - car.roof_front_m, car.height_m - 0.03),
            (f - 0.5 * (car.roof_front_m + car.roof_rear_m), car.height_m),
            (f - car.roof_rear_m, car.height_m - 0.05), (f - car.tail_m, car.belt_m + 0.02),
        ]  # fmt: skip
        return lower, cabin

    def _lower_body(self) -> None:
        lower, _ = self._silhouette()
        w = self.car.width_m / 2
        widths = [w - 0.08, w - 0.03, w - 0.05, w - 0.05, w - 0.02, w - 0.02, w - 0.05, w - 0.03, w - 0.08]
        for side in (1.0, -1.0):
            corners = [(x, side * w, z) for x, z in lower]
            self._side_panel(corners if side < 0 else corners[::-1], side)
        for index in range(len(lower) - 1):
            (x0, z0), (x1, z1) = lower[index], lower[index + 1]
            w0, w1 = widths[index], widths[index + 1]
            self._quad([(x0, w0, z0), (x1, w1, z1), (x1, -w1, z1), (x0, -w0, z0)], self.color, gloss=0.6)
        self._ends()

    def _side_panel(self, corners: list[tuple[float, float, float]], side: float) -> None:
        if not self._quad(corners, self.color):
            return
        car, w = self.car, side * self.car.width_m / 2
        f = car.length_m / 2
        lit = 0.52 + 0.40 * max(0.0, side * float(self.light[1]))
        high, low = car.belt_m - 0.06, car.belt_m - 0.2
        gleam = [
            (f - 0.3, high - 0.12),
            (f - car.bonnet_m, high),
            (-f + 0.1, high),
            (-f + 0.1, low),
            (f - 0.3, low),
        ]
        self._flat([(x, w, z) for x, z in gleam], shade(self.color, lit * 1.18, 10))
        self._strip(w, (-f + 0.1, f - 0.1), (0.26, 0.42), shade(self.color, lit * 0.62))

    def _ends(self) -> None:
        """Grille, lamps and plate at whichever end is seen."""
        car, f, w = self.car, self.car.length_m / 2, self.car.width_m / 2
        end = 1.0 if self.eye[0] > 0 else -1.0
        if abs(self.eye[0]) < f:
            return
        x = end * (f + 0.005)

        def panel(y0: float, y1: float, z0: float, z1: float, color: Color) -> None:
            self._flat([(x, y0, z0), (x, y1, z0), (x, y1, z1), (x, y0, z1)], color)

        top = car.belt_m - 0.2
        panel(-w + 0.06, w - 0.06, 0.24, 0.36, (36, 36, 38))
        if end > 0:
            panel(-0.42, 0.42, 0.46, top - 0.06, (30, 30, 32))
            for z in (0.52, 0.60):
                panel(-0.40, 0.40, z, z + 0.02, (120, 122, 126))
            for side in (1, -1):
                panel(side * (w - 0.38), side * (w - 0.06), top - 0.15, top + 0.02, (206, 214, 220))
                self._lamp((x, side * (w - 0.25), top - 0.06), 0.06, (252, 250, 236))
        else:
            for side in (1, -1):
                panel(side * (w - 0.34), side * (w - 0.04), top - 0.14, top + 0.06, (170, 24, 26))
                self._lamp((x, side * (w - 0.2), top - 0.04), 0.05, (236, 60, 50))
            panel(-w + 0.36, w - 0.36, top + 0.03, top + 0.05, shade(self.color, 0.5))
        panel(-0.26, 0.26, 0.40, 0.51, (236, 236, 224))
        panel(-0.2, 0.2, 0.43, 0.48, (60, 60, 66))

    def _cabin(self) -> None:
        _, cabin = self._silhouette()
        car = self.car
        w, roof = car.width_m / 2 - 0.03, car.width_m / 2 - 0.20
        widths = [w, roof, roof + 0.02, roof, w]
        for side in (1.0, -1.0):
            corners = [(x, side * width, z) for (x, z), width in zip(cabin, widths, strict=True)]
            if self._quad(corners if side < 0 else corners[::-1], self.color):
                self._side_glass(side, w, roof)
        for index in range(len(cabin) - 1):
            (x0, z0), (x1, z1) = cabin[index], cabin[index + 1]
            w0, w1 = widths[index], widths[index + 1]
            corners = [(x0, w0, z0), (x1, w1, z1), (x1, -w1, z1), (x0, -w0, z0)]
            if self._quad(corners, self.color, gloss=0.8) and index in (0, len(cabin) - 2):
                self._screen(corners)

    def _screen(self, corners: list[tuple[float, float, float]]) -> None:
        """Windscreen or rear window inside its frame, with the sky in its upper part."""
        points = np.array(corners)
        middle = points.mean(axis=0)
        glass = middle + (points - middle) * np.array((0.92, 0.88, 0.86))
        self.brush.polygon(to_world(self.state, glass), _GLASS)
        (high, low) = (
            (glass[[1, 2]], glass[[0, 3]]) if points[1, 2] > points[0, 2] else (glass[[0, 3]], glass[[1, 2]])
        )
        band = np.concatenate((high, (high + (low - high) * 0.4)[::-1]))
        self.brush.polygon(to_world(self.state, band), shade(_GLASS, 1.6, 18))

    def _side_glass(self, side: float, w: float, roof: float) -> None:
        car, f = self.car, self.car.length_m / 2
        z0, z1 = car.belt_m + 0.04, car.height_m - 0.12
        lean = (z0 - car.belt_m) / (car.height_m - car.belt_m), (z1 - car.belt_m) / (car.height_m - car.belt_m)
        y0, y1 = (side * (w + (roof - w) * part + 0.012) for part in lean)
        screen = car.roof_front_m - car.bonnet_m
        back = car.tail_m - car.roof_rear_m
        front = [f - car.bonnet_m - screen * lean[0] - 0.13, f - car.bonnet_m - screen * lean[1] - 0.10]
        rear = [f - car.tail_m + back * lean[0] + 0.14, f - car.tail_m + back * lean[1] + 0.12]
        post = 0.5 * (front[0] + rear[0]) + 0.02
        for (a0, a1), (b0, b1) in (
            ((front[0], front[1]), (post + 0.05, post + 0.05)),
            ((post - 0.05, post - 0.05), (rear[0], rear[1])),
        ):
            self._flat([(a0, y0, z0), (a1, y1, z1), (b1, y1, z1), (b0, y0, z0)], _GLASS)
            middle = 0.55
            za, ya = z0 + (z1 - z0) * middle, y0 + (y1 - y0) * middle
            am, bm = a0 + (a1 - a0) * middle, b0 + (b1 - b0) * middle
            self._flat([(am, ya, za), (a1, y1, z1), (b1, y1, z1), (bm, ya, za)], shade(_GLASS, 1.5, 16))

    def _side_details(self, side: float) -> None:
        """Door seams, handles, mirror."""
        car, f, w = self.car, self.car.length_m / 2, side * (self.car.width_m / 2 + 0.004)
        dark = shade(self.color, 0.35)
        post = 0.5 * (f - car.bonnet_m - 0.2 + f - car.tail_m + 0.2)
        for x in (f - car.bonnet_m - 0.12, post, f - car.tail_m + 0.35):
            self.brush.line(
                to_world(self.state, np.array(((x, w, 0.32), (x, w, car.belt_m - 0.02)))), dark, width_m=0.014
            )
        for x in (post + 0.12, f - car.tail_m + 0.5):
            self._strip(w, (x, x + 0.16), (car.belt_m - 0.13, car.belt_m - 0.1), shade(self.color, 0.45))
        x, y = f - car.bonnet_m - 0.32, w + side * 0.08
        self._strip(y, (x, x + 0.12), (car.belt_m + 0.02, car.belt_m + 0.16), shade(self.color, 0.75))

    def _wheel(self, x: float, y: float, *, is_near: bool) -> None:
        radius = self.car.wheel_m
        angle = np.linspace(0, 2 * pi, 25)[:-1]
        ring = np.stack((np.sin(angle), np.zeros_like(angle), np.cos(angle)), axis=1)
        centre = np.array((x, y, radius))

        def disc(scale: float, color: Color, out: float = 0.0) -> None:
            local = centre + ring * scale * radius + (0, out * np.sign(y), 0)
            self.brush.polygon(to_world(self.state, local), color)

        if is_near:
            disc(1.16, (18, 18, 20))
        disc(1.0, _TYRE, 0.01)
        if not is_near:
            return
        lit = 0.62 + 0.38 * max(0.0, float(np.sign(y) * self.light[1]))
        disc(0.66, shade(_RIM, lit), 0.015)
        turn = wheel_turn_rad(self.state, radius)
        for spoke in turn + np.arange(5) * 2 * pi / 5:
            wedge = [(0.22, spoke - 0.5), (0.56, spoke - 0.36), (0.56, spoke + 0.36), (0.22, spoke + 0.5)]
            local = centre + np.array(
                [(r * radius * sin(a), 0.018 * np.sign(y), r * radius * cos(a)) for r, a in wedge]
            )
            self.brush.polygon(to_world(self.state, local), (52, 52, 56))
        disc(0.16, shade(_RIM, lit * 0.9), 0.02)
