"""Models of a few bytes whose answers say which version computed them, and a stand-in for the export child."""

import asyncio
import contextlib
import io
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import uvicorn
from fastapi import FastAPI
from onnx import TensorProto, helper, numpy_helper
from starlette.types import ASGIApp

from api.app import create_app
from api.processes.movable import Switch
from api.server import Server, uvicorn_config
from api.settings import ApiSettings
from services.core.logs import logger
from services.core.registry import CHECKPOINT_FILE, InputContract, Manifest, Parity, Registry

CLASSES = ("empty", "pedestrian", "cyclist", "car")
SITES = ("", "north", "south")
SHAPE = (2, 4, 3)
EXPORTER = Path(__file__).with_name("fake_export.py")
PARITY = Parity(
    num_frames=8, batch_sizes=(1, 8), max_abs_probability_error=1e-7, max_allowed=1e-4, num_label_changes=0
)


def probability_of(version: int, *, site: int = 0) -> float:
    """What `tiny_model(version)` gives for the first class."""
    return version / 1000 + site / 100


def tiny_model(
    version: int,
    *,
    scale: float = 1.0,
    num_classes: int = 4,
    is_nan: bool = False,
    has_unknown: bool = False,
    can_dawdle: bool = False,
) -> bytes:
    """A graph of the contract. scale, num_classes, is_nan: break it. has_unknown: its score is the map's mean.

    can_dawdle: a heatmap with a value of 1000 + n takes it n products of matrices, of some third of a millisecond.
    """
    first = [probability_of(version, site=site) for site in range(len(SITES))]
    rows = np.array([[p, *[(1 - p) / (num_classes - 1)] * (num_classes - 1)] for p in first], np.float32) * scale
    if is_nan:
        rows[:] = np.nan
    nodes = [
        helper.make_node("ReduceMean", ["heatmap"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("ReduceSum", ["means", "one"], ["sum"], keepdims=1),
        helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
        helper.make_node("Gather", ["rows", "site"], ["row"], axis=0),
        helper.make_node("Add", ["row", "nothing"], ["probabilities"]),
        helper.make_node("Identity", ["means"], ["embedding"]),
    ]
    outputs = [
        helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", num_classes]),
        helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", SHAPE[0]]),
    ]
    if has_unknown:
        nodes.append(helper.make_node("ReduceMean", ["heatmap"], ["unknown_score"], axes=[1, 2, 3], keepdims=0))
        outputs.append(helper.make_tensor_value_info("unknown_score", TensorProto.FLOAT, ["batch"]))
    weights = [
        numpy_helper.from_array(rows, "rows"),
        numpy_helper.from_array(np.zeros(1, np.float32), "zero"),
        numpy_helper.from_array(np.ones(1, np.int64), "one"),
    ]
    if can_dawdle:
        nodes[2:3] = _dawdling(weights)
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info("heatmap", TensorProto.FLOAT, ["batch", *SHAPE]),
            helper.make_tensor_value_info("site", TensorProto.INT64, ["batch"]),
        ],
        outputs,
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(onnx.ModelProto.SerializeToString(model))


def _dawdling(weights: list[TensorProto]) -> list[onnx.NodeProto]:
    """Nodes for "nothing", which take their time; their constants are added to `weights`."""
    side = 256
    matrix = [side, side]
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["goes_on"], ["still_goes_on"]),
            helper.make_node("MatMul", ["product", "identity"], ["next_product"]),
        ],
        "step",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("product", TensorProto.FLOAT, matrix),
        ],
        [
            helper.make_tensor_value_info("still_goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next_product", TensorProto.FLOAT, matrix),
        ],
    )
    weights += [
        numpy_helper.from_array(np.array(1000.0, np.float32), "usual"),
        numpy_helper.from_array(np.eye(side, dtype=np.float32), "identity"),
        numpy_helper.from_array(np.array(True), "true"),
    ]
    return [
        helper.make_node("ReduceMax", ["heatmap"], ["highest"], keepdims=0),
        helper.make_node("Sub", ["highest", "usual"], ["beyond"]),
        helper.make_node("Relu", ["beyond"], ["steps"]),
        helper.make_node("Cast", ["steps"], ["num_steps"], to=TensorProto.INT64),
        helper.make_node("Loop", ["num_steps", "true", "identity"], ["last_product"], body=body),
        helper.make_node("ReduceMax", ["last_product"], ["one_again"], keepdims=0),
        helper.make_node("Mul", ["one_again", "zero"], ["none"]),
        helper.make_node("Mul", ["sum", "none"], ["nothing"]),
    ]


def publish(
    registry: Registry,
    *,
    shape: tuple[int, int, int] = SHAPE,
    unknown_threshold: float | None = None,
    abstain_below: float | None = None,
    verdict: str = "promote",
) -> int:
    """A version as the trainer publishes it: a checkpoint, no model yet. verdict: what its gate said."""
    gate = {"verdict": verdict, "why": "+1.0 points [-0.5, 2.5]"}

    def describe(version: int) -> Manifest:
        return Manifest(
            name=registry.name,
            version=version,
            created_at_s=float(version),
            classes=CLASSES,
            input=InputContract(shape=shape, channels=("integrated", "moving")[: shape[0]]),
            sites=SITES,
            architecture={},
            preprocessing={},
            metrics={"probe_accuracy": 0.9} | ({} if verdict == "promote" else {"gate": gate}),
            lineage={},
            unknown_threshold=unknown_threshold,
            abstain_below=abstain_below,
        )

    return registry.publish(describe, lambda directory: _write(directory / CHECKPOINT_FILE, b"weights"))


def attach(registry: Registry, version: int, model: bytes) -> None:
    """What a good export leaves."""
    aside = registry.dir / f".{version}.test"
    aside.write_bytes(model)
    registry.attach_model(version, aside, PARITY)


def publish_champion(registry: Registry) -> int:
    version = publish(registry)
    attach(registry, version, tiny_model(version))
    registry.promote(version, by="test", why="test")
    return version


def export_command(models_dir: Path) -> Sequence[str]:
    """A child that attaches `models_dir/VERSION.onnx`; see fake_export.py for what else it can be told."""
    models_dir.mkdir(exist_ok=True)
    return (sys.executable, str(EXPORTER), "--models-dir", str(models_dir))


def registry_of(data_dir: Path) -> Registry:
    return Registry(data_dir / "models", "radar")


@contextlib.asynccontextmanager
async def serving(data_dir: Path, **settings: Any) -> AsyncIterator[tuple[FastAPI, httpx.AsyncClient]]:
    """A running app on `data_dir` and a client for it, in this process, without a socket."""
    given = {"poll_interval_s": 0.02, "inference_threads": 2, **settings}
    app = create_app(
        ApiSettings.read(data_dir=data_dir, redis_url=given.pop("redis_url", ""), **given),
        export_command=export_command(data_dir / "prepared"),
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://api") as client,
    ):
        yield app, client


@contextlib.asynccontextmanager
async def listening(data_dir: Path, **settings: Any) -> AsyncIterator[tuple[FastAPI, str]]:
    """A running app that listens on a free port, in this process; yields it and its address, host:port."""
    given = {"poll_interval_s": 0.02, "inference_threads": 2, "redis_url": "", "api_port": 0, **settings}
    read = ApiSettings.read(data_dir=data_dir, **given)
    app = create_app(read, export_command=export_command(data_dir / "prepared"))
    server = Server(uvicorn_config(app, read, switch=app.state.pool), live=app.state.live, log=logger("test"))
    serving = asyncio.create_task(server.serve())
    try:
        await until(lambda: server.started and (app.state.live.is_ready or app.state.live.waiting_for))
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        yield app, f"{host}:{port}"
    finally:
        app.state.live.is_stopping = True
        server.should_exit = True
        await serving


@contextlib.asynccontextmanager
async def answering(app: ASGIApp, *, switch: Switch | None = None) -> AsyncIterator[uvicorn.Server]:
    """Any ASGI app behind the server's own protocol, on a free port, in this process."""
    config = uvicorn_config(app, ApiSettings.read(api_port=0), switch=switch)
    config.lifespan = "off"
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    try:
        yield server
    finally:
        server.should_exit = True
        await serving


async def until(is_so: Callable[[], Any], *, timeout_s: float = 60.0) -> None:
    """Wait for a condition, with a deadline."""
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s, "waited in vain"
        await asyncio.sleep(0.01)


def npy(array: Any, *, version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), version=version, allow_pickle=True)
    return file.getvalue()


def heatmap(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.arange(int(np.prod(shape or SHAPE)), dtype=dtype).reshape(shape or SHAPE)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
