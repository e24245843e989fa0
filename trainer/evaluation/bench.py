"""What all studies share: a dataset, splits, seeds, and encoders that were learnt once and are kept.

An encoder is kept under what it came from: data, rows, settings and the trainer's own code. It does not know
what is asked of an encoder.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
import torch

import trainer
from services.core.errors import SettingsError
from services.core.files import write_atomically
from services.core.frames import CLASSES
from trainer.evaluation.dataset import UNLABELLED, Bools, Dataset, Rows
from trainer.evaluation.pretrain import (
    Cost,
    Order,
    Pretrained,
    describe_settings,
    features_of,
    new_learner,
    num_steps,
    pretrain,
)
from trainer.evaluation.probe import PAPER_EPOCHS, ProbeName, fit_linear
from trainer.evaluation.progress import Bars
from trainer.evaluation.split import Split, split_at_random, split_by_session, unseen_sites
from trainer.head_nets import Head
from trainer.learner import Learner
from trainer.settings import TrainerSettings

_KEPT = ("average", "average_projection")
"""What of a learner is asked: what would be published, and what leads to the image encodings."""
SplitName = Literal["sessions", "random", "both"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for. steps: of learning; None: as production does. unseen: None: sites named eval_*."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    order: Order = "shuffled"
    probe: ProbeName = "lbfgs"
    probe_epochs: int = PAPER_EPOCHS
    split: SplitName = "both"
    split_seed: int = 0
    unseen: tuple[str, ...] | None = None
    session_s: float = 60.0
    guard_s: float = 5.0
    label_block_s: float = 10.0
    source: str = ""


@dataclass(slots=True)
class _Features:
    """values: (N, D) float32, of all frames of the dataset; is_known: (N,) bool. It keeps its learner alive."""

    learner: Learner
    values: torch.Tensor
    is_known: Bools


@dataclass(slots=True)
class Bench:
    """Runs a plan on a dataset. encoders_dir: where learnt encoders are kept; None: nowhere."""

    dataset: Dataset
    settings: TrainerSettings
    plan: Plan
    bars: Bars
    encoders_dir: Path | None = None
    is_fresh: bool = False
    _known: dict[str, Pretrained] = field(default_factory=dict)
    _features: dict[int, "_Features"] = field(default_factory=dict)

    def splits(self) -> list[Split]:
        """Session-disjoint, random, or both."""
        plan, is_unseen = self.plan, unseen_sites(self.dataset, self.plan.unseen)
        found = []
        if plan.split in ("sessions", "both"):
            found.append(
                split_by_session(self.dataset, is_unseen=is_unseen, seed=plan.split_seed, guard_s=plan.guard_s)
            )
        if plan.split in ("random", "both"):
            found.append(split_at_random(self.dataset, is_unseen=is_unseen, seed=plan.split_seed))
        return found

    def main_split(self) -> Split:
        """The one that a study uses which does not show both."""
        return self.splits()[0]

    def settings_of(self, seed: int, **changes: Any) -> TrainerSettings:
        """Settings for one seed. `changes` are checked as those from the environment are."""
        given = {name: getattr(self.settings, name) for name in self.settings.model_fields_set}
        given.pop("redis_url", None)
        return type(self.settings).read(**(given | {"seed": seed} | changes))

    def learnt(self, train: Rows, seed: int, *, what: str = "", **changes: Any) -> Pretrained:
        """An encoder that has learnt from the pairs of `train`, without labels. changes: settings."""
        settings = self.settings_of(seed, **changes)
        steps = num_steps(settings, num_pairs=len(train)) if self.plan.steps is None else self.plan.steps
        key = self._key(train, settings, steps)
        if key not in self._known:
            name = f"learning {what} seed {seed}".replace("  ", " ")
            self._known[key] = (
                None if self.is_fresh else self._load(key, train, settings)
            ) or self._learn_and_keep(key, train, settings, steps, name)
        return self._known[key]

    @property
    def known(self) -> list[Pretrained]:
        """All that were learnt, or loaded, so far."""
        return list(self._known.values())

    def untrained(self, train: Rows, seed: int, **changes: Any) -> Pretrained:
        """The same encoder before it has learnt anything."""
        settings = self.settings_of(
            seed, **({"precision": "fp32"} | changes)
        )  # it takes no step: nothing to choose
        return Pretrained(new_learner(self.dataset, train, settings), Cost(), [])

    def features(self, learner: Learner, rows: Rows) -> torch.Tensor:
        """(n, D) float32: frozen features, computed once a frame for as long as the learner stays as it is."""
        if id(learner) not in self._features:
            shape = (len(self.dataset), learner.architecture["feature_dim"])
            self._features[id(learner)] = _Features(learner, torch.zeros(shape), np.zeros(len(self.dataset), bool))
        found = self._features[id(learner)]
        missing = np.unique(rows[~found.is_known[rows]])
        found.values[torch.from_numpy(missing)] = features_of(learner, self.dataset, missing)
        found.is_known[missing] = True
        return found.values[torch.from_numpy(rows)]

    def layer(self, features: torch.Tensor, rows: Rows, *, seed: int) -> Head:
        """A linear layer on the features (n, D) of labelled rows, as the plan says."""
        plan, targets = self.plan, targets_of(self.dataset, rows)
        return fit_linear(features, targets, probe=plan.probe, seed=seed, epochs=plan.probe_epochs)

    def protocol(self, splits: Sequence[Split]) -> dict[str, Any]:
        """What decides the outcome, for a report."""
        plan = self.plan
        return {
            "data": self.dataset.describe() | {"source": plan.source},
            "splits": [
                {"name": split.name, "train": len(split.train)}
                | {part: len(rows) for part, rows in split.parts.items()}
                | {
                    "labels": {
                        part: self._labels(rows) for part, rows in (("train", split.train), *split.parts.items())
                    }
                }
                for split in splits
            ],
            "warnings": self.warnings(splits),
            "session_s": plan.session_s,
            "guard_s": plan.guard_s,
            "label_block_s": plan.label_block_s,
            "split_seed": plan.split_seed,
            "seeds": list(plan.seeds),
            "steps": plan.steps or [num_steps(self.settings, num_pairs=len(split.train)) for split in splits],
            "order": plan.order,
            "probe": plan.probe,
            "interval": "95 %, bootstrap over sessions and seeds",
            "settings": describe_settings(self.settings),
        }

    def _labels(self, rows: Rows) -> dict[str, int]:
        return {name: int((self.dataset.label[rows] == number).sum()) for number, name in enumerate(CLASSES)}

    def warnings(self, splits: Sequence[Split]) -> list[str]:
        """What the splits cannot tell: classes that nothing was learnt of, parts of a single session."""
        found = []
        for split in splits:
            label, session = self.dataset.label, self.dataset.session
            known = np.unique(label[split.train])
            for part, rows in split.parts.items():
                if len(np.unique(session[rows])) == 1:
                    found.append(
                        f"{split.name} split, {part}: one session, so no interval; shorter ones: --session-s."
                    )
                if not (known >= 0).any():
                    continue
                strange = np.setdiff1d(label[rows], [*known, UNLABELLED])
                for name, num in self._labels(rows[np.isin(label[rows], strange)]).items():
                    if num:
                        said = f"{split.name} split, {part}: {num} frames are {name}, none to learn from is"
                        found += [f"{said}: what is answered there is wrong. Hold out others: --split-seed 1."]
        return found

    def _learn_and_keep(
        self, key: str, train: Rows, settings: TrainerSettings, steps: int, name: str
    ) -> Pretrained:
        found = pretrain(
            self.dataset,
            train,
            settings,
            steps=steps,
            order=self.plan.order,
            on_progress=lambda done, total: self.bars.advance(name, done, total),
        )
        if self.encoders_dir is not None:
            learner = found.learner
            state = {name: getattr(learner, name).state_dict() for name in _KEPT}
            self.encoders_dir.mkdir(parents=True, exist_ok=True)
            part = self.encoders_dir / f".{key}.part"
            torch.save(state, part)
            part.replace(self.encoders_dir / f"{key}.pt")
            told = {"cost": found.cost.report(), "curve": found.curve}
            write_atomically(self.encoders_dir / f"{key}.json", orjson.dumps(told))
        return found

    def _load(self, key: str, train: Rows, settings: TrainerSettings) -> Pretrained | None:
        if self.encoders_dir is None or not (self.encoders_dir / f"{key}.json").exists():
            return None
        try:
            told = orjson.loads((self.encoders_dir / f"{key}.json").read_bytes())
            state = torch.load(self.encoders_dir / f"{key}.pt", map_location="cpu", weights_only=True)
        except (OSError, ValueError, RuntimeError):
            return None  # what cannot be read is learnt again
        learner = new_learner(self.dataset, train, settings.model_copy(update={"precision": "fp32"}))
        for name in _KEPT:
            getattr(learner, name).load_state_dict(state[name])
        return Pretrained(learner, Cost(**told["cost"]), told["curve"])

    def _key(self, train: Rows, settings: TrainerSettings, steps: int) -> str:
        facts = (
            self.dataset.fingerprint,
            hashlib.sha256(train.tobytes()).hexdigest(),
            sorted(describe_settings(settings).items()),
            steps,
            self.plan.order,
            code_digest(),
        )
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:20]


def code_digest() -> str:
    """Of what learns: another version of it is asked to learn again."""
    digest = hashlib.sha256()
    directory = Path(trainer.__file__).parent
    for path in [*sorted(directory.glob("*.py")), directory / "evaluation" / "pretrain.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def targets_of(dataset: Dataset, rows: Rows) -> torch.Tensor:
    """(n,) int64 labels of labelled rows."""
    assert (dataset.label[rows] >= 0).all()
    return torch.from_numpy(dataset.label[rows])


def require_labels(dataset: Dataset) -> None:
    """Raises SettingsError where there is nothing to ask."""
    labels = dataset.label[dataset.label >= 0]
    if len(np.unique(labels)) < 2:
        found = f"all {len(labels)} labels say {CLASSES[labels[0]]}" if len(labels) else "no frame has a label"
        raise SettingsError(
            f"{found}: there is no second class to tell apart, in {len(dataset):,} pairs",
            remedy="label frames of two classes or more (POST /v1/labels), add recordings (--recording), or "
            "ask what needs no label: echosight evaluate retrieval",
        )
