"""A camera that is ahead or behind is found by what it shows, with an interval that says how sure that is."""

import numpy as np
import pytest

from trainer.sync_lag import SyncLag


class Street:
    """What both sensors see: D smooth numbers that change as things move, with a correlation of about a second."""

    def __init__(self, seed: int = 0, *, dim: int = 12) -> None:
        rng = np.random.default_rng(seed)
        self._amplitude = rng.normal(0, 1, (30, dim))
        self._hertz = np.abs(rng.normal(0, 0.25, 30))
        self._phase = rng.uniform(0, 2 * np.pi, (30, dim))
        self._rng = rng

    def seen(self, at_s, *, noise: float) -> np.ndarray:
        angle = 2 * np.pi * self._hertz[:, None, None] * at_s[None, :, None] + self._phase[:, None, :]
        clean = (self._amplitude[:, None, :] * np.sin(angle)).sum(0)
        noisy = clean + noise * clean.std() * self._rng.normal(0, 1, clean.shape)
        return noisy / np.linalg.norm(noisy, axis=1, keepdims=True)


def watch(
    sync: SyncLag, *, ahead_s: float, seconds: int = 120, fps: float = 10.0, noise: float = 1.5, at_s: float = 0.0,
    keep: float = 1.0, moves: bool = True,
) -> SyncLag:  # fmt: skip
    """Pairs by capture time: the radar's is right, the camera's clock is `ahead_s` ahead of it."""
    street, rng = Street(), np.random.default_rng(1)
    for start in range(0, seconds, 20):
        radar_s = at_s + start + np.arange(0, 20, 1 / fps)
        radar_s = radar_s[rng.random(len(radar_s)) < keep]
        camera_s = radar_s + rng.uniform(-0.03, 0.03, len(radar_s))
        still = 1.0 if moves else 0.0
        sync.observe(
            street.seen(still * radar_s, noise=noise),
            street.seen(still * (camera_s - ahead_s), noise=noise),
            radar_at_ns=(radar_s * 1e9).astype(np.int64),
            camera_at_ns=(camera_s * 1e9).astype(np.int64),
        )
    return sync


@pytest.mark.parametrize("ahead_s", [0.2, -0.2, 0.0, 0.05, 0.45])
def test_lag_is_found_between_frames_and_lies_in_its_interval(ahead_s) -> None:
    lag = watch(SyncLag(), ahead_s=ahead_s, seconds=240).estimate()
    assert lag is not None
    assert lag.lag_ms == pytest.approx(1e3 * ahead_s, abs=25)
    assert lag.low_ms - 15 <= 1e3 * ahead_s <= lag.high_ms + 15
    assert lag.high_ms - lag.low_ms < 120
    assert lag.is_beyond(100) == (abs(ahead_s) >= 0.2)


@pytest.mark.parametrize("fps", [5.0, 20.0])
def test_lag_is_found_at_other_frame_rates_and_with_frames_missing(fps) -> None:
    lag = watch(SyncLag(), ahead_s=0.2, fps=fps, keep=0.5, seconds=200).estimate()
    assert lag is not None
    assert lag.lag_ms == pytest.approx(200, abs=40)


def test_clock_that_jumps_shows_within_three_minutes() -> None:
    sync = watch(SyncLag(), ahead_s=0.0, seconds=480)
    assert sync.estimate().is_beyond(100) is False
    shown_s = None
    for minute in range(1, 5):
        lag = watch(sync, ahead_s=0.2, seconds=60, at_s=4000 + 60 * minute).estimate()
        if shown_s is None and lag.is_beyond(100):
            shown_s = 60 * minute
    assert shown_s is not None
    assert shown_s <= 180
    assert lag.lag_ms == pytest.approx(200, abs=25)


def test_long_time_in_step_raises_no_alarm_however_noisy() -> None:
    sync = SyncLag()
    lags = [watch(sync, ahead_s=0.0, seconds=120, at_s=120 * i, noise=3.0).estimate() for i in range(12)]
    assert not any(lag.is_beyond(100) for lag in lags if lag is not None)
    assert sum(lag is not None for lag in lags) > 8


def test_still_scene_and_unrelated_encodings_raise_no_alarm() -> None:
    for case in (watch(SyncLag(), ahead_s=0.2, moves=False), watch(SyncLag(), ahead_s=0.2, noise=1e3)):
        lag = case.estimate()
        assert lag is None or not lag.is_beyond(100)


def test_too_few_pairs_say_nothing_and_memory_is_bounded() -> None:
    assert SyncLag().estimate() is None
    assert watch(SyncLag(), ahead_s=0.2, seconds=40).estimate() is None
    sync = watch(SyncLag(), ahead_s=0.0, seconds=600)
    assert len(sync._stretches) <= 24
