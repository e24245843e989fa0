"""Who comes by: tracks of pedestrians, cyclists and cars that enter, turn, stop and leave, and empty stretches.

Time is cut into blocks; a block's tracks follow from (seed, site, block number) alone, so that any instant can be
asked for in any order and the stream has no end. One class at a time, as a frame label of CRUW has it. It does not
know what the road users look like.
"""

from collections import OrderedDict
from dataclasses import dataclass
from math import pi, radians
from typing import Literal
from zlib import crc32

import numpy as np
import numpy.typing as npt

from services.core.errors import SettingsError
from services.core.frames import CLASSES
from services.sensors.simulator.sites import Box, Pole, Site, Tree

Kind = Literal["pedestrian", "cyclist", "car"]
Points = npt.NDArray[np.float64]

_STEP_S = 0.02
_PATH_POINTS = 64
_KEPT_BLOCKS = 4
_HALF_LENGTH_M: dict[Kind, float] = {"pedestrian": 0.4, "cyclist": 0.95, "car": 2.2}
_HALF_WIDTH_M: dict[Kind, float] = {"pedestrian": 0.25, "cyclist": 0.25, "car": 0.9}
_CLEARANCE_M: dict[Kind, float] = {"pedestrian": 0.5, "cyclist": 0.8, "car": 1.6}
_TURNING_M: dict[Kind, float] = {"pedestrian": 0.5, "cyclist": 1.6, "car": 3.6}
_NEAREST_M: dict[Kind, float] = {"pedestrian": 0.0, "cyclist": 0.8, "car": 2.4}  # beyond the site's minimum


@dataclass(frozen=True, slots=True)
class TrafficSettings:
    """How busy it is. Speeds are uniform between their bounds."""

    block_s: float = 60.0
    pedestrian_mps: tuple[float, float] = (0.8, 1.8)
    cyclist_mps: tuple[float, float] = (1.8, 4.5)
    car_mps: tuple[float, float] = (1.8, 5.5)
    stop_share: float = 0.3  # of tracks, that stop on their way
    stop_s: tuple[float, float] = (1.0, 4.0)
    pair_share: float = 0.2  # of visits, by two of a class
    empty_s: tuple[float, float] = (1.5, 6.0)

    def __post_init__(self) -> None:
        if self.block_s < 20:
            raise SettingsError(f"traffic block_s is {self.block_s}", remedy="use 20 s or more")
        for name in ("pedestrian_mps", "cyclist_mps", "car_mps", "stop_s", "empty_s"):
            low, high = getattr(self, name)
            if not 0.1 <= low <= high:
                raise SettingsError(f"traffic {name} is {(low, high)}", remedy="use 0.1 <= low <= high")


@dataclass(frozen=True, slots=True)
class State:
    """Where a road user is: position on the ground (2,), heading from the x axis, speed, way since it came."""

    xy_m: Points
    heading_rad: float
    speed_mps: float
    travelled_m: float


@dataclass(frozen=True, slots=True, eq=False)
class Track:
    """One road user's way through the site, from start_s until end_s. look: a seed for its shape and colours."""

    kind: Kind
    look: int
    start_s: float
    end_s: float
    cruise_mps: float
    clock_s: Points
    travelled_m: Points
    path_m: Points  # (P,) arc length of the points of the path
    xy_m: Points  # (P, 2)
    heading_rad: Points  # (P,), unwrapped

    def state(self, t_s: float) -> State:
        """Position and motion at scene time t_s, which may lie a little outside the track's life."""
        clock = t_s - self.start_s
        travelled, later = np.interp((clock, clock + _STEP_S), self.clock_s, self.travelled_m)
        x = np.interp(travelled, self.path_m, self.xy_m[:, 0])
        y = np.interp(travelled, self.path_m, self.xy_m[:, 1])
        heading = np.interp(travelled, self.path_m, self.heading_rad)
        speed = (later - travelled) / _STEP_S
        return State(np.array((x, y)), float(heading), float(speed), float(travelled))


class Traffic:
    """All tracks of a site and seed. Keeps the last few blocks it made, no more."""

    def __init__(self, site: Site, *, seed: int, settings: TrafficSettings) -> None:
        self._site, self._settings = site, settings
        self._key = (seed, crc32(site.name.encode()))
        self._blocks: OrderedDict[int, tuple[Track, ...]] = OrderedDict()

    def tracks(self, t_s: float) -> tuple[Track, ...]:
        """The tracks alive at t_s, all of one class. Raises SettingsError for times before the start."""
        if not t_s >= 0:
            raise SettingsError(f"scene time is {t_s} s", remedy="ask for 0 or later")
        number = int(t_s // self._settings.block_s)
        if number not in self._blocks:
            self._blocks[number] = self._block(number)
            while len(self._blocks) > _KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return tuple(track for track in self._blocks[number] if track.start_s <= t_s < track.end_s)

    def _block(self, number: int) -> tuple[Track, ...]:
        """Visits one after another; next comes a class that was there least, so that all four share the time."""
        rng = np.random.default_rng((*self._key, number, 1))
        settings = self._settings
        clock, end = number * settings.block_s, (number + 1) * settings.block_s
        spent = dict.fromkeys(CLASSES, 0.0) | {"empty": rng.uniform(0, 2)}
        tracks: list[Track] = []
        while end - clock > settings.empty_s[0]:
            label = min(spent, key=lambda name: spent[name] + rng.uniform(0, 5))
            if label == "empty":
                duration = rng.uniform(*settings.empty_s)
                spent["empty"] += duration
            else:
                visit = self._visit(rng, label, clock)  # type: ignore[arg-type]
                duration = max(track.end_s for track in visit) - clock
                if clock + duration > end:
                    break
                tracks += visit
                seen = self._seconds_in_view(visit)
                spent[label] += seen
                spent["empty"] += duration - seen
            clock += duration
        return tuple(tracks)

    def _visit(self, rng: np.random.Generator, kind: Kind, start_s: float) -> list[Track]:
        visit = [_make_track(rng, kind, start_s, self._site, self._settings)]
        if rng.random() < self._settings.pair_share:
            other = _make_track(rng, kind, start_s + rng.uniform(0, 1.5), self._site, self._settings)
            instants = np.linspace(0, 8, 17) + start_s
            gaps = [visit[0].state(t).xy_m - other.state(t).xy_m for t in instants]
            if np.hypot(*np.transpose(gaps)).min() > 2 * _CLEARANCE_M[kind]:
                visit.append(other)
        return visit

    def _seconds_in_view(self, visit: list[Track]) -> float:
        instants = np.arange(visit[0].start_s, max(track.end_s for track in visit), 0.25)
        half = radians(self._site.mount.fov_deg / 2)
        seen = np.zeros(len(instants), bool)
        for track in visit:
            xy = np.array([track.state(t).xy_m for t in instants])
            alive = (instants >= track.start_s) & (instants < track.end_s)
            partly = 0.6 * _HALF_LENGTH_M[track.kind] / np.hypot(xy[:, 0], xy[:, 1])
            seen |= alive & (np.abs(np.arctan2(xy[:, 0], xy[:, 1])) < half + partly)
        return 0.25 * float(seen.sum())


def _make_track(
    rng: np.random.Generator, kind: Kind, start_s: float, site: Site, settings: TrafficSettings
) -> Track:
    xy = _path(rng, kind, site)
    heading = np.unwrap(np.arctan2(np.gradient(xy[:, 1]), np.gradient(xy[:, 0])))
    seen = _reaches_view(xy, heading, kind=kind, half_rad=radians(site.mount.fov_deg / 2))
    xy, heading = xy[seen], heading[seen]
    steps = np.diff(xy, axis=0)
    path_m = np.concatenate(([0.0], np.cumsum(np.hypot(steps[:, 0], steps[:, 1]))))
    bounds = {"pedestrian": settings.pedestrian_mps, "cyclist": settings.cyclist_mps, "car": settings.car_mps}
    cruise = rng.uniform(*bounds[kind])
    clock, travelled = _timetable(rng, kind, length_m=float(path_m[-1]), cruise_mps=cruise, settings=settings)
    return Track(
        kind=kind,
        look=int(rng.integers(2**31)),
        start_s=start_s,
        end_s=start_s + float(clock[-1]),
        cruise_mps=cruise,
        clock_s=clock,
        travelled_m=travelled,
        path_m=path_m,
        xy_m=xy,
        heading_rad=heading,
    )


def _timetable(
    rng: np.random.Generator, kind: Kind, *, length_m: float, cruise_mps: float, settings: TrafficSettings
) -> tuple[Points, Points]:
    """Seconds and metres travelled, each (T,): at cruising speed, some with a stop that is braked for."""
    if rng.random() >= settings.stop_share:
        clock = np.arange(0, length_m / cruise_mps + _STEP_S, _STEP_S)
        return clock, clock * cruise_mps
    braking_m = {"pedestrian": 0.5, "cyclist": 1.5, "car": 2.5}[kind]
    at_m = length_m * rng.uniform(0.35, 0.65)
    travelled = np.linspace(0, length_m, 600)
    share = np.clip(np.abs(travelled - at_m) / braking_m, 0.0, 1.0)
    speed = cruise_mps * np.maximum(np.sqrt(share), 0.06)
    clock = np.concatenate(([0.0], np.cumsum(np.diff(travelled) * 2 / (speed[1:] + speed[:-1]))))
    stop = int(np.searchsorted(travelled, at_m))
    waits = rng.uniform(*settings.stop_s)
    clock = np.concatenate((clock[:stop], clock[stop:] + waits))
    even = np.arange(0, clock[-1] + _STEP_S, _STEP_S)
    return even, np.interp(even, clock, travelled)


def _path(rng: np.random.Generator, kind: Kind, site: Site) -> Points:
    """(P, 2) points of a Bézier curve from beyond one edge of the view to beyond an edge, clear of obstacles."""
    low = site.ways.min_range_m + _NEAREST_M[kind]
    high = max(site.ways.max_range_m - 0.3 * _CLEARANCE_M[kind], low + 1)
    standing: list[Pole | Tree | Box] = [*site.poles, *site.trees, *site.boxes]
    obstacles = np.array([part.at for part in standing]).reshape(-1, 2)
    half = radians(site.mount.fov_deg / 2)
    for _ in range(60):
        side = rng.choice((-1, 1))
        leaves = side if rng.random() < 0.2 else -side  # some turn back
        first, last = rng.uniform(low, high, 2)
        ends = [_beyond_edge(first, side, half, kind), _beyond_edge(last, leaves, half, kind)]
        bends = [
            np.array((np.sin(a), np.cos(a))) * r
            for a, r in zip(rng.uniform(-half, half, 2), rng.uniform(low, high, 2), strict=True)
        ]
        bends.sort(key=lambda point: float(-side * point[0]))
        curve = _bezier(ends[0], bends[0], bends[1], ends[1])
        if leaves == side:  # a turn needs its bends apart
            curve = _bezier(ends[0], bends[1] + (0, 1.0), bends[1] - (0, 1.0), ends[1])
        if _is_clear(curve, low=low, high=high, obstacles=obstacles, kind=kind):
            return curve
    level = np.linspace(0, 1, _PATH_POINTS)[:, None]
    middle = 0.5 * (low + high)  # straight across, always possible
    return _beyond_edge(middle, -1, half, kind) * (1 - level) + _beyond_edge(middle, 1, half, kind) * level


def _reaches_view(xy: Points, heading: Points, *, kind: Kind, half_rad: float) -> slice:
    """The points from where the road user's outline first reaches into the view until it last does."""
    ahead = np.stack((np.cos(heading), np.sin(heading)), axis=1)
    aside = np.stack((-ahead[:, 1], ahead[:, 0]), axis=1)
    is_in = np.ones(len(xy), bool)
    for side in (1, -1):
        off = np.array((side * np.cos(half_rad), -np.sin(half_rad)))
        reach = _HALF_LENGTH_M[kind] * np.abs(ahead @ off) + _HALF_WIDTH_M[kind] * np.abs(aside @ off)
        is_in &= xy @ off < 0.8 * reach
    inside = np.flatnonzero(is_in)
    return slice(int(inside[0]), int(inside[-1]) + 1)


def _beyond_edge(range_m: float, side: int, half_rad: float, kind: Kind) -> Points:
    """Just out of view: off the edge ray by half the length of the road user."""
    margin = _HALF_LENGTH_M[kind]
    along = np.array((side * np.sin(half_rad), np.cos(half_rad)))
    off = np.array((side * np.cos(half_rad), -np.sin(half_rad)))
    return np.asarray(along * range_m + off * margin)


def _bezier(a: Points, b: Points, c: Points, d: Points) -> Points:
    u = np.linspace(0, 1, _PATH_POINTS)[:, None]
    return np.asarray(a * (1 - u) ** 3 + 3 * b * u * (1 - u) ** 2 + 3 * c * u**2 * (1 - u) + d * u**3)


def _is_clear(curve: Points, *, low: float, high: float, obstacles: Points, kind: Kind) -> bool:
    ranges = np.hypot(curve[:, 0], curve[:, 1])
    if ranges.min() < low or ranges.max() > high + _HALF_LENGTH_M[kind]:
        return False
    gaps = np.hypot(*(curve[:, None] - obstacles[None]).transpose(2, 0, 1))
    if gaps.size and gaps.min() < _CLEARANCE_M[kind] + 0.3:
        return False
    first, second = np.gradient(curve, axis=0), np.gradient(np.gradient(curve, axis=0), axis=0)
    cross = np.abs(first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0])
    bend = cross / np.maximum(np.hypot(first[:, 0], first[:, 1]), 1e-6) ** 3
    turned = np.ptp(np.unwrap(np.arctan2(first[:, 1], first[:, 0])))
    return bool(bend.max() < 1 / _TURNING_M[kind] and turned < 1.2 * pi)
