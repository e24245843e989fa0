"""The Open Inference Protocol V2 as an existing client speaks it: tritonclient, unmodified, with its defaults."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.api.test_process import api_process
from tests.api.tiny import CLASSES, SHAPE, attach, heatmap, probability_of, publish, registry_of, tiny_model
from tests.system.conftest import wait_for


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server of its own process: version 2 is live, 1 is `previous`, 3 has not been exported."""
    data_dir = tmp_path_factory.mktemp("data")
    registry = registry_of(data_dir)
    for _ in range(2):
        version = publish(registry)
        attach(registry, version, tiny_model(version))
        registry.promote(version, by="test", why="test")
    publish(registry)
    registry.refuse(3, by="test", why="never exported")
    with api_process(data_dir, ECHOSIGHT_MAX_LOADED_VERSIONS="1") as (_, port):
        yield port


@pytest.fixture
def client(port: int) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        yield client
        client.unload_model("radar")


def given(array: np.ndarray, datatype: str = "FP32", *, name: str = "heatmap", binary: bool = True) -> Any:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    return tensor.set_data_from_numpy(array, binary_data=binary)


def first_class(result: Any) -> float:
    return float(result.as_numpy("probabilities")[0, 0])


def test_health_and_metadata(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("radar")
    assert client.is_model_ready("radar", "2")
    assert not client.is_model_ready("radar", "1")
    assert not client.is_model_ready("lidar")
    server = client.get_server_metadata()
    assert server["name"] == "echosight"
    assert "binary_tensor_data" in server["extensions"]
    model = client.get_model_metadata("radar")
    assert model["versions"] == ["2"]
    assert {"name": "heatmap", "datatype": "FP32", "shape": [-1, *SHAPE]} in model["inputs"]
    assert {"name": "probabilities", "datatype": "FP32", "shape": [-1, 4]} in model["outputs"]
    config = client.get_model_config("radar", "2")
    assert (config["max_batch_size"], config["backend"]) == (64, "onnxruntime")
    assert [row["dims"] for row in config["output"]] == [[4], [2]]


def test_inference_with_the_clients_defaults(client: triton.InferenceServerClient) -> None:
    result = client.infer("radar", [given(heatmap(3, *SHAPE))])
    assert result.as_numpy("probabilities").shape == (3, 4)
    assert result.as_numpy("embedding").dtype == np.float32
    assert first_class(result) == pytest.approx(probability_of(2), abs=1e-6)
    assert result.get_response()["model_version"] == "2"


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("datatype", "dtype"), [("FP32", "f4"), ("FP16", "f2"), ("FP64", "f8"), ("UINT8", "u1")])
def test_every_datatype_of_a_heatmap(
    client: triton.InferenceServerClient, datatype: str, dtype: str, binary: bool
) -> None:
    array = np.arange(24).reshape(1, *SHAPE).astype(dtype)
    result = client.infer("radar", [given(array, datatype, binary=binary)])
    assert result.as_numpy("embedding") == pytest.approx(array.mean(axis=(2, 3)))


def test_one_frame_without_a_batch_dimension(client: triton.InferenceServerClient) -> None:
    assert client.infer("radar", [given(heatmap())]).as_numpy("probabilities").shape == (1, 4)


@pytest.mark.parametrize("binary", [True, False])
def test_sites_by_name_and_by_index(client: triton.InferenceServerClient, binary: bool) -> None:
    frames = given(heatmap(3, *SHAPE))
    names = np.array([b"south", b"", b"new"], dtype=object)
    indices = np.array([[2], [0], [0]], np.int64)
    expected = [probability_of(2, site=site) for site in (2, 0, 0)]
    for site in (given(names, "BYTES", name="site", binary=binary), given(indices, "INT64", name="site")):
        found = client.infer("radar", [frames, site]).as_numpy("probabilities")[:, 0]
        assert found == pytest.approx(expected, abs=1e-6)
    one = client.infer("radar", [frames, given(np.array([b"north"], object), "BYTES", name="site")])
    assert one.as_numpy("probabilities")[:, 0] == pytest.approx([probability_of(2, site=1)] * 3, abs=1e-6)
    by_parameter = client.infer("radar", [frames], parameters={"site": "north"})
    assert first_class(by_parameter) == pytest.approx(probability_of(2, site=1), abs=1e-6)


def test_outputs_by_name_binary_and_json(client: triton.InferenceServerClient) -> None:
    outputs = [
        triton.InferRequestedOutput("embedding", binary_data=False),
        triton.InferRequestedOutput("probabilities", binary_data=True),
    ]
    result = client.infer("radar", [given(heatmap())], outputs=outputs, request_id="seven")
    assert [row["name"] for row in result.get_response()["outputs"]] == ["embedding", "probabilities"]
    assert result.get_output("embedding")["data"] == pytest.approx([5.5, 17.5])
    assert result.as_numpy("probabilities").sum() == pytest.approx(1.0)
    assert result.get_response()["id"] == "seven"


@pytest.mark.parametrize("binary", [True, False])
def test_the_classification_extension(client: triton.InferenceServerClient, binary: bool) -> None:
    outputs = [triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=2)]
    best = client.infer("radar", [given(heatmap(2, *SHAPE))], outputs=outputs).as_numpy("probabilities")
    assert best.shape == (2, 2)
    score, index, label = (best[0, 0] if binary else best[0, 0].encode()).decode().split(":")
    assert (int(index), label) == (1, CLASSES[1])
    assert float(score) == pytest.approx((1 - probability_of(2)) / 3, abs=1e-6)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests(client: triton.InferenceServerClient, algorithm: str) -> None:
    result = client.infer(
        "radar",
        [given(heatmap())],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert first_class(result) == pytest.approx(probability_of(2), abs=1e-6)


def test_asynchronous_inference(port: int) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{port}", concurrency=4) as client:
        requests = [client.async_infer("radar", [given(heatmap())], request_id=str(i)) for i in range(8)]
        assert [request.get_result().get_response()["id"] for request in requests] == list("01234567")


def test_versions_are_loaded_asked_and_dropped(client: triton.InferenceServerClient) -> None:
    client.load_model("radar")
    assert first_class(client.infer("radar", [given(heatmap())], model_version="previous")) == pytest.approx(
        probability_of(1), abs=1e-6
    )
    assert client.infer("radar", [given(heatmap())], "1").get_response()["model_version"] == "1"
    assert client.infer("radar", [given(heatmap())], "champion").get_response()["model_version"] == "2"
    states = {row["version"]: (row["state"], row["reason"]) for row in client.get_model_repository_index()}
    assert states["1"] == states["2"] == ("READY", "")
    assert states["3"] == ("UNAVAILABLE", "refused: never exported")
    client.unload_model("radar")
    with pytest.raises(InferenceServerException, match=r"not loaded.*/load"):
        client.infer("radar", [given(heatmap())], model_version="1")
    policy = {"version_policy": {"specific": {"versions": [1]}}}
    client.load_model("radar", config=json.dumps(policy))
    assert client.is_model_ready("radar", "1")


def test_statistics_count_frames_calls_and_failures(client: triton.InferenceServerClient) -> None:
    def counts() -> Any:
        [row] = client.get_inference_statistics("radar", "2")["model_stats"]
        return row

    before = counts()
    client.infer("radar", [given(heatmap(5, *SHAPE))])
    with pytest.raises(InferenceServerException):
        client.infer("radar", [given(heatmap(1, 2, 3))])
    after = counts()
    assert after["inference_count"] - before["inference_count"] == 5
    assert after["execution_count"] - before["execution_count"] == 1
    for name in ("success", "fail", "compute_infer"):
        assert after["inference_stats"][name]["count"] - before["inference_stats"][name]["count"] == 1
    assert 5 in {row["batch_size"] for row in after["batch_stats"]}
    assert client.get_inference_statistics()["model_stats"][0]["version"] == "2"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.infer("lidar", [given(heatmap())]), "model is 'lidar'; this server has 'radar'"),
        (lambda c: c.infer("radar", [given(heatmap())], "99"), "version 99 of radar is not loaded"),
        (lambda c: c.infer("radar", [given(heatmap(2, 2, 2))]), r"shape.*\(2, 2, 2\).*send \(2, 4, 3\)"),
        (lambda c: c.infer("radar", [given(heatmap(), name="image")]), "input 'image' is unknown"),
        (lambda c: c.infer("radar", [given(heatmap().astype("i4"), "INT32")]), "datatype of heatmap is INT32"),
        (lambda c: c.load_model("radar", config="{}"), "version_policy"),
        (lambda c: c.load_model("lidar"), "this server has 'radar'"),
        (lambda c: c.get_trace_settings(), "GET / lists what is here"),
        (lambda c: c.get_system_shared_memory_status(), "GET / lists what is here"),
    ],
)
def test_the_client_shows_what_is_wrong_and_the_remedy(
    client: triton.InferenceServerClient, call: Any, message: str
) -> None:
    with pytest.raises(InferenceServerException, match=message):
        call(client)


def test_the_server_waits_for_its_model_in_the_clients_words(tmp_path: Path) -> None:
    with (
        api_process(tmp_path, wait_until="listening") as (_, port),
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):
        wait_for(client.is_server_live, timeout_s=20, what="server")
        assert not client.is_server_ready()
        assert not client.is_model_ready("radar")
        with pytest.raises(InferenceServerException, match="waiting for"):
            client.infer("radar", [given(heatmap())])
