"""How strange a frame is: its distance from what the classes look like, and from where on it counts as unknown.

Mahalanobis' distance of the unit-norm features from the nearest class mean, under the covariance that the classes
share (Lee et al. 2018; unit norm: Mueller & Hein 2025). EXPERIMENTS.md has what it was chosen over.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SHRINKAGE = 0.1
"""Share of the covariance that is the same in all directions: few frames do not tell it in each."""
_MAX_RANK = 128
_MIN_FRAMES = 20
_MIN_OF_CLASS = 5


class UnknownScore(nn.Module):
    """(B, D) features of any norm -> (B,) float32, larger for what is stranger; about 1 for what is known.

    means: (C, D), of the classes that have names. directions: (r, D), rest: (): the inverse covariance is
    rest * (I - directions' directions), so that its size does not grow with D squared.
    """

    means: Tensor
    directions: Tensor
    rest: Tensor

    def __init__(self, num_classes: int, feature_dim: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(num_classes, feature_dim))
        self.register_buffer("directions", torch.zeros(rank, feature_dim))
        self.register_buffer("rest", torch.ones(()))

    def forward(self, features: Tensor) -> Tensor:
        apart = F.normalize(features, dim=1)[:, None] - self.means  # (B, C, D)
        along = apart @ self.directions.T  # (B, C, r)
        squared = apart.square().sum(2) - along.square().sum(2)  # (B, C)
        scores: Tensor = (squared * self.rest).amin(1) / self.means.shape[1]
        return scores

    def describe(self) -> dict[str, Any]:
        """What `build_unknown` needs."""
        return {"score": "mahalanobis", "num_classes": len(self.means), "rank": len(self.directions)}


def build_unknown(description: dict[str, Any] | None, feature_dim: int) -> UnknownScore | None:
    """The score that a manifest describes; None if its model has none."""
    if description is None:
        return None
    return UnknownScore(description["num_classes"], feature_dim, description["rank"])


@torch.no_grad()
def fit_unknown(features: Tensor, targets: Tensor) -> UnknownScore:
    """From known frames. features: (N, D) float32; targets: (N,) int64."""
    unit = F.normalize(features, dim=1)
    present = torch.tensor(sorted(set(targets.tolist())))
    means = torch.stack([unit[targets == i].mean(0) for i in present])
    apart = unit - means[torch.searchsorted(present, targets)]
    num, dim = apart.shape
    level = float(apart.square().sum() / num / dim)  # mean variance of a direction
    rest = max(_SHRINKAGE * level, 1e-8)
    rank = min(num, dim, _MAX_RANK)
    if min(num, dim) > 2 * _MAX_RANK:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # it draws its first guess
            _, values, columns = torch.svd_lowrank(apart, q=rank)
        directions = columns.T
    else:
        _, values, directions = torch.linalg.svd(apart, full_matrices=False)
        values, directions = values[:rank], directions[:rank]
    variance = (1 - _SHRINKAGE) * values.square() / num
    unknown = UnknownScore(len(present), dim, len(directions))
    unknown.means.copy_(means)
    unknown.directions.copy_(directions * (variance / (variance + rest)).sqrt()[:, None])  # Woodbury
    unknown.rest.fill_(1 / rest)
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
    threshold = float(known.quantile(accepted_share))
    score = fit_unknown(features, targets)
    strangers = {
        name: auroc(*_without(i, features, targets, folds))
        for i, name in enumerate(classes)
        if _can_leave_out(i, targets)
    }
    metrics: dict[str, Any] = {
        "score": "mahalanobis",
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


def _can_leave_out(i: int, targets: Tensor) -> bool:
    num = int((targets == i).sum())
    return num >= _MIN_OF_CLASS and len(targets) - num >= _MIN_FRAMES
