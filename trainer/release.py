"""A release: head trained on the labels, everything that serving needs, into the registry."""

import copy
import hashlib
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from services.core.frames import CLASSES, Label
from services.core.registry import CHECKPOINT_FILE, Manifest, Registry
from services.core.store import StoredPair
from trainer.feed import Feed
from trainer.head import HeadFit, fit_head
from trainer.learner import Learner
from trainer.radar import LinearHead, RadarClassifier

_BLOCK_NS = 10_000_000_000
_FEATURE_BATCH = 128
_MAX_LABELS = 4096


@dataclass(frozen=True, slots=True)
class Release:
    version: int
    metrics: dict[str, Any]


def publish_release(
    registry: Registry, learner: Learner, feed: Feed, *, losses: dict[str, float]
) -> Release | None:
    """Train a head on the labelled pairs and publish; None if there are no labels to train on."""
    labelled = feed.labelled()
    labelled = labelled[:: 1 + len(labelled) // _MAX_LABELS]  # evenly over sites and times
    if not labelled:
        return None
    fit = train_head(learner, feed, labelled)
    metrics: dict[str, Any] = {"probe": fit.metrics, "contrast": losses}

    def describe(version: int) -> Manifest:
        return Manifest(
            name=registry.name,
            version=version,
            created_at_s=round(time.time(), 3),
            classes=CLASSES,
            input=learner.contract,
            sites=("", *feed.sites),
            architecture=learner.architecture,
            preprocessing={
                "scale": float(learner.preprocess.scale),
                "clutter_versions": {site: feed.profiles[site].version for site in feed.sites},
                "subtracts_clutter": learner.settings.subtract_clutter,
            },
            metrics=metrics,
            lineage=_lineage(learner, feed, labelled),
        )

    tensors = classifier_of(learner, fit.head).state_dict()
    version = registry.publish(describe, lambda directory: save_file(_own(tensors), directory / CHECKPOINT_FILE))
    return Release(version, metrics)


def train_head(learner: Learner, feed: Feed, labelled: list[tuple[StoredPair, Label]]) -> HeadFit:
    """Features of the labelled pairs by the averaged encoder, and a head on them."""
    features, targets, blocks = [], [], []
    for start in range(0, len(labelled), _FEATURE_BATCH):
        heatmaps, sites = [], []
        for pair, label in labelled[start : start + _FEATURE_BATCH]:
            radar = pair.radar()
            if radar is None:
                continue
            heatmaps.append(torch.from_numpy(radar.heatmap.astype("float32")).reshape(learner.contract.shape))
            sites.append(feed.sites.index(pair.site) + 1)
            targets.append(CLASSES.index(label.label))
            blocks.append((pair.site, pair.id.captured_at_ns // _BLOCK_NS))
        if heatmaps:
            features.append(learner.features(torch.stack(heatmaps), torch.tensor(sites)))
    return fit_head(torch.cat(features), torch.tensor(targets), blocks=blocks, classes=CLASSES)


def classifier_of(learner: Learner, head: LinearHead) -> RadarClassifier:
    return copy.deepcopy(RadarClassifier(learner.preprocess, learner.average, head)).cpu().eval()


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _lineage(learner: Learner, feed: Feed, labelled: list[tuple[StoredPair, Label]]) -> dict[str, Any]:
    config = learner.settings.model_dump(mode="json", exclude={"redis_url", "data_dir"})
    newest = max((pair.id.captured_at_ns for pair in feed.reader), default=0)
    return {
        "step": learner.step_num,
        "num_pairs": len(feed),
        "newest_captured_at_ns": newest,
        "num_labels": len(labelled),
        "label_sources": dict(Counter(label.source for _, label in labelled)),
        "configuration": config,
        "configuration_sha256": hashlib.sha256(repr(sorted(config.items())).encode()).hexdigest(),
        "torch": torch.__version__,
    }
