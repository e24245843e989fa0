"""How strange a frame is: how far from anything that has a name, and from where on it counts as unknown.

One minus the mean cosine to the three nearest of a bank of named features (deep nearest neighbours, Sun et al.
2022). EXPERIMENTS.md has what it was chosen over.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.core.errors import RegistryError

_NUM_NEIGHBOURS = 3
_MOST_OF_CLASS = 64
_MIN_FRAMES = 20
_MIN_OF_CLASS = 5


class UnknownScore(nn.Module):
    """(B, D) features of any norm -> (B,) float32 in [0, 2], larger for what is stranger.

    bank: (M, D) float32, unit L2 norm: named features, at most 64 of each class, so that the graph stays small.
    """

    bank: Tensor

    def __init__(self, num_vectors: int, feature_dim: int) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(num_vectors, feature_dim))
        self._num_neighbours = min(_NUM_NEIGHBOURS, num_vectors)

    def forward(self, features: Tensor) -> Tensor:
        similarity = F.normalize(features, dim=1) @ self.bank.T  # (B, M)
        scores: Tensor = 1 - similarity.topk(self._num_neighbours, dim=1).values.mean(1)
        return scores

    def describe(self) -> dict[str, Any]:
        """What `build_unknown` needs."""
        return {"score": "knn", "num_vectors": len(self.bank)}


def build_unknown(description: dict[str, Any] | None, feature_dim: int) -> UnknownScore | None:
    """The score that a manifest describes; None if its model has none. Raises RegistryError for another kind."""
    if description is None:
        return None
    if description["score"] != "knn":
        raise RegistryError(
            f"unknown score is {description['score']!r}",
            remedy="upgrade Echosight, or roll back to another version",
        )
    return UnknownScore(description["num_vectors"], feature_dim)


@torch.no_grad()
def fit_unknown(features: Tensor, targets: Tensor) -> UnknownScore:
    """From known frames, spread over each class's. features: (N, D) float32; targets: (N,) int64."""
    rows = []
    for i in sorted(set(targets.tolist())):
        of_class = (targets == i).nonzero().flatten()
        num = min(len(of_class), _MOST_OF_CLASS)
        rows.append(of_class[torch.arange(num) * len(of_class) // num])
    bank = F.normalize(features[torch.cat(rows)], dim=1)
    unknown = UnknownScore(*bank.shape)
    unknown.bank.copy_(bank)
    return unknown


@dataclass(frozen=True, slots=True)
class OpenSet:
    """score: from all known frames. threshold: from here on a frame is unknown."""

    score: UnknownScore
    threshold: float
    metrics: dict[str, Any]


@torch.no_grad()
def fit_open_set(
    features: Tensor,
    targets: Tensor,
    folds: Tensor,
    *,
    classes: tuple[str, ...],
    accepted_share: float,
    noise: Tensor,
) -> OpenSet | None:
    """A score and its threshold; None with fewer than 20 known frames, or where nothing can be held out.

    The threshold accepts `accepted_share` of known frames, each scored by a fit that has not seen its block of
    time. Reported: how well a class that was left out, and `noise` (features (M, D) of heatmaps that show
    nothing), are told from known frames, as the area under the ROC curve.
    """
    if len(targets) < _MIN_FRAMES or len(set(folds.tolist())) < 2:
        return None
    known = _out_of_fold(features, targets, folds)
    threshold = max(float(known.quantile(accepted_share)), 1e-6)
    score = fit_unknown(features, targets)
    strangers = {
        name: auroc(*_without(i, features, targets, folds))
        for i, name in enumerate(classes)
        if _can_leave_out(i, targets, folds)
    }
    metrics: dict[str, Any] = {
        "score": "knn",
        "threshold": threshold,
        "accepted_share": accepted_share,
        "num_frames": len(targets),
        "auroc_class_left_out": {name: round(value, 4) for name, value in strangers.items()},
    }
    if len(noise):
        scores = score(noise)
        metrics["auroc_noise"] = round(auroc(known, scores), 4)
        metrics["noise_found"] = round(float((scores >= threshold).float().mean()), 4)
    return OpenSet(score, threshold, metrics)


def auroc(known: Tensor, strange: Tensor) -> float:
    """How likely a strange one scores above a known one; a tie counts half."""
    above = torch.searchsorted(known.sort().values, strange, right=False).double()
    not_below = torch.searchsorted(known.sort().values, strange, right=True).double()
    return float(((above + not_below) / 2).mean() / len(known)) if len(known) and len(strange) else math.nan


def _out_of_fold(features: Tensor, targets: Tensor, folds: Tensor) -> Tensor:
    scores = torch.zeros(len(targets))
    for fold in sorted(set(folds.tolist())):
        is_test = folds == fold
        scores[is_test] = fit_unknown(features[~is_test], targets[~is_test])(features[is_test])
    return scores


def _without(i: int, features: Tensor, targets: Tensor, folds: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of known frames out of fold, and of class `i`, by fits that know nothing of it."""
    rest = targets != i
    known = _out_of_fold(features[rest], targets[rest], folds[rest])
    return known, fit_unknown(features[rest], targets[rest])(features[~rest])


def _can_leave_out(i: int, targets: Tensor, folds: Tensor) -> bool:
    rest = targets != i
    num_rest = int(rest.sum())
    is_enough = len(targets) - num_rest >= _MIN_OF_CLASS and num_rest >= _MIN_FRAMES
    return is_enough and len(set(folds[rest].tolist())) > 1
