"""Road users as the radar meets them: extended targets of point scatterers that move with limbs and wheels.

Mean radar cross-sections are chosen, not measured: a pedestrian -8 dBsm, a cyclist 8 dB above, a car 9 dBsm and
far more when seen square on; each body spreads around its mean. They set how hard the classes are to tell apart
(EXPERIMENTS.md). It does not know the radar.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi, sin

import numpy as np
import numpy.typing as npt

from services.sensors.simulator.bodies import (
    BICYCLE,
    CARS,
    JOINT,
    JOINTS,
    CarShape,
    Shape,
    bicycle_points,
    crank_turn_rad,
    cyclist,
    shape_of,
    to_world,
    walker,
    wheel_turn_rad,
)
from services.sensors.simulator.traffic import State, Track

Points = npt.NDArray[np.float64]

MEAN_RCS_DBSM = {"pedestrian": -8.0, "cyclist": 0.0, "car": 9.0}
RCS_SPREAD_DB = {"pedestrian": 1.8, "cyclist": 1.8, "car": 2.5}

_INSTANT_S = 1e-3
_RIM_POINTS = 10
_CAR_RIM_POINTS = 5

_LIMBS = (
    # from, to, points, share of the cross-section
    ("pelvis", "chest", 4, 0.26),
    ("chest", "neck", 4, 0.24),
    ("shoulder_l", "shoulder_r", 3, 0.08),
    ("neck", "head", 2, 0.06),
    ("hip_l", "knee_l", 3, 0.07), ("hip_r", "knee_r", 3, 0.07),
    ("knee_l", "ankle_l", 3, 0.05), ("knee_r", "ankle_r", 3, 0.05),
    ("ankle_l", "toe_l", 2, 0.02), ("ankle_r", "toe_r", 2, 0.02),
    ("shoulder_l", "elbow_l", 2, 0.02), ("shoulder_r", "elbow_r", 2, 0.02),
    ("elbow_l", "hand_l", 2, 0.02), ("elbow_r", "hand_r", 2, 0.02),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scatterers:
    """Points in site metres: position_m, velocity_mps (P, 3), rcs_m2 (P,), all float64."""

    position_m: Points
    velocity_mps: Points
    rcs_m2: Points


def scatterers(track: Track, t_s: float, *, sensor_m: Points) -> Scatterers:
    """The road user's scatterers at t_s, as bright as they are towards the sensor at sensor_m (3,)."""
    state = track.state(t_s)
    shape, brightness = _constants(track)
    toward = _local_direction(state, sensor_m)
    if track.kind == "car":
        rcs = _car_rcs(CARS[shape.variant], toward)
    elif track.kind == "cyclist":
        rcs = _cyclist_rcs(toward)
    else:
        rcs = _limb_weights()[1]
    before, after = (
        to_world(track.state(t), _points(track, shape, t)) for t in (t_s - _INSTANT_S, t_s + _INSTANT_S)
    )
    return Scatterers(0.5 * (before + after), (after - before) / (2 * _INSTANT_S), rcs * brightness)


@lru_cache(maxsize=64)
def _constants(track: Track) -> tuple[Shape, Points]:
    """Its shape, and per scatterer the factor by which this road user is brighter than the mean of its kind."""
    rng = np.random.default_rng((track.look, 1))
    count = {"pedestrian": len(_limb_weights()[1]), "cyclist": len(_cyclist_rcs(np.array((1.0, 0, 0))))}
    points = count.get(track.kind) or len(_car_rcs(CARS[0], np.array((1.0, 0, 0))))
    mean_db = MEAN_RCS_DBSM[track.kind] + RCS_SPREAD_DB[track.kind] * np.clip(rng.standard_normal(), -2.2, 2.2)
    own_db = 3.0 * rng.standard_normal(points) - 1.0  # the mean of a 3 dB lognormal is 1 dB up
    return shape_of(track), 10 ** ((mean_db + own_db) / 10)


def _local_direction(state: State, sensor_m: Points) -> Points:
    """Unit vector (forward, left, up) from the road user to the sensor."""
    x, y = sensor_m[:2] - state.xy_m
    c, s = cos(state.heading_rad), sin(state.heading_rad)
    direction = np.array((c * x + s * y, -s * x + c * y, sensor_m[2] - 0.8))
    return np.asarray(direction / np.linalg.norm(direction))


def _points(track: Track, shape: Shape, t_s: float) -> Points:
    state = track.state(t_s)
    jitter = _surface(track.look, track.kind)
    match track.kind:
        case "pedestrian":
            joints = walker(shape, state, cruise_mps=track.cruise_mps, t_s=t_s)
            return np.asarray(_limb_weights()[0] @ joints + jitter)
        case "cyclist":
            rider = _limb_weights()[0] @ cyclist(shape, state)
            return np.concatenate((rider + jitter, _bicycle(state)))
        case "car":
            car = CARS[shape.variant]
            return np.concatenate((_body(car) + jitter, _wheels(car, state)))


@lru_cache(maxsize=64)
def _surface(look: int, kind: str) -> Points:
    """Where on the body's surface each scatterer sits, off the line between the joints."""
    rng = np.random.default_rng((look, 2))
    count = len(_body(CARS[0])) if kind == "car" else len(_limb_weights()[1])
    return rng.uniform(-0.05, 0.05, (count, 3))


@lru_cache(maxsize=1)
def _limb_weights() -> tuple[Points, Points]:
    """(P, J) weights that put scatterers along the limbs, and (P,) their shares of the cross-section."""
    rows, shares = [], []
    for start, end, count, share in _LIMBS:
        for part in (np.arange(count) + 0.5) / count:
            row = np.zeros(len(JOINTS))
            row[JOINT[start]], row[JOINT[end]] = 1 - part, part
            rows.append(row)
            shares.append(share / count)
    return np.array(rows), np.array(shares)


def _bicycle(state: State) -> Points:
    """Frame tubes, cranks, and rim points that turn with the wheels."""
    rear, front, crank, seat, stem, fork, bar = bicycle_points()
    tubes = ((rear, crank), (crank, stem), (crank, seat), (seat, stem), (rear, seat), (fork, front), (stem, bar))
    frame = [a + (b - a) * part for a, b in tubes for part in (0.25, 0.75)]
    turn = crank_turn_rad(state)
    reach = BICYCLE.pedal_m * np.array((sin(turn), 0, cos(turn)))
    pedals = [crank + reach + (0, 0.13, 0), crank - reach - (0, 0.13, 0)]
    angle = wheel_turn_rad(state, BICYCLE.wheel_m) + np.arange(_RIM_POINTS) * 2 * pi / _RIM_POINTS
    rim = BICYCLE.wheel_m * 0.93 * np.stack((np.sin(angle), np.zeros_like(angle), np.cos(angle)), axis=1)
    return np.concatenate((frame, pedals, rear + rim, front + rim, [rear, front]))


def _cyclist_rcs(toward: Points) -> Points:
    """Half the rider's, half the bicycle's; tubes and rims flash when seen broadside. Mean over aspects 1 m²."""
    broadside = toward[1] ** 2
    rider = _limb_weights()[1] * 0.5
    gain = 0.6 + 1.3 * broadside**2
    frame = np.full(14, 0.30 / 14) * gain
    pedals = np.full(2, 0.03)
    rims = np.full(2 * _RIM_POINTS, 0.14 / (2 * _RIM_POINTS)) * gain
    return np.concatenate((rider, frame, pedals, rims, np.full(2, 0.02)))


_SIDE = np.linspace(-0.46, 0.46, 7)


@lru_cache(maxsize=8)
def _body(car: CarShape) -> Points:
    """Local body points: four sides at bumper and belt height, corners, mirrors, underbody, roof edge."""
    half_l, half_w, points = car.length_m / 2, car.width_m / 2, []
    for z in (0.45, 0.8):
        points += [(s * car.length_m, side * half_w, z) for side in (1, -1) for s in _SIDE]
        points += [(end * half_l, s * car.width_m, z) for end in (1, -1) for s in _SIDE[::2]]
    points += [(end * half_l, side * half_w, 0.55) for end in (1, -1) for side in (1, -1)]
    points += [(0.2 * car.length_m, side * (half_w + 0.08), 1.0) for side in (1, -1)]
    points += [(s * car.length_m, 0.0, 0.25) for s in (-0.35, -0.12, 0.12, 0.35)]
    points += [(s, 0.0, car.height_m) for s in (-0.8, 0.4)]
    return np.array(points)


def _wheels(car: CarShape, state: State) -> Points:
    angle = wheel_turn_rad(state, car.wheel_m) + np.arange(_CAR_RIM_POINTS) * 2 * pi / _CAR_RIM_POINTS
    rim = 0.8 * car.wheel_m * np.stack((np.sin(angle), np.zeros_like(angle), np.cos(angle)), axis=1)
    hubs = [
        (car.length_m * (0.5 - axle), side * car.width_m / 2, car.wheel_m)
        for axle in car.axles
        for side in (1, -1)
    ]
    return np.concatenate([np.array(hub) + np.concatenate((rim, np.zeros((1, 3)))) for hub in hubs])


def _car_rcs(car: CarShape, toward: Points) -> Points:
    """(P,) shares per body and wheel point, about 1 m² in the mean over aspects; flat sides flash square on."""
    forward, left = toward[0], toward[1]
    sides = [_facet(left), _facet(-left)]
    ends = [_facet(forward), _facet(-forward)]
    shares: list[float] = []
    for z in (1.0, 0.5):
        shares += [z * 0.020 * facet for facet in sides for _ in _SIDE]
        shares += [z * 0.035 * facet for facet in ends for _ in _SIDE[::2]]
    for end in (forward, -forward):
        shares += [0.13 * _seen(max(end, side)) for side in (left, -left)]
    shares += [0.03 * _seen(side) for side in (left, -left)]
    shares += [0.02] * 4 + [0.02 * car.height_m] * 2
    for _ in car.axles:
        for side in (left, -left):
            shares += [0.010 * _seen(side)] * _CAR_RIM_POINTS + [0.03 * _seen(side)]
    return np.array(shares)


def _seen(cosine: float) -> float:
    """A soft step: parts on the far side are not quite dark, the wave gets there below the car."""
    return 0.06 + 0.94 * min(1.0, max(0.0, 0.15 + cosine) / 0.4)


def _facet(cosine: float) -> float:
    off_rad = np.arccos(np.clip(cosine, -1, 1))
    return float(_seen(cosine) * (0.5 + 7.0 * np.exp(-((off_rad / 0.16) ** 2))))
