"""How well the encoders have learnt, in numbers. Pure functions of encodings; each names its source.

q: (N, D) float32, unit L2 norm, radar encodings. k: the same of the images that saw the same instants, row by row.
is_candidate: (N, N) bool, which image may be mistaken for that of a radar frame; its own always counts.
docs/gauges.md says for people what is healthy and what to do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.head import Block, fit_head, score

_NUM_NEIGHBOURS = 10
_NEIGHBOUR_TAU = 0.1


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Share of radar frames whose image is among the k best, and what a blind guess would get."""

    r1: float
    r5: float
    r1_chance: float
    r5_chance: float


def mi_bound(loss: float, chance: float) -> float:
    """Nats that two encodings are known to share, at least: log(candidates) - loss (van den Oord 2018, eq. 5).

    With K negatives there are K + 1 candidates and chance is log(K + 1): more than that it cannot show.
    """
    return chance - loss


def contrast_loss(q: Tensor, k: Tensor, *, is_candidate: Tensor, scale: float) -> tuple[float, float]:
    """InfoNCE of held-out pairs against one another, and its chance line, in nats. scale: 1 / tau."""
    allowed = is_candidate | torch.eye(len(q), dtype=torch.bool)
    logits = (q @ k.T * scale).masked_fill(~allowed, -math.inf)
    loss = F.cross_entropy(logits, torch.arange(len(q)))
    return float(loss), float(allowed.sum(1).double().log().mean())


def retrieval(q: Tensor, k: Tensor, *, is_candidate: Tensor) -> Retrieval:
    """Cross-modal recall at 1 and 5, radar to image (as in Radford 2021). A tie counts against us."""
    similarity = q @ k.T
    others = is_candidate & ~torch.eye(len(q), dtype=torch.bool)
    rank = 1 + (others & (similarity >= similarity.diagonal()[:, None])).sum(1)
    num = 1 + others.sum(1)
    recalls = [float((rank <= among).double().mean()) for among in (1, 5)]
    chances = [float((among / num.double()).clamp(max=1).mean()) for among in (1, 5)]
    return Retrieval(*recalls, *chances)


def alignment(q: Tensor, k: Tensor) -> float:
    """Mean squared distance of the two encodings of an instant: 0 to 4, 2 if unrelated (Wang & Isola 2020)."""
    return float((q - k).square().sum(1).mean())


def uniformity(x: Tensor) -> float:
    """log of the mean Gaussian potential of all pairs: 0 if all the same, -4 if spread (Wang & Isola 2020)."""
    return float(torch.pdist(x).square().mul(-2).exp().mean().log())


def effective_rank(x: Tensor) -> float:
    """exp of the entropy of the centred singular values: directions in use (Roy & Vetterli 2007). x: (N, D)."""
    values = torch.linalg.svdvals((x - x.mean(0)).double())
    total = float(values.sum())
    if total <= 1e-9:
        return 1.0
    share = values / total
    return float(torch.special.entr(share).sum().exp())


def feature_std(x: Tensor) -> float:
    """Mean standard deviation of unit vectors, times sqrt(D): 1 if spread, 0 if collapsed (Chen & He 2021)."""
    unit = F.normalize(x, dim=1)
    return float(unit.std(0, unbiased=False).mean()) * math.sqrt(x.shape[1])


@dataclass(frozen=True, slots=True)
class Labelled:
    """Features (N, D) float32, their classes (N,) int64, and the stretch of time that each is from."""

    features: Tensor
    targets: Tensor
    blocks: Sequence[Block]

    def __len__(self) -> int:
        return len(self.targets)


def probe(learnt: Labelled, held_out: Labelled, *, classes: Sequence[str]) -> dict[str, Any]:
    """Accuracy and recall of each class on held-out labels, by a linear head and by neighbours (Wu 2018).

    Both know the labels of the learnt part alone.
    """
    head = fit_head(learnt.features, learnt.targets, blocks=learnt.blocks, classes=classes).head
    with torch.no_grad():
        linear = head(held_out.features).argmax(1)
    neighbours = _by_neighbours(learnt, held_out.features, num_classes=len(classes))
    return {
        "num_trained": len(learnt),
        "num_tested": len(held_out),
        "linear": score(linear, held_out.targets, classes=classes),
        "knn": score(neighbours, held_out.targets, classes=classes),
    }


def _by_neighbours(known: Labelled, features: Tensor, *, num_classes: int) -> Tensor:
    """(M,) int64: weighted vote of the most similar; a class counts as much as another, however many it has."""
    mean = known.features.mean(0)
    near = F.normalize(features - mean, dim=1) @ F.normalize(known.features - mean, dim=1).T
    similarity, at = near.topk(min(_NUM_NEIGHBOURS, len(known)), dim=1)
    share = torch.bincount(known.targets, minlength=num_classes).clamp_min(1).float()
    votes = torch.zeros(len(features), num_classes)
    targets = known.targets[at]
    votes.scatter_add_(1, targets, (similarity / _NEIGHBOUR_TAU).exp() / share[targets])
    return votes.argmax(1)
