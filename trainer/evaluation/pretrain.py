"""Learning without labels on a dataset: the product's own learner and settings, fed from arrays.

What is evaluated is what runs in production: every step is `Learner.step`. Only the sampling is this module's own,
because here the whole past is there at once.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.evaluation.dataset import Dataset, Rows, clutter_table, is_mirrored
from trainer.feed import Batch
from trainer.learner import Learner
from trainer.queue import Scenes
from trainer.settings import TrainerSettings
from trainer.worker import device_of

Order = Literal["shuffled", "replay", "stream"]
"""shuffled: passes over all pairs in random order. replay: pairs become known in order of capture, as in
production; a batch has a fresh share and the rest from all known ones. stream: in order of capture, repeatedly."""
_NUM_SCALE_FRAMES = 256
_FEATURE_BATCH = 256
StepProgress = Callable[[int, int], None]
"""Steps done, steps in all."""


@dataclass(slots=True)
class Cost:
    """What something took. seconds: on the clock. cpu_s: of all threads of the process. steps: of an optimizer."""

    seconds: float = 0.0
    cpu_s: float = 0.0
    steps: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds + other.seconds, self.cpu_s + other.cpu_s, self.steps + other.steps)

    def report(self) -> dict[str, float]:
        return {"seconds": round(self.seconds, 2), "cpu_s": round(self.cpu_s, 2), "steps": self.steps}


class Stopwatch:
    """Measures from its making on."""

    def __init__(self) -> None:
        self._seconds, self._cpu_s = time.monotonic(), time.process_time()

    def cost(self, *, steps: int = 0) -> Cost:
        return Cost(time.monotonic() - self._seconds, time.process_time() - self._cpu_s, steps)


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A learner that has learnt, or has not (`cost.steps` 0). curve: loss and chance in nats, now and then."""

    learner: Learner
    cost: Cost
    curve: list[dict[str, float]]


def num_steps(settings: TrainerSettings, *, num_pairs: int) -> int:
    """As long as production learns from so many pairs: `max_replays` times each."""
    return max(1, math.ceil(settings.max_replays * num_pairs / settings.batch_size))


def new_learner(dataset: Dataset, train: Rows, settings: TrainerSettings) -> Learner:
    """A learner that has learnt nothing, with the clutter maps and the scale of the training part."""
    learner = Learner(
        settings, contract=dataset.contract, key_dim=dataset.key.shape[1], device=device_of(settings)
    )
    table = clutter_table(dataset, train)
    rng = np.random.default_rng(settings.seed)
    rows = rng.choice(train, min(len(train), _NUM_SCALE_FRAMES), replace=False)
    corrected = dataset.heatmap[rows].astype(np.float32)
    if settings.subtract_clutter:
        corrected -= table[1 + dataset.site[rows]]
    learner.set_input(table, scale=max(float(corrected.std()), 1e-3))
    return learner


def pretrain(
    dataset: Dataset,
    train: Rows,
    settings: TrainerSettings,
    *,
    steps: int | None = None,
    order: Order = "shuffled",
    on_progress: StepProgress = lambda *_: None,
) -> Pretrained:
    """Learn from the pairs of `train`, without a label. steps: None: as many as production would take.

    A cosine schedule ends with the last step. Raises DivergedError.
    """
    steps = num_steps(settings, num_pairs=len(train)) if steps is None else steps
    if settings.schedule == "cosine" and "schedule_steps" not in settings.model_fields_set:
        settings = settings.model_copy(update={"schedule_steps": max(1, steps - settings.warmup_steps)})
    train = train[dataset.has_key[train] | dataset.has_mirrored_key[train]]
    learner = new_learner(dataset, train, settings)
    watch = Stopwatch()
    curve: list[dict[str, float]] = []
    source = PairBatches(dataset, train, settings)
    every = max(1, steps // 200)
    for step, rows in enumerate(_sampled(dataset, train, settings, steps=steps, order=order)):
        found = learner.step(source.batch(rows))
        if step % every == 0 or step == steps - 1:
            values = {"loss": float(found.loss.detach()), "chance": float(found.chance), "top1": float(found.top1)}
            curve.append({"step": step, **{name: round(value, 4) for name, value in values.items()}})
        on_progress(step + 1, steps)
    return Pretrained(learner, watch.cost(steps=steps), curve)


@torch.no_grad()
def features_of(learner: Learner, dataset: Dataset, rows: Rows, *, site_known: bool = True) -> Tensor:
    """(n, feature_dim) float32 on the CPU. site_known: False: as of a site that the model has never heard of."""
    found = []
    for start in range(0, len(rows), _FEATURE_BATCH):
        part = rows[start : start + _FEATURE_BATCH]
        site = torch.from_numpy(1 + dataset.site[part] if site_known else np.zeros(len(part), np.int64))
        found.append(learner.features(heatmaps(dataset, part), site))
    return torch.cat(found) if found else torch.zeros(0, learner.architecture["feature_dim"])


def site_means(dataset: Dataset, train: Rows) -> npt.NDArray[np.float32]:
    """(S, D) float32: each site's mean image encoding, over its training frames; of an unseen site over all."""
    means = np.zeros((len(dataset.sites), dataset.key.shape[1]), np.float32)
    for site in range(len(dataset.sites)):
        rows = train[dataset.site[train] == site]
        rows = rows if len(rows) else np.flatnonzero(dataset.site == site)
        rows = rows[dataset.has_key[rows]]
        if len(rows):
            means[site] = dataset.key[rows].astype(np.float32).mean(0)
    return means


def heatmaps(dataset: Dataset, rows: Rows) -> Tensor:
    """(n, C, R, A) float32."""
    return torch.from_numpy(dataset.heatmap[rows].astype(np.float32))


class PairBatches:
    """Batches of pairs, with encodings centred by site and orientation as the feed does it."""

    def __init__(self, dataset: Dataset, train: Rows, settings: TrainerSettings) -> None:
        self._dataset = dataset
        share = settings.mirror_share
        chosen = np.array([is_mirrored(pair.id, share=share) for pair in dataset.pairs])
        self._is_mirrored = (chosen & dataset.has_mirrored_key) | ~dataset.has_key
        self._mean = np.zeros((len(dataset.sites), 2, dataset.key.shape[1]), np.float32)
        if settings.centre_vision:
            for site in range(len(dataset.sites)):
                for flag in (0, 1):
                    rows = train[(dataset.site[train] == site) & (self._is_mirrored[train] == bool(flag))]
                    if len(rows):
                        self._mean[site, flag] = self._keys(rows).mean(0)

    def _keys(self, rows: Rows) -> npt.NDArray[np.float32]:
        flags = self._is_mirrored[rows, None]
        both = np.where(flags, self._dataset.mirrored_key[rows], self._dataset.key[rows])
        keys: npt.NDArray[np.float32] = both.astype(np.float32)
        return keys

    def batch(self, rows: Rows) -> Batch:
        dataset, flags = self._dataset, self._is_mirrored[rows]
        site = torch.from_numpy(dataset.site[rows])
        k = self._keys(rows) - self._mean[dataset.site[rows], flags.astype(np.int64)]
        return Batch(
            heatmap=heatmaps(dataset, rows),
            site=site + 1,
            mirrored=torch.from_numpy(flags),
            k=torch.from_numpy(k),
            scenes=Scenes(id=torch.from_numpy(rows), site=site, at_ns=torch.from_numpy(dataset.at_ns[rows])),
        )


def _sampled(
    dataset: Dataset, train: Rows, settings: TrainerSettings, *, steps: int, order: Order
) -> Iterator[Rows]:
    """The rows of each step."""
    rng = np.random.default_rng((settings.seed, 7))
    size = min(settings.batch_size, len(train))
    in_time = train[np.argsort(dataset.at_ns[train], kind="stable")]
    match order:
        case "shuffled":
            yield from _passes(lambda: rng.permutation(train), size, steps)
        case "stream":
            yield from _passes(lambda: in_time, size, steps)
        case "replay":
            num_fresh = round(settings.fresh_share * size)
            for step in range(steps):
                known = max(size, math.ceil(len(train) * (step + 1) / steps))
                fresh = rng.integers(max(0, known - settings.fresh_pairs), known, num_fresh)
                rest = rng.choice(known, size - num_fresh, replace=False, shuffle=False)
                yield in_time[np.concatenate([fresh, rest])]


def _passes(again: Callable[[], Rows], size: int, steps: int) -> Iterator[Rows]:
    """Whole batches of one pass after another; what is left over at the end of a pass begins the next."""
    left = again()
    for _ in range(steps):
        while len(left) < size:
            left = np.concatenate([left, again()])
        yield left[:size]
        left = left[size:]


def describe_settings(settings: TrainerSettings) -> dict[str, Any]:
    """What decides the outcome, for a report."""
    elsewhere = {"redis_url", "data_dir", "log_level", "log_format", "model_name", "threads"}
    return settings.model_dump(mode="json", exclude=elsewhere)
