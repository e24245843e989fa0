"""How sure an answer may be: one temperature for all logits (Guo et al. 2017), and how far off probabilities are;
how sure it must be to be given at all (selective classification, Geifman and El-Yaniv 2017).

Everything is measured on logits of heads that have not seen the row they judge, at the frequencies of classes in
the stream as it was named.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_CONFIDENCE = 0.5
_NUM_BINS = 10
_MIN_FRAMES = 20
_MAX_LOG = math.log(10.0)
_STEPS = 40


@dataclass(frozen=True, slots=True)
class Calibration:
    """temperature: logits are divided by it. abstain_below: confidence from which on an answer is given.

    metrics: before, and after by temperatures and confidences from the other folds.
    """

    temperature: float
    abstain_below: float | None
    metrics: dict[str, Any]


def calibrate(logits: Tensor, targets: Tensor, folds: Tensor, *, answer_accuracy: float) -> Calibration:
    """A temperature for `logits`, and the confidence from which on `answer_accuracy` of the answers are right.

    logits: (N, C) float32, out of fold; targets, folds: (N,) int64. With fewer than 20 rows the temperature stays
    at 1 and nothing is known of the confidence. What is reported of "after" and "answered" is of each fold by what
    the other folds gave.
    """
    metrics: dict[str, Any] = {"num_frames": len(targets), "ece_bins": _NUM_BINS}
    if len(targets) < _MIN_FRAMES:
        return Calibration(1.0, None, metrics | {"temperature": 1.0})
    temperature = fit_temperature(logits, targets)
    after = logits.clone()
    for fold in sorted(set(folds.tolist())):
        rest = folds != fold
        after[~rest] /= fit_temperature(logits[rest], targets[rest]) if rest.any() else temperature
    metrics |= {
        "temperature": round(temperature, 4),
        "nll_before": round(negative_log_likelihood(logits, targets), 4),
        "nll_after": round(negative_log_likelihood(after, targets), 4),
        "ece_before": round(expected_calibration_error(logits, targets), 4),
        "ece_after": round(expected_calibration_error(after, targets), 4),
    }
    confidence, predicted = after.softmax(1).max(1)
    is_right = predicted == targets
    abstain_below = fit_abstention(confidence, is_right, accuracy=answer_accuracy)
    is_given = torch.zeros(len(targets), dtype=torch.bool)
    for fold in sorted(set(folds.tolist())):
        rest = folds != fold
        below = fit_abstention(confidence[rest], is_right[rest], accuracy=answer_accuracy) if rest.any() else 0.0
        is_given[~rest] = confidence[~rest] >= below
    metrics |= {
        "abstain_below": round(abstain_below, 4),
        "answered_share": round(float(is_given.float().mean()), 4),
        "answered_accuracy": round(float(is_right[is_given].float().mean()), 4) if is_given.any() else None,
    }
    return Calibration(temperature, abstain_below, metrics)


def fit_abstention(confidence: Tensor, is_right: Tensor, *, accuracy: float) -> float:
    """The lowest confidence from which on this share of the answers is right. confidence, is_right: (N,).

    At least one half: below, an answer is more likely wrong than right. Where that accuracy is out of reach, the
    surer half is answered all the same.
    """
    order = confidence.argsort(descending=True)
    num = torch.arange(1, len(order) + 1)
    is_enough = is_right[order].cumsum(0) >= accuracy * num
    is_enough[: (len(order) + 1) // 2 - 1] = False
    good = is_enough.nonzero().flatten()
    last = int(good[-1]) if len(good) else (len(order) + 1) // 2 - 1
    return max(LEAST_CONFIDENCE, float(confidence[order[last]]))


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """What minimises the negative log-likelihood, by golden section over log T in [-log 10, log 10].

    A normal prior of width 1 on log T, worth one row, keeps a handful of rows that are all right from asking for
    certainty.
    """
    ratio = (math.sqrt(5) - 1) / 2

    def cost(log_t: float) -> float:
        return negative_log_likelihood(logits / math.exp(log_t), targets) + log_t**2 / (2 * len(targets))

    low, high = -_MAX_LOG, _MAX_LOG
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    cost_left, cost_right = cost(left), cost(right)
    for _ in range(_STEPS):
        if cost_left < cost_right:
            high, right, cost_right = right, left, cost_left
            left = high - ratio * (high - low)
            cost_left = cost(left)
        else:
            low, left, cost_left = left, right, cost_right
            right = low + ratio * (high - low)
            cost_right = cost(right)
    return math.exp((low + high) / 2)


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """Mean, in nats."""
    return float(F.cross_entropy(logits.double(), targets))


def expected_calibration_error(logits: Tensor, targets: Tensor) -> float:
    """Mean distance of confidence from accuracy, over bins of equally many frames (Naeini et al. 2015)."""
    confidence, predicted = logits.softmax(1).max(1)
    gap = (predicted == targets).double() - confidence.double()
    order = confidence.argsort()
    sums = [float(part.sum().abs()) for part in gap[order].tensor_split(_NUM_BINS)]
    return sum(sums) / len(targets)
