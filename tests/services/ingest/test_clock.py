"""The offset between two sensors' clocks, from when frames arrive: near enough, and silent when it cannot be."""

import random
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from services.ingest.clock import ClockEstimate, ClockOffset
from services.ingest.matcher import Side

MS = 1_000_000
START_S = 1_700_000_000
Delay = Callable[[float], float]


class Bench:
    """Two simulated sensors and a server. Times in seconds; `offset_s` and `drift_ppm` are the camera clock's."""

    def __init__(self, *, seed: int = 0, offset_s: float = 0.12, drift_ppm: float = 0.0) -> None:
        self.random = random.Random(seed)
        self.offset_s = offset_s
        self.drift_ppm = drift_ppm
        self.clock = ClockOffset()
        self.now_s = 0.0
        self.radar_leap_s = 0.0
        self.speed = 1.0

    def true_offset_s(self) -> float:
        return self.offset_s - self.radar_leap_s + self.drift_ppm * 1e-6 * self.now_s

    def jitter(self, mean_s: float = 0.004) -> Delay:
        """A way of 5 ms, with a tail: mostly short, one in fifty ten times as long."""
        return lambda _: 0.005 + self.random.expovariate(1 / mean_s) * (10 if self.random.random() < 0.02 else 1)

    def run(
        self, seconds: float, *, radar_fps: float = 10.0, camera_fps: float = 30.0, radar: Delay, camera: Delay
    ) -> None:
        """Let both sensors run; the ways' delays are functions of the time of capture."""
        arrivals: list[tuple[float, Side, float]] = []
        for side, fps, way in (("radar", radar_fps, radar), ("camera", camera_fps, camera)):
            last_s = 0.0
            for at_s in self._captures(seconds, fps):
                last_s = max(last_s, at_s + way(at_s))  # one connection: nothing overtakes
                arrivals.append((last_s, side, at_s))
        for arrived_s, side, at_s in sorted(arrivals):
            clock_s = self.radar_leap_s
            if side == "camera":
                clock_s = self.offset_s + self.drift_ppm * 1e-6 * at_s
            captured_at_ns = START_S * 10**9 + round((at_s * self.speed + clock_s) * 1e9)
            self.clock.observe(side, captured_at_ns, int((START_S + arrived_s) * 1000))
        self.now_s += seconds

    def _captures(self, seconds: float, fps: float) -> Iterator[float]:
        at_s = self.now_s + self.random.random() / max(fps, 0.1)
        while fps and at_s < self.now_s + seconds:
            yield at_s
            at_s += 1 / fps

    def error_s(self) -> float:
        estimate = self.clock.estimate()
        assert estimate is not None
        error_s = estimate.offset_ns / 1e9 - self.true_offset_s()
        assert abs(error_s) * 1e9 <= estimate.uncertainty_ns
        return error_s


def estimate_of(bench: Bench) -> ClockEstimate:
    estimate = bench.clock.estimate()
    assert estimate is not None
    return estimate


def test_fixed_offset_and_slow_drift_are_found_within_a_millisecond_for_ten_minutes() -> None:
    bench = Bench(offset_s=0.12, drift_ppm=50.0)
    worst_s = worst_ppm = 0.0
    for _ in range(60):
        bench.run(10.0, radar=bench.jitter(), camera=bench.jitter())
        if bench.now_s >= 30:
            worst_s = max(worst_s, abs(bench.error_s()))
        if bench.now_s >= 120:
            worst_ppm = max(worst_ppm, abs(estimate_of(bench).drift_ppm - 50.0))
    assert worst_s < 1e-3
    assert worst_ppm < 10.0
    assert 100e6 < estimate_of(bench).offset_ns < 200e6
    assert 4_000 < estimate_of(bench).num_frames < 5_000


@pytest.mark.parametrize("seed", range(3))
def test_slow_sensors_on_a_bad_network_cost_some_milliseconds(seed) -> None:
    bench = Bench(seed=seed, offset_s=-0.3)
    bench.run(90.0, radar_fps=4, camera_fps=5, radar=bench.jitter(0.02), camera=bench.jitter(0.005))
    assert abs(bench.error_s()) < 6e-3


def test_bursts_and_lost_frames_do_not_move_it() -> None:
    bench = Bench(seed=1)
    way = bench.jitter()

    def stalls(at_s: float) -> float:
        """Every 20 s the camera's way is blocked for 4 s; then everything comes at once."""
        return max(way(at_s), 4.0 - at_s % 20.0)

    bench.run(120.0, radar=way, camera=stalls)
    assert abs(bench.error_s()) < 1.5e-3
    bench.run(60.0, camera_fps=7.0, radar=way, camera=way)
    assert abs(bench.error_s()) < 1.5e-3


def test_constant_difference_of_the_ways_is_what_it_cannot_see() -> None:
    bench = Bench(offset_s=0.0)
    bench.run(60.0, radar=lambda _: 0.005, camera=lambda _: 0.025)
    assert estimate_of(bench).offset_ns == pytest.approx(-20e6, abs=1.5e6)


def test_nothing_is_said_before_ten_seconds_and_after_one_sensor_fell_silent() -> None:
    bench = Bench()
    bench.run(8.0, radar=bench.jitter(), camera=bench.jitter())
    assert bench.clock.estimate() is None
    bench.run(8.0, radar=bench.jitter(), camera=bench.jitter())
    assert abs(bench.error_s()) < 2e-3
    bench.run(20.0, camera_fps=0, radar=bench.jitter(), camera=bench.jitter())
    assert bench.clock.estimate() is None
    bench.run(15.0, radar=bench.jitter(), camera=bench.jitter())
    assert abs(bench.error_s()) < 2e-3


@pytest.mark.parametrize("leap_s", [7200.0, -7200.0, 3.0, -3.0, -0.4])
def test_leap_of_one_clock_restarts_the_window(leap_s) -> None:
    bench = Bench()
    bench.run(60.0, radar=bench.jitter(), camera=bench.jitter())
    bench.radar_leap_s = leap_s
    bench.run(25.0, radar=bench.jitter(), camera=bench.jitter())
    assert abs(bench.error_s()) < 1.5e-3
    assert estimate_of(bench).num_frames < 26 * 40


def test_both_clocks_leaping_together_leaves_the_offset() -> None:
    bench = Bench()
    bench.run(60.0, radar=bench.jitter(), camera=bench.jitter())
    before_ns = estimate_of(bench).offset_ns
    bench.radar_leap_s = 3600.0
    bench.offset_s += 3600.0
    bench.run(25.0, radar=bench.jitter(), camera=bench.jitter())
    assert estimate_of(bench).offset_ns == pytest.approx(before_ns, abs=2e6)


def test_single_frames_from_another_time_do_not_move_it() -> None:
    bench = Bench()
    for second in range(60):
        bench.run(1.0, radar=bench.jitter(), camera=bench.jitter())
        if second % 10 == 5:
            now_ms = int((START_S + bench.now_s) * 1000)
            bench.clock.observe("camera", now_ms * 10**6 + 10**18, now_ms)
            bench.clock.observe("radar", -(10**18), now_ms)
    assert abs(bench.error_s()) < 1.5e-3


def test_replay_at_its_own_pace_is_judged_and_a_faster_or_slower_one_is_not() -> None:
    for speed in (1.0, 0.5, 1.1, 4.0, 50.0):
        bench = Bench()
        bench.speed = speed
        bench.run(60.0, radar=bench.jitter(), camera=bench.jitter())
        assert (bench.clock.estimate() is not None) == (speed == 1.0)


@pytest.mark.parametrize("step_s", [-3600, -30, 3600])
def test_another_server_with_another_clock_costs_half_a_minute(step_s) -> None:
    bench = Bench()
    bench.run(60.0, radar=bench.jitter(), camera=bench.jitter())
    for number in range(1, 2500):
        at_ns = round((START_S + bench.now_s + number / 100) * 1e9)
        bench.clock.observe("radar", at_ns, at_ns // 10**6 + step_s * 1000 + 5)
        bench.clock.observe("camera", at_ns + 170_000_000, at_ns // 10**6 + step_s * 1000 + 5)
    assert estimate_of(bench).offset_ns == pytest.approx(170e6, abs=1.5e6)


def test_memory_does_not_grow_with_frames_or_time() -> None:
    bench = Bench()

    def watch(first_s: int, last_s: int) -> None:
        for second in range(first_s, last_s):
            for number in range(10):
                at_ms = (START_S + second) * 1000 + number * 100
                bench.clock.observe("radar", at_ms * 10**6, at_ms + 5)
                bench.clock.observe("camera", at_ms * 10**6, at_ms + 5)

    watch(0, 200)
    tracemalloc.start()
    try:
        watch(200, 1200)
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()


def test_no_leaps_and_no_gaps_at_any_time_are_too_much_for_it() -> None:
    rng = random.Random(0)
    for _ in range(50):
        clock, at_s = ClockOffset(), 1000
        lags_s = {"radar": 0, "camera": 0}
        for _ in range(100):
            at_s += rng.choice((1, 1, 1, 20, 60, 110))
            for side in ("radar", "camera"):
                if rng.random() < 0.1:
                    lags_s[side] = rng.randint(-30, 30)
                if rng.random() < 0.9:
                    clock.observe(side, (at_s - lags_s[side]) * 1000 * MS, at_s * 1000)
            clock.estimate()
