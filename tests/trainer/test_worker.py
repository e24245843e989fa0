"""The endless worker, bounded: waits, learns, resumes, publishes; and the export that follows."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import structlog
import torch
import typer
from prometheus_client import generate_latest

from services.core.errors import ExportError, NoPairsError, RegistryError
from services.core.registry import Registry
from tests.trainer.conftest import SHAPE, fill, scene
from trainer import export
from trainer import worker as worker_module
from trainer.worker import TrainerWorker


def worker_of(settings, vision) -> TrainerWorker:
    return TrainerWorker(settings, vision=vision, log=structlog.get_logger(), events=None)


@pytest.fixture
def published(settings, vision, store_dir) -> Registry:
    fill(settings.store_dir, [scene(i) for i in range(60)], num_labels=40)
    worker_of(settings, vision).run(max_steps=24)
    return Registry(settings.registry_dir, settings.model_name)


def test_publishes_encoder_and_head_with_metrics_and_lineage(published, settings) -> None:
    version = published.versions()[-1]  # the candidate may be one before, if the gate holds this one
    manifest = published.manifest(version)
    assert manifest.input.shape == SHAPE
    assert manifest.sites == ("", "north")
    assert manifest.metrics["probe"]["num_labels"]["car"] == 20
    assert manifest.metrics["probe"]["accuracy"] > 0.8
    assert manifest.metrics["contrast"]["chance"] > 0
    assert manifest.lineage["num_pairs"] == 60
    assert manifest.lineage["configuration"]["queue_size"] == settings.queue_size
    assert manifest.parity is None
    assert manifest.metrics["names"] == {"people": 40, "detector": 0, "sources": {"annotator": 40}}
    assert manifest.metrics["calibration"]["num_frames"] == 40
    assert manifest.abstain_below == manifest.metrics["calibration"].get("abstain_below")
    assert manifest.unknown_threshold == manifest.metrics["unknown"]["threshold"] > 0
    assert published.history()[-1]["why"] == manifest.metrics["gate"]["why"]


def test_second_run_resumes_and_does_not_encode_again(published, settings, vision) -> None:
    encoded = vision.net.num_images
    worker = worker_of(settings, vision)
    worker.run(max_steps=40)
    assert worker.learner is not None
    assert worker.learner.step_num == 40
    assert vision.net.num_images == encoded
    assert len(published.versions()) >= 2


def test_damaged_checkpoint_is_passed_over_for_the_one_before(published, settings, vision) -> None:
    worker = worker_of(settings, vision)
    worker.run(max_steps=32)  # the second save keeps the first
    path = settings.data_dir / "trainer" / "radar" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    again = worker_of(settings, vision)
    again._resume()
    assert again.learner is not None
    assert 0 < again.learner.step_num < 32


def test_batch_drawn_ahead_while_the_store_was_empty_does_not_end_the_trainer(settings, vision) -> None:
    fill(settings.store_dir, [scene(i) for i in range(40)])
    worker = worker_of(settings, vision)
    draw, num_draws = worker._batches._draw, 0

    def draw_when_not_empty():
        nonlocal num_draws
        num_draws += 1
        if num_draws == 3:
            raise NoPairsError("no encoded pair is left to learn from")
        return draw()

    worker._batches._draw = draw_when_not_empty
    with structlog.testing.capture_logs() as logs:
        worker.run(max_steps=8)
    assert worker.learner is not None
    assert worker.learner.step_num == 8
    assert [entry["reason"] for entry in logs if entry["event"] == "no_batch"]


def test_too_few_labels_publish_nothing(settings, vision) -> None:
    fill(settings.store_dir, [scene(i) for i in range(40)], num_labels=2)
    worker_of(settings, vision).run(max_steps=16)
    assert Registry(settings.registry_dir, "radar").versions() == []


def test_export_equals_torch_on_stored_frames_and_is_attached(published, settings) -> None:
    version = published.aliases()["candidate"]
    done = subprocess.run(
        [sys.executable, "-m", "trainer.export", "--registry-dir", str(settings.registry_dir), "--name", "radar",
         "--version", str(version), "--store-dir", str(settings.store_dir)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    parity = published.manifest(version).parity
    assert parity is not None
    assert parity.max_abs_probability_error < 1e-3
    assert parity.num_label_changes == 0
    assert parity.max_abs_embedding_error < 1e-3
    assert parity.max_rel_unknown_error < 1e-3
    session = onnxruntime.InferenceSession(str(published.path(version) / "model.onnx"))
    for size in (1, 3, 8):
        heatmap = np.random.default_rng(0).normal(20, 3, (size, *SHAPE)).astype(np.float32)
        probabilities, _, scores = session.run(None, {"heatmap": heatmap, "site": np.zeros(size, np.int64)})
        np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
        assert scores.shape == (size,)


def test_export_that_differs_from_torch_is_refused(published, settings, monkeypatch) -> None:
    version = published.aliases()["candidate"]
    honest = export.to_onnx

    def distort(classifier, path: Path, *, shape) -> None:
        with torch.no_grad():
            classifier.head.linear.bias += torch.tensor([0.0, 5.0, 0.0, 0.0])
        honest(classifier, path, shape=shape)
        with torch.no_grad():
            classifier.head.linear.bias -= torch.tensor([0.0, 5.0, 0.0, 0.0])

    monkeypatch.setattr(export, "to_onnx", distort)
    with pytest.raises(ExportError, match="differ by"):
        export.export(published, version, store_dir=settings.store_dir)
    assert not (published.path(version) / "model.onnx").exists()


def test_damaged_checkpoint_of_a_version_is_a_clear_error(published, settings) -> None:
    version = published.aliases()["candidate"]
    path = published.path(version) / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(RegistryError, match="cannot load"):
        export.export(published, version, store_dir=settings.store_dir)


def test_exit_status_tells_a_bad_version_from_one_that_cannot_be_judged_now(
    published, settings, tmp_path, monkeypatch, capsys
) -> None:
    given = {"registry_dir": settings.registry_dir, "name": "radar", "version": published.aliases()["candidate"]}

    def exit_status(store_dir: Path) -> tuple[int, str]:
        with pytest.raises(typer.Exit) as ended:
            export.main(**given, store_dir=store_dir)
        return ended.value.exit_code, capsys.readouterr().err

    status, why = exit_status(tmp_path / "empty")
    assert (status, "holds no frame of shape" in why) == (os.EX_TEMPFAIL, True)

    def full_disk(*_, **__) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export, "to_onnx", full_disk)
        status, why = exit_status(settings.store_dir)
    assert (status, "No space left" in why) == (os.EX_TEMPFAIL, True)

    checkpoint = published.path(given["version"]) / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    status, why = exit_status(settings.store_dir)
    assert (status, "cannot load" in why) == (1, True)


def test_restart_without_news_publishes_nothing(published, settings, vision) -> None:
    before = published.versions()
    worker_of(settings, vision).run(max_steps=24)
    assert published.versions() == before


def test_says_that_it_waits_only_where_the_sensors_are_silent(published, settings, vision, monkeypatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("trainer.worker.time.monotonic", lambda: now_s)
    worker = worker_of(settings, vision)
    worker._resume()
    assert worker.learner is not None
    num_learnt = int(settings.max_replays * worker.feed.num_seen)
    said = []
    for now_s, has_news in [
        (1, False), (2, True), (3, False), (4, True), (40, False), (80, False), (90, True), (91, False)
    ]:  # fmt: skip
        worker.learner.num_learnt = num_learnt - has_news
        with structlog.testing.capture_logs() as logs:
            assert worker._has_news() == has_news
        said += [(now_s, entry["event"]) for entry in logs]
    assert said == [(40, "waiting_for_new_pairs"), (90, "learning")]


def test_diverged_step_goes_back_to_the_last_checkpoint_and_is_reported(
    published, settings, vision, monkeypatch
) -> None:
    told: list[tuple[str, dict[str, Any]]] = []

    class Events:
        def emit(self, kind: str, **values: Any) -> None:
            told.append((kind, values))

    worker = TrainerWorker(settings, vision=vision, log=structlog.get_logger(), events=Events())
    monkeypatch.setattr(worker_module, "_REPORT_EVERY_S", 0.0)
    worker._resume()
    honest, calls = type(worker.learner).step, iter([True])

    def step(learner, batch):
        if next(calls, False):
            batch.heatmap[0] = torch.inf
        return honest(learner, batch)

    monkeypatch.setattr(type(worker.learner), "step", step)
    worker.run(max_steps=32)
    assert (worker._diverged_at, worker._num_diverged) == (24, 0)  # undone once, and overcome
    assert worker.learner is not None
    assert worker.learner.step_num == 32
    [diverged] = [values for kind, values in told if kind == "diverged"]
    assert (diverged["step"], diverged["times"]) == (24, 1)
    assert "loss is nan" in diverged["reason"]
    assert [values for kind, values in told if kind == "trainer"][-1]["rollbacks"] == 1
    assert "echosight_trainer_rollbacks_total 1.0" in generate_latest(worker.metrics.registry).decode()
