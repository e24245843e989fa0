"""Whether what arrives from a site is still what it was: radar levels, image encodings, time between partners.

Each look at a site's newest pairs gives a few numbers; each number is a series that a two-sided Page-Hinkley test
(Page 1954, Hinkley 1971) follows online. A series first learns its level. What moves together is told once, by the
number that moved most; then the new levels are learnt. One wild look alone is no change. Memory: some tens of
numbers, a heatmap and a vector a site. Pure: it does not know where pairs come from, nor the time.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_NUM_TO_LEARN = 8
_SLACK = 1.0
_ALARM = 6.0
"""With independent normal looks: one false alarm in some 400,000 (Siegmund 1985)."""
_MAX_STEP = 4.0
_EVERY_CELL = 7
"""Quantiles of a part of the cells; odd, so that it hits every row and column."""
_SMALLEST_OF_SCALE = 0.15
_REMEDIES = {
    "radar": "check the radar's gain, mount and view; clutter map and encoder follow by themselves in time",
    "vision": "look at the camera: moved, dirty, another light or season? The encoder follows by itself in time",
    "pairing": "compare frame rates and clocks of radar and camera with what they were; see docs/pairing.md",
}
_SMALLEST = {
    "vision_direction": (0.03, "1 - cosine"),
    "vision_norm": (0.05, "log"),
    "pairing_residual": (12.0, "ms"),
    "pairing_distance": (6.0, "ms"),
}
"""The change that is worth telling, and its unit."""


@dataclass(frozen=True, slots=True)
class Change:
    """part: radar, vision or pairing. what: the number of it that moved most, from `was` to `now`, in `unit`."""

    site: str
    part: str
    what: str
    was: float
    now: float
    unit: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Look:
    """A site's newest pairs. heatmaps: (N, C, R, A) float32, `unit`. clutter: (C, R, A) float32, the site's map.

    scale: the usual spread of corrected cells, `unit`. vectors: (N, D) float32, image encodings as the frozen
    network gives them. residual_ms: (N,), camera's capture time minus radar's.
    """

    heatmaps: Floats
    clutter: Floats
    unit: str
    scale: float
    vectors: Floats
    residual_ms: npt.NDArray[np.float64]


class Drift:
    """All sites' series. num_changes: how many were told, by site and part."""

    def __init__(self) -> None:
        self._sites: dict[str, dict[str, _Part]] = {}
        self.num_changes: dict[tuple[str, str], int] = {}

    def observe(self, site: str, look: Look) -> list[Change]:
        """Take in one look; return what changed."""
        if site not in self._sites:
            self._sites[site] = {"radar": _Radar(), "vision": _Vision(), "pairing": _Pairing()}
        found = []
        for name, part in self._sites[site].items():
            moved = part.observe(look)
            if moved is not None:
                self._sites[site][name] = type(part)()  # the new level is learnt from nothing
                found.append(Change(site, name, *moved, remedy=_REMEDIES[name]))
                self.num_changes[site, name] = self.num_changes.get((site, name), 0) + 1
        return found

    def levels(self, site: str) -> dict[str, float]:
        """The last look's numbers."""
        parts = self._sites.get(site, {}).values()
        return {name: value for part in parts for name, value in part.levels.items()}

    def keep_only(self, sites: set[str]) -> None:
        """Forget the sites that are gone from the store."""
        self._sites = {site: parts for site, parts in self._sites.items() if site in sites}
        self.num_changes = {at: num for at, num in self.num_changes.items() if at[0] in sites}


class _Part:
    """Numbers that move together. levels: of the last look."""

    def __init__(self) -> None:
        self._series: dict[str, PageHinkley] = {}
        self.levels: dict[str, float] = {}

    def observe(self, look: Look) -> tuple[str, float, float, str] | None:
        """What moved most, from what to what, in which unit; None if nothing did."""
        self.levels = self.measure(look)
        moved: list[tuple[float, str, float, float, str]] = []
        for name, value in self.levels.items():
            smallest, unit = _SMALLEST.get(name, (_SMALLEST_OF_SCALE * look.scale, look.unit))
            change = self._series.setdefault(name, PageHinkley(smallest)).observe(value)
            if change is not None:
                was, now = change
                moved.append((abs(now - was) / smallest, name, was, now, unit))
        return max(moved)[1:] if moved else None

    def measure(self, look: Look) -> dict[str, float]:
        raise NotImplementedError


class _Radar(_Part):
    """Cells less the clutter map as the first look had it: the site's own follows a change and would hide it."""

    def __init__(self) -> None:
        super().__init__()
        self._clutter: Floats | None = None

    def measure(self, look: Look) -> dict[str, float]:
        """The middle over frames of each frame's numbers: a car that passes moves few frames, a gain moves all."""
        if self._clutter is None:
            self._clutter = look.clutter.copy()
        cells = (look.heatmaps - self._clutter).reshape(len(look.heatmaps), -1)
        low, middle, high = np.quantile(cells[:, ::_EVERY_CELL], (0.1, 0.5, 0.99), axis=1)
        of_frames = {
            "radar_mean": cells.mean(1),
            "radar_std": cells.std(1),
            "radar_q10": low,
            "radar_q50": middle,
            "radar_q99": high,
        }
        return {name: float(np.median(values)) for name, values in of_frames.items()}


class _Vision(_Part):
    """How far the mean direction has turned from where the first looks had it, and the usual length."""

    def __init__(self) -> None:
        super().__init__()
        self._first: npt.NDArray[np.float64] | None = None
        self._num_first = 0

    def measure(self, look: Look) -> dict[str, float]:
        norms = np.maximum(np.linalg.norm(look.vectors.astype(np.float64), axis=1), 1e-9)
        mean = np.mean(look.vectors / norms[:, None], axis=0)
        levels = {"vision_norm": float(np.log(np.median(norms)))}
        if self._num_first < _NUM_TO_LEARN:
            self._first = mean if self._first is None else self._first + mean
            self._num_first += 1
            return levels
        assert self._first is not None
        cosine = self._first @ mean / max(float(np.linalg.norm(self._first) * np.linalg.norm(mean)), 1e-9)
        return levels | {"vision_direction": 1.0 - float(cosine)}


class _Pairing(_Part):
    def measure(self, look: Look) -> dict[str, float]:
        return {
            "pairing_residual": float(look.residual_ms.mean()),
            "pairing_distance": float(np.abs(look.residual_ms).mean()),
        }


@dataclass(slots=True)
class PageHinkley:
    """One series of numbers. smallest: the change that is worth telling.

    Deviations from the learnt level, in units of its spread or of `smallest` if that is more, add up beyond a
    slack of one unit, upwards and downwards apart; either sum beyond 6 is a change.
    """

    smallest: float
    _learnt: list[float] = field(default_factory=list)
    _level: float = 0.0
    _unit: float = 0.0
    _sums: list[float] = field(default_factory=lambda: [0.0, 0.0])
    _since: list[tuple[float, int]] = field(default_factory=lambda: [(0.0, 0), (0.0, 0)])

    def observe(self, value: float) -> tuple[float, float] | None:
        """The level before and the mean since a change began, if one did. What is not finite is passed over."""
        if not np.isfinite(value):
            return None
        if len(self._learnt) < _NUM_TO_LEARN:
            self._learnt.append(value)
            if len(self._learnt) == _NUM_TO_LEARN:
                self._level = float(np.median(self._learnt))
                self._unit = max(float(np.std(self._learnt)), self.smallest)
            return None
        step = float(np.clip((value - self._level) / self._unit, -_MAX_STEP, _MAX_STEP))
        for side, sign in enumerate((1.0, -1.0)):
            self._sums[side] = max(0.0, self._sums[side] + sign * step - _SLACK)
            total, num = self._since[side]
            self._since[side] = (total + value, num + 1) if self._sums[side] > 0 else (0.0, 0)
            if self._sums[side] >= _ALARM:
                was, now = self._level, self._since[side][0] / self._since[side][1]
                self._learnt.clear()
                self._sums, self._since = [0.0, 0.0], [(0.0, 0), (0.0, 0)]
                return was, now  # the new level is learnt from here on
        return None
