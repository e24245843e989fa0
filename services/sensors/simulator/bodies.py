"""How road users move: joints of a walker and of a cyclist, frame and wheels of a car, at any instant.

Radar scatterers and the camera's drawing both hang on these joints, so that an echo's micro-Doppler and the
picture show the same step. Local axes: forward, left, up, in metres from the ground below the body.
"""

from dataclasses import dataclass
from math import asin, cos, pi, sin

import numpy as np
import numpy.typing as npt

from services.sensors.simulator.traffic import Kind, State, Track

Points = npt.NDArray[np.float64]

JOINTS = (
    "pelvis", "chest", "neck", "head",
    "hip_l", "knee_l", "ankle_l", "toe_l", "hip_r", "knee_r", "ankle_r", "toe_r",
    "shoulder_l", "elbow_l", "hand_l", "shoulder_r", "elbow_r", "hand_r",
)  # fmt: skip
JOINT = {name: index for index, name in enumerate(JOINTS)}

_ANKLE_M = 0.065


@dataclass(frozen=True, slots=True)
class Shape:
    """What tells one road user from the next of its kind.

    height_m: of a person. width: of its shoulders, around 1. variant: index into CARS. idle: a habit, 0 to 2 pi.
    """

    kind: Kind
    height_m: float
    width: float
    variant: int
    idle: float


@dataclass(frozen=True, slots=True)
class Bicycle:
    """Fixed points of a bicycle, (forward, up) in metres from the ground below the crank, and what turns."""

    wheel_m: float = 0.34
    rear: tuple[float, float] = (-0.45, 0.34)
    front: tuple[float, float] = (0.59, 0.34)
    crank: tuple[float, float] = (0.0, 0.29)
    seat: tuple[float, float] = (-0.19, 0.93)
    stem: tuple[float, float] = (0.41, 0.92)
    fork: tuple[float, float] = (0.46, 0.66)
    bar: tuple[float, float] = (0.47, 1.02)
    pedal_m: float = 0.17
    gear: float = 2.4


@dataclass(frozen=True, slots=True)
class CarShape:
    """A body type: outer sizes and what its silhouette from the side needs, metres."""

    name: str
    length_m: float
    width_m: float
    height_m: float
    belt_m: float
    bonnet_m: float  # where the windscreen starts, from the front
    roof_front_m: float
    roof_rear_m: float
    tail_m: float  # where the rear window ends, from the front
    wheel_m: float = 0.32
    axles: tuple[float, float] = (0.18, 0.81)  # of the length, from the front


BICYCLE = Bicycle()
CARS = (
    CarShape("hatchback", 4.05, 1.76, 1.47, 0.92, 1.05, 1.85, 3.50, 4.00),
    CarShape("saloon", 4.65, 1.82, 1.44, 0.92, 1.30, 2.15, 3.30, 4.05),
    CarShape("suv", 4.45, 1.86, 1.68, 1.03, 1.15, 1.85, 3.85, 4.38, wheel_m=0.36),
    CarShape("estate", 4.60, 1.80, 1.49, 0.93, 1.25, 2.05, 4.05, 4.55),
    CarShape("van", 4.85, 1.92, 1.95, 1.05, 0.80, 1.55, 4.70, 4.84, wheel_m=0.34),
)


def shape_of(track: Track) -> Shape:
    """The sizes of this road user, the same whenever asked."""
    rng = np.random.default_rng((track.look, 0))
    return Shape(
        kind=track.kind,
        height_m=float(rng.uniform(1.55, 1.92)),
        width=float(rng.uniform(0.9, 1.15)),
        variant=int(rng.integers(len(CARS))),
        idle=float(rng.uniform(0, 2 * pi)),
    )


def to_world(state: State, local: Points) -> Points:
    """(J, 3) forward, left, up to (J, 3) site metres."""
    c, s = cos(state.heading_rad), sin(state.heading_rad)
    world = local @ np.array(((c, s, 0.0), (-s, c, 0.0), (0.0, 0.0, 1.0)))
    world[:, :2] += state.xy_m
    return np.asarray(world)


def walker(shape: Shape, state: State, *, cruise_mps: float, t_s: float) -> Points:
    """(18, 3) local joints of a person on foot, whose foot on the ground stays about where it is."""
    height = shape.height_m
    thigh, shin = 0.245 * height, 0.246 * height
    cycle_m = height * (0.42 + 0.28 * cruise_mps)
    phase = 2 * pi * state.travelled_m / cycle_m
    pace = min(1.0, state.speed_mps / cruise_mps)
    swing = pace * asin(min(0.62, cycle_m / 4 / (thigh + shin)))
    sway = 0.02 * sin(1.1 * t_s + shape.idle) * (1 - pace)
    hip_z = 0.525 * height + 0.014 * height * pace * cos(2 * phase)
    lean = 0.04 * pace * cruise_mps + sway
    joints = np.zeros((len(JOINTS), 3))

    half_hip, half_shoulder = 0.055 * height * shape.width, 0.115 * height * shape.width
    joints[JOINT["pelvis"]] = (0, 0, hip_z)
    joints[JOINT["chest"]] = (0.22 * height * lean, 0, hip_z + 0.20 * height)
    joints[JOINT["neck"]] = (0.30 * height * lean, 0, hip_z + 0.305 * height)
    joints[JOINT["head"]] = (0.33 * height * lean + 0.015, 0, hip_z + 0.40 * height)
    for side, sign, turn in (("l", 1, 0.0), ("r", -1, pi)):
        hip = swing * asin(0.95 * sin(phase + turn)) / asin(0.95)  # even speed of the foot on the ground
        knee = pace * (0.10 + 0.85 * ((1 + cos(phase + turn + 0.5)) / 2) ** 3) + 0.03
        joints[JOINT[f"hip_{side}"]] = (0, sign * half_hip, hip_z)
        _leg(joints, side, hip, hip - knee, thigh, shin)
        arm = -0.9 * swing * sin(phase + turn) + 0.05 * sin(0.9 * t_s + shape.idle + turn) * (1 - pace)
        elbow = 0.22 + 0.35 * pace * cruise_mps / 2 + 0.2 * pace * max(0.0, sin(phase + turn + pi))
        if shape.idle > 4.9 and side == "r":  # on the phone
            arm, elbow = 0.35, 2.3
        twist = 0.25 * swing * -sin(phase + turn) * half_shoulder
        shoulder = _off(joints[JOINT["neck"]], twist, sign * half_shoulder, -0.035 * height)
        joints[JOINT[f"shoulder_{side}"]] = shoulder
        _arm(joints, side, shoulder, arm, elbow, 0.172 * height, 0.16 * height, sign)
    return joints


def _off(point: Points, forward: float, left: float, up: float) -> Points:
    return np.array((point[0] + forward, point[1] + left, point[2] + up))


def _leg(joints: Points, side: str, hip: float, shin_angle: float, thigh: float, shin: float) -> None:
    top = joints[JOINT[f"hip_{side}"]]
    knee = _off(top, thigh * sin(hip), 0, -thigh * cos(hip))
    ankle = _off(knee, shin * sin(shin_angle), 0, -shin * cos(shin_angle))
    ankle[2] = max(ankle[2], _ANKLE_M)
    tilt = 0.5 * min(shin_angle, 0.0) - 0.15
    joints[JOINT[f"knee_{side}"]], joints[JOINT[f"ankle_{side}"]] = knee, ankle
    toe = _off(ankle, 0.17 * cos(tilt), 0, min(0.17 * sin(tilt), 0.0))
    toe[2] = max(toe[2], 0.03)
    joints[JOINT[f"toe_{side}"]] = toe


def _arm(
    joints: Points, side: str, shoulder: Points, angle: float, elbow: float, upper: float, lower: float, sign: int
) -> None:
    middle = _off(shoulder, upper * sin(angle), sign * 0.03, -upper * cos(angle))
    joints[JOINT[f"elbow_{side}"]] = middle
    joints[JOINT[f"hand_{side}"]] = _off(middle, lower * sin(angle + elbow), 0, -lower * cos(angle + elbow))


def wheel_turn_rad(state: State, wheel_m: float) -> float:
    """How far a wheel that does not slip has turned."""
    return state.travelled_m / wheel_m


def crank_turn_rad(state: State) -> float:
    return state.travelled_m / (BICYCLE.wheel_m * BICYCLE.gear)


def cyclist(shape: Shape, state: State) -> Points:
    """(18, 3) local joints of the rider. Feet go with the pedals; at a stop one of them goes to the ground."""
    bike = BICYCLE
    turn = crank_turn_rad(state)
    stands = max(0.0, 1 - state.speed_mps / 0.8)
    upright = 0.5 + 0.5 * sin(shape.idle)  # a town bike or a racer
    joints = np.zeros((len(JOINTS), 3))
    hips = np.array((bike.seat[0] + 0.05, 0.0, bike.seat[1] + 0.09))
    shoulders = _off(hips, 0.40 - 0.18 * upright, 0.0, 0.40 + 0.08 * upright)
    joints[JOINT["pelvis"]] = hips
    joints[JOINT["chest"]] = _off(0.4 * hips + 0.6 * shoulders, -0.02, 0, 0.02)
    joints[JOINT["neck"]] = _off(shoulders, 0.03, 0, 0.06)
    joints[JOINT["head"]] = _off(shoulders, 0.12 - 0.05 * upright, 0, 0.22)
    for side, sign, offset in (("l", 1, 0.0), ("r", -1, pi)):
        hip = _off(hips, 0.0, sign * 0.09, -0.02)
        at = turn + offset
        forward, up = bike.crank[0] + bike.pedal_m * sin(at), bike.crank[1] + bike.pedal_m * cos(at)
        ankle = np.array((forward - 0.06, sign * 0.13, up + 0.09))
        if side == "l":
            ankle = ankle * (1 - stands) + np.array((0.1, 0.30, 0.09)) * stands
        joints[JOINT[f"hip_{side}"]] = hip
        joints[JOINT[f"knee_{side}"]], joints[JOINT[f"ankle_{side}"]] = _bend(hip, ankle, 0.45, 0.45)
        joints[JOINT[f"toe_{side}"]] = _off(joints[JOINT[f"ankle_{side}"]], 0.15, 0, -0.06)
        shoulder = _off(shoulders, 0, sign * 0.19 * shape.width, 0)
        hand = np.array((bike.bar[0], sign * 0.24, bike.bar[1] + 0.02))
        joints[JOINT[f"shoulder_{side}"]], joints[JOINT[f"hand_{side}"]] = shoulder, hand
        joints[JOINT[f"elbow_{side}"]] = _off(0.5 * (shoulder + hand), -0.05, sign * 0.06, -0.08)
    return joints


def _bend(top: Points, end: Points, upper: float, lower: float) -> tuple[Points, Points]:
    """Knee (and reachable ankle) of a leg from `top` to `end` whose knee points forward."""
    way = end - top
    reach = float(np.linalg.norm(way))
    if reach > 0.995 * (upper + lower):
        end = top + way * (0.995 * (upper + lower) / reach)
        way, reach = end - top, 0.995 * (upper + lower)
    along = (upper**2 - lower**2 + reach**2) / (2 * reach)
    out = np.array((-way[2], 0.0, way[0]))
    out *= np.sign(out[0] or 1.0) / max(float(np.linalg.norm(out)), 1e-6)
    knee = top + way * (along / reach) + out * max(upper**2 - along**2, 0.0) ** 0.5
    return knee, end


def bicycle_points() -> Points:
    """(7, 3) local points rear, front, crank, seat, stem, fork, bar."""
    bike = BICYCLE
    flat = (bike.rear, bike.front, bike.crank, bike.seat, bike.stem, bike.fork, bike.bar)
    return np.array([(forward, 0.0, up) for forward, up in flat])
