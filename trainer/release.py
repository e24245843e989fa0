"""A release: a calibrated head on the names there are, with a sense for strangers; judged, and published.

Everything is computed from features, once for each encoder; see docs/releases.md for the rules in words.
"""

import copy
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.core.errors import EchosightError
from services.core.frames import CLASSES
from services.core.logs import Log
from services.core.registry import Manifest, Registry
from services.core.store import StoredPair
from trainer import names as naming
from trainer.calibration import calibrate
from trainer.classifier import RadarClassifier, load_classifier, save_classifier
from trainer.features import Features
from trainer.feed import Feed
from trainer.gate import Judgement
from trainer.head import HeadFit, fit_head
from trainer.learner import Learner
from trainer.names import Named, Names
from trainer.settings import TrainerSettings
from trainer.trial import MIN_TESTED, Trial, Version
from trainer.unknown import fit_open_set

_NUM_NOISE_FRAMES = 64


@dataclass(frozen=True, slots=True)
class Release:
    version: int
    metrics: dict[str, Any]
    judgement: Judgement


class Releases:
    """Makes the versions of one model; remembers the features of the champion and of the newest."""

    def __init__(
        self,
        settings: TrainerSettings,
        *,
        registry: Registry,
        feed: Feed,
        log: Log,
        now_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._feed = feed
        self._log = log
        self._now_s = now_s
        self._names = Names(settings, feed)
        self._trial = Trial(settings, feed, self._names)
        self._versions: dict[int, Version] = {}
        self._newest: Version | None = None

    def num_names(self) -> int:
        """How many frames a head would be trained on."""
        return len(self._names.learnable())

    def make(self, learner: Learner, *, losses: dict[str, float]) -> Release | None:
        """A version from the learner's average, judged and published; None if too few frames have a name."""
        began_s = self._now_s()
        named = self._names.learnable()
        if len(named) < self._settings.min_labels:
            return None
        version = self._encoder_of(learner)
        x, at = version.features.of([name.pair for name in named])
        named = [named[i] for i in at]
        if len(named) < self._settings.min_labels:
            return None
        encoded_s = self._now_s()
        version.classifier, metrics, threshold, fit = self._classifier(version.features, x, named)
        metrics["contrast"] = losses
        fitted_s = self._now_s()
        number = self._champion()
        theirs, why = self._known(number, device=learner.device)
        if theirs is None or number is None:
            judgement = self._trial.first(version, named, fit, why=why)
        else:
            judgement = self._trial.against(theirs, number, ours=version, named=named, fit=fit)
        metrics["gate"] = judgement.metrics
        metrics["took_s"] = {
            "features": round(encoded_s - began_s, 3),
            "head": round(fitted_s - encoded_s, 3),
            "gate": round(self._now_s() - fitted_s, 3),
        }
        published = self._publish(learner, version, metrics, threshold, named)
        self._versions = {n: known for n, known in self._versions.items() if n == number} | {published: version}
        return Release(published, metrics, judgement)

    def _encoder_of(self, learner: Learner) -> Version:
        """The learner's average as it is now, frozen; the newest version's if nothing has changed since."""
        sites = ("", *self._feed.sites)
        newest = self._newest
        if (
            newest is not None
            and (newest.step_num, newest.sites) == (learner.step_num, sites)
            and torch.equal(newest.features.preprocess.clutter, learner.preprocess.clutter)
        ):
            features = newest.features
        else:
            features = Features(
                copy.deepcopy(learner.preprocess),
                copy.deepcopy(learner.average),
                sites=sites,
                shape=learner.contract.shape,
            )
        self._newest = Version(features, sites, step_num=learner.step_num)
        return self._newest

    def _classifier(
        self, features: Features, x: Tensor, named: Sequence[Named]
    ) -> tuple[RadarClassifier, dict[str, Any], float | None, HeadFit]:
        """Head, temperature and unknown score; what was measured of them; the score's threshold."""
        targets = torch.tensor([name.target for name in named])
        by_people = torch.tensor([name.is_human for name in named])
        fit = fit_head(
            x,
            targets,
            blocks=[name.block for name in named],
            classes=CLASSES,
            kind=self._settings.head,
            weights=torch.tensor([name.weight for name in named]),
            is_judged=by_people if by_people.any() else None,
        )
        tested = fit.is_tested & by_people
        if int(tested.sum()) < MIN_TESTED:
            tested = fit.is_tested
        calibration = calibrate(
            fit.logits[tested],
            targets[tested],
            fit.folds[tested],
            answer_accuracy=self._settings.answer_accuracy,
        )
        open_set = fit_open_set(
            x,
            targets,
            fit.folds,
            classes=CLASSES,
            accepted_share=self._settings.known_share,
            noise=noise_of(features, [name.pair for name in named]),
        )
        score = None if open_set is None else open_set.score
        classifier = RadarClassifier(features.preprocess, features.encoder, fit.head, score).eval()
        classifier.temperature.fill_(calibration.temperature)
        metrics: dict[str, Any] = {
            "probe": fit.metrics | {"judged_on": "people" if by_people.any() else "detector"},
            "names": naming.describe(named),
            "calibration": calibration.metrics,
        }
        if open_set is None:
            return classifier, metrics, None, fit
        return classifier, metrics | {"unknown": open_set.metrics}, open_set.threshold, fit

    # -- the champion

    def _champion(self) -> int | None:
        """What a new version has to beat: what is served, or is about to be."""
        aliases = self._registry.aliases()
        return aliases.get("champion", aliases.get("candidate"))

    def _known(self, number: int | None, *, device: torch.device) -> tuple[Version | None, str]:
        """A version to compare with, or why there is none, in words."""
        if number is None:
            return None, "first version"
        try:
            manifest = self._registry.manifest(number)
            contract = self._feed.contract
            assert contract is not None
            if manifest.input != contract:
                shape, unit = manifest.input.shape, manifest.input.unit
                return None, f"version {number} takes {shape} {unit}, not {contract.shape} {contract.unit}"
            if manifest.classes != CLASSES:
                return None, f"version {number} knows other classes: {', '.join(manifest.classes)}"
            if number not in self._versions:
                classifier = load_classifier(self._registry.path(number), manifest)
                features = Features(
                    classifier.preprocess.to(device),
                    classifier.encoder.to(device),
                    sites=manifest.sites,
                    shape=contract.shape,
                )
                self._versions[number] = Version(features, manifest.sites, classifier)
            return self._versions[number], ""
        except (EchosightError, OSError) as error:
            self._log.warning("champion_cannot_be_compared", version=number, reason=str(error)[:200])
            return None, f"version {number} cannot be loaded"

    # -- into the registry

    def _publish(
        self,
        learner: Learner,
        version: Version,
        metrics: dict[str, Any],
        threshold: float | None,
        named: Sequence[Named],
    ) -> int:
        classifier = version.classifier
        assert classifier is not None
        feed = self._feed

        def describe(number: int) -> Manifest:
            return Manifest(
                name=self._registry.name,
                version=number,
                created_at_s=round(time.time(), 3),
                classes=CLASSES,
                input=learner.contract,
                sites=version.sites,
                architecture=learner.architecture | classifier.describe(),
                preprocessing={
                    "scale": float(learner.preprocess.scale),
                    "clutter_versions": {site: feed.profiles[site].version for site in feed.sites},
                    "subtracts_clutter": learner.settings.subtract_clutter,
                },
                metrics=metrics,
                lineage=_lineage(learner, feed, named),
                unknown_threshold=threshold,
                abstain_below=metrics["calibration"].get("abstain_below"),
            )

        return self._registry.publish(describe, lambda directory: save_classifier(classifier, directory))


def noise_of(features: Features, pairs: Sequence[StoredPair]) -> Tensor:
    """(M, D): features of heatmaps that show nothing.

    Their cells are at the level, and have the spread, of the same channel in some of the frames of `pairs`:
    channels may be in other units, dB and m/s. None where no frame can be read.
    """
    heatmaps, _ = features.read(pairs[:: 1 + len(pairs) // _NUM_NOISE_FRAMES])
    if not len(heatmaps):
        return torch.empty(0, 0)
    spread, level = torch.std_mean(heatmaps, (0, 2, 3), keepdim=True)  # (1, C, 1, 1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_NUM_NOISE_FRAMES, *heatmaps.shape[1:], generator=generator)
    return features.encode(level + spread * noise, torch.zeros(_NUM_NOISE_FRAMES, dtype=torch.int64))


def _lineage(learner: Learner, feed: Feed, named: Sequence[Named]) -> dict[str, Any]:
    config = learner.settings.model_dump(mode="json", exclude={"redis_url", "data_dir"})
    newest = max((pair.id.captured_at_ns for pair in feed.reader), default=0)
    counts = naming.describe(named)
    return {
        "step": learner.step_num,
        "num_pairs": len(feed),
        "newest_captured_at_ns": newest,
        "num_labels": counts["people"],
        "num_pseudo_labels": counts["detector"],
        "label_sources": counts["sources"],
        "configuration": config,
        "configuration_sha256": hashlib.sha256(repr(sorted(config.items())).encode()).hexdigest(),
        "torch": torch.__version__,
    }
