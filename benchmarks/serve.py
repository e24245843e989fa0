"""The hot routes against bare Starlette, plain FastAPI, LitServe and MLServer, on the same ONNX models, in a run.

    python benchmarks/serve.py
    python benchmarks/serve.py --mlserver-python VENV/bin/python       MLServer too, of an environment of its own
    python benchmarks/serve.py --vgg --clients 32 --seconds 20         VGG-16 alone: batching

MLServer's requirements and ours do not go together: `pip install mlserver onnxruntime` in another environment.

Bare Starlette is the least that can be called a server: one route under the same uvicorn that reads the body,
calls numpy.load and the model, and writes the same answer, without checking anything; FastAPI's has a response
model. Every server is its own process; so is the client, which speaks HTTP over raw keep-alive sockets. Rounds of
load go to the servers in turn, and the medians over rounds are compared. Each row names the body that it sends.
The CPU time of a request is that of the server's process: it says more than a rate where other work shares the
cores.

Ours is measured with one process, as the references that call the model in theirs, and with a process a core.

What a model can give at most is measured in the same rounds by bare onnxruntime loops, one a core. HTTP takes a
part of the same cores: its cost is the CPU time of server and client for a request of the tiny model, which itself
takes next to nothing.
"""

import argparse
import asyncio
import base64
import functools
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fastapi
import litserve
import numpy as np
import onnxruntime as ort
import orjson
import pydantic
import uvicorn
import uvloop
from serve_models import CLASSES, MODELS, SHAPE, publish, vgg_model
from serve_processes import cpu_s, echosight, free_port, process, rss_mib
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

LITSERVE = {"LitServe": (), "LitServe zmq": ("--fast-queue",)}
"""Its two ways to hand requests to its worker; the faster one counts."""
REFERENCES = ("Starlette", "FastAPI")
MLSERVER = "MLServer"
CORES = len(os.sched_getaffinity(0))
ALL = f"echosight x{CORES}"
"""Ours with a process a core. Of MLServer and LitServe, too, the faster way to use the cores counts."""
WARM_S = 0.5
TARGET_LITSERVE = 5.0
TARGET_SAME_JSON = 3.5
TARGET_MLSERVER = 9.0
TARGET_BARE_RATIO = 0.9
"""Of .npy and of V2 binary to bare Starlette, on the tiny model."""
TARGET_P99_RATIO = 1.0
"""Of the same at 8 clients."""
TARGET_OF_BARE_LOOPS = 0.9
"""Of the default model, less what HTTP costs; of VGG-16 at the same batch."""
TARGET_VGG_LITSERVE = 1.1
TARGET_RSS_MIB = 300
LITSERVE_BATCH = 16


# The reference: LitServe as its documentation shows it, with the same work and the same answer.


class LitClassifier(litserve.LitAPI):  # type: ignore[misc]
    """Base64 in JSON, the smallest body that LitServe hands over without its form parser, or a list as ours."""

    def setup(self, device: str) -> None:  # noqa: ARG002
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(os.environ["BENCHMARK_THREADS"])
        options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(os.environ["BENCHMARK_MODEL"], options)

    def decode_request(self, request: dict[str, Any]) -> np.ndarray:
        if "shape" not in request:
            return np.array(request["heatmap"], dtype=np.float32)
        heatmap = np.frombuffer(base64.b64decode(request["heatmap"]), dtype=np.float32)
        return heatmap.reshape(request["shape"])

    def predict(self, x: np.ndarray) -> np.ndarray:
        """One frame, or with LitServe's own batching a stack of them."""
        batch = x.reshape(-1, *SHAPE)
        feed = {"heatmap": batch, "site": np.zeros(len(batch), dtype=np.int64)}
        probabilities: np.ndarray = self.session.run(["probabilities"], feed)[0]
        return probabilities if x.ndim == 4 else np.asarray(probabilities[0])

    def encode_response(self, output: np.ndarray) -> dict[str, Any]:
        row = output.tolist()
        return {
            "label": CLASSES[row.index(max(row))],
            "probabilities": dict(zip(CLASSES, row, strict=True)),
            "model": {"name": "radar", "version": 1},
        }


def serve_with_litserve(port: int, *, fast_queue: bool, max_batch: int) -> None:
    batching = {"max_batch_size": max_batch, "batch_timeout": 0.05} if max_batch > 1 else {}
    api = LitClassifier(api_path="/predict", **batching)
    server = litserve.LitServer(api, accelerator="cpu", fast_queue=fast_queue)
    server.run(host="127.0.0.1", port=port, log_level="error", generate_client_file=False, access_log=False)


# The other references: the same work in one route.


class OneModel:
    """The model and the answer that all references share."""

    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(os.environ["BENCHMARK_MODEL"], options)
        self._site = np.zeros(1, dtype=np.int64)

    def answer(self, body: bytes) -> dict[str, Any]:
        heatmap = np.load(io.BytesIO(body))[np.newaxis]
        row = self._session.run(["probabilities"], {"heatmap": heatmap, "site": self._site})[0][0].tolist()
        return {
            "label": CLASSES[row.index(max(row))],
            "probabilities": dict(zip(CLASSES, row, strict=True)),
            "model": {"name": "radar", "version": 1},
        }


class ModelName(pydantic.BaseModel):
    name: str
    version: int


class Classification(pydantic.BaseModel):
    label: str
    probabilities: dict[str, float]
    model: ModelName


def serve_reference(name: str, port: int) -> None:
    model = OneModel()
    if name == "Starlette":

        async def bare(request: Request) -> Response:
            return Response(orjson.dumps(model.answer(await request.body())), media_type="application/json")

        app: Any = Starlette(routes=[Route("/predict", bare, methods=["POST"])])
        app.router.routes.append(Route("/health", lambda _: Response(b"ok")))
    else:
        app = fastapi.FastAPI()

        @app.post("/predict")
        async def predict(request: fastapi.Request) -> Classification:
            return Classification.model_validate(model.answer(await request.body()))

        @app.get("/health")
        async def health() -> str:
            return "ok"

    uvicorn.run(
        app, host="127.0.0.1", port=port, loop="uvloop", http="httptools", log_level="error", access_log=False
    )


# The client.


class Connection(asyncio.Protocol):
    """One client: posts, waits for the whole answer, posts again, until it is told to end."""

    def __init__(self, request: bytes, seconds: list[float], ended: asyncio.Event) -> None:
        self._request = request
        self._seconds = seconds
        self._ended = ended
        self._answer = b""
        self.is_over = False
        self.refusal = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._post()

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, found, body = self._answer.partition(b"\r\n\r\n")
        if not found:
            return
        start = head.lower().index(b"content-length:") + 15
        if len(body) < int(head[start:].split(b"\r\n", 1)[0]):
            return
        if not head.startswith(b"HTTP/1.1 200"):
            self.refusal = self._answer[:500]
            self._transport.close()
            return
        self._seconds.append(time.perf_counter() - self._posted_at_s)
        if self.is_over:
            self._transport.close()
        else:
            self._post()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._ended.set()

    def _post(self) -> None:
        self._answer = b""
        self._posted_at_s = time.perf_counter()
        self._transport.write(self._request)


async def post_for(port: int, request: bytes, *, seconds: float, num_clients: int) -> dict[str, float]:
    """Requests per second and latencies of `num_clients` that post without a pause."""
    loop = asyncio.get_running_loop()
    began_s = time.process_time()
    latencies_s: list[float] = []
    connections, ends = [], []
    for _ in range(num_clients):
        ended = asyncio.Event()
        connection = Connection(request, latencies_s, ended)
        await loop.create_connection(functools.partial(_same, connection), "127.0.0.1", port)
        connections.append(connection)
        ends.append(ended)
    await asyncio.sleep(WARM_S)
    num_warm = len(latencies_s)
    latencies_s.clear()
    started_s = time.perf_counter()
    await asyncio.sleep(seconds)
    elapsed_s, measured_s = time.perf_counter() - started_s, sorted(latencies_s)
    for connection in connections:
        connection.is_over = True
    await asyncio.wait_for(asyncio.gather(*(ended.wait() for ended in ends)), timeout=60.0)
    refusals = [connection.refusal for connection in connections if connection.refusal]
    if refusals or not measured_s:
        raise RuntimeError(f"server answered {(refusals or [b'nothing'])[0]!r}")
    num_requests = num_warm + len(latencies_s)
    return {
        "num_requests": num_requests,
        "client_cpu_us": 1e6 * (time.process_time() - began_s) / num_requests,
        "requests_per_s": len(measured_s) / elapsed_s,
        "p50_ms": 1e3 * measured_s[len(measured_s) // 2],
        "p99_ms": 1e3 * measured_s[int(0.99 * (len(measured_s) - 1))],
    }


def _same(connection: Connection) -> Connection:
    return connection


# The comparison.


@dataclass(frozen=True)
class Row:
    """One server with one body."""

    server: str
    body: str
    port: int
    request: bytes
    pid: int = 0
    """Of its process; 0 where it has more than one."""
    frames: int = 1
    """In a request."""
    clients: int = 0
    """At a time; 0: as many as asked for."""


def requests_for(api_port: int, ports: dict[str, int]) -> list[Row]:
    """ports: of the references that run, by their names."""
    heatmap = np.random.default_rng(1).normal(-60.0, 8.0, size=SHAPE).astype(np.float32)
    npy = io.BytesIO()
    np.save(npy, heatmap)
    nested = orjson.dumps({"heatmap": heatmap.tolist()})
    packed = orjson.dumps({"heatmap": base64.b64encode(heatmap.tobytes()).decode(), "shape": SHAPE})
    tensor = {
        "name": "heatmap",
        "shape": [1, *SHAPE],
        "datatype": "FP32",
        "parameters": {"binary_data_size": heatmap.nbytes},
    }
    # What tritonclient sends when it is asked for the probabilities.
    wanted = {"name": "probabilities", "parameters": {"binary_data": True}}
    head = orjson.dumps({"inputs": [tensor], "outputs": [wanted]})
    raw_headers = (f"x-shape: {','.join(map(str, SHAPE))}", "x-dtype: float32")
    infer = "/v2/models/radar/infer"
    npy_type, json_type, raw_type = "application/x-npy", "application/json", "application/octet-stream"
    mlserver_base64 = {"name": "heatmap", "shape": [1, 1], "datatype": "BYTES"} | {
        "parameters": {"content_type": "base64"},
        "data": [base64.b64encode(heatmap.tobytes()).decode()],
    }
    mlserver_list = {"name": "heatmap", "shape": [1, *SHAPE], "datatype": "FP32", "data": heatmap.ravel().tolist()}
    mlserver_bodies = [("V2 JSON list", mlserver_list), ("base64 in V2 JSON", mlserver_base64)]
    return [
        Row("echosight", ".npy", api_port, _request("/v1/classify", npy_type, npy.getvalue())),
        Row(
            "echosight",
            "octet-stream",
            api_port,
            _request("/v1/classify", raw_type, heatmap.tobytes(), *raw_headers),
        ),
        Row(
            "echosight",
            "V2 binary",
            api_port,
            _request(infer, raw_type, head + heatmap.tobytes(), f"inference-header-content-length: {len(head)}"),
        ),
        Row("echosight", "JSON list", api_port, _request("/v1/classify", json_type, nested)),
        Row(ALL, ".npy", ports[ALL], _request("/v1/classify", npy_type, npy.getvalue())),
        Row(
            ALL,
            "V2 binary",
            ports[ALL],
            _request(infer, raw_type, head + heatmap.tobytes(), f"inference-header-content-length: {len(head)}"),
        ),
        *(Row(name, ".npy", ports[name], _request("/predict", npy_type, npy.getvalue())) for name in REFERENCES),
        *(Row(name, "base64 in JSON", ports[name], _request("/predict", json_type, packed)) for name in LITSERVE),
        *(Row(name, "JSON list", ports[name], _request("/predict", json_type, nested)) for name in LITSERVE),
        *(
            Row(MLSERVER, body, ports[MLSERVER], _request(infer, json_type, orjson.dumps({"inputs": [given]})))
            for body, given in mlserver_bodies
            if MLSERVER in ports
        ),
    ]


def batched_requests_for(api_port: int, ports: dict[str, int]) -> list[Row]:
    """Single frames, for the server to batch, and batches of LITSERVE_BATCH."""
    heatmaps = np.random.default_rng(1).normal(-60.0, 8.0, size=(LITSERVE_BATCH, *SHAPE)).astype(np.float32)
    one, many = io.BytesIO(), io.BytesIO()
    np.save(one, heatmaps[0])
    np.save(many, heatmaps)
    packed = orjson.dumps({"heatmap": base64.b64encode(heatmaps[0].tobytes()).decode(), "shape": SHAPE})
    path, npy_type = "/v1/classify", "application/x-npy"
    several = _request(path, npy_type, many.getvalue())
    return [
        Row("echosight", ".npy", api_port, _request(path, npy_type, one.getvalue())),
        Row("echosight", f".npy of {LITSERVE_BATCH}", api_port, several, frames=LITSERVE_BATCH, clients=CORES),
        *(
            Row(name, "base64 in JSON", ports[name], _request("/predict", "application/json", packed))
            for name in LITSERVE
        ),
    ]


def _request(path: str, content_type: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: 127.0.0.1", f"content-type: {content_type}", *headers]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body


def compare(name: str, model: bytes, options: argparse.Namespace, *, batch: int = 1) -> dict[str, Any]:
    """All rows for one model: medians over rounds in which every row has its turn. batch: LitServe's, if not 1."""
    with tempfile.TemporaryDirectory() as folder:
        path = publish(Path(folder), model)
        with ExitStack() as stack:
            rows = _serve(stack, Path(folder), path, options, batch)
            rounds: list[list[dict[str, float]]] = [[] for _ in rows]
            loops_per_s: list[float] = []
            for _ in range(options.rounds):
                for results, row in zip(rounds, rows, strict=True):
                    results.append(_load(row, options))
                loops_per_s.append(_bare_loops_per_s(path, batch, options))
            rss = rss_mib(rows[0].pid)
    medians: list[dict[str, Any]] = [
        {"server": row.server, "body": row.body}
        | {key: statistics.median(result[key] for result in results) for key in results[0]}
        for row, results in zip(rows, rounds, strict=True)
    ]

    def over(body: str, reference: str, reference_body: str = "", *, key: str = "frames_per_s") -> float:
        """Of rounds, not of their medians: the machine is the same for the rows of one round."""
        return _ratio(rounds, rows, ("echosight", body), (reference, reference_body), key=key)

    found = {
        "model": name,
        "rows": medians,
        "bare_loops_per_s": statistics.median(loops_per_s),
        "api_rss_mib": rss,
    }
    found["of_bare_loops"] = {
        f"{row.server} {row.body}": statistics.median(
            r["frames_per_s"] / bare for r, bare in zip(results, loops_per_s, strict=True)
        )
        for row, results in zip(rows, rounds, strict=True)
        if row.server in ("echosight", ALL)
    }
    found["npy_over_litserve"] = min(over(".npy", name, "base64 in JSON") for name in LITSERVE)
    if batch > 1:
        return found
    found["all_over_one"] = _ratio(rounds, rows, (ALL, ".npy"), ("echosight", ".npy"), key="frames_per_s")
    found["all_over_litserve"] = min(
        _ratio(rounds, rows, (ALL, ".npy"), (name, "base64 in JSON"), key="frames_per_s") for name in LITSERVE
    )
    bodies = (".npy", "octet-stream", "V2 binary")
    fastapi_over_bare = _ratio(rounds, rows, ("FastAPI", ".npy"), ("Starlette", ".npy"), key="frames_per_s")
    found |= {
        "json_over_litserve": min(over("JSON list", name, "JSON list") for name in LITSERVE),
        "over_bare": {body: over(body, "Starlette") for body in bodies},
        "cpu_over_bare": {body: over(body, "Starlette", key="cpu_us") for body in bodies},
        "p99_over_bare": {body: over(body, "Starlette", key="p99_ms") for body in bodies},
        "bare_over_fastapi": 1.0 / fastapi_over_bare,
        "http_us": medians[0]["cpu_us"] + medians[0]["client_cpu_us"],
    }
    if options.mlserver_python:
        found["npy_over_mlserver"] = {
            f"{ours}, over its {row.body}": _ratio(
                rounds, rows, (ours, ".npy"), (MLSERVER, row.body), key="frames_per_s"
            )
            for row in rows
            if row.server == MLSERVER
            for ours in ("echosight", ALL)
        }
    return found


def _serve(stack: ExitStack, folder: Path, path: Path, options: argparse.Namespace, batch: int) -> list[Row]:
    """All servers, until the stack is closed; ours is that of the first row."""
    api_port = free_port()
    api_pid = stack.enter_context(echosight(folder, api_port, processes=1))
    environment = {"BENCHMARK_MODEL": str(path), "BENCHMARK_THREADS": str(CORES if batch > 1 else 1)}
    pids, ports = {"echosight": api_pid}, {}
    if batch == 1:
        port = ports[ALL] = free_port()
        pids[ALL] = stack.enter_context(echosight(folder, port, processes=CORES))
    for name in (*(() if batch > 1 else REFERENCES), *LITSERVE):
        port = ports[name] = free_port()
        is_litserve = name in LITSERVE
        command = (
            ("--litserve-port", str(port), "--litserve-batch", str(batch), *LITSERVE[name])
            if is_litserve
            else ("--reference-port", str(port), "--reference", name)
        )
        reference = process(__file__, *command, health=f"http://127.0.0.1:{port}/health", environment=environment)
        pid = stack.enter_context(reference)
        if not is_litserve:
            pids[name] = pid
    if options.mlserver_python and batch == 1:
        port = ports[MLSERVER] = free_port()
        script = Path(__file__).with_name("serve_mlserver.py")
        health = f"http://127.0.0.1:{port}/v2/models/radar/ready"
        mlserver = process(
            *(str(script), str(port)), health=health, environment=environment, python=options.mlserver_python
        )
        pids[MLSERVER] = stack.enter_context(mlserver)
    rows = batched_requests_for(api_port, ports) if batch > 1 else requests_for(api_port, ports)
    return [replace(row, pid=pids.get(row.server, 0)) for row in rows]


def _ratio(
    rounds: list[list[dict[str, float]]],
    rows: list[Row],
    ours: tuple[str, str],
    theirs: tuple[str, str],
    *,
    key: str,
) -> float:
    """Median over rounds of `key` of one server and body over that of another. No body: the server's first."""
    one = next(index for index, row in enumerate(rows) if (row.server, row.body) == ours)
    other = next(i for i, row in enumerate(rows) if row.server == theirs[0] and theirs[1] in ("", row.body))
    return statistics.median(a[key] / b[key] for a, b in zip(rounds[one], rounds[other], strict=True))


def _load(row: Row, options: argparse.Namespace) -> dict[str, float]:
    """One round against one row, from a process of its own."""
    command = [sys.executable, __file__, "--client-port", str(row.port)]
    command += ["--seconds", str(options.seconds), "--clients", str(row.clients or options.clients)]
    before_s = cpu_s(row.pid)
    done = subprocess.run(command, input=row.request, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{row.server} with {row.body}: {done.stderr.decode()[-800:]}")
    result: dict[str, float] = json.loads(done.stdout)
    num_requests = result.pop("num_requests")
    frames_per_s = row.frames * result["requests_per_s"]
    return result | {"frames_per_s": frames_per_s, "cpu_us": 1e6 * (cpu_s(row.pid) - before_s) / num_requests}


def _bare_loops_per_s(path: Path, batch: int, options: argparse.Namespace) -> float:
    """Frames/s of bare onnxruntime loops, one a core, in a process of their own."""
    command = [sys.executable, __file__, "--bare-loops", str(path), "--litserve-batch", str(batch)]
    done = subprocess.run([*command, "--seconds", str(options.seconds)], capture_output=True, check=True)
    return float(done.stdout)


def loop_bare(path: str, batch: int, seconds: float) -> float:
    """Frames/s of a loop a core, each with a session of one thread."""
    config = ort.SessionOptions()
    config.intra_op_num_threads = config.inter_op_num_threads = 1
    sessions = [ort.InferenceSession(path, config) for _ in range(CORES)]
    feed = {"heatmap": np.zeros((batch, *SHAPE), np.float32), "site": np.zeros(batch, np.int64)}
    for session in sessions:
        session.run(["probabilities"], feed)
    began_s = time.perf_counter()

    def loop(session: Any) -> float:
        """Frames/s, of whole calls in the time that they took."""
        num_calls = 0
        while (elapsed_s := time.perf_counter() - began_s) < seconds or not num_calls:
            session.run(["probabilities"], feed)
            num_calls += 1
        return num_calls * batch / max(elapsed_s, time.perf_counter() - began_s)

    with ThreadPoolExecutor(CORES) as pool:
        return sum(pool.map(loop, sessions))


def less_http(bare_per_s: float, http_us: float) -> float:
    """What bare loops would give if every frame took so much more CPU time of their cores."""
    return CORES * 1e6 / (CORES * 1e6 / bare_per_s + http_us)


def _print(result: dict[str, Any], num_clients: int) -> None:
    print(f"\n{result['model']}, {SHAPE} float32, {num_clients} clients; ", end="")
    print(f"bare onnxruntime loops, one a core: {result['bare_loops_per_s']:,.1f} frames/s")
    print(f"  {'server':14}{'body':19}{'frames/s':>11}{'p50 ms':>9}{'p99 ms':>9}{'CPU us':>9}")
    for row in result["rows"]:
        rate = f"{row['frames_per_s']:>11,.1f}"
        cpu = f"{row['cpu_us']:9.0f}" if row["cpu_us"] else f"{'-':>9}"
        print(f"  {row['server']:14}{row['body']:19}{rate}{row['p50_ms']:>9.2f}{row['p99_ms']:>9.2f}{cpu}")
    for key, what in (
        ("over_bare", "over bare Starlette"),
        ("cpu_over_bare", "CPU time over bare Starlette's"),
        ("p99_over_bare", "p99 over bare Starlette's"),
        ("of_bare_loops", "share of bare onnxruntime loops"),
        ("npy_over_mlserver", ".npy over MLServer"),
        ("of_bare_less_http", "share of bare loops less the cost of HTTP"),
    ):
        if key in result:
            print(f"  {what}: {', '.join(f'{body} {ratio:.2f}' for body, ratio in result[key].items())}")
    for key, what in (
        ("npy_over_litserve", ".npy over LitServe's best body"),
        ("json_over_litserve", "the same JSON over LitServe"),
        ("all_over_litserve", f"{ALL}, .npy over LitServe's best body"),
        ("all_over_one", f"{ALL} over one process"),
        ("bare_over_fastapi", "bare Starlette over FastAPI"),
    ):
        if key in result:
            print(f"  {what}: {result[key]:.2f}")
    if "http_us" in result:
        print(f"  CPU time of server and client for a request: {result['http_us']:.0f} us")
    print(f"  API process {result['api_rss_mib']:.0f} MiB")


def targets(results: dict[str, dict[str, Any]], num_clients: int) -> list[tuple[str, bool]]:
    """What was to be shown, and whether it was."""
    found = [
        (f"{name}: <= {TARGET_RSS_MIB} MiB", r["api_rss_mib"] <= TARGET_RSS_MIB)
        for name, r in results.items()
        if name != "vgg"
    ]
    if "tiny" in results:
        tiny = results["tiny"]
        hot = (".npy", "V2 binary")
        found += [
            (f"tiny: >= {TARGET_LITSERVE:g}x LitServe", tiny["npy_over_litserve"] >= TARGET_LITSERVE),
            (f"tiny: >= {TARGET_SAME_JSON:g}x on the same JSON", tiny["json_over_litserve"] >= TARGET_SAME_JSON),
            (
                f"tiny: .npy and V2 binary >= {TARGET_BARE_RATIO:g}x bare Starlette",
                all(tiny["over_bare"][body] >= TARGET_BARE_RATIO for body in hot),
            ),
        ]
        if num_clients == 8:
            no_worse = all(tiny["p99_over_bare"][body] <= TARGET_P99_RATIO for body in hot)
            found.append(("tiny: p99 no worse than bare Starlette's", no_worse))
        if "npy_over_mlserver" in tiny:
            for ours, ratio in tiny["npy_over_mlserver"].items():
                found.append((f"tiny: >= {TARGET_MLSERVER:g}x MLServer, {ours}", ratio >= TARGET_MLSERVER))
    if "of_bare_less_http" in results.get("default", {}):
        for ours, share in results["default"]["of_bare_less_http"].items():
            is_near = share >= TARGET_OF_BARE_LOOPS
            found.append((f"default: >= {TARGET_OF_BARE_LOOPS:g} of bare loops less HTTP, {ours}", is_near))
    if "vgg" in results:
        vgg = results["vgg"]
        found += [
            (
                f"VGG-16: >= {TARGET_OF_BARE_LOOPS:g} of bare loops at the same batch",
                min(vgg["of_bare_loops"].values()) >= TARGET_OF_BARE_LOOPS,
            ),
            (f"VGG-16: >= {TARGET_VGG_LITSERVE:g}x LitServe", vgg["npy_over_litserve"] >= TARGET_VGG_LITSERVE),
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of load to each server (5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="measured seconds a round (2)")
    parser.add_argument("--clients", type=int, default=8, help="clients at a time (8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--client-port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--litserve-port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--litserve-batch", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--bare-loops", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("tiny", "default"), help="one model alone")
    parser.add_argument(
        "--vgg", action="store_true", help="VGG-16 alone, batched; use many clients and long rounds"
    )
    parser.add_argument("--mlserver-python", help="Python of an environment with mlserver and onnxruntime")
    parser.add_argument("--reference-port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--reference", choices=REFERENCES, help=argparse.SUPPRESS)
    parser.add_argument("--fast-queue", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.litserve_port:
        serve_with_litserve(options.litserve_port, fast_queue=options.fast_queue, max_batch=options.litserve_batch)
        return 0
    if options.reference_port:
        serve_reference(options.reference, options.reference_port)
        return 0
    if options.client_port:
        request = sys.stdin.buffer.read()
        load = post_for(options.client_port, request, seconds=options.seconds, num_clients=options.clients)
        print(json.dumps(uvloop.run(load)))
        return 0
    if options.bare_loops:
        print(loop_bare(options.bare_loops, options.litserve_batch, options.seconds))
        return 0
    if options.vgg:
        results = {"vgg": compare("VGG-16", vgg_model(), options, batch=LITSERVE_BATCH)}
    else:
        chosen = [options.only] if options.only else list(MODELS)
        results = {name: compare(name, MODELS[name](), options) for name in chosen}
    if "tiny" in results and "default" in results:
        default = results["default"]
        bound = less_http(default["bare_loops_per_s"], results["tiny"]["http_us"])
        default["of_bare_less_http"] = {
            row["server"]: row["frames_per_s"] / bound
            for row in default["rows"]
            if row["server"] in ("echosight", ALL) and row["body"] == ".npy"
        }
    shown = targets(results, options.clients)
    is_met = all(is_so for _, is_so in shown)
    if options.json:
        report = {"results": list(results.values()), "targets": dict(shown), "targets_met": is_met}
        print(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())
    else:
        for result in results.values():
            _print(result, options.clients)
        print(f"\nload of the machine {os.getloadavg()[0]:.1f}, {CORES} cores")
        for what, is_so in shown:
            print(f"{'met   ' if is_so else 'MISSED'} {what}")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
