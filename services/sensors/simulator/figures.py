"""Pictures of people: a walker and a cyclist drawn on the joints that the radar's scatterers hang on."""

from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi, sin

import numpy as np
import numpy.typing as npt

from services.sensors.simulator.bodies import (
    BICYCLE,
    JOINT,
    Shape,
    bicycle_points,
    crank_turn_rad,
    cyclist,
    to_world,
    walker,
    wheel_turn_rad,
)
from services.sensors.simulator.brush import Brush, Color, shade
from services.sensors.simulator.traffic import State, Track

Points = npt.NDArray[np.float64]

_SKIN = ((236, 196, 168), (210, 162, 128), (160, 112, 82), (104, 72, 54))
_HAIR = ((44, 34, 28), (92, 62, 38), (168, 128, 72), (150, 150, 150), (30, 28, 30))
_TOPS = (
    (170, 38, 40), (38, 70, 140), (40, 44, 52), (224, 222, 216), (52, 108, 74),
    (206, 150, 42), (106, 62, 120), (84, 132, 158), (196, 96, 50), (120, 120, 124),
)  # fmt: skip
_BOTTOMS = ((38, 48, 78), (36, 36, 40), (84, 84, 90), (118, 96, 70), (60, 66, 56), (74, 96, 134))
_SHOES = ((30, 28, 28), (220, 220, 220), (92, 66, 48), (62, 64, 70))
_PAINTS = ((170, 30, 34), (30, 60, 130), (34, 36, 38), (210, 210, 206), (30, 110, 80), (220, 120, 30))
_HELMETS = ((230, 230, 230), (200, 40, 40), (36, 38, 44), (240, 200, 40), (60, 110, 190))


@dataclass(frozen=True, slots=True)
class Clothes:
    """Colours and extras of one person."""

    skin: Color
    hair: Color
    top: Color
    bottom: Color
    shoes: Color
    paint: Color
    helmet: Color
    is_long_coat: bool
    has_bag: bool
    has_helmet: bool
    is_short_sleeved: bool
    is_long_haired: bool


@lru_cache(maxsize=64)
def clothes_of(look: int) -> Clothes:
    """What this person wears, the same whenever asked."""
    rng = np.random.default_rng((look, 3))

    def pick(colors: tuple[tuple[int, int, int], ...]) -> Color:
        red, green, blue = np.clip(np.array(colors[rng.integers(len(colors))]) + rng.normal(0, 9, 3), 8, 250)
        return float(red), float(green), float(blue)

    chance = rng.random(5)
    return Clothes(
        skin=pick(_SKIN),
        hair=pick(_HAIR),
        top=pick(_TOPS),
        bottom=pick(_BOTTOMS),
        shoes=pick(_SHOES),
        paint=pick(_PAINTS),
        helmet=pick(_HELMETS),
        is_long_coat=bool(chance[0] < 0.2),
        has_bag=bool(chance[1] < 0.3),
        has_helmet=bool(chance[2] < 0.7),
        is_short_sleeved=bool(chance[3] < 0.35),
        is_long_haired=bool(chance[4] < 0.35),
    )


def draw_walker(brush: Brush, track: Track, shape: Shape, state: State, *, t_s: float) -> None:
    """Paint a person on foot."""
    joints = to_world(state, walker(shape, state, cruise_mps=track.cruise_mps, t_s=t_s))
    _draw_person(brush, joints, clothes_of(track.look), shape, state, scale=shape.height_m / 1.75)


def draw_cyclist(brush: Brush, track: Track, shape: Shape, state: State) -> None:
    """Paint the rider's far limbs, the bicycle, the rest of the rider."""
    clothes = clothes_of(track.look)
    bicycle = to_world(state, bicycle_points())
    left = np.array((-sin(state.heading_rad), cos(state.heading_rad), 0.0))
    near = "l" if float(left[:2] @ -state.xy_m) > 0 else "r"
    joints = to_world(state, cyclist(shape, state))
    far = "r" if near == "l" else "l"
    _draw_leg(brush, joints, clothes, far, 1.0)
    _draw_arm(brush, joints, clothes, far, 1.0)
    _draw_bicycle(brush, bicycle, clothes, state)
    _draw_person(brush, joints, clothes, shape, state, scale=1.0, is_rider=True, only_side=near)


def _draw_person(
    brush: Brush,
    joints: Points,
    clothes: Clothes,
    shape: Shape,
    state: State,
    *,
    scale: float,
    is_rider: bool = False,
    only_side: str = "",
) -> None:
    """Far limbs, torso, head, near limbs: by which side the camera sees."""
    depth = brush.eye.project(joints)[1]
    near = only_side or ("l" if depth[JOINT["shoulder_l"]] < depth[JOINT["shoulder_r"]] else "r")
    far = "r" if near == "l" else "l"
    view = state.xy_m / np.hypot(*state.xy_m)
    ahead = np.array((cos(state.heading_rad), sin(state.heading_rad)))
    away = float(ahead @ view)  # 1: seen from behind
    if not is_rider:
        _draw_arm(brush, joints, clothes, far, scale)
        _draw_leg(brush, joints, clothes, far, scale)
        _draw_leg(brush, joints, clothes, near, scale)
    if clothes.has_bag and not clothes.is_long_coat and away < 0.4:
        _draw_bag(brush, joints, clothes, ahead, scale)
    _draw_neck(brush, joints, clothes, scale)
    if away > 0:
        _draw_head(brush, joints, clothes, ahead, away, scale, is_rider=is_rider)
    _draw_torso(brush, joints, clothes, shape, scale, away=away, is_rider=is_rider)
    if clothes.has_bag and not clothes.is_long_coat and away >= 0.4:
        _draw_bag(brush, joints, clothes, ahead, scale)
    if away <= 0:
        _draw_head(brush, joints, clothes, ahead, away, scale, is_rider=is_rider)
    if is_rider:
        _draw_leg(brush, joints, clothes, near, scale)
    _draw_arm(brush, joints, clothes, near, scale)


def _draw_leg(brush: Brush, joints: Points, clothes: Clothes, side: str, scale: float) -> None:
    hip, knee, ankle, toe = (joints[JOINT[f"{name}_{side}"]] for name in ("hip", "knee", "ankle", "toe"))
    brush.limb(hip, knee, (0.088 * scale, 0.062 * scale), clothes.bottom)
    brush.limb(knee, ankle, (0.060 * scale, 0.045 * scale), clothes.bottom)
    heel = ankle - (toe - ankle) * 0.25 - np.array((0, 0, 0.035))
    brush.limb(heel, toe, (0.045 * scale, 0.034 * scale), clothes.shoes)


def _draw_arm(brush: Brush, joints: Points, clothes: Clothes, side: str, scale: float) -> None:
    shoulder, elbow, hand = (joints[JOINT[f"{name}_{side}"]] for name in ("shoulder", "elbow", "hand"))
    sleeve = clothes.skin if clothes.is_short_sleeved else clothes.top
    brush.limb(elbow, hand, (0.042 * scale, 0.032 * scale), sleeve)
    brush.limb(shoulder, elbow, (0.058 * scale, 0.046 * scale), clothes.top)
    pixel, depth = brush.eye.project(hand)
    brush.disc(pixel, brush.eye.focal_px * 0.042 * scale / float(depth), clothes.skin)


def _draw_torso(
    brush: Brush, joints: Points, clothes: Clothes, shape: Shape, scale: float, *, away: float, is_rider: bool
) -> None:
    hips = joints[[JOINT["hip_l"], JOINT["hip_r"]]]
    shoulders = joints[[JOINT["shoulder_l"], JOINT["shoulder_r"]]]
    pelvis, chest = joints[JOINT["pelvis"]], joints[JOINT["chest"]]
    thick = 0.10 * scale * shape.width
    brush.bulk(hips, (0.09 * scale, 0.09 * scale), clothes.bottom)
    if clothes.is_long_coat and not is_rider:
        hem = hips - np.array((0, 0, 0.26 * scale))
        brush.bulk(np.concatenate((hips, hem)), (thick, thick, thick * 1.1, thick * 1.1), clothes.top)
    waist = pelvis + 0.75 * (hips - pelvis)
    inner = chest + 0.72 * (shoulders - chest)
    body = np.concatenate((waist, [chest], inner, shoulders))
    brush.bulk(
        body, (thick * 0.8, thick * 0.8, thick * 1.1, thick * 0.75, thick * 0.75, 0.055, 0.055), clothes.top
    )
    if away < -0.2 and shape.idle < 3:  # an open jacket
        seam = np.stack((chest * 0.3 + shoulders.mean(axis=0) * 0.7, pelvis))
        brush.line(seam, shade(clothes.top, 0.45), width_m=0.02)


def _draw_neck(brush: Brush, joints: Points, clothes: Clothes, scale: float) -> None:
    neck, head = joints[JOINT["neck"]], joints[JOINT["head"]]
    brush.limb(0.6 * neck + 0.4 * head, neck - np.array((0, 0, 0.02)), (0.05 * scale, 0.055 * scale), clothes.skin)


def _draw_bag(brush: Brush, joints: Points, clothes: Clothes, ahead: Points, scale: float) -> None:
    back = np.array((*(-0.17 * scale * ahead), 0.0))
    top = joints[JOINT["neck"]] + back - np.array((0, 0, 0.08))
    low = joints[JOINT["chest"]] * 0.6 + joints[JOINT["pelvis"]] * 0.4 + back
    brush.limb(top, low, (0.12 * scale, 0.14 * scale), clothes.paint)


def _draw_head(
    brush: Brush, joints: Points, clothes: Clothes, ahead: Points, away: float, scale: float, *, is_rider: bool
) -> None:
    head = joints[JOINT["head"]]
    radius = 0.105 * scale
    up = np.array((0, 0, 1.0))
    front = np.array((*ahead, 0.0))
    brush.limb(head + up * 0.03, head - up * 0.05 + front * 0.01, (radius, radius * 0.78), clothes.skin)
    hair = 0.5 + 0.5 * away
    if is_rider and clothes.has_helmet:
        brush.limb(
            head + up * 0.06 + front * 0.035,
            head + up * 0.065 - front * 0.045,
            (radius * 0.88, radius * 0.94),
            clothes.helmet,
        )
        return
    brush.limb(
        head + up * 0.07 - front * 0.02,
        head + up * 0.02 - front * 0.05,
        (radius * 0.95, radius * 0.9),
        clothes.hair,
    )
    if away > 0.3:
        brush.limb(head + up * 0.05, head - up * (0.03 + 0.03 * hair), (radius * 1.02, radius * 0.9), clothes.hair)
    else:
        brush.limb(
            head + front * 0.05, head + front * 0.05 - up * 0.06, (radius * 0.62, radius * 0.5), clothes.skin
        )
    if clothes.is_long_haired:
        brush.limb(
            head - front * 0.08, head - front * 0.09 - up * 0.2, (radius * 0.75, radius * 0.6), clothes.hair
        )


def _draw_bicycle(brush: Brush, points: Points, clothes: Clothes, state: State) -> None:
    rear, front, crank, seat, stem, fork, bar = points
    ahead = np.array((cos(state.heading_rad), sin(state.heading_rad), 0.0))
    left = np.array((-ahead[1], ahead[0], 0.0))
    up = np.array((0, 0, 1.0))
    turn = wheel_turn_rad(state, BICYCLE.wheel_m)
    for hub in (rear, front):
        _draw_wheel(brush, hub, ahead, left, turn)
    paint = clothes.paint
    for a, b, width in (
        (rear, crank, 0.026), (rear, seat, 0.022), (crank, stem, 0.042), (crank, seat, 0.036),
        (seat + (stem - seat) * 0.02 - up * 0.08, stem, 0.036), (stem, fork, 0.042), (fork, front, 0.03),
    ):  # fmt: skip
        brush.line(np.stack((a, b)), shade(paint, 0.7), width_m=width * 1.35)
        brush.line(np.stack((a, b)), shade(paint, 1.1, 12), width_m=width * 0.6)
    brush.line(np.stack((stem, bar)), (70, 70, 74), width_m=0.03)
    brush.line(np.stack((bar + left * 0.28, bar - left * 0.28)), (46, 46, 48), width_m=0.034)
    brush.limb(seat + ahead * 0.12 + up * 0.02, seat - ahead * 0.13 + up * 0.03, (0.03, 0.06), (36, 34, 34))
    pedal = BICYCLE.pedal_m * (ahead * sin(crank_turn_rad(state)) + up * cos(crank_turn_rad(state)))
    ring = [crank + 0.1 * (ahead * cos(a) + up * sin(a)) for a in np.linspace(0, 2 * pi, 13)]
    brush.line(np.stack(ring), (60, 60, 62), width_m=0.02)
    brush.line(
        np.stack((crank + pedal + left * 0.12, crank + pedal, crank - pedal, crank - pedal - left * 0.12)),
        (90, 90, 94),
        width_m=0.026,
    )
    lamp = bar + ahead * 0.08 - up * 0.08
    brush.lamp(lamp, 0.03, (250, 248, 226), shines=float(ahead[:2] @ state.xy_m) < 0)


def _draw_wheel(brush: Brush, hub: Points, ahead: Points, left: Points, turn: float) -> None:
    """A tyre of some width, seen also end on, a bright rim, thin spokes, a hub."""
    radius = BICYCLE.wheel_m
    angle = np.linspace(0, 2 * pi, 29)[:-1]
    circle = np.cos(angle)[:, None] * ahead + np.sin(angle)[:, None] * np.array((0, 0, 1.0))
    for spoke in turn + np.arange(9) * 2 * pi / 9:
        tip = np.cos(spoke) * ahead * 1.0 + np.array((0, 0, -np.sin(spoke)))
        brush.line(np.stack((hub, hub + tip * radius * 0.92)), (150, 152, 156), width_m=0.006)
    brush.line(hub + circle * radius * 0.93, (168, 170, 174), width_m=0.03, closed=True)
    for side in (-0.014, 0.014):
        brush.line(hub + circle * radius * 0.985 + left * side, (28, 28, 30), width_m=0.042, closed=True)
    brush.line(np.stack((hub - left * 0.05, hub + left * 0.05)), (110, 112, 116), width_m=0.06)
