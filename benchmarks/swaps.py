"""Models go live one after another while clients ask without a pause: who is failed, who is misled, what it costs.

    python benchmarks/swaps.py                          1,000 swaps of the tiny model, 8 clients
    python benchmarks/swaps.py --model default          of one as large as the default radar encoder

Each version answers with a number of its own, so that an answer that bears another version's label is found. Half
of the clients post .npy to /v1/classify, half V2 JSON. The next version is promoted, as an operator would, as soon
as an answer of the one before it has come. Ends with status 1 if any answer is not 200 or is missing, if any has a
wrong label, or if the second half of the swaps took 16 MiB more memory than the first.
"""

import argparse
import asyncio
import io
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import uvloop
from serve_models import MODELS, SHAPE, number_of, numbered, publish
from serve_processes import echosight, free_port, rss_mib

from services.core.registry import Registry

MAX_GROWTH_MIB = 16.0
NUM_VERSIONS = 100
"""They are promoted in turn: a version that was live before is loaded anew."""
SWAP_TIMEOUT_S = 60.0


class Load:
    """What all clients have seen. faults: what no client may see, counted."""

    def __init__(self) -> None:
        self.num_answers = 0
        self.newest = 0
        self.faults: Counter[str] = Counter()
        self.is_over = False
        self.came = asyncio.Event()

    def check(self, version: int, probability: float) -> None:
        """An answer with the label `version`, whose first probability says which version made it."""
        self.num_answers += 1
        if number_of(probability) != version:
            self.faults[f"an answer of version {number_of(probability)} is labelled {version}"] += 1
        if version != self.newest:
            self.newest = version
            self.came.set()


class Client(asyncio.Protocol):
    """Posts, checks the answer, posts again."""

    def __init__(self, load: Load, request: bytes) -> None:
        self._load = load
        self._request = request
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._post()

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, found, body = self._answer.partition(b"\r\n\r\n")
        if not found or len(body) < int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]):
            return
        self._is_waiting = False
        if head.startswith(b"HTTP/1.1 200"):
            self._load.check(*_said(orjson.loads(body)))
        else:
            self._load.faults[head[9:12].decode()] += 1
        if self._load.is_over:
            self._transport.close()
        else:
            self._post()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        if self._is_waiting or not self._load.is_over:
            self._load.faults["a connection ended"] += 1
        self.ended.set()

    def _post(self) -> None:
        self._answer = b""
        self._is_waiting = True
        self._transport.write(self._request)


def _said(answer: dict[str, Any]) -> tuple[int, float]:
    """The version that an answer names, and its first probability."""
    if "outputs" in answer:
        return int(answer["model_version"]), answer["outputs"][0]["data"][0]
    return answer["model"]["version"], next(iter(answer["probabilities"].values()))


def requests_of() -> tuple[bytes, bytes]:
    heatmap = np.random.default_rng(0).normal(-60.0, 8.0, size=(1, *SHAPE)).astype(np.float32)
    npy = io.BytesIO()
    np.save(npy, heatmap[0])
    tensor = {"name": "heatmap", "shape": heatmap.shape, "datatype": "FP32"}
    tensor["parameters"] = {"binary_data_size": heatmap.nbytes}
    head = orjson.dumps({"inputs": [tensor], "outputs": [{"name": "probabilities"}]})
    return (
        _request("/v1/classify", npy.getvalue(), "content-type: application/x-npy"),
        _request(
            "/v2/models/radar/infer", head + heatmap.tobytes(), f"inference-header-content-length: {len(head)}"
        ),
    )


def _request(path: str, body: bytes, header: str) -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: api\r\n{header}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


async def swap(port: int, pid: int, registry: Registry, options: argparse.Namespace) -> list[str]:
    """The faults."""
    loop = asyncio.get_running_loop()
    load = Load()
    requests = requests_of()
    clients = [Client(load, requests[number % 2]) for number in range(options.clients)]
    for client in clients:
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)
    versions = registry.versions()
    sizes: list[float] = []
    took_s: list[float] = []
    began_s = time.perf_counter()
    print(f"{'seconds':>8}{'swaps':>7}{'answers':>10}{'MiB resident':>14}{'faults':>8}")
    for number in range(options.swaps + 1):
        if number % max(1, options.swaps // 10) == 0:
            sizes.append(rss_mib(pid))
            row = f"{time.perf_counter() - began_s:8.0f}{number:7}{load.num_answers:10,}{sizes[-1]:14.1f}"
            print(f"{row}{load.faults.total():8}", flush=True)
        if number == options.swaps:
            break
        wanted = versions[(number + 1) % len(versions)]
        started_s = time.perf_counter()
        await asyncio.to_thread(registry.promote, wanted, by="benchmark", why="its turn")
        while load.newest != wanted:
            load.came.clear()
            try:
                await asyncio.wait_for(load.came.wait(), SWAP_TIMEOUT_S)
            except TimeoutError:
                return [*map(str, load.faults), f"version {wanted} does not go live"]
        took_s.append(time.perf_counter() - started_s)
    load.is_over = True
    await asyncio.wait_for(asyncio.gather(*(client.ended.wait() for client in clients)), 60.0)
    took_ms = 1e3 * np.array(took_s)
    print(f"\nfrom promoted to answering: p50 {np.median(took_ms):.0f} ms, most {took_ms.max():.0f} ms")
    half = len(sizes) // 2
    grown_mib = max(sizes[half:]) - max(sizes[:half])
    print(f"memory has grown by {grown_mib:.1f} MiB from the first half to the second")
    faults = [f"{fault} ({count} times)" for fault, count in load.faults.items()]
    return [*faults, "memory has grown"] if grown_mib > MAX_GROWTH_MIB else faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--processes", type=int, default=1, help="of the server (default: %(default)s)")
    parser.add_argument("--model", choices=list(MODELS), default="tiny")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="echosight-swaps-") as folder:
        model = MODELS[options.model]()
        for number in range(1, min(NUM_VERSIONS, options.swaps + 1) + 1):
            publish(Path(folder), numbered(model, number))
        port = free_port()
        settings = {"ECHOSIGHT_LOG_LEVEL": "error", "ECHOSIGHT_POLL_INTERVAL_S": "0.02"}
        server = echosight(Path(folder), port, processes=options.processes, **settings)
        with server as pid:
            faults = uvloop.run(swap(port, pid, Registry(Path(folder) / "models", "radar"), options))
    for fault in faults:
        print(f"wrong: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
