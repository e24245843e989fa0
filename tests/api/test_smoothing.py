"""The vote of a track window, and when no answer is given."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.live.smoothing import Smoother, Vote, Window, abstention

MS = 1_000_000
WINDOW = Window(num_frames=3, max_age_ns=500 * MS)

distributions = st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4).filter(lambda p: sum(p) > 0.1)


def shares(*values: float) -> np.ndarray:
    return np.asarray(values, np.float32) / np.float32(sum(values))


def votes(*frames: tuple[float, np.ndarray], window: Window = WINDOW) -> list[Vote]:
    """frames: (captured at ms, probabilities)."""
    smoother = Smoother(window)
    return [smoother.add(round(at_ms * MS), probabilities) for at_ms, probabilities in frames]


def test_one_wrong_frame_is_outvoted_by_its_neighbours() -> None:
    car, other = shares(0.1, 0.9), shares(0.6, 0.4)
    assert [vote.index for vote in votes((0, car), (100, car), (200, other))] == [1, 1, 1]


def test_vote_is_the_mean_of_probabilities() -> None:
    [_, vote] = votes((0, shares(0.2, 0.8)), (100, shares(0.5, 0.5)))
    assert vote.probabilities == pytest.approx([0.35, 0.65])
    assert vote.confidence == pytest.approx(0.65)


def test_window_is_bounded_by_frames_and_by_age() -> None:
    p = shares(0.5, 0.5)
    assert [vote.num_frames for vote in votes(*((100 * i, p) for i in range(5)))] == [1, 2, 3, 3, 3]
    assert [vote.num_frames for vote in votes(*((300 * i, p) for i in range(5)))] == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("next_ms", [601, -1], ids=["gap", "clock set back"])
def test_gap_or_a_clock_that_went_back_begins_anew(next_ms: float) -> None:
    [*_, vote] = votes((0, shares(0.9, 0.1)), (100, shares(0.9, 0.1)), (next_ms, shares(0.2, 0.8)))
    assert (vote.num_frames, vote.index) == (1, 1)


def test_unknown_frame_has_no_vote() -> None:
    smoother = Smoother(WINDOW)
    alone = smoother.add(0, shares(0.1, 0.9), is_unknown=True)
    assert (alone.num_frames, alone.index) == (0, 1)
    smoother.add(100 * MS, shares(0.9, 0.1))
    vote = smoother.add(200 * MS, shares(0.0, 1.0), is_unknown=True)
    assert (vote.num_frames, vote.index) == (1, 0)


@given(st.lists(st.tuples(st.integers(0, 3000), distributions), min_size=1, max_size=20))
def test_vote_is_a_distribution_whatever_comes(frames: list[tuple[int, list[float]]]) -> None:
    for vote in votes(*((at_ms, shares(*values)) for at_ms, values in frames)):
        assert vote.probabilities.sum() == pytest.approx(1.0)
        assert 0 <= vote.probabilities.min() <= vote.confidence <= 1
        assert 1 <= vote.num_frames <= WINDOW.num_frames


@given(distributions, st.integers(1, 3))
def test_frames_that_agree_are_no_surer_together_than_alone(values: list[float], num: int) -> None:
    vote = votes(*((100 * i, shares(*values)) for i in range(num)))[-1]
    assert vote.probabilities == pytest.approx(shares(*values), abs=1e-6)


def test_no_answer_where_the_frame_is_unknown_or_the_vote_unsure() -> None:
    vote = Vote(np.array([0.4, 0.6]), 3)
    assert abstention(vote, is_unknown=False, below=0.6) == ""
    assert abstention(vote, is_unknown=False, below=0.61) == "unsure"
    assert abstention(vote, is_unknown=True, below=0.0) == "unknown"
