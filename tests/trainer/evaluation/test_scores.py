"""Intervals are by session, differences are paired, confusion is by truth."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from trainer.evaluation.scores import Answers, accuracy, difference, outcome, score


def asked(labels: list[int], sessions: list[int]) -> Any:
    return SimpleNamespace(label=np.array(labels), session=np.array(sessions))


def test_scores_of_one_seed_by_hand() -> None:
    data = asked([0, 1, 1, 3], [0, 0, 1, 1])
    found = score(data, [Answers(0, np.arange(4), np.array([0, 1, 2, 3]))])
    assert found["accuracy"]["mean"] == 0.75
    assert found["recall"] == {"empty": 1.0, "pedestrian": 0.5, "car": 1.0}
    assert found["confusion"]["counts"][1] == [0, 1, 1, 0]
    assert (found["frames"], found["sessions"]) == (4, 2)


def test_sessions_not_frames_decide_how_sure_we_are() -> None:
    label = np.zeros(400, np.int64)
    predicted = np.where(np.arange(400) < 200, 0, 1)  # one half of the time all right, the other all wrong
    few = accuracy(asked(label.tolist(), np.repeat([0, 1], 200).tolist()), [Answers(0, np.arange(400), predicted)])
    shuffled = np.random.default_rng(0).permutation(400) // 4
    many = accuracy(asked(label.tolist(), shuffled.tolist()), [Answers(0, np.arange(400), predicted)])
    assert few.mean == many.mean == 0.5
    assert few.high - few.low == 1.0
    assert many.high - many.low < 0.25


def test_difference_is_paired_by_seed_and_session() -> None:
    rng = np.random.default_rng(0)
    data = asked(rng.integers(0, 4, 200).tolist(), (np.arange(200) // 10).tolist())
    ours = [Answers(seed, np.arange(200), data.label.copy()) for seed in (0, 1)]
    theirs = [
        Answers(seed, np.arange(200), np.where(np.arange(200) % 10 == 0, 9, data.label) % 4) for seed in (0, 1)
    ]
    gain = difference(data, ours, theirs)
    assert 0 < gain.mean <= 0.1
    assert gain.low >= 0
    assert difference(data, ours, ours).high == 0


def test_one_session_gives_no_interval_however_many_seeds() -> None:
    label = [0, 1] * 10
    data = asked(label, [7] * 20)
    answers = [Answers(seed, np.arange(20), np.arange(20) % (2 + seed)) for seed in (0, 1)]
    found = accuracy(data, answers)
    assert 0 < found.mean < 1
    assert np.isnan([found.low, found.high]).all()


def test_outcome_says_what_an_accuracy_rests_on() -> None:
    data = asked([0, 1, 1, 3], [0, 0, 1, 1])
    answers = [Answers(seed, np.arange(4), np.array([0, 1, 2, 3])) for seed in (0, 1, 2)]
    found = outcome(score(data, answers))
    assert (found["frames"], found["sessions"], found["seeds"]) == (4, 2, 3)
    assert found["recall_pedestrian"] == 0.5
