"""An encoder with a hidden head, trained on labels: fine-tuned from what was learnt without, or from scratch.

Both start as the same network with the same augmentation, optimizer and schedule, so that what differs is where
the weights come from.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.core.frames import CLASSES
from trainer.evaluation.dataset import Bools, Dataset, Rows
from trainer.evaluation.pretrain import Cost, StepProgress, Stopwatch, heatmaps
from trainer.learner import Learner

HIDDEN = 128
_BATCH = 64
_ASKED_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a classifier is trained. encoder_rate: 0 keeps the encoder frozen. steps: of at most 64 frames.

    schedule: cosine: after a short warm-up down to nothing; constant: the paper's, as far as it says.
    """

    encoder_rate: float
    head_rate: float
    steps: int
    weight_decay: float = 0.05
    is_augmented: bool = True
    optimizer: Literal["adamw", "adam"] = "adamw"
    schedule: Literal["cosine", "constant"] = "cosine"

    def report(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Look:
    """What held-out frames say after so many steps. loss: (n,) float64, nats; is_right: (n,) bool."""

    step: int
    loss: npt.NDArray[np.float64]
    is_right: Bools


@dataclass(slots=True)
class Classifier:
    """encoder and head as trained, behind the learner's preprocessing. curve: of the frames that were watched."""

    learner: Learner
    encoder: nn.Module
    head: nn.Sequential
    cost: Cost
    curve: list[Look]

    @torch.no_grad()
    def logits(self, dataset: Dataset, rows: Rows) -> Tensor:
        """(n, classes) float32 on the CPU."""
        return self._through(dataset, rows, self.head)

    @torch.no_grad()
    def penultimate(self, dataset: Dataset, rows: Rows) -> Tensor:
        """(n, 128) float32 on the CPU: what the last layer reads."""
        return self._through(dataset, rows, self.head[:-1])

    def predict(self, dataset: Dataset, rows: Rows) -> Rows:
        """(n,) int64."""
        predicted: Rows = self.logits(dataset, rows).argmax(1).numpy()
        return predicted

    def _through(self, dataset: Dataset, rows: Rows, last: nn.Module) -> Tensor:
        self.encoder.eval()
        found = []
        for start in range(0, len(rows), _ASKED_AT_ONCE):
            part = rows[start : start + _ASKED_AT_ONCE]
            found.append(last(self.encoder(_input(self.learner, dataset, part))).float().cpu())
        return torch.cat(found)


def new_classifier(learner: Learner, *, seed: int) -> Classifier:
    """The learner's averaged encoder under a head that knows nothing yet: Linear(128), ReLU, Linear."""
    torch.manual_seed(seed)
    feature_dim = learner.architecture["feature_dim"]
    head = nn.Sequential(nn.Linear(feature_dim, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, len(CLASSES)))
    encoder = copy.deepcopy(learner.average).requires_grad_(True)
    return Classifier(learner, encoder, head.to(learner.device), Cost(), [])


def train_classifier(
    learner: Learner,
    dataset: Dataset,
    rows: Rows,
    recipe: Recipe,
    *,
    seed: int,
    watch: Rows | None = None,
    watch_every: int = 0,
    on_progress: StepProgress = lambda *_: None,
) -> Classifier:
    """Train on labelled `rows`. watch: labelled rows to look at before, every `watch_every` steps, and after."""
    found = new_classifier(learner, seed=seed)
    rng = np.random.default_rng((seed, 11))
    optimizer = _optimizer(found, recipe)
    rates = [group["lr"] for group in optimizer.param_groups]
    weight = _class_weights(dataset, rows).to(learner.device)
    size = min(_BATCH, len(rows))
    left: Rows = np.zeros(0, np.int64)
    if watch is not None:
        found.curve.append(look(found, dataset, watch, step=0))
    stopwatch, seconds = Stopwatch(), Cost()
    for step in range(recipe.steps):
        while len(left) < size:
            left = np.concatenate([left, rng.permutation(rows)])
        batch, left = left[:size], left[size:]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * _schedule(step, recipe)
        _step(found, dataset, batch, recipe, optimizer, weight, rng)
        if watch is not None and watch_every and ((step + 1) % watch_every == 0 or step + 1 == recipe.steps):
            seconds = seconds + stopwatch.cost()  # looking is not learning
            found.curve.append(look(found, dataset, watch, step=step + 1))
            stopwatch = Stopwatch()
        on_progress(step + 1, recipe.steps)
    found.cost = seconds + stopwatch.cost(steps=recipe.steps)
    return found


def loss_and_accuracy(classifier: Classifier, dataset: Dataset, rows: Rows) -> dict[str, float]:
    """Mean cross-entropy in nats, and accuracy, on labelled rows."""
    found = look(classifier, dataset, rows, step=0)
    return {"loss": round(float(found.loss.mean()), 5), "accuracy": round(float(found.is_right.mean()), 4)}


def look(classifier: Classifier, dataset: Dataset, rows: Rows, *, step: int) -> Look:
    """Cross-entropy of each of the labelled rows, and whether its class is right."""
    logits, targets = classifier.logits(dataset, rows), torch.from_numpy(dataset.label[rows])
    loss = F.cross_entropy(logits, targets, reduction="none").double()
    return Look(step, loss.numpy(), (logits.argmax(1) == targets).numpy())


def tune(
    train: Callable[[Recipe], Classifier],
    judge: Callable[[Classifier], dict[str, float]],
    grid: list[list[Recipe]],
) -> tuple[Recipe, list[dict[str, Any]]]:
    """The best recipe by coordinate search, and all that were tried.

    grid: for each axis in turn the recipes that differ from the best so far; the first one holds the start. A
    recipe is better by its accuracy on the validation part, and where that is equal by its loss.
    """
    tried: dict[Recipe, dict[str, float]] = {}

    def value(recipe: Recipe) -> tuple[float, float]:
        if recipe not in tried:
            tried[recipe] = judge(train(recipe))
        return tried[recipe]["accuracy"], -tried[recipe]["loss"]

    best = grid[0][0]
    value(best)
    for axis in grid[1:]:
        for candidate in axis:
            moved = _moved(best, grid[0][0], candidate)
            if value(moved) > value(best):
                best = moved
    return best, [recipe.report() | judged for recipe, judged in tried.items()]


def _moved(best: Recipe, start: Recipe, candidate: Recipe) -> Recipe:
    """`best` with what `candidate` has changed of `start`."""
    changes = {name: value for name, value in asdict(candidate).items() if value != asdict(start)[name]}
    return Recipe(**(asdict(best) | changes))


def _step(
    found: Classifier,
    dataset: Dataset,
    batch: Rows,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    weight: Tensor,
    rng: np.random.Generator,
) -> None:
    found.encoder.train(recipe.encoder_rate > 0)
    learner = found.learner
    x = _input(learner, dataset, batch)
    if recipe.is_augmented:
        share = learner.settings.mirror_share
        x = learner.augment(x, torch.from_numpy(rng.random(len(batch)) < share))
    x = learner.precision.lay_out(x)
    targets = torch.from_numpy(dataset.label[batch]).to(learner.device)
    with learner.precision.autocast(learner.device):
        with torch.set_grad_enabled(recipe.encoder_rate > 0):
            features = found.encoder(x)
        logits = found.head(features).float()
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(logits, targets, weight=weight).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _optimizer(found: Classifier, recipe: Recipe) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": list(found.head.parameters()), "lr": recipe.head_rate}]
    if recipe.encoder_rate > 0:
        groups.append({"params": list(found.encoder.parameters()), "lr": recipe.encoder_rate})
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=recipe.head_rate, weight_decay=recipe.weight_decay)


def _schedule(step: int, recipe: Recipe) -> float:
    if recipe.schedule == "constant":
        return 1.0
    warmup = max(1, recipe.steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, recipe.steps - warmup)))


def _class_weights(dataset: Dataset, rows: Rows) -> Tensor:
    """(classes,) float32: every class counts the same, as in the product's head."""
    counts = torch.bincount(torch.from_numpy(dataset.label[rows]), minlength=len(CLASSES)).float()
    return torch.where(counts > 0, len(rows) / (counts.clamp_min(1) * (counts > 0).sum()), 0.0)


def _input(learner: Learner, dataset: Dataset, rows: Rows) -> Tensor:
    """(n, C, R, A): what the encoder sees."""
    site = torch.from_numpy(1 + dataset.site[rows]).to(learner.device)
    x: Tensor = learner.preprocess(heatmaps(dataset, rows).to(learner.device), site)
    return x
