"""A model is loaded and warmed before it may answer; a bad one is refused with what is wrong with it."""

from pathlib import Path

import numpy as np
import pytest

from api.models.classifier import Classifier
from services.core.errors import ExportError
from services.core.registry import MODEL_FILE, Registry
from tests.api.tiny import SHAPE, attach, heatmap, probability_of, publish, registry_of, tiny_model


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return registry_of(tmp_path)


def load(registry: Registry, model: bytes) -> Classifier:
    version = publish(registry)
    attach(registry, version, model)
    return Classifier.load(registry.path(version) / MODEL_FILE, registry.manifest(version))


def test_a_loaded_model_has_answered_and_knows_its_time(registry: Registry) -> None:
    classifier = load(registry, tiny_model(1))
    assert 0 < classifier.frame_ms < 1000
    assert 0 < classifier.batch_gain < 100
    assert classifier.threads == 1
    assert classifier.version == 1


def test_the_site_chooses_its_row_and_an_unknown_one_the_first(registry: Registry) -> None:
    classifier = load(registry, tiny_model(1))
    assert classifier.site("") == (0, False)
    assert classifier.site("nowhere") == (0, False)
    index, is_known = classifier.site("south")
    assert is_known
    answer = classifier.predict(np.stack([heatmap()] * 3), index)
    np.testing.assert_allclose(answer[:, 0], probability_of(1, site=2), atol=1e-6)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (b"not a model", "does not load"),
        (tiny_model(1)[:-40], "does not load"),
        (tiny_model(1, is_nan=True), "NaN"),
        (tiny_model(1, scale=2.0), "sum to 2.0000"),
        (tiny_model(1, num_classes=3), "(2, 3) float32, expected (2, 4)"),
    ],
)
def test_a_bad_model_is_refused_by_name(registry: Registry, model: bytes, named: str) -> None:
    with pytest.raises(ExportError, match=r".*") as caught:
        load(registry, model)
    assert named in caught.value.what


def test_a_model_of_another_shape_than_its_manifest_is_refused(registry: Registry) -> None:
    version = publish(registry, shape=(1, *SHAPE[1:]))
    attach(registry, version, tiny_model(version))
    with pytest.raises(ExportError, match="fails on 2 frames"):
        Classifier.load(registry.path(version) / MODEL_FILE, registry.manifest(version))


def test_a_graph_with_other_names_is_refused(registry: Registry) -> None:
    with pytest.raises(ExportError, match=r"takes \['heatmap', 'xite'\]"):
        load(registry, tiny_model(1).replace(b"site", b"xite"))


def test_unknown_scores_come_only_with_a_threshold_in_the_manifest(registry: Registry) -> None:
    heatmaps = np.stack([np.full(SHAPE, value, np.float32) for value in (1.0, 7.0)])
    for threshold, expected in ((5.0, [1.0, 7.0]), (None, None)):
        version = publish(registry, unknown_threshold=threshold)
        attach(registry, version, tiny_model(version, has_unknown=True))
        classifier = Classifier.load(registry.path(version) / MODEL_FILE, registry.manifest(version))
        _, *scores = classifier.run(heatmaps, classifier.sites(0, 2), classifier.answers)
        assert [values.tolist() for values in scores] == ([] if expected is None else [expected])


def test_a_graph_without_the_score_that_its_manifest_promises_is_refused(registry: Registry) -> None:
    version = publish(registry, unknown_threshold=5.0)
    attach(registry, version, tiny_model(version))
    with pytest.raises(ExportError, match=r"gives .'embedding', 'probabilities'"):
        Classifier.load(registry.path(version) / MODEL_FILE, registry.manifest(version))
