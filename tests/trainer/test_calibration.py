"""Temperature: found where it is known, no certainty from a handful, and an error that is what it says."""

import pytest
import torch

from trainer.calibration import (
    calibrate,
    expected_calibration_error,
    fit_abstention,
    fit_temperature,
    negative_log_likelihood,
)


def drawn(num: int, *, sharpened: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are `sharpened` times too large for the classes drawn by them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num, 4, generator=generator) * 2
    targets = torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()
    return logits * sharpened, targets


@pytest.mark.parametrize("sharpened", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_what_sharpened_the_logits(sharpened: float) -> None:
    assert fit_temperature(*drawn(4000, sharpened=sharpened)) == pytest.approx(sharpened, rel=0.1)


def test_calibration_lowers_both_errors_on_folds_that_did_not_choose_it() -> None:
    logits, targets = drawn(1000, sharpened=3.0)
    found = calibrate(logits, targets, torch.arange(1000) % 5, answer_accuracy=0.95).metrics
    assert found["ece_before"] > 0.1
    assert found["ece_after"] < 0.05
    assert found["nll_after"] < found["nll_before"]
    assert found["nll_after"] == pytest.approx(negative_log_likelihood(logits / 3, targets), abs=0.01)


def test_a_handful_that_is_all_right_does_not_ask_for_certainty() -> None:
    targets = torch.arange(24) % 4
    logits = torch.nn.functional.one_hot(targets, 4).float() * 2
    assert 0.15 < fit_temperature(logits, targets) < 1.0
    assert calibrate(logits[:8], targets[:8], targets[:8], answer_accuracy=0.95).temperature == 1.0


def test_the_error_of_answers_that_are_always_sure_is_their_share_of_mistakes() -> None:
    targets = torch.tensor([0, 1] * 50)
    logits = torch.tensor([[20.0, 0.0]]).repeat(100, 1)
    assert expected_calibration_error(logits, targets) == pytest.approx(0.5, abs=1e-6)


def test_answers_are_as_often_right_as_asked_for_on_folds_that_did_not_choose_the_confidence() -> None:
    logits, targets = drawn(4000, sharpened=3.0)
    plain = (logits.argmax(1) == targets).float().mean()
    found = calibrate(logits, targets, torch.arange(4000) % 5, answer_accuracy=0.8)
    assert plain < 0.75
    assert found.metrics["answered_accuracy"] == pytest.approx(0.8, abs=0.015)
    assert 0.5 < found.metrics["answered_share"] < 0.9
    assert found.abstain_below is not None
    assert found.metrics["abstain_below"] == pytest.approx(found.abstain_below, abs=1e-4)


def test_a_handful_does_not_say_how_sure_an_answer_must_be() -> None:
    logits, targets = drawn(19, sharpened=1.0)
    assert calibrate(logits, targets, torch.arange(19) % 5, answer_accuracy=0.9).abstain_below is None


def test_confidence_is_the_lowest_that_is_accurate_enough_never_below_one_half_nor_the_surer_half() -> None:
    confidence = torch.tensor([0.95, 0.9, 0.8, 0.7, 0.6, 0.4])
    right = torch.tensor([1, 1, 1, 0, 1, 1]).bool()
    assert fit_abstention(confidence, right, accuracy=1.0) == pytest.approx(0.8)
    assert fit_abstention(confidence, right, accuracy=0.8) == 0.5
    assert fit_abstention(confidence, ~right, accuracy=0.9) == pytest.approx(0.8)
