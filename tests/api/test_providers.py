"""What can run a model here, and sessions that look alike whatever is behind them."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from api.models import providers
from api.models.providers import BATCH, CPU_FP32, VARIANTS, FixedBatches, Session
from services.core.errors import ExportError, SettingsError
from services.core.registry import INT8_FILE, MODEL_FILE
from tests.api.tiny import SHAPE, probability_of, tiny_model

WITH_OPENVINO = ["OpenVINOExecutionProvider", "CPUExecutionProvider"]
CPUINFO = (
    "processor : 0\nmodel name\t: Some Xeon\nflags\t\t: fpu avx2 avx512f amx_int8 amx_bf16 {}\n\nprocessor : 1\n"
)


class Counted:
    """A session that takes one batch size only, and answers each row's sum."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.num_calls = 0

    def get_inputs(self) -> list[str]:
        return ["heatmap", "site"]

    def get_outputs(self) -> list[str]:
        return ["sum", "site"]

    def run(self, outputs, feed):
        assert len(feed["heatmap"]) == len(feed["site"]) == self.size
        self.num_calls += 1
        answers = {"sum": feed["heatmap"].sum((1, 2, 3)), "site": feed["site"][:, None]}
        return [answers[name] for name in outputs]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / MODEL_FILE).write_bytes(tiny_model(1))
    return tmp_path


def feed_of(num: int) -> dict[str, np.ndarray]:
    heatmap = np.arange(num * np.prod(SHAPE), dtype=np.float32).reshape(num, *SHAPE)
    return {"heatmap": heatmap, "site": np.arange(num)}


@pytest.mark.parametrize("num", range(21))
def test_any_batch_is_answered_by_graphs_of_one_and_of_eight_frames(num: int) -> None:
    one, many = Counted(1), Counted(BATCH)
    session: Session = FixedBatches(one, many)
    feed = feed_of(num)
    sums, sites = session.run(["sum", "site"], feed)
    np.testing.assert_array_equal(sums, feed["heatmap"].sum((1, 2, 3)))
    np.testing.assert_array_equal(sites, feed["site"][:, None])
    assert one.num_calls < BATCH // 2


def test_frames_left_over_are_asked_one_by_one_while_that_is_cheaper() -> None:
    one, many = Counted(1), Counted(BATCH)
    session = FixedBatches(one, many)
    session.fill_from = 3
    session.run(["sum"], feed_of(BATCH + 2))
    assert (one.num_calls, many.num_calls) == (2, 1)
    session.run(["sum"], feed_of(BATCH + 3))
    assert (one.num_calls, many.num_calls) == (2, 3)


def test_what_is_asked_for_and_not_there_names_the_package(monkeypatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    for name, package in (
        ("openvino-int8", "onnxruntime-openvino"), ("cuda", "onnxruntime-gpu"), ("tensorrt", "onnxruntime-gpu")
    ):  # fmt: skip
        with pytest.raises(SettingsError, match=package) as caught:
            providers.wanted(name)
        assert f"ECHOSIGHT_EXECUTION is {name}" in caught.value.what
    assert providers.wanted("cpu-int8").file == INT8_FILE


def test_bf16_is_tried_only_where_the_processor_has_it(model_dir, monkeypatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: WITH_OPENVINO)
    for flags, is_tried in (({"amx_bf16"}, True), ({"avx512_bf16"}, True), ({"avx512f", "avx2"}, False)):
        monkeypatch.setattr(providers, "cpu_flags", lambda flags=flags: flags)
        names = [variant.name for variant in providers.candidates(model_dir, has_int8=False)]
        assert names == ["cpu-fp32", *(["openvino-bf16"] if is_tried else [])]


def test_int8_is_tried_only_if_the_manifest_vouches_for_it(model_dir, monkeypatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert providers.candidates(model_dir, has_int8=True) == [CPU_FP32]
    (model_dir / INT8_FILE).write_bytes(tiny_model(1))
    assert providers.candidates(model_dir, has_int8=False) == [CPU_FP32]
    assert [v.name for v in providers.candidates(model_dir, has_int8=True)] == ["cpu-fp32", "cpu-int8"]


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start_is_an_error_and_no_silent_cpu(model_dir) -> None:
    with pytest.raises(ExportError, match=r"cuda.*does not start here"):
        providers.open_session(model_dir, VARIANTS["cuda"], threads=1, cores=2)


@pytest.mark.skipif("OpenVINOExecutionProvider" not in ort.get_available_providers(), reason="no OpenVINO here")
@pytest.mark.parametrize("name", ["openvino-fp32", "openvino-bf16"])
def test_openvino_answers_like_onnxruntime(model_dir, name: str) -> None:
    session = providers.open_session(model_dir, VARIANTS[name], threads=1, cores=2)
    for num in (1, 3, 8, 13):
        feed = {"heatmap": np.ones((num, *SHAPE), np.float32), "site": np.full(num, 2)}
        found = session.run(["probabilities"], feed)[0]
        np.testing.assert_allclose(found[:, 0], probability_of(1, site=2), atol=VARIANTS[name].max_error)


def test_the_processor_is_told_apart_by_what_matters(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(CPUINFO.format("avx512_vnni"))
    assert providers.cpu_flags(path) == {"avx2", "avx512f", "amx_int8", "amx_bf16", "avx512_vnni"}
    with_vnni = providers.cpu_name(path)
    assert with_vnni.startswith("Some Xeon amx_bf16")
    path.write_text(CPUINFO.format(""))
    assert providers.cpu_name(path) != with_vnni
    assert providers.cpu_name(tmp_path / "none") == "unknown processor"
