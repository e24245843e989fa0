"""A new version tried beside the champion: which frames both are asked about, and what each gets right.

The first kind of evidence that is enough decides:

1. held-out frames that have a name: the served answers, head and all;
2. named frames, cross-validated: the encoders, by heads trained alike on the same folds;
3. held-out frames without names: is the image found by what can be read out of the radar features?
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.core.errors import NoPairsError
from services.core.frames import CLASSES
from services.core.store import StoredPair
from trainer import names as naming
from trainer.classifier import RadarClassifier
from trainer.features import Features
from trainer.feed import Feed, Sample
from trainer.gate import Array, Evidence, Judgement, judge, judge_first
from trainer.head import Block, HeadFit, fit_head
from trainer.names import Named, Names
from trainer.queue import is_negative
from trainer.readout import retrieve
from trainer.settings import TrainerSettings

MIN_TESTED = 20
_HELD_OUT_EVERY_S = 0.5


@dataclass(slots=True)
class Version:
    """One model as it is judged: its features, and what it makes of them. step_num: 0 if it was loaded."""

    features: Features
    sites: tuple[str, ...]
    classifier: RadarClassifier | None = None
    step_num: int = 0

    def right(self, features: Tensor, targets: Tensor) -> Array:
        """(N,) float64: 1 where the head names the class."""
        assert self.classifier is not None
        with torch.no_grad():
            predicted = self.classifier.head(features).argmax(1)
        return _shares(predicted == targets)


class Trial:
    """Finds the evidence and has it judged."""

    def __init__(self, settings: TrainerSettings, feed: Feed, names: Names) -> None:
        self._settings = settings
        self._feed = feed
        self._names = names

    def against(
        self, theirs: Version, number: int, *, ours: Version, named: Sequence[Named], fit: HeadFit
    ) -> Judgement:
        """Compare with the version `number`. named, fit: what our head was trained on, and its fit."""
        held_out, samples = self._names.held_out(), self._samples()
        evidence = self._by_names(ours, theirs, held_out)
        if evidence is None or not evidence.is_enough:
            evidence = self._by_cross_validation(theirs, named, fit)
        if evidence is None or not evidence.is_enough:
            evidence = self._by_retrieval(ours, theirs, samples)
        pairs = [*(name.pair for name in (*named, *held_out)), *(sample.pair for sample in samples)]
        for version in (ours, theirs):
            version.features.keep_only(pairs)
        if evidence is None or not evidence.is_enough:
            return Judgement("promote", f"nothing to compare with version {number} on yet: by rule", {})
        return judge(
            evidence,
            champion=number,
            old_sites={site for site in theirs.sites if site},
            classes=CLASSES,
            max_fall_points=self._settings.max_fall_points,
        )

    def first(self, ours: Version, named: Sequence[Named], fit: HeadFit, *, why: str) -> Judgement:
        """By cross-validated names; by retrieval where those cannot be tested. why: there is no champion."""
        tested = fit.is_tested
        if any(name.is_human for name in named):
            tested = tested & torch.tensor([name.is_human for name in named])
        at = tested.nonzero().flatten().tolist()
        targets = np.array([named[i].target for i in at], np.int64)
        blocks = [named[i].block for i in at]
        by_names = len(set(targets.tolist())) > 1
        if not by_names:
            seen = self._retrieve(ours, self._samples())
            if seen is not None:
                hits, chance, seen_blocks = seen
                return judge_first(
                    hits,
                    None,
                    chance=chance,
                    what="R@5",
                    basis="held out, no names",
                    blocks=seen_blocks,
                    why_no_champion=why,
                )
            return Judgement(
                "promote", f"{why}; names of one class, and nothing held out, cannot test it: by rule", {}
            )
        right = (fit.logits[tested].argmax(1).numpy() == targets).astype(np.float64)
        return judge_first(
            right,
            targets,
            chance=1 / len(set(targets.tolist())),
            what="accuracy with classes weighed alike",
            basis="cross-validated",
            blocks=blocks,
            why_no_champion=why,
        )

    def _by_names(self, ours: Version, theirs: Version, held_out: Sequence[Named]) -> Evidence | None:
        """What both models name rightly of held-out frames."""
        both = self._both(ours, theirs, [name.pair for name in held_out])
        if both is None or len(both[2]) < self._settings.min_gate_frames:
            return None
        x, x_theirs, at = both
        named = [held_out[i] for i in at]
        targets = torch.tensor([name.target for name in named])
        if len(set(targets.tolist())) < 2:  # whoever always says that class is always right
            return None
        counts = naming.describe(named)
        return Evidence(
            "accuracy",
            f"held out, {counts['people']} named by people, {counts['detector']} by the detector",
            ours.right(x, targets),
            theirs.right(x_theirs, targets),
            targets.numpy(),
            [name.block for name in named],
        )

    def _by_cross_validation(self, theirs: Version, named: Sequence[Named], fit: HeadFit) -> Evidence | None:
        """Encoders compared by heads of the same kind on the same folds: while few held-out frames have a name."""
        x_theirs, at = theirs.features.of([name.pair for name in named])
        if len(at) != len(named):
            return None
        targets = torch.tensor([name.target for name in named])
        by_people = torch.tensor([name.is_human for name in named])
        their_fit = fit_head(
            x_theirs,
            targets,
            blocks=[name.block for name in named],
            classes=CLASSES,
            kind=fit.head.kind,
            weights=torch.tensor([name.weight for name in named]),
        )
        tested = fit.is_tested & by_people if by_people.any() else fit.is_tested
        if int(tested.sum()) < MIN_TESTED or len(set(targets[tested].tolist())) < 2:
            return None
        rows = tested.nonzero().flatten().tolist()
        right = [_shares((of.logits.argmax(1) == targets)[tested]) for of in (fit, their_fit)]
        return Evidence(
            "accuracy",
            "cross-validated, heads trained alike",
            right[0],
            right[1],
            targets[tested].numpy(),
            [named[i].block for i in rows],
        )

    def _by_retrieval(self, ours: Version, theirs: Version, samples: Sequence[Sample]) -> Evidence | None:
        """Without names: how often a frame's image is found by what can be read out of its features."""
        found = [self._retrieve(version, samples) for version in (ours, theirs)]
        if found[0] is None or found[1] is None or len(found[0][0]) != len(found[1][0]):
            return None
        return Evidence("R@5", "held out, no names", found[0][0], found[1][0], None, found[0][2])

    def _samples(self) -> list[Sample]:
        most = self._settings.max_gate_frames
        samples = self._feed.heldout(every_s=_HELD_OUT_EVERY_S, newest=most)
        by_pair = {(sample.pair.site, sample.pair.id): sample for sample in samples}
        return [by_pair[pair.site, pair.id] for pair in naming.fair([sample.pair for sample in samples], most)]

    def _retrieve(self, version: Version, samples: Sequence[Sample]) -> tuple[Array, float, list[Block]] | None:
        """Hits (N,) float64, chance, and the blocks; None with too few frames."""
        blocks = [naming.block_of(sample.pair) for sample in samples]
        if len(set(blocks)) < 2:
            return None
        try:
            batch = self._feed.collate(list(samples))
        except NoPairsError:
            return None
        x, at = version.features.of([sample.pair for sample in samples])
        if not len(at) == len(samples) == len(batch.k):  # one is damaged: the next release tries again
            return None
        within_ns = round(self._settings.exclude_within_s * 1e9)
        is_other = is_negative(batch.scenes, batch.scenes, exclude_within_ns=within_ns)
        hits, _, chance = retrieve(x, batch.k, blocks=blocks, is_other=is_other)
        return _shares(hits), chance, blocks

    def _both(
        self, ours: Version, theirs: Version, pairs: list[StoredPair]
    ) -> tuple[Tensor, Tensor, list[int]] | None:
        """Features of both models of the pairs that both can read, and which those are."""
        x, at = ours.features.of(pairs)
        x_theirs, at_theirs = theirs.features.of(pairs)
        if not at or at != at_theirs:
            return None
        return x, x_theirs, at


def _shares(right: Tensor) -> Array:
    shares: Array = right.double().numpy()
    return shares
