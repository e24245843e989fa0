"""What runs a model is measured once, remembered, and held to the checkpoint's answers; else fp32 serves."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog

from api.models import execution
from api.models.classifier import Classifier, Probes
from api.models.execution import Execution, Measurement
from api.settings import ApiSettings
from services.core.errors import SettingsError
from services.core.registry import INT8_FILE, MODEL_FILE, PROBES_FILE, Int8, Manifest, Registry
from tests.api.tiny import (
    SHAPE,
    attach,
    heatmap,
    npy,
    probability_of,
    publish,
    registry_of,
    serving,
    tiny_model,
    until,
)

INT8 = Int8(is_kept=True, why="as good")
EXACT, COARSE = "cpu-fp32", "cpu-int8"


@pytest.fixture(autouse=True)
def plain_onnxruntime(monkeypatch) -> None:
    """Whichever onnxruntime is installed: two candidates, whose times the tests give."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return registry_of(tmp_path)


@pytest.fixture
def execute(tmp_path: Path) -> Execution:
    return new_execution(tmp_path)


def new_execution(data_dir: Path, wanted: str = "auto", *, cores: int = 2) -> Execution:
    return Execution(wanted, data_dir=data_dir, cores=cores, log=structlog.get_logger())


def probes(version: int) -> bytes:
    """What an export of `tiny_model(version)` leaves."""
    rest = (1 - probability_of(version)) / 3
    row = np.array([probability_of(version), rest, rest, rest], np.float32)
    file = io.BytesIO()
    heatmaps = np.ones((8, *SHAPE), np.float16)
    np.savez(file, heatmap=heatmaps, site=np.zeros(8, np.int64), probabilities=np.tile(row, (8, 1)))
    return file.getvalue()


def publish_both(registry: Registry, *, of_int8: int | None = None) -> tuple[Path, Manifest]:
    """A version with both graphs. of_int8: answers like `tiny_model(of_int8)`, itself by default."""
    version = publish(registry)
    attach(registry, version, tiny_model(version))
    (registry.path(version) / PROBES_FILE).write_bytes(probes(version))
    aside = registry.dir / "int8"
    aside.write_bytes(tiny_model(version if of_int8 is None else of_int8))
    registry.attach_int8(version, aside, INT8)
    return registry.path(version) / MODEL_FILE, registry.manifest(version)


def given_times(monkeypatch, times_ms: dict[tuple[str, int], float]) -> list[tuple[str, int]]:
    """Replace the stop-watch: ms a frame by variant and threads. Returns what was timed, as it happens."""
    timed: list[tuple[str, int]] = []

    def tell(model: Classifier, _: Probes) -> Measurement:
        key = (model.variant, model.threads)
        timed.append(key)
        return Measurement(
            variant=key[0], threads=key[1], frame_ms=times_ms[key], batch_ms=8 * times_ms[key], max_error=0.0
        )

    monkeypatch.setattr(execution, "_timed", tell)
    return timed


def test_the_fastest_is_measured_once_and_remembered(registry, execute, tmp_path, monkeypatch) -> None:
    timed = given_times(monkeypatch, {(EXACT, 1): 2.0, (COARSE, 1): 1.0})
    model, manifest = publish_both(registry)
    assert execute.load(model, manifest).variant == COARSE
    assert timed == [(EXACT, 1), (COARSE, 1)]
    later, its_manifest = publish_both(registry)
    classifier = new_execution(tmp_path).load(later, its_manifest)
    assert (classifier.variant, classifier.version) == (COARSE, 2)
    assert len(timed) == 2
    new_execution(tmp_path, cores=1).load(later, its_manifest)
    assert len(timed) == 4  # another machine


@pytest.mark.parametrize(("coarse_ms", "chosen"), [(1.0 / 1.05, EXACT), (1.0 / 1.2, COARSE), (3.0, EXACT)])
def test_the_less_exact_has_to_be_clearly_faster(registry, execute, monkeypatch, coarse_ms, chosen) -> None:
    given_times(monkeypatch, {(EXACT, 1): 1.0, (COARSE, 1): coarse_ms})
    assert execute.measure(*publish_both(registry)).variant == chosen


@pytest.mark.parametrize(("wide_ms", "threads"), [(11.0, 2), (15.0, 1)])
def test_a_large_network_takes_all_cores_where_that_pays(registry, execute, monkeypatch, wide_ms, threads) -> None:
    given_times(monkeypatch, {(EXACT, 1): 200.0, (COARSE, 1): 20.0, (COARSE, 2): wide_ms})
    classifier = execute.load(*publish_both(registry))
    assert (classifier.variant, classifier.threads) == (COARSE, threads)


def test_a_small_network_is_not_asked_for_two_threads(registry, execute, monkeypatch) -> None:
    timed = given_times(monkeypatch, {(EXACT, 1): 1.0, (COARSE, 1): 0.5})
    assert execute.measure(*publish_both(registry)).threads == 1
    assert (COARSE, 2) not in timed


def test_one_that_answers_otherwise_than_the_checkpoint_is_not_chosen(registry, execute, monkeypatch) -> None:
    given_times(monkeypatch, {(EXACT, 1): 2.0, (COARSE, 1): 0.1})
    choice = execute.measure(*publish_both(registry, of_int8=400))
    assert choice.variant == EXACT
    bad = next(row for row in choice.measurements if row.variant == COARSE)
    assert "differs by 0.399 in probability from its checkpoint" in bad.problem


def test_a_version_that_the_choice_does_not_suit_is_served_in_fp32(registry, execute, monkeypatch) -> None:
    timed = given_times(monkeypatch, {(EXACT, 1): 2.0, (COARSE, 1): 1.0})
    execute.load(*publish_both(registry))
    for damage in (tiny_model(500), b"not a model"):
        model, manifest = publish_both(registry)
        (model.parent / INT8_FILE).write_bytes(damage)
        with structlog.testing.capture_logs() as logs:
            assert execute.load(model, manifest).variant == EXACT
        assert logs[-1]["event"] == "fp32 on the CPU serves"
    assert len(timed) == 2


def test_what_is_asked_for_serves_though_it_is_slower(registry, tmp_path, monkeypatch) -> None:
    given_times(monkeypatch, {(EXACT, 1): 1.0, (COARSE, 1): 2.0})
    model, manifest = publish_both(registry)
    assert new_execution(tmp_path, COARSE).load(model, manifest).variant == COARSE
    assert new_execution(tmp_path, EXACT).load(model, manifest).variant == EXACT
    assert new_execution(tmp_path).load(model, manifest).variant == EXACT


def test_without_a_second_candidate_a_small_network_is_not_measured(
    registry, execute, tmp_path, monkeypatch
) -> None:
    timed = given_times(monkeypatch, {})
    version = publish(registry)
    attach(registry, version, tiny_model(version))
    assert execute.load(registry.path(version) / MODEL_FILE, registry.manifest(version)).variant == EXACT
    assert timed == []
    assert not (tmp_path / execution.FILE_NAME).exists()


def test_a_version_without_probes_is_compared_with_fp32_on_noise(registry, execute, monkeypatch) -> None:
    given_times(monkeypatch, {(EXACT, 1): 2.0, (COARSE, 1): 1.0})
    good, bad = publish_both(registry), publish_both(registry, of_int8=600)
    for model, _ in (good, bad):
        (model.parent / PROBES_FILE).unlink()
    assert execute.load(*good).variant == COARSE
    assert execute.load(*bad).variant == EXACT


@pytest.mark.parametrize("content", [b"{", b'{"key": {"variant": 3}}'])
def test_damaged_choices_are_measured_anew(registry, execute, tmp_path, monkeypatch, content: bytes) -> None:
    given_times(monkeypatch, {(EXACT, 1): 2.0, (COARSE, 1): 1.0})
    (tmp_path / execution.FILE_NAME).write_bytes(content)
    assert execute.load(*publish_both(registry)).variant == COARSE


def test_a_choice_that_cannot_be_saved_serves_all_the_same(registry, execute, tmp_path, monkeypatch) -> None:
    given_times(monkeypatch, {(EXACT, 1): 2.0, (COARSE, 1): 1.0})
    (tmp_path / execution.FILE_NAME).mkdir()
    assert execute.load(*publish_both(registry)).variant == COARSE


def test_the_stop_watch_times_both_batch_sizes(registry) -> None:
    model, manifest = publish_both(registry)
    row = execution._timed(Classifier.load(model, manifest), execution.read_probes(model.parent))
    assert 0 < row.frame_ms < row.batch_ms * 8
    assert row.max_error < 1e-6


def test_an_execution_that_cannot_be_had_ends_the_start(tmp_path) -> None:
    with pytest.raises(SettingsError, match="install onnxruntime-openvino"):
        new_execution(tmp_path, "openvino-int8")
    with pytest.raises(SettingsError, match="ECHOSIGHT_EXECUTION"):
        ApiSettings.read(data_dir=tmp_path, execution="openvino")


async def test_what_serves_is_said_by_every_route_that_describes_a_model(registry, tmp_path) -> None:
    _, manifest = publish_both(registry)
    registry.promote(manifest.version, by="test", why="test")
    async with serving(tmp_path, execution=COARSE) as (app, client):
        live = app.state.live
        await until(lambda: live.is_ready)
        answer = await client.post("/v1/classify", content=npy(heatmap()))
        shown: dict[str, Any] = (await client.get("/v1/models/1")).json()
        config = (await client.get("/v2/models/radar/config")).json()
        metrics = (await client.get("/metrics")).text
    assert answer.json()["probabilities"]["empty"] == pytest.approx(probability_of(1), abs=1e-4)
    assert shown["execution"]["variant"] == COARSE
    assert shown["execution"]["threads"] == 1
    assert shown["int8"]["is_kept"]
    assert config["parameters"]["execution"] == {"string_value": COARSE}
    assert 'echosight_api_execution_info{onnxruntime="' in metrics
    assert f'variant="{COARSE}"' in metrics
