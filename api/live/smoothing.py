"""A vote of the last frames of one site, and when to give no answer. Pure.

What passes a radar does so over many frames, and the errors of single frames are partly not those of their
neighbours. The vote is the mean of calibrated probabilities; docs/live.md has what it was chosen over.
"""

from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Probabilities = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Window:
    """num_frames: at most. max_age_ns: since the newest, by capture time: a longer gap begins a new window."""

    num_frames: int
    max_age_ns: int


@dataclass(frozen=True, slots=True)
class Vote:
    """probabilities: (classes,) float64, of sum 1. num_frames: that voted."""

    probabilities: Probabilities
    num_frames: int

    @property
    def index(self) -> int:
        return int(self.probabilities.argmax())

    @property
    def confidence(self) -> float:
        return float(self.probabilities.max())


class Smoother:
    """The window of one site."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._frames: deque[tuple[int, Probabilities]] = deque(maxlen=window.num_frames)
        self._newest_ns = 0

    def add(self, captured_at_ns: int, probabilities: Probabilities, *, is_unknown: bool = False) -> Vote:
        """The vote of the window that ends with this frame. probabilities: (classes,), calibrated, of sum 1.

        An unknown frame has no vote: what the model says of it means nothing. Where the clock went back, a new
        window begins. Every frame has the same number of classes.
        """
        if captured_at_ns < self._newest_ns:
            self._frames.clear()
        self._newest_ns = captured_at_ns
        while self._frames and captured_at_ns - self._frames[0][0] > self._window.max_age_ns:
            self._frames.popleft()
        if not is_unknown:
            self._frames.append((captured_at_ns, probabilities))
        voters = [frame for _, frame in self._frames] or [probabilities]
        mean: Probabilities = np.mean(voters, axis=0, dtype=np.float64)
        return Vote(mean / mean.sum(), len(self._frames))


def abstention(vote: Vote, *, is_unknown: bool, below: float) -> Literal["", "unknown", "unsure"]:
    """Why no answer is given: "unknown", "unsure", or "" where one is."""
    if is_unknown:
        return "unknown"
    return "unsure" if vote.confidence < below else ""
