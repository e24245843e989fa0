"""From predictions to what is reported: means over seeds, intervals by session, recall, confusion.

Frames of a session are not independent, so intervals resample sessions, not frames, and seeds with them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from services.core.errors import SettingsError
from services.core.frames import CLASSES
from trainer.evaluation.dataset import Dataset, Rows
from trainer.evaluation.split import Split

_NUM_DRAWS = 2000
_LEVEL = (2.5, 97.5)
Counts = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Answers:
    """What one seed answered. rows: (n,) labelled frames; predicted: (n,) int64, indices into CLASSES."""

    seed: int
    rows: Rows
    predicted: Rows


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds with the 95 % interval around it; shares from 0 to 1."""

    mean: float
    low: float
    high: float

    def report(self) -> dict[str, float]:
        return {"mean": round(self.mean, 4), "low": round(self.low, 4), "high": round(self.high, 4)}

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


def score(dataset: Dataset, answers: Sequence[Answers]) -> dict[str, Any]:
    """Accuracy, recall and confusion of several seeds on the same frames."""
    confusion = sum(_confusion(dataset, found) for found in answers)
    assert isinstance(confusion, np.ndarray)
    per_seed = [float(np.mean(found.predicted == dataset.label[found.rows])) for found in answers]
    asked = confusion.sum(1)
    recall = {name: round(float(confusion[i, i] / asked[i]), 4) for i, name in enumerate(CLASSES) if asked[i]}
    return {
        "accuracy": accuracy(dataset, answers).report(),
        "per_seed": [round(value, 4) for value in per_seed],
        "seeds": [found.seed for found in answers],
        "balanced_accuracy": round(float(np.mean(list(recall.values()))), 4),
        "recall": recall,
        "confusion": {"classes": list(CLASSES), "rows_are": "truth", "counts": confusion.tolist()},
        "frames": len(answers[0].rows),
        "sessions": len(np.unique(dataset.session[answers[0].rows])),
    }


def outcome(scored: dict[str, Any]) -> dict[str, Any]:
    """Columns of a table from what `score` says: the accuracy with its interval, and what it rests on."""
    rests_on = {"frames": scored["frames"], "sessions": scored["sessions"], "seeds": len(scored["seeds"])}
    recall = {f"recall_{name}": value for name, value in scored["recall"].items()}
    return {"accuracy": scored["accuracy"], "balanced_accuracy": scored["balanced_accuracy"]} | recall | rests_on


def accuracy(dataset: Dataset, answers: Sequence[Answers]) -> Interval:
    """Mean accuracy over seeds."""
    return bootstrap(*by_session(dataset, [(a.rows, a.predicted == dataset.label[a.rows]) for a in answers]))


def difference(dataset: Dataset, ours: Sequence[Answers], theirs: Sequence[Answers]) -> Interval:
    """Accuracy of `ours` minus that of `theirs`, seed by seed, on the same sessions."""
    gains = [
        (a.rows, (a.predicted == dataset.label[a.rows]).astype(float) - (b.predicted == dataset.label[b.rows]))
        for a, b in zip(ours, theirs, strict=True)
    ]
    return bootstrap(*by_session(dataset, gains))


def by_session(dataset: Dataset, values: Sequence[tuple[Rows, npt.NDArray[Any]]]) -> tuple[Counts, Counts]:
    """values: rows and a value each, for every seed -> sums (seeds, sessions) and frames (seeds, sessions)."""
    sessions = np.unique(np.concatenate([dataset.session[rows] for rows, _ in values]))
    sums, frames = np.zeros((len(values), len(sessions))), np.zeros((len(values), len(sessions)))
    for i, (rows, value) in enumerate(values):
        at = np.searchsorted(sessions, dataset.session[rows])
        sums[i] = np.bincount(at, weights=value.astype(float), minlength=len(sessions))
        frames[i] = np.bincount(at, minlength=len(sessions))
    return sums, frames


def bootstrap(sums: Counts, frames: Counts) -> Interval:
    """Interval of sum(sums) / sum(frames), by resampling sessions, and seeds. sums, frames: (seeds, sessions)."""
    rng = np.random.default_rng(0)
    num_seeds, num_sessions = sums.shape
    mean = float(np.mean(sums.sum(1) / frames.sum(1)))
    if num_sessions == 1:  # how sessions differ is not known, and seeds alone would look far too sure
        return Interval(mean, float("nan"), float("nan"))
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), _NUM_DRAWS)  # how often each was drawn
    sessions = rng.multinomial(num_sessions, np.full(num_sessions, 1 / num_sessions), _NUM_DRAWS)
    drawn = [((seeds @ values) * sessions).sum(1) for values in (sums, frames)]
    low, high = np.percentile(drawn[0] / np.maximum(1.0, drawn[1]), _LEVEL)
    return Interval(mean, float(low), float(high))


def _confusion(dataset: Dataset, found: Answers) -> npt.NDArray[np.int64]:
    counts = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    np.add.at(counts, (dataset.label[found.rows], found.predicted), 1)
    return counts


def labelled(dataset: Dataset, rows: Rows) -> Rows:
    """Those of `rows` that have a label."""
    return rows[dataset.label[rows] >= 0]


def asked_parts(dataset: Dataset, split: Split) -> dict[str, Rows]:
    """The labelled rows of each part that has any. Raises SettingsError where no held-out frame has a label."""
    found = {part: labelled(dataset, rows) for part, rows in split.parts.items()}
    found = {part: rows for part, rows in found.items() if len(rows)}
    if not found:
        raise SettingsError(
            "no held-out frame has a label", remedy="label more, or hold out others: --split-seed 1"
        )
    return found


def answer(dataset: Dataset, rows: Rows, predict: Callable[[Rows], Rows], *, seed: int) -> Answers:
    """Ask about the labelled ones of `rows`. predict: rows to class indices."""
    asked = labelled(dataset, rows)
    return Answers(seed, asked, predict(asked))
