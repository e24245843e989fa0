"""How sensors really deliver: jitter, drops, duplicates, late and disordered frames, dead spells, wrong clocks.

A pure function turns ideal capture instants into a plan of deliveries. It does not know what a frame holds.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from services.core.errors import SettingsError


@dataclass(frozen=True, slots=True)
class DeliverySettings:
    """One sensor's rate, clock and troubles. The defaults are a good sensor: steady, prompt, complete."""

    rate_hz: float = 10.0
    jitter_s: float = 0.002  # standard deviation of the capture instant around its ideal, cut at three
    latency_s: float = 0.03  # from capture to sending
    latency_jitter_s: float = 0.005  # mean of an exponential on top, cut at ten
    drop_share: float = 0.0  # of frames, that never come
    duplicate_share: float = 0.0  # of frames, that come twice
    late_share: float = 0.0  # of frames, held back, so that later ones overtake them
    late_by_s: float = 0.5
    dead_every_s: float = 0.0  # the sensor dies once in every such interval; 0: never
    dead_for_s: float = 2.0
    clock_offset_s: float = 0.0  # what the sensor's clock is ahead at the start
    clock_drift_ppm: float = 0.0  # and what it gains from then on

    def __post_init__(self) -> None:
        if not 0 < self.rate_hz <= 1000:
            raise SettingsError(f"delivery rate_hz is {self.rate_hz}", remedy="use more than 0 and at most 1000")
        for name in ("drop_share", "duplicate_share", "late_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"delivery {name} is {getattr(self, name)}", remedy="use a share from 0 to 1")
        for name in ("jitter_s", "latency_s", "latency_jitter_s", "late_by_s", "dead_every_s", "dead_for_s"):
            if not 0 <= getattr(self, name) <= 3600:
                raise SettingsError(f"delivery {name} is {getattr(self, name)}", remedy="use 0 to 3600 s")
        if self.dead_every_s and self.dead_for_s >= self.dead_every_s:
            raise SettingsError(
                f"delivery dead_for_s is {self.dead_for_s}, in every {self.dead_every_s} s",
                remedy="let it live for a part of the interval",
            )

    @property
    def longest_s(self) -> float:
        """No delivery comes later than this after its ideal instant."""
        return 3 * self.jitter_s + self.latency_s + 20 * self.latency_jitter_s + self.late_by_s


@dataclass(frozen=True, slots=True, order=True)
class Planned:
    """One delivery: when to send, which frame, when it was truly captured, what its sensor's clock said then."""

    at_s: float
    seq: int
    is_copy: bool
    captured_s: float
    stamped_s: float


def plan(settings: DeliverySettings, *, seed: tuple[int, ...], seconds: float | None) -> Iterator[Planned]:
    """Deliveries in the order they are sent, of frames captured in the first `seconds` (None: for ever).

    Frame `seq` depends on settings, seed and seq alone. Memory is bounded by the longest delay.
    """
    waiting: list[Planned] = []
    seq = 0
    while seconds is None or seq / settings.rate_hz < seconds:
        for planned in _frame(settings, seed=seed, seq=seq):
            heapq.heappush(waiting, planned)
        seq += 1
        settled_s = seq / settings.rate_hz - 3 * settings.jitter_s  # nothing yet to come is sent before this
        while waiting and waiting[0].at_s < settled_s:
            yield heapq.heappop(waiting)
    while waiting:
        yield heapq.heappop(waiting)


def _frame(settings: DeliverySettings, *, seed: tuple[int, ...], seq: int) -> list[Planned]:
    rng = np.random.default_rng((*seed, seq))
    ideal_s = seq / settings.rate_hz
    dropped, duplicated, late = rng.random(3) < (
        settings.drop_share,
        settings.duplicate_share,
        settings.late_share,
    )
    captured_s = max(0.0, ideal_s + settings.jitter_s * float(np.clip(rng.standard_normal(), -3, 3)))
    waits_s = settings.latency_jitter_s * np.minimum(rng.exponential(1.0, 2), 10)
    if dropped or _is_dead(settings, seed=seed, t_s=captured_s):
        return []
    stamped_s = captured_s * (1 + settings.clock_drift_ppm * 1e-6) + settings.clock_offset_s
    at_s = captured_s + settings.latency_s + float(waits_s[0]) + (settings.late_by_s if late else 0.0)
    frames = [Planned(at_s, seq, False, captured_s, stamped_s)]
    if duplicated:
        frames.append(Planned(at_s + float(waits_s[1]), seq, True, captured_s, stamped_s))
    return frames


def _is_dead(settings: DeliverySettings, *, seed: tuple[int, ...], t_s: float) -> bool:
    if not settings.dead_every_s:
        return False
    interval = int(t_s // settings.dead_every_s)
    rng = np.random.default_rng((*seed, interval, 7))
    starts_s = interval * settings.dead_every_s + rng.uniform(0, settings.dead_every_s - settings.dead_for_s)
    return starts_s <= t_s < starts_s + settings.dead_for_s
