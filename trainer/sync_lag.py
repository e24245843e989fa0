"""How far a site's camera is behind or ahead of its radar, by what they see: no labels, no trust in clocks.

What the radar encoder makes of the echoes at t is compared with the images around t: the mean of q_t . k_{t + lag}
over a site's consecutive pairs peaks at the lag at which both saw the same scene. If the camera's clock is 200 ms
ahead, the image that carries the time t + 200 ms shows what the radar saw at t, and the peak is at +200 ms.

It needs a scene that moves, and pairs closer to one another than the lags that are looked at. It does not know
where encodings come from. Pure: no clock, no store.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

STEP_MS = 100.0
MAX_LAG_MS = 1000.0
_MIN_SCENES = 8
"""In a stretch of time: fewer say nothing about its mean."""
_WINDOWS = (5, 8, 12, 24)
"""Stretches to look back."""
_NUM_RESAMPLES = 200
_NUM_SIDE = 5
"""Bins left and right of the highest that its parabola is laid through."""
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Lag:
    """lag_ms: camera's clock minus radar's, by content. low_ms, high_ms: where it is with 90 % confidence.

    num_pairs, num_stretches: that it rests on.
    """

    lag_ms: float
    low_ms: float
    high_ms: float
    num_pairs: int
    num_stretches: int

    @property
    def width_ms(self) -> float:
        return self.high_ms - self.low_ms

    def overlaps(self, other: "Lag") -> bool:
        return self.low_ms <= other.high_ms and other.low_ms <= self.high_ms

    def is_beyond(self, alarm_ms: float) -> bool:
        """Whether the whole interval is farther from 0 than `alarm_ms`."""
        return min(abs(self.low_ms), abs(self.high_ms)) > alarm_ms and self.low_ms * self.high_ms > 0


class SyncLag:
    """One site's curve over lags, of its last stretches of time. Bounded: one row of sums a stretch."""

    def __init__(self) -> None:
        self._half = round(MAX_LAG_MS / STEP_MS)
        self._stretches: deque[tuple[int, _Floats]] = deque(maxlen=_WINDOWS[-1])

    def observe(
        self, q: _Floats, k: _Floats, *, radar_at_ns: npt.NDArray[np.int64], camera_at_ns: npt.NDArray[np.int64]
    ) -> None:
        """Take in one stretch of time. q: (M, D) of radar frames at (M,); k: (N, D) of images at (N,), any norm.

        Not every image needs a radar encoding beside it: images are encoded already, radar frames cost a pass.
        Both are centred on the stretch: what does not move, and what a site's frames have in common, is gone.
        """
        if len(q) < _MIN_SCENES:
            return
        q, k = _unit(q - q.mean(0)), _unit(k - k.mean(0))
        lag_ms = (camera_at_ns[None, :] - radar_at_ns[:, None]) / 1e6
        at = np.rint(lag_ms / STEP_MS).astype(np.int64) + self._half
        near = (at >= 0) & (at <= 2 * self._half)
        sums = [
            np.bincount(at[near], weights=values[near], minlength=2 * self._half + 1)
            for values in (q @ k.T, lag_ms, np.ones_like(lag_ms))
        ]
        self._stretches.append((len(q), np.stack(sums)))

    def estimate(self) -> Lag | None:
        """The lag now; None if too little was seen, or nothing that moves.

        From the newest stretches, so that a jump shows soon; from more where they say the same better.
        """
        nums = sorted({min(num, len(self._stretches)) for num in _WINDOWS})
        found = newest = self._estimate(nums[0]) if nums[0] >= _WINDOWS[0] else None
        for num in nums[1:]:
            more = self._estimate(num)
            if more is None or (newest is not None and not more.overlaps(newest)):
                continue
            if found is None or more.width_ms < found.width_ms:
                found = more
        return found

    def _estimate(self, num: int) -> Lag | None:
        """From the newest `num` stretches; the interval from drawing them anew, again and again (Efron 1979)."""
        newest = list(self._stretches)[-num:]
        sums = np.stack([of_one for _, of_one in newest])  # (num, 3, L)
        products, lags, counts = sums.sum(0)
        seen = counts > 0
        lags_ms = lags[seen] / counts[seen]
        draws = np.random.default_rng(0).integers(0, num, (_NUM_RESAMPLES, num))
        weights = np.stack([np.bincount(draw, minlength=num) for draw in draws]).astype(np.float64)
        again = np.einsum("rn,nsl->srl", weights, sums[:, [0, 2]][:, :, seen])
        means = np.vstack([products[seen] / counts[seen], again[0] / np.maximum(again[1], 1)])
        peaks = _peaks(lags_ms, means)
        if np.isnan(peaks[0]):
            return None
        nowhere = np.where(np.arange(_NUM_RESAMPLES) % 2, -MAX_LAG_MS, MAX_LAG_MS)  # no peak: it could be anywhere
        low_ms, high_ms = np.quantile(np.where(np.isnan(peaks[1:]), nowhere, peaks[1:]), (0.05, 0.95))
        num_pairs = sum(num_of_one for num_of_one, _ in newest)
        return Lag(float(peaks[0]), float(low_ms), float(high_ms), num_pairs=num_pairs, num_stretches=num)


def _peaks(lags_ms: _Floats, means: _Floats) -> _Floats:
    """(R,) the lag of each curve's highest point, between samples by a parabola; nan where that is at an end.

    lags_ms: (L,). means: (R, L), one curve a row.
    """
    size, num_lags = 2 * _NUM_SIDE + 1, len(lags_ms)
    if num_lags < size:
        return np.full(len(means), np.nan)
    at = means.argmax(1)
    first = np.clip(at - _NUM_SIDE, 0, num_lags - size)
    x = (lags_ms[first[:, None] + np.arange(size)] - lags_ms[at][:, None]) / STEP_MS  # (R, size)
    design = np.stack([x**2, x, np.ones_like(x)], 2)
    around = np.take_along_axis(means, first[:, None] + np.arange(size), 1)
    a, b, _ = (np.linalg.pinv(design) @ around[:, :, None])[:, :, 0].T
    off = np.clip(-b / np.where(a < 0, 2 * a, -1.0), -_NUM_SIDE, _NUM_SIDE)
    has_peak = (at > 0) & (at < num_lags - 1) & (a < 0)
    peaks: _Floats = np.where(has_peak, lags_ms[at] + STEP_MS * off, np.nan)
    return peaks


def _unit(x: _Floats) -> _Floats:
    unit: _Floats = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    return unit
