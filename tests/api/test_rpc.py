"""The protocol over gRPC as an existing client speaks it: tritonclient, unmodified, against a process of its own.

No test imports api.rpc: its messages and the client's have the same names, and one process cannot hold both.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto

from api.app import create_app
from api.settings import ApiSettings
from services.core.errors import SettingsError
from tests.api.test_access import make_keys
from tests.api.test_process import api_process
from tests.api.tiny import CLASSES, SHAPE, attach, heatmap, probability_of, publish, registry_of, tiny_model
from tests.system.conftest import wait_for

grpc = pytest.importorskip("grpc", reason="gRPC is an extra")
import tritonclient.grpc as triton  # noqa: E402
from tritonclient.grpc import model_config_pb2, service_pb2  # noqa: E402
from tritonclient.utils import InferenceServerException  # noqa: E402


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def rpc_process(
    data_dir: Path, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], triton.InferenceServerClient]]:
    """A server with gRPC, and a client of it."""
    port = free_port()
    with (
        api_process(data_dir, ECHOSIGHT_GRPC_PORT=str(port), **environment) as (process, _),
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):
        yield process, client


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[triton.InferenceServerClient]:
    """Version 2 is live, 1 is `previous`."""
    data_dir = tmp_path_factory.mktemp("data")
    registry = registry_of(data_dir)
    for _ in range(2):
        version = publish(registry)
        attach(registry, version, tiny_model(version))
        registry.promote(version, by="test", why="test")
    with rpc_process(data_dir, ECHOSIGHT_MAX_BODY_BYTES="100000") as (_, client):
        yield client


def given(array: np.ndarray, datatype: str = "FP32", *, name: str = "heatmap") -> Any:
    return triton.InferInput(name, list(array.shape), datatype).set_data_from_numpy(array)


def first_class(result: Any) -> float:
    return float(result.as_numpy("probabilities")[0, 0])


def test_health_and_metadata(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("radar")
    assert client.is_model_ready("radar", "2")
    assert not client.is_model_ready("radar", "1")
    assert not client.is_model_ready("lidar")
    server = client.get_server_metadata(as_json=True)
    assert server["name"] == "echosight"
    assert "statistics" in server["extensions"]
    model = client.get_model_metadata("radar")
    assert list(model.versions) == ["2"]
    assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in model.inputs] == [
        ("heatmap", "FP32", [-1, *SHAPE]),
        ("site", "BYTES", [-1]),
    ]
    config = client.get_model_config("radar", "2").config
    assert (config.max_batch_size, config.backend) == (64, "onnxruntime")
    assert [list(output.dims) for output in config.output] == [[4], [2]]
    assert config.input[0].data_type == model_config_pb2.TYPE_FP32
    assert list(config.version_policy.specific.versions) == [2]
    assert config.parameters["classes"].string_value == ",".join(CLASSES)


@pytest.mark.parametrize(("datatype", "dtype"), [("FP32", "f4"), ("FP16", "f2"), ("FP64", "f8"), ("UINT8", "u1")])
def test_every_datatype_of_a_heatmap(client: triton.InferenceServerClient, datatype: str, dtype: str) -> None:
    array = np.arange(48).reshape(2, *SHAPE).astype(dtype)
    result = client.infer("radar", [given(array, datatype)], request_id="seven")
    assert result.as_numpy("embedding") == pytest.approx(array.mean(axis=(2, 3)))
    assert first_class(result) == pytest.approx(probability_of(2), abs=1e-6)
    answer = result.get_response()
    assert (answer.id, answer.model_name, answer.model_version) == ("seven", "radar", "2")


def test_typed_contents_are_answered_by_typed_contents(client: triton.InferenceServerClient) -> None:
    request = service_pb2.ModelInferRequest(model_name="radar")
    tensor = request.inputs.add(name="heatmap", datatype="FP32", shape=[1, *SHAPE])
    tensor.contents.fp32_contents.extend(heatmap().ravel().tolist())
    names = request.inputs.add(name="site", datatype="BYTES", shape=[1])
    names.contents.bytes_contents.append(b"north")
    request.outputs.add(name="probabilities")
    request.outputs.add(name="probabilities2")
    with pytest.raises(grpc.RpcError, match="output is 'probabilities2'"):
        client._client_stub.ModelInfer(request)
    del request.outputs[1]
    answer = client._client_stub.ModelInfer(request)
    assert not answer.raw_output_contents
    [output] = answer.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("probabilities", "FP32", [1, 4])
    assert output.contents.fp32_contents[0] == pytest.approx(probability_of(2, site=1), abs=1e-6)


@pytest.mark.parametrize(
    ("datatype", "field", "values", "message"),
    [
        ("UINT8", "uint_contents", [300] * 24, "heatmap: .*send what UINT8 holds"),
        ("FP16", "fp32_contents", [1.0] * 24, "datatype of heatmap is 'FP16'.*raw_input_contents"),
        ("FP32", "fp32_contents", [1.0] * 23, "heatmap has 92 bytes"),
        ("FP32", "fp64_contents", [1.0] * 24, "heatmap has 0 bytes"),
        ("FP32", "fp32_contents", [float("nan")] * 24, "24 of 24 values are NaN"),
    ],
)
def test_typed_contents_that_do_not_fit_are_said(
    client: triton.InferenceServerClient, datatype: str, field: str, values: list[Any], message: str
) -> None:
    request = service_pb2.ModelInferRequest(model_name="radar")
    tensor = request.inputs.add(name="heatmap", datatype=datatype, shape=[1, *SHAPE])
    getattr(tensor.contents, field).extend(values)
    with pytest.raises(grpc.RpcError, match=message) as raised:
        client._client_stub.ModelInfer(request)
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_sites_and_classification(client: triton.InferenceServerClient) -> None:
    names = np.array([b"south", b"", b"new"], dtype=object)
    result = client.infer("radar", [given(heatmap(3, *SHAPE)), given(names, "BYTES", name="site")])
    expected = [probability_of(2, site=site) for site in (2, 0, 0)]
    assert result.as_numpy("probabilities")[:, 0] == pytest.approx(expected, abs=1e-6)
    by_parameter = client.infer("radar", [given(heatmap())], parameters={"site": "north"})
    assert first_class(by_parameter) == pytest.approx(probability_of(2, site=1), abs=1e-6)
    best = client.infer(
        "radar", [given(heatmap())], outputs=[triton.InferRequestedOutput("probabilities", class_count=2)]
    )
    score, index, label = best.as_numpy("probabilities")[0, 0].decode().split(":")
    assert (int(index), label) == (1, CLASSES[1])
    assert float(score) == pytest.approx((1 - probability_of(2)) / 3, abs=1e-6)


def test_asynchronous_and_streamed_inference(client: triton.InferenceServerClient) -> None:
    results: dict[str, Any] = {}
    done = threading.Event()

    def take(result: Any, error: Any) -> None:
        results[result.get_response().id if result else str(error)] = result
        if len(results) == 4:
            done.set()

    for number in range(4):
        client.async_infer("radar", [given(heatmap())], take, request_id=str(number))
    assert done.wait(20.0)
    assert set(results) == set("0123")
    results.clear()
    done.clear()
    client.start_stream(take)
    for number in range(3):
        client.async_stream_infer("radar", [given(heatmap())], request_id=str(number))
    client.async_stream_infer("lidar", [given(heatmap())])
    assert done.wait(20.0)
    client.stop_stream()
    assert list(results)[:3] == list("012")
    assert "this server has 'radar'" in list(results)[3]


def test_versions_are_loaded_listed_asked_and_dropped(client: triton.InferenceServerClient) -> None:
    client.load_model("radar")
    states = {row.version: row.state for row in client.get_model_repository_index().models}
    assert states == {"2": "READY", "1": "READY"}
    assert first_class(client.infer("radar", [given(heatmap())], "previous")) == pytest.approx(
        probability_of(1), abs=1e-6
    )
    client.unload_model("radar")
    with pytest.raises(InferenceServerException, match=r"not loaded.*/load"):
        client.infer("radar", [given(heatmap())], "1")
    client.load_model("radar", config=json.dumps({"version_policy": {"specific": {"versions": [1]}}}))
    assert client.is_model_ready("radar", "1")
    client.unload_model("radar")


def test_statistics_are_those_of_all_ways_to_ask(client: triton.InferenceServerClient) -> None:
    def counts() -> Any:
        [row] = client.get_inference_statistics("radar", "2").model_stats
        return row

    before = counts()
    client.infer("radar", [given(heatmap(5, *SHAPE))])
    after = counts()
    assert after.inference_count - before.inference_count == 5
    assert after.inference_stats.compute_infer.count - before.inference_stats.compute_infer.count == 1
    assert 5 in {row.batch_size for row in after.batch_stats}
    assert client.get_inference_statistics().model_stats[0].version == "2"


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        (lambda c: c.infer("lidar", [given(heatmap())]), "NOT_FOUND", "model is 'lidar'; this server has 'radar'"),
        (lambda c: c.infer("../radar", [given(heatmap())]), "NOT_FOUND", "this server has 'radar'"),
        (lambda c: c.infer("radar", [given(heatmap())], "9"), "NOT_FOUND", "version 9 of radar is not loaded"),
        (lambda c: c.infer("radar", [given(heatmap(2, 2, 2))]), "INVALID_ARGUMENT", r"send \(2, 4, 3\)"),
        (lambda c: c.infer("radar", [given(heatmap(), name="image")]), "INVALID_ARGUMENT", "'image' is unknown"),
        (lambda c: c.infer("radar", [given(heatmap(9999, 24))]), "RESOURCE_EXHAUSTED", "larger than max"),
        (lambda c: c.unload_model("lidar"), "NOT_FOUND", "this server has 'radar'"),
        (lambda c: c.load_model("radar", config="{}"), "INVALID_ARGUMENT", "version_policy"),
        (
            lambda c: c.load_model("radar", config="{}", files={"file:1/model.onnx": b"x"}),
            "INVALID_ARGUMENT",
            "parameter 'file:1/model.onnx' is a file",
        ),
        (lambda c: c.get_trace_settings(), "UNIMPLEMENTED", "Method not found"),
    ],
)
def test_the_client_shows_what_is_wrong_and_the_remedy(
    client: triton.InferenceServerClient, call: Any, code: str, message: str
) -> None:
    with pytest.raises(InferenceServerException, match=message) as raised:
        call(client)
    assert raised.value.status() == f"StatusCode.{code}"


def test_a_server_without_a_model_is_live_and_not_ready(tmp_path: Path) -> None:
    port = free_port()
    with (
        api_process(tmp_path, wait_until="listening", ECHOSIGHT_GRPC_PORT=str(port)),
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):
        assert client.is_server_live()
        assert not client.is_server_ready()
        assert not client.is_model_ready("radar")
        with pytest.raises(InferenceServerException, match="waiting for") as raised:
            client.infer("radar", [given(heatmap())])
        assert raised.value.status() == "StatusCode.UNAVAILABLE"


def test_keys_are_asked_for_as_over_http(tmp_path: Path) -> None:
    registry = registry_of(tmp_path)
    attach(registry, publish(registry), tiny_model(1))
    registry.promote(1, by="test", why="test")
    keys = make_keys(tmp_path / "keys.json")
    with rpc_process(tmp_path, ECHOSIGHT_API_KEYS_FILE=str(tmp_path / "keys.json")) as (_, client):
        assert client.is_server_ready()
        for headers, code in (
            ({}, "UNAUTHENTICATED"),
            ({"authorization": "Bearer wrong"}, "UNAUTHENTICATED"),
            ({"x-api-key": keys["label"]}, "PERMISSION_DENIED"),
        ):
            with pytest.raises(InferenceServerException, match="key") as raised:
                client.infer("radar", [given(heatmap())], headers=headers)
            assert raised.value.status() == f"StatusCode.{code}"
        predicting = {"authorization": f"Bearer {keys['predict']}"}
        assert client.infer("radar", [given(heatmap())], headers=predicting).as_numpy("embedding").size
        with pytest.raises(InferenceServerException, match="needs admin"):
            client.load_model("radar", headers=predicting)


@contextmanager
def dawdling_process(
    tmp_path: Path,
) -> Iterator[tuple["subprocess.Popen[bytes]", triton.InferenceServerClient, int]]:
    """One thread answers, and takes its time where it is asked to; the process, a client, and the HTTP port."""
    registry = registry_of(tmp_path)
    attach(registry, publish(registry), tiny_model(1, can_dawdle=True))
    registry.promote(1, by="test", why="test")
    port = free_port()
    settings = {
        "ECHOSIGHT_GRPC_PORT": str(port),
        "ECHOSIGHT_INFERENCE_THREADS": "1",
        "ECHOSIGHT_IN_LOOP_BELOW_MS": "0",
        "ECHOSIGHT_EXECUTION": "cpu-fp32",
    }
    with (
        api_process(tmp_path, **settings) as (process, http_port),
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):
        yield process, client, http_port


class Calls:
    """Calls in flight, and what came of them by name: a first value, or the status of the error."""

    def __init__(self, client: triton.InferenceServerClient) -> None:
        self._client = client
        self.outcomes: dict[str, Any] = {}

    def ask(self, name: str, frame: np.ndarray, *, output: str = "probabilities", **options: Any) -> Any:
        """returns: what can cancel the call. Calls for other outputs share no batch."""

        def take(result: Any, error: Any) -> None:
            self.outcomes[name] = error.status() if error else float(result.as_numpy(output)[0, 0])

        outputs = [triton.InferRequestedOutput(output)]
        return self._client.async_infer("radar", [given(frame)], take, outputs=outputs, **options)

    def keep_busy(self, http_port: int) -> None:
        """One call in the model, one in line, for a second or more."""
        frame = np.full((1, *SHAPE), 4000.0, np.float32)
        self.ask("one", frame)
        self.ask("other", frame, output="embedding")
        wait_for_frames_in_line(http_port, 1)

    def wait(self, *names: str) -> list[Any]:
        wait_for(lambda: self.outcomes.keys() >= set(names), timeout_s=60, what=f"answers {names}")
        return [self.outcomes[name] for name in names]


def metric(http_port: int, name: str) -> float:
    """The sum over all metrics whose names begin so."""
    lines = httpx.get(f"http://127.0.0.1:{http_port}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def wait_for_frames_in_line(http_port: int, num: int) -> None:
    """What is in the model is not in line any more."""
    wait_for(
        lambda: metric(http_port, "echosight_api_waiting_frames") == num,
        timeout_s=30,
        what=f"{num} frames in line",
    )


LONG_ANSWERS = pytest.approx([probability_of(1), 4000.0])


def test_no_work_is_done_for_a_caller_whose_deadline_passed_or_who_is_gone(tmp_path: Path) -> None:
    infer = 'echosight_api_requests_total{route="/v2/models/{name}/infer",status='
    with dawdling_process(tmp_path) as (_, client, http_port):
        calls = Calls(client)
        calls.keep_busy(http_port)
        gone = calls.ask("gone", heatmap())
        wait_for_frames_in_line(http_port, 2)
        calls.ask("late", heatmap(), client_timeout=0.1)
        assert calls.wait("late") == ["StatusCode.DEADLINE_EXCEEDED"]
        gone.cancel()
        assert calls.wait("one", "other") == LONG_ANSWERS
        assert first_class(client.infer("radar", [given(heatmap())], client_timeout=60.0)) > 0
        assert metric(http_port, "echosight_api_inference_seconds_count") == 3
        assert metric(http_port, f'{infer}"499"') + metric(http_port, f'{infer}"504"') == 2


def test_a_deadline_of_the_protocol_is_kept_too(tmp_path: Path) -> None:
    with dawdling_process(tmp_path) as (_, client, http_port):
        Calls(client).keep_busy(http_port)
        with pytest.raises(InferenceServerException, match=r"the deadline passed after .* ms in line") as raised:
            client.infer("radar", [given(heatmap())], timeout=100_000)  # us
        assert raised.value.status() == "StatusCode.DEADLINE_EXCEEDED"


def test_calls_in_flight_finish_after_sigterm_and_the_process_ends_well(tmp_path: Path) -> None:
    with dawdling_process(tmp_path) as (process, client, http_port):
        calls = Calls(client)
        streamed: list[Any] = []
        client.start_stream(lambda result, error: streamed.append(error or result))
        client.async_stream_infer("radar", [given(heatmap())])
        wait_for(lambda: streamed, timeout_s=30, what="first answer of the stream")
        calls.keep_busy(http_port)
        client.async_stream_infer("radar", [given(heatmap())])
        wait_for_frames_in_line(http_port, 2)
        process.send_signal(signal.SIGTERM)
        assert calls.wait("one", "other") == LONG_ANSWERS
        wait_for(lambda: len(streamed) == 3, timeout_s=10, what="end of the stream")
        assert first_class(streamed[1]) == pytest.approx(probability_of(1))
        assert "the server is stopping; ask another server" in str(streamed[2])
        assert process.wait(timeout=10.0) == 0


def test_sigterm_ends_both_servers(tmp_path: Path) -> None:
    registry = registry_of(tmp_path)
    attach(registry, publish(registry), tiny_model(1))
    registry.promote(1, by="test", why="test")
    with rpc_process(tmp_path) as (process, client):
        assert client.is_server_ready()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20.0) == 0
        wait_for(lambda: not _is_live(client), timeout_s=20, what="end of gRPC")


def _is_live(client: triton.InferenceServerClient) -> bool:
    try:
        return bool(client.is_server_live(client_timeout=2.0))
    except InferenceServerException:
        return False


def test_without_grpc_the_port_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    settings = ApiSettings.read(data_dir=tmp_path, redis_url="", grpc_port=8001)
    with pytest.raises(
        SettingsError, match=r"ECHOSIGHT_GRPC_PORT is 8001.*grpc is not installed.*echosight\[grpc\]"
    ):
        create_app(settings)


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "api", "--port", "0"],
            env=os.environ | {"ECHOSIGHT_DATA_DIR": str(tmp_path), "REDIS_URL": "", "ECHOSIGHT_GRPC_PORT": port},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode != 0
    assert f"gRPC cannot listen at 127.0.0.1:{port}; set ECHOSIGHT_GRPC_PORT" in done.stderr


def test_messages_have_the_numbers_and_types_that_clients_know() -> None:
    code = (
        "import sys; from api.rpc import open_inference_pb2 as pb;"
        "sys.stdout.buffer.write(pb.DESCRIPTOR.serialized_pb)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    ours = FileDescriptorProto.FromString(done.stdout)
    theirs = [
        FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb) for pb in (service_pb2, model_config_pb2)
    ]
    known = {message.name: message for file in theirs for message in file.message_type}
    for message in ours.message_type:
        assert_within(message, known[message.name])
    methods = {method.name: method for method in theirs[0].service[0].method}
    for method in ours.service[0].method:
        known_method = methods[method.name]
        assert (method.input_type, method.output_type) == (known_method.input_type, known_method.output_type)
        assert method.server_streaming == known_method.server_streaming
    values = {value.name: value.number for value in theirs[1].enum_type[0].value}
    assert {value.name: value.number for value in ours.enum_type[0].value}.items() <= values.items()


def assert_within(ours: DescriptorProto, theirs: DescriptorProto) -> None:
    fields = {field.name: field for field in theirs.field}
    for field in ours.field:
        known = fields[field.name]
        for what in ("number", "type", "label", "type_name"):
            assert getattr(field, what) == getattr(known, what), f"{ours.name}.{field.name}: {what}"
    nested = {message.name: message for message in theirs.nested_type}
    for message in ours.nested_type:
        assert_within(message, nested[message.name])
