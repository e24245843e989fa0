"""The classifier head: a linear probe on frozen radar features, trained in seconds on the labels there are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.radar import LinearHead

_NUM_TEST_BLOCKS = 5
Block = tuple[str, int]
"""A site and a stretch of its time."""
_L2 = 1e-3


@dataclass(frozen=True, slots=True)
class HeadFit:
    """A head trained on all labels, and what a head trained on a part of them reached on the rest."""

    head: LinearHead
    metrics: dict[str, Any]


def fit_head(features: Tensor, targets: Tensor, *, blocks: Sequence[Block], classes: Sequence[str]) -> HeadFit:
    """Train a head. features: (N, D) float32; targets: (N,) int64; blocks: which stretch of time each is from.

    Accuracy comes from heads that have not seen the block they are tested on: neighbouring frames show the same
    object, and a random split would flatter.
    """
    folds = torch.tensor(_folds(blocks))
    predicted = torch.full_like(targets, -1)
    for fold in range(_NUM_TEST_BLOCKS):
        is_test = folds == fold
        if not is_test.any() or is_test.all():
            continue
        head = _train(features[~is_test], targets[~is_test], num_classes=len(classes))
        predicted[is_test] = _predict(head, features[is_test])
    head = _train(features, targets, num_classes=len(classes))
    return HeadFit(head, _metrics(predicted, targets, classes=classes, num_blocks=len(set(blocks))))


def _folds(blocks: Sequence[Block]) -> list[int]:
    """Whole blocks to folds, in turn."""
    order = {block: i % _NUM_TEST_BLOCKS for i, block in enumerate(sorted(set(blocks)))}
    return [order[block] for block in blocks]


def _train(features: Tensor, targets: Tensor, *, num_classes: int) -> LinearHead:
    """Class-balanced logistic regression by L-BFGS; classes without labels get no probability to speak of."""
    head = LinearHead(features.shape[1], num_classes)
    head.mean.copy_(features.mean(0))
    head.inverse_std.copy_(1 / features.std(0, unbiased=False).clamp_min(1e-4))
    counts = torch.bincount(targets, minlength=num_classes).float()
    weight = torch.where(counts > 0, len(targets) / (counts.clamp_min(1) * (counts > 0).sum()), 0.0)
    torch.nn.init.zeros_(head.linear.weight)
    torch.nn.init.zeros_(head.linear.bias)
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=200, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features), targets, weight=weight)
        loss = loss + _L2 * head.linear.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return head.eval()


@torch.no_grad()
def _predict(head: LinearHead, features: Tensor) -> Tensor:
    predicted: Tensor = head(features).argmax(1)
    return predicted


def _metrics(predicted: Tensor, targets: Tensor, *, classes: Sequence[str], num_blocks: int) -> dict[str, Any]:
    tested = predicted >= 0
    counts = {name: int((targets == i).sum()) for i, name in enumerate(classes)}
    metrics: dict[str, Any] = {
        "num_labels": counts,
        "split": f"{_NUM_TEST_BLOCKS}-fold over {num_blocks} blocks of time",
        "num_tested": int(tested.sum()),
    }
    if tested.any():
        right = (predicted == targets) & tested
        metrics["accuracy"] = round(float(right.sum() / tested.sum()), 4)
        metrics["recall"] = {
            name: round(float(right[targets == i].sum() / (tested & (targets == i)).sum()), 4)
            for i, name in enumerate(classes)
            if (tested & (targets == i)).any()
        }
    return metrics
