"""What stands still in a site as the radar meets it, what the wind moves, and where walls mirror road users.

It does not know the traffic. Static parts are echoes whose sum is made once per site; foliage is made per instant.
"""

from dataclasses import dataclass
from math import pi

import numpy as np
import numpy.typing as npt

from services.sensors.simulator.radar import Echoes, RadarSettings, point_echoes
from services.sensors.simulator.sites import Site, Wall

Points = npt.NDArray[np.float64]

_LEAVES = 28
_MIRRORED = 24  # strongest echoes of a road user that come round by a wall


def sensor_position(site: Site) -> Points:
    """(3,) metres: both sensors hang over the origin."""
    return np.array((0.0, 0.0, site.mount.height_m))


def ground_bounce(site: Site, echoes: Echoes, *, height_m: Points, wavelength_m: float) -> Echoes:
    """The same echoes with the ray that touches the ground on its way added, there and back (two-ray model).

    height_m: (P,) of the points above ground. The detour is a fraction of a range bin: only the phase matters.
    """
    detour_m = 2 * site.mount.height_m * np.maximum(height_m, 0) / echoes.range_m
    ray = 1 - site.ground.bounce * np.exp(2j * pi * detour_m / wavelength_m)
    return Echoes(
        echoes.range_m, echoes.sin_azimuth, echoes.speed_mps, (echoes.amplitude * ray**2).astype(np.complex64)
    )


def static_echoes(site: Site, settings: RadarSettings) -> Echoes:
    """Ground, walls, poles, trunks and boxes of the site: the same for ever."""
    rng = np.random.default_rng((site.seed, 20))
    positions, rcs = zip(
        _ground(site, rng), *(_wall(wall, rng) for wall in site.walls), _things(site, rng), strict=True
    )
    position_m = np.concatenate(positions) - sensor_position(site)
    return point_echoes(
        settings, position_m=position_m, velocity_mps=np.zeros_like(position_m), rcs_m2=np.concatenate(rcs)
    )


def _ground(site: Site, rng: np.random.Generator) -> tuple[Points, Points]:
    """Patches of ground from 1.5 to 26 m, brighter at steeper view; their carrier phases make the speckle."""
    count = 1800
    range_m = 1.5 + 24.5 * np.sqrt(rng.random(count))
    azimuth = rng.uniform(-1.2, 1.2, count)
    area_m2 = 2.4 * 0.5 * (26.0**2 - 1.5**2) / count
    steep = np.clip(site.mount.height_m / range_m, 0.02, 1)
    rcs = area_m2 * 10 ** (site.ground.sigma0_db / 10) * steep / 0.2 * rng.exponential(1.0, count)
    height = rng.uniform(-0.01, 0.03, count)
    return np.stack((range_m * np.sin(azimuth), range_m * np.cos(azimuth), height), axis=1), rcs


def _wall(wall: Wall, rng: np.random.Generator) -> tuple[Points, Points]:
    """Roughness everywhere, ledges here and there, and a flash where the wall faces the radar."""
    start, end = np.array(wall.start), np.array(wall.end)
    length = float(np.hypot(*(end - start)))
    along = (end - start) / length
    normal = np.array((-along[1], along[0]))
    count = min(240, max(12, int(length * 6)))
    at = start + along * np.sort(rng.uniform(0, length, count))[:, None]
    height = rng.uniform(0.1, min(wall.height_m, 4.5), count)
    facing = np.abs(at @ normal) / np.maximum(np.hypot(at[:, 0], at[:, 1]), 0.1)
    rough = 0.012 * 10 ** (rng.normal(0, 4, count) / 10) * length / count * 6
    ledges = (rng.random(count) < 0.06) * 0.25 * rng.exponential(1.0, count)
    flash = 0.8 * np.exp(-((np.arccos(np.clip(facing, -1, 1)) / 0.05) ** 2))
    mirror = 10 ** ((wall.mirror_db + 9) / 10)
    soft = 3.0 if wall.kind == "hedge" else 1.0
    return np.column_stack((at, height)), rough * soft + (ledges + flash) * mirror


def _things(site: Site, rng: np.random.Generator) -> tuple[Points, Points]:
    points, rcs = [], []
    for pole in site.poles:
        for height in np.linspace(0.2, min(pole.height_m, 4.0), 6):
            points.append((*pole.at, height))
            rcs.append(0.12 * rng.exponential(1.0))
    for tree in site.trees:
        for height in np.linspace(0.2, tree.height_m * 0.4, 5):
            points.append((*(np.array(tree.at) + rng.normal(0, 0.08, 2)), height))
            rcs.append(0.05 * rng.exponential(1.0))
    for box in site.boxes:
        c, s = np.cos(np.radians(box.turned_deg)), np.sin(np.radians(box.turned_deg))
        for right, back in ((-0.5, -0.5), (0.5, -0.5), (0, -0.5), (-0.5, 0.5), (0.5, 0.5), (0.2, -0.5)):
            u, v = right * box.size_m[0], back * box.size_m[1]
            points.append((box.at[0] + c * u - s * v, box.at[1] + s * u + c * v, 0.6 * box.size_m[2]))
            rcs.append(10 ** (box.rcs_dbsm / 10) / 6 * rng.exponential(1.0))
    return np.array(points).reshape(-1, 3), np.array(rcs)


@dataclass(frozen=True, slots=True)
class Foliage:
    """Leaves of all crowns, each (P, ...): rest position from the radar, sway, cross-section."""

    rest_m: Points
    sway_m: Points
    rate_rad_per_s: Points
    phase_rad: Points
    rcs_m2: Points

    @staticmethod
    def of(site: Site) -> "Foliage":
        rng = np.random.default_rng((site.seed, 21))
        crowns = [(np.array((*tree.at, 0.62 * tree.height_m)), tree.crown_m) for tree in site.trees]
        rest = [centre + rng.normal(0, 0.4 * size, (_LEAVES, 3)) for centre, size in crowns]
        count = _LEAVES * len(crowns)
        return Foliage(
            rest_m=np.concatenate(rest).reshape(-1, 3) - sensor_position(site) if rest else np.zeros((0, 3)),
            sway_m=rng.normal(0, 0.05, (count, 3)),
            rate_rad_per_s=rng.uniform(1.5, 7.0, (count, 1)),
            phase_rad=rng.uniform(0, 2 * pi, (count, 1)),
            rcs_m2=rng.exponential(0.02, count),
        )

    def echoes(self, settings: RadarSettings, t_s: float, *, wind_mps: float) -> Echoes:
        """Leaves and twigs at t_s, swaying the more the stronger the wind."""
        angle, sway = self.rate_rad_per_s * t_s + self.phase_rad, self.sway_m * (wind_mps / 3.0)
        return point_echoes(
            settings,
            position_m=self.rest_m + sway * np.sin(angle),
            velocity_mps=sway * self.rate_rad_per_s * np.cos(angle),
            rcs_m2=self.rcs_m2,
        )


def ghosts(
    site: Site, settings: RadarSettings, *, position_m: Points, velocity_mps: Points, rcs_m2: Points
) -> Echoes:
    """Echoes that come by way of a wall: out direct and back mirrored (and the reverse), and mirrored both ways.

    position_m, velocity_mps: (P, 3), a road user's scatterers from the radar. Walls mirror only where they stand.
    """
    strongest = np.argsort(rcs_m2)[-_MIRRORED:]
    position, velocity, rcs = position_m[strongest], velocity_mps[strongest], rcs_m2[strongest]
    direct = point_echoes(settings, position_m=position, velocity_mps=velocity, rcs_m2=rcs)
    found = []
    for wall in site.walls:
        mirrored, moving, bounces = _mirror(wall, position, velocity)
        if not bounces.any():
            continue
        there = point_echoes(
            settings, position_m=mirrored[bounces], velocity_mps=moving[bounces], rcs_m2=rcs[bounces]
        )
        loss = 10 ** (wall.mirror_db / 20)
        range_m = 0.5 * (direct.range_m[bounces] + there.range_m)
        speed = 0.5 * (direct.speed_mps[bounces] + there.speed_mps)
        single = np.sqrt(np.abs(direct.amplitude[bounces] * there.amplitude)).astype(np.complex64) * loss
        found += [
            Echoes(range_m, direct.sin_azimuth[bounces], speed, single),
            Echoes(range_m, there.sin_azimuth, speed, single),
            Echoes(there.range_m, there.sin_azimuth, there.speed_mps, there.amplitude * np.complex64(loss**2)),
        ]
    return (
        Echoes.join(found) if found else Echoes(np.zeros(0), np.zeros(0), np.zeros(0), np.zeros(0, np.complex64))
    )


def _mirror(wall: Wall, position: Points, velocity: Points) -> tuple[Points, Points, npt.NDArray[np.bool_]]:
    """Mirror images of the points in the wall's plane, and which of them the radar sees inside the wall."""
    start, end = np.array(wall.start), np.array(wall.end)
    along = (end - start) / np.hypot(*(end - start))
    normal = np.array((-along[1], along[0]))
    distance = (position[:, :2] - start) @ normal
    image, moving = position.copy(), velocity.copy()
    image[:, :2] -= 2 * distance[:, None] * normal
    moving[:, :2] -= 2 * (velocity[:, :2] @ normal)[:, None] * normal
    own = -float(start @ normal)  # the radar's side of the plane
    across = image[:, :2] @ normal
    part = np.divide(-own, across, out=np.full(len(across), 2.0), where=np.abs(across) > 1e-9)
    hit = (image[:, :2] * part[:, None] - start) @ along
    inside = (hit > 0) & (hit < np.hypot(*(end - start)))
    return image, moving, (own * distance > 0) & inside & (part > 0) & (part < 1)
