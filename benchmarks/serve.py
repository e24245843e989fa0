"""The hot routes against bare Starlette, plain FastAPI and LitServe, on the same ONNX models, in one run.

    python benchmarks/serve.py

Bare Starlette is the least that can be called a server: one route under the same uvicorn that reads the body,
calls numpy.load and the model, and writes the same answer, without checking anything; FastAPI's has a response
model. Every server is its own process; so is the client, which speaks HTTP over raw keep-alive sockets. Rounds of
load go to the servers in turn, and the medians over rounds are compared. Each row names the body that it sends.
The CPU time of a request is that of the server's process: it says more than a rate where other work shares the
cores.
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
from serve_models import CLASSES, MODELS, SHAPE, publish
from serve_processes import cpu_s, free_port, process, rss_mib
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

LITSERVE = {"LitServe": (), "LitServe zmq": ("--fast-queue",)}
"""Its two ways to hand requests to its worker; the faster one counts."""
REFERENCES = ("Starlette", "FastAPI")
WARM_S = 0.5
TARGET_RATIO = 4.0
TARGET_BARE_RATIO = 0.9
"""Of .npy and of V2 binary to bare Starlette, on the tiny model."""
TARGET_RSS_MIB = 300


# The reference: LitServe as its documentation shows it, with the same work and the same answer.


class LitClassifier(litserve.LitAPI):  # type: ignore[misc]
    """Base64 in JSON: the smallest body that LitServe hands over without its form parser."""

    def setup(self, device: str) -> None:  # noqa: ARG002
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(os.environ["BENCHMARK_MODEL"], options)
        self.site = np.zeros(1, dtype=np.int64)

    def decode_request(self, request: dict[str, Any]) -> np.ndarray:
        heatmap = np.frombuffer(base64.b64decode(request["heatmap"]), dtype=np.float32)
        return heatmap.reshape(1, *request["shape"])

    def predict(self, x: np.ndarray) -> np.ndarray:
        probabilities: np.ndarray = self.session.run(["probabilities"], {"heatmap": x, "site": self.site})[0]
        return np.asarray(probabilities[0])

    def encode_response(self, output: np.ndarray) -> dict[str, Any]:
        row = output.tolist()
        return {
            "label": CLASSES[row.index(max(row))],
            "probabilities": dict(zip(CLASSES, row, strict=True)),
            "model": {"name": "radar", "version": 1},
        }


def serve_with_litserve(port: int, *, fast_queue: bool) -> None:
    server = litserve.LitServer(LitClassifier(api_path="/predict"), accelerator="cpu", fast_queue=fast_queue)
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
    return {
        "num_requests": num_warm + len(latencies_s),
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


def requests_for(api_port: int, ports: dict[str, int]) -> list[Row]:
    """ports: of the references, by their names."""
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
        *(Row(name, ".npy", ports[name], _request("/predict", npy_type, npy.getvalue())) for name in REFERENCES),
        *(Row(name, "base64 in JSON", ports[name], _request("/predict", json_type, packed)) for name in LITSERVE),
    ]


def _request(path: str, content_type: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: 127.0.0.1", f"content-type: {content_type}", *headers]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body


def compare(name: str, model: bytes, options: argparse.Namespace) -> dict[str, Any]:
    """All rows for one model: medians over rounds in which every row has its turn."""
    with tempfile.TemporaryDirectory() as folder:
        path = publish(Path(folder), model)
        api_port, ports = free_port(), {name: free_port() for name in (*REFERENCES, *LITSERVE)}
        with ExitStack() as stack:
            api_pid = stack.enter_context(
                process(
                    *("-m", "api", "--port", str(api_port)),
                    health=f"http://127.0.0.1:{api_port}/readyz",
                    environment={"ECHOSIGHT_DATA_DIR": folder, "REDIS_URL": "", "ECHOSIGHT_LOG_LEVEL": "warning"},
                )
            )
            pids: dict[str, int] = {}
            for reference_name, port in ports.items():
                litserve_options = LITSERVE.get(reference_name)
                option = "--reference-port" if litserve_options is None else "--litserve-port"
                chosen = ("--reference", reference_name) if litserve_options is None else litserve_options
                reference = process(
                    *(__file__, option, str(port), *chosen),
                    health=f"http://127.0.0.1:{port}/health",
                    environment={"BENCHMARK_MODEL": str(path)},
                )
                pid = stack.enter_context(reference)
                if reference_name in REFERENCES:
                    pids[reference_name] = pid
            pids["echosight"] = api_pid
            rows = [replace(row, pid=pids.get(row.server, 0)) for row in requests_for(api_port, ports)]
            rounds: list[list[dict[str, float]]] = [[] for _ in rows]
            for _ in range(options.rounds):
                for results, row in zip(rounds, rows, strict=True):
                    results.append(_load(row, options))
            rss = rss_mib(api_pid)
        bare_ms = _bare_ms(path)
    medians: list[dict[str, Any]] = [
        {"server": row.server, "body": row.body}
        | {key: statistics.median(result[key] for result in results) for key in results[0]}
        for row, results in zip(rows, rounds, strict=True)
    ]
    rates = {(median["server"], median["body"]): median["requests_per_s"] for median in medians}
    return {
        "model": name,
        "rows": medians,
        "npy_over_litserve": rates["echosight", ".npy"] / max(rates[name, "base64 in JSON"] for name in LITSERVE),
        # Of rounds, not of their medians: the machine is the same for the rows of one round.
        "over_bare": {
            body: _ratio(rounds, rows, body, "Starlette") for body in (".npy", "octet-stream", "V2 binary")
        },
        "cpu_over_bare": {
            body: _ratio(rounds, rows, body, "Starlette", key="cpu_us")
            for body in (".npy", "octet-stream", "V2 binary")
        },
        "bare_over_fastapi": rates["Starlette", ".npy"] / rates["FastAPI", ".npy"],
        "api_rss_mib": rss,
        "bare_onnxruntime_ms": bare_ms,
    }


def _ratio(
    rounds: list[list[dict[str, float]]],
    rows: list[Row],
    body: str,
    reference: str,
    *,
    key: str = "requests_per_s",
) -> float:
    """Median over rounds of our `key` with `body` over that of `reference` in the same round."""
    [ours] = [index for index, row in enumerate(rows) if (row.server, row.body) == ("echosight", body)]
    [theirs] = [index for index, row in enumerate(rows) if row.server == reference]
    pairs = zip(rounds[ours], rounds[theirs], strict=True)
    return statistics.median(one[key] / other[key] for one, other in pairs)


def _load(row: Row, options: argparse.Namespace) -> dict[str, float]:
    """One round against one row, from a process of its own."""
    command = [sys.executable, __file__, "--client-port", str(row.port)]
    command += ["--seconds", str(options.seconds), "--clients", str(options.clients)]
    before_s = cpu_s(row.pid)
    done = subprocess.run(command, input=row.request, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{row.server} with {row.body}: {done.stderr.decode()[-800:]}")
    result: dict[str, float] = json.loads(done.stdout)
    num_requests = result.pop("num_requests")
    return result | {"cpu_us": 1e6 * (cpu_s(row.pid) - before_s) / num_requests}


def _bare_ms(path: Path) -> float:
    """One frame in a bare onnxruntime loop of one thread, median."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(path), options)
    feed = {"heatmap": np.zeros((1, *SHAPE), np.float32), "site": np.zeros(1, np.int64)}
    times_ms = []
    for _ in range(200):
        started_s = time.perf_counter()
        session.run(["probabilities"], feed)
        times_ms.append(1e3 * (time.perf_counter() - started_s))
    return statistics.median(times_ms)


def _print(result: dict[str, Any], num_clients: int) -> None:
    print(f"\n{result['model']}, {SHAPE} float32, {num_clients} clients; ", end="")
    print(f"bare onnxruntime, 1 thread: {result['bare_onnxruntime_ms']:.3f} ms a frame")
    print(f"  {'server':14}{'body':16}{'requests/s':>11}{'p50 ms':>9}{'p99 ms':>9}{'CPU us':>9}")
    for row in result["rows"]:
        rate = f"{row['requests_per_s']:>11,.0f}"
        cpu = f"{row['cpu_us']:9.0f}" if row["cpu_us"] else f"{'-':>9}"
        print(f"  {row['server']:14}{row['body']:16}{rate}{row['p50_ms']:>9.2f}{row['p99_ms']:>9.2f}{cpu}")
    over_bare = ", ".join(f"{body} {ratio:.2f}x" for body, ratio in result["over_bare"].items())
    cpu = ", ".join(f"{body} {ratio:.2f}x" for body, ratio in result["cpu_over_bare"].items())
    print(f"  CPU time over bare Starlette's: {cpu}")
    print(f"  over bare Starlette: {over_bare}; bare over FastAPI: {result['bare_over_fastapi']:.2f}x")
    print(f"  .npy over LitServe: {result['npy_over_litserve']:.1f}x; API process {result['api_rss_mib']:.0f} MiB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of load to each server (5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="measured seconds a round (2)")
    parser.add_argument("--clients", type=int, default=8, help="clients at a time (8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--client-port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--litserve-port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("tiny", "default"), help="one model alone")
    parser.add_argument("--reference-port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--reference", choices=REFERENCES, help=argparse.SUPPRESS)
    parser.add_argument("--fast-queue", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.litserve_port:
        serve_with_litserve(options.litserve_port, fast_queue=options.fast_queue)
        return 0
    if options.reference_port:
        serve_reference(options.reference, options.reference_port)
        return 0
    if options.client_port:
        request = sys.stdin.buffer.read()
        load = post_for(options.client_port, request, seconds=options.seconds, num_clients=options.clients)
        print(json.dumps(uvloop.run(load)))
        return 0
    chosen = [options.only] if options.only else list(MODELS)
    results = {name: compare(name, MODELS[name](), options) for name in chosen}
    is_met = all(result["api_rss_mib"] <= TARGET_RSS_MIB for result in results.values())
    if "tiny" in results:
        over_bare = results["tiny"]["over_bare"]
        is_met &= results["tiny"]["npy_over_litserve"] >= TARGET_RATIO
        is_met &= min(over_bare[".npy"], over_bare["V2 binary"]) >= TARGET_BARE_RATIO
    if options.json:
        print(
            orjson.dumps(
                {"results": list(results.values()), "targets_met": is_met}, option=orjson.OPT_INDENT_2
            ).decode()
        )
    else:
        for result in results.values():
            _print(result, options.clients)
        targets = (
            f">= {TARGET_RATIO:g}x LitServe, >= {TARGET_BARE_RATIO:g}x bare Starlette, <= {TARGET_RSS_MIB} MiB"
        )
        print(f"\ntargets ({targets}): {'met' if is_met else 'MISSED'}; load {os.getloadavg()[0]:.1f}")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
