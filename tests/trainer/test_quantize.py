"""An int8 graph stands beside the fp32 one if it is as good on frames that did not calibrate it."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from services.core.registry import INT8_FILE, MODEL_FILE, PROBES_FILE, InputContract, Manifest, Registry
from services.core.store import StoreReader
from tests.trainer.conftest import SHAPE, fill, scene
from trainer import export, quantize
from trainer.classifier import RadarClassifier, save_classifier
from trainer.head_nets import LinearHead
from trainer.heldout import is_held_out, may_learn
from trainer.radar import Preprocess, SmallEncoder

CLASSES = ("empty", "pedestrian", "cyclist", "car")
NUM_PAIRS = 96


@pytest.fixture
def store_dir(tmp_path: Path) -> Path:
    fill(tmp_path / "store", [scene(i) for i in range(NUM_PAIRS)], num_labels=20)
    return tmp_path / "store"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    torch.manual_seed(0)
    encoder = SmallEncoder(SHAPE, width=16, feature_dim=32)
    model = RadarClassifier(Preprocess(1, SHAPE), encoder, LinearHead(32, len(CLASSES))).eval()
    registry = Registry(tmp_path / "models", "radar")
    registry.publish(manifest, lambda directory: save_classifier(model, directory))
    return registry


def manifest(version: int, *, held_out_share: float = 0.0) -> Manifest:
    return Manifest(
        name="radar",
        version=version,
        created_at_s=0.0,
        classes=CLASSES,
        input=InputContract(shape=SHAPE),
        sites=("", "north"),
        architecture={"encoder": "small", "width": 16, "feature_dim": 32, "unknown": None},
        preprocessing={},
        metrics={},
        lineage={"configuration": {"held_out_share": held_out_share}},
    )


def test_an_export_leaves_an_int8_graph_that_answers_like_the_exact_one(registry, store_dir) -> None:
    export.export(registry, 1, store_dir=store_dir)
    int8 = registry.manifest(1).int8
    assert int8 is not None
    assert int8.is_kept, int8.why
    assert "labels agree on" in int8.why
    assert (int8.num_calibration_frames, int8.num_frames, int8.num_labelled) == (48, 48, int8.num_labelled)
    graph = onnx.load(registry.path(1) / INT8_FILE).graph
    exact = {node.name for node in graph.node if "DequantizeLinear" not in node.op_type} - {""}
    made_int8 = {node.input[1] for node in graph.node if node.op_type == "Conv"}
    assert all("DequantizeLinear" in name for name in made_int8)
    assert any(name.startswith("/head/linear") for name in exact)

    probes = np.load(registry.path(1) / PROBES_FILE)
    feed = {"heatmap": probes["heatmap"].astype(np.float32), "site": probes["site"]}
    assert probes["heatmap"].dtype == np.float16
    for file, allowed in ((MODEL_FILE, 1e-5), (INT8_FILE, quantize.MAX_PROBABILITY_ERROR)):
        found = onnxruntime.InferenceSession(str(registry.path(1) / file)).run(["probabilities"], feed)[0]
        assert np.abs(found - probes["probabilities"]).max() <= allowed


def test_int8_that_differs_too_much_is_not_kept_and_the_manifest_says_why(
    registry, store_dir, monkeypatch
) -> None:
    export.export(registry, 1, store_dir=store_dir)
    monkeypatch.setattr(quantize, "MAX_PROBABILITY_ERROR", 1e-9)
    export.export(registry, 1, store_dir=store_dir)
    found = registry.manifest(1)
    assert found.parity is not None
    assert found.int8 is not None
    assert not found.int8.is_kept
    assert "allowed: 0.5 points, 1e-09" in found.int8.why
    assert found.int8.max_abs_probability_error > 1e-9
    assert not (registry.path(1) / INT8_FILE).exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("unsupported\noperator"), OSError("disk full")])
def test_an_int8_failure_does_not_fail_the_export(registry, store_dir, monkeypatch, capsys, error) -> None:
    def fail(*_, **__) -> None:
        raise error

    monkeypatch.setattr(quantize, "quantize_static", fail)
    export.export(registry, 1, store_dir=store_dir)
    found = registry.manifest(1)
    assert found.parity is not None
    assert (registry.path(1) / MODEL_FILE).exists()
    assert found.int8 is not None
    assert not found.int8.is_kept
    assert "could not be made" in found.int8.why
    assert "int8 not kept" in capsys.readouterr().err


def test_int8_can_be_turned_off(registry, store_dir) -> None:
    export.export(registry, 1, store_dir=store_dir, with_int8=False)
    assert registry.manifest(1).int8 is None
    assert not (registry.path(1) / INT8_FILE).exists()


def test_too_few_frames_to_calibrate_on_is_said(registry, tmp_path) -> None:
    fill(tmp_path / "few", [scene(i) for i in range(20)])
    export.export(registry, 1, store_dir=tmp_path / "few")
    int8 = registry.manifest(1).int8
    assert int8 is not None
    assert "10 stored frames to calibrate on, 32 are needed" in int8.why


def test_frames_that_judge_are_held_out_and_named_ones_come_first(store_dir) -> None:
    reader = StoreReader(store_dir)
    reader.refresh()
    frames = quantize.choose_frames(reader, manifest(1, held_out_share=0.4))
    assert frames.judging
    assert all(is_held_out(pair.site, pair.id.captured_at_ns, share=0.4) for pair in frames.judging)
    assert frames.calibrating
    assert all(may_learn(pair.site, pair.id.captured_at_ns, share=0.4) for pair in frames.calibrating)
    is_named = [(pair.site, pair.id) in frames.labels for pair in frames.judging]
    assert is_named == sorted(is_named, reverse=True)


def test_a_large_network_is_calibrated_for_no_longer_than_its_budget(registry, store_dir, tmp_path) -> None:
    export.export(registry, 1, store_dir=store_dir, with_int8=False)
    reader = StoreReader(store_dir)
    reader.refresh()
    found = registry.manifest(1)
    frames = quantize.choose_frames(reader, found)
    model = registry.path(1) / MODEL_FILE
    int8 = quantize.quantize(model, tmp_path / "q.onnx", frames=frames, manifest=found, budget_s=0.0)
    assert int8.num_calibration_frames == 32  # the least


def answers(labels: list[int], *, sure: float = 0.7) -> np.ndarray:
    rest = (1 - sure) / 3
    return np.array([[sure if i == label else rest for i in range(4)] for label in labels], np.float32)


@pytest.mark.parametrize(("num_wrong", "is_kept"), [(1, True), (2, False)])
def test_half_a_point_of_accuracy_is_the_most_that_may_be_lost(num_wrong: int, is_kept: bool) -> None:
    labels = [i % 4 for i in range(200)]
    expected = answers(labels, sure=0.251)
    found = answers([(label + 1) % 4 if i < num_wrong else label for i, label in enumerate(labels)], sure=0.251)
    int8 = quantize.compare(expected, found, np.array(labels))
    assert int8.is_kept is is_kept, int8.why
    assert "on 200 held-out labelled frames" in int8.why
    assert int8.accuracy_fp32 == 1.0


def test_with_few_labels_it_is_the_agreement_that_counts() -> None:
    labels = [i % 4 for i in range(300)]
    expected, found = answers(labels, sure=0.251), answers([*labels[:-2], 0, 0], sure=0.251)
    targets = np.full(300, -1)
    targets[:199] = labels[:199]
    int8 = quantize.compare(expected, found, targets)
    assert not int8.is_kept
    assert "labels agree on 99.33 % of 300 frames" in int8.why
    assert (int8.num_labelled, int8.accuracy_int8) == (199, 1.0)


def test_nan_is_never_kept() -> None:
    expected = answers([0] * 300)
    assert not quantize.compare(expected, np.full_like(expected, np.nan), np.zeros(300, np.int64)).is_kept
