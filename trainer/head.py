"""The classifier head, trained in seconds on frozen features and the names there are for them.

A name is a person's word or a detector's guess; each comes with a weight. Classes count alike, however many names
each has. What is reported comes from heads that have not seen the block of time they are tested on: neighbouring
frames show the same object, and a random split would flatter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.head_nets import Head, HeadKind, LinearHead, MlpHead

_NUM_FOLDS = 5
Block = tuple[str, int]
"""A site and a stretch of its time."""
_L2 = 2e-2
"""Large on purpose: worth more than a point with 40 labels of which one is wrong, free with 1,000."""
_MLP_STEPS = 150
_MLP_RATE = 5e-3
_MLP_DECAY = 0.1
_LABEL_SMOOTHING = 0.1
"""A hidden layer learns wrong names by heart; smoothing and dropout keep it from that."""


@dataclass(frozen=True, slots=True)
class HeadFit:
    """A head trained on all names, and what heads trained on a part of them said of the rest.

    logits: (N, C) float32, out of fold; rows that were never tested are nan. folds: (N,) int64.
    """

    head: Head
    metrics: dict[str, Any]
    logits: Tensor
    folds: Tensor

    @property
    def is_tested(self) -> Tensor:
        """(N,) bool."""
        return torch.isfinite(self.logits).all(1)


def fit_head(
    features: Tensor,
    targets: Tensor,
    *,
    blocks: Sequence[Block],
    classes: Sequence[str],
    kind: HeadKind | Literal["auto"] = "linear",
    weights: Tensor | None = None,
    is_judged: Tensor | None = None,
) -> HeadFit:
    """Train a head. features: (N, D) float32; targets: (N,) int64; blocks: which stretch of time each is from.

    kind: "auto" takes the hidden layer where cross-validation finds it better by more than one standard error.
    weights: (N,) float32, default all 1. is_judged: (N,) bool, whose names are good enough to be tested on.
    """
    weights = torch.ones(len(targets)) if weights is None else weights
    is_judged = torch.ones(len(targets), dtype=torch.bool) if is_judged is None else is_judged
    folds = folds_of(blocks)
    kinds: tuple[HeadKind, ...] = ("linear", "mlp") if kind == "auto" else (kind,)
    logits = {
        name: _out_of_fold(name, features, targets, weights, folds, num_classes=len(classes)) for name in kinds
    }
    chosen = kinds[0]
    if len(kinds) > 1 and _is_better(logits["mlp"], logits["linear"], targets, is_judged, blocks):
        chosen = "mlp"
    head = train_head(chosen, features, targets, weights, num_classes=len(classes))
    is_tested = torch.isfinite(logits[chosen]).all(1) & is_judged
    metrics = {
        "kind": chosen,
        "num_labels": {name: int((targets == i).sum()) for i, name in enumerate(classes)},
        "split": f"{_NUM_FOLDS}-fold over {len(set(blocks))} blocks of time",
    } | score(logits[chosen].argmax(1)[is_tested], targets[is_tested], classes=classes)
    if len(kinds) > 1 and is_tested.any():
        right = {name: (found.argmax(1) == targets)[is_tested].float().mean() for name, found in logits.items()}
        metrics["accuracy_by_kind"] = {name: round(float(share), 4) for name, share in right.items()}
    return HeadFit(head, metrics, logits[chosen], folds)


def score(predicted: Tensor, targets: Tensor, *, classes: Sequence[str]) -> dict[str, Any]:
    """Accuracy, mean recall over classes, and each class's recall. predicted, targets: (N,) int64."""
    metrics: dict[str, Any] = {"num_tested": len(targets)}
    if not len(targets):
        return metrics
    right = predicted == targets
    recall = {
        name: round(float(right[targets == i].float().mean()), 4)
        for i, name in enumerate(classes)
        if (targets == i).any()
    }
    metrics["accuracy"] = round(float(right.float().mean()), 4)
    metrics["balanced_accuracy"] = round(sum(recall.values()) / len(recall), 4)
    metrics["recall"] = recall
    return metrics


def train_head(kind: HeadKind, features: Tensor, targets: Tensor, weights: Tensor, *, num_classes: int) -> Head:
    """A head on all of `features`; classes without names get no probability to speak of.

    The same every time, and torch's own generator is left as it was: a resume must not depend on this.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        weights = class_balanced(targets, weights, num_classes=num_classes)
        if kind == "linear":
            return _train_linear(features, targets, weights, num_classes=num_classes)
        return _train_mlp(features, targets, weights, num_classes=num_classes)


def folds_of(blocks: Sequence[Block]) -> Tensor:
    """(N,) int64: whole blocks to folds, in turn."""
    order = {block: i % _NUM_FOLDS for i, block in enumerate(sorted(set(blocks)))}
    return torch.tensor([order[block] for block in blocks])


def class_balanced(targets: Tensor, weights: Tensor, *, num_classes: int) -> Tensor:
    """(N,) float32: `weights`, scaled so that each class sums to the same and all to N."""
    mass = torch.zeros(num_classes).scatter_add_(0, targets, weights)
    num_present = int((mass > 0).sum())
    return weights * len(targets) / (mass[targets].clamp_min(1e-9) * num_present)


def _train_linear(features: Tensor, targets: Tensor, weights: Tensor, *, num_classes: int) -> LinearHead:
    """Logistic regression by L-BFGS."""
    head = LinearHead(features.shape[1], num_classes)
    head.standardise_by(features)
    torch.nn.init.zeros_(head.linear.weight)
    torch.nn.init.zeros_(head.linear.bias)
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=200, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weights * F.cross_entropy(head(features), targets, reduction="none")).mean()
        loss = loss + _L2 * head.linear.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return head.eval()


def _train_mlp(features: Tensor, targets: Tensor, weights: Tensor, *, num_classes: int) -> MlpHead:
    """AdamW on all names at once, the rate up and down again in one cycle."""
    head = MlpHead(features.shape[1], num_classes).train()
    head.standardise_by(features)
    optimizer = torch.optim.AdamW(head.parameters(), lr=_MLP_RATE, weight_decay=_MLP_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _MLP_RATE, total_steps=_MLP_STEPS)
    for _ in range(_MLP_STEPS):
        optimizer.zero_grad()
        losses = F.cross_entropy(head(features), targets, reduction="none", label_smoothing=_LABEL_SMOOTHING)
        (weights * losses).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return head.eval()


def _out_of_fold(
    kind: HeadKind, features: Tensor, targets: Tensor, weights: Tensor, folds: Tensor, *, num_classes: int
) -> Tensor:
    """(N, C) float32: what heads that have not seen a row's fold say of it; nan where there is no other fold."""
    logits = torch.full((len(targets), num_classes), torch.nan)
    for fold in range(_NUM_FOLDS):
        is_test = folds == fold
        if not is_test.any() or is_test.all():
            continue
        known = ~is_test
        head = train_head(kind, features[known], targets[known], weights[known], num_classes=num_classes)
        with torch.no_grad():
            logits[is_test] = head(features[is_test])
    return logits


def _is_better(ours: Tensor, theirs: Tensor, targets: Tensor, is_judged: Tensor, blocks: Sequence[Block]) -> bool:
    """Whether the gain in accuracy is more than its standard error over blocks."""
    is_tested = torch.isfinite(ours).all(1) & is_judged
    gain = ((ours.argmax(1) == targets).float() - (theirs.argmax(1) == targets).float()) * is_tested
    numbers = {block: i for i, block in enumerate(dict.fromkeys(blocks))}
    of_block = torch.zeros(len(numbers)).scatter_add_(0, torch.tensor([numbers[b] for b in blocks]), gain)
    return len(numbers) > 1 and float(of_block.sum()) > float(of_block.std() * len(numbers) ** 0.5)
