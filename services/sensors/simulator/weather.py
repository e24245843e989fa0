"""Light and weather of a site at any instant: slow, smooth, and decided by the seed alone."""

from dataclasses import dataclass
from zlib import crc32

import numpy as np

from services.sensors.simulator.sites import Site

SPELL_S = 90.0
_CHANGE_S = 12.0


@dataclass(frozen=True, slots=True)
class Weather:
    """daylight: 0 night to 1 noon. sun: 0 overcast to 1 clear. fog_per_m: extinction of light. wind_mps: gusts.

    drift: -1..1, of the radar receiver's gain. exposure: of the camera, around 1.
    """

    daylight: float
    sun: float
    fog_per_m: float
    wind_mps: float
    drift: float
    exposure: float


def weather_at(site: Site, *, seed: int, t_s: float) -> Weather:
    """A spell's weather, blended into the next one's over a few seconds."""
    spell = int(t_s // SPELL_S)
    blend = max(0.0, 1 - ((spell + 1) * SPELL_S - t_s) / _CHANGE_S)
    here, then = _spell(site, seed, spell), _spell(site, seed, spell + 1)
    return Weather(*(float(a) for a in here * (1 - blend) + then * blend))


def _spell(site: Site, seed: int, number: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    rng = np.random.default_rng((seed, crc32(site.name.encode()), number, 2))
    is_night = rng.random() < site.light.night_share
    is_foggy = rng.random() < site.light.fog_share
    dim, bright, cloud, thick, gust, drift, exposure = rng.random(7)
    return np.array(
        (
            0.25 * dim if is_night else 0.7 + 0.3 * bright,
            0.0 if is_night or is_foggy else np.clip(1.6 * cloud, 0.15, 1),
            0.02 + 0.05 * thick if is_foggy else 0.003,
            site.light.wind_mps * (0.4 + 1.2 * gust),
            2 * drift - 1,
            0.85 + 0.3 * exposure,
        )
    )
