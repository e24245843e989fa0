"""The models that benchmarks/serve.py serves: random weights, the graph contract of the API."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from services.core.registry import MODEL_FILE, InputContract, Manifest, Parity, Registry

CLASSES = ("empty", "pedestrian", "cyclist", "car")
SITES = ("", "north", "south")
SHAPE = (2, 128, 64)
EMBEDDING = 128


class Graph:
    """Collects nodes and weights of one graph."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(0)

    def add(self, op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype=dtype), name))
        return name

    def random(self, *shape: int) -> str:
        fan_in = int(np.prod(shape[1:])) or 1
        return self.constant(self._rng.normal(0.0, (2.0 / fan_in) ** 0.5, size=shape))

    def conv(self, x: str, channels: tuple[int, int], *, size: int, stride: int = 1, relu: bool = True) -> str:
        weight = self.random(channels[1], channels[0], size, size)
        y = self.add("Conv", x, weight, self.random(channels[1]), strides=[stride] * 2, pads=[size // 2] * 4)
        return self.add("Relu", y) if relu else y

    def linear(self, x: str, sizes: tuple[int, int], *, output: str = "") -> str:
        return self.add("Gemm", x, self.random(sizes[1], sizes[0]), self.random(sizes[1]), transB=1, output=output)

    def finish(self) -> bytes:
        inputs = [
            helper.make_tensor_value_info("heatmap", TensorProto.FLOAT, ["batch", *SHAPE]),
            helper.make_tensor_value_info("site", TensorProto.INT64, ["batch"]),
        ]
        outputs = [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", len(CLASSES)]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", EMBEDDING]),
        ]
        graph = helper.make_graph(self.nodes, "radar", inputs, outputs, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString())


def tiny_model() -> bytes:
    """Mean power per channel, two small layers: the model costs next to nothing, the HTTP path is what is seen."""
    graph = Graph()
    clutter = graph.add("Gather", graph.random(len(SITES), SHAPE[0], 1, 1), "site", axis=0)
    means = graph.add("ReduceMean", "heatmap", axes=[2, 3], keepdims=1)
    flat = graph.add("Flatten", graph.add("Sub", means, clutter))
    embedding = graph.linear(flat, (SHAPE[0], EMBEDDING), output="embedding")
    graph.add("Softmax", graph.linear(embedding, (EMBEDDING, len(CLASSES))), axis=1, output="probabilities")
    return graph.finish()


def default_model() -> bytes:
    """The size of the default radar encoder: 5x5 stem, three residual stages, mean and max pool, head; 0.3 M."""
    graph = Graph()
    clutter = graph.add("Gather", graph.random(len(SITES), *SHAPE), "site", axis=0)
    scaled = graph.add("Mul", graph.add("Sub", "heatmap", clutter), graph.constant(0.05))
    x = graph.conv(scaled, (SHAPE[0], 32), size=5, stride=2)
    for before, after, stride in ((32, 32, 1), (32, 64, 2), (64, 96, 2)):
        inner = graph.conv(x, (before, after), size=3, stride=stride)
        inner = graph.conv(inner, (after, after), size=3, relu=False)
        skip = x if before == after else graph.conv(x, (before, after), size=1, stride=stride, relu=False)
        x = graph.add("Relu", graph.add("Add", inner, skip))
    pooled = graph.add("Concat", graph.add("GlobalAveragePool", x), graph.add("GlobalMaxPool", x), axis=1)
    hidden = graph.add("Relu", graph.linear(graph.add("Flatten", pooled), (192, 256)))
    embedding = graph.linear(hidden, (256, EMBEDDING), output="embedding")
    graph.add("Softmax", graph.linear(embedding, (EMBEDDING, len(CLASSES))), axis=1, output="probabilities")
    return graph.finish()


def vgg_model() -> bytes:
    """VGG-16 as the paper's mode serves it: the map as 224 x 224 pixels, 13 convolutions, two large layers."""
    graph = Graph()
    clutter = graph.add("Gather", graph.random(len(SITES), *SHAPE), "site", axis=0)
    scaled = graph.add("Mul", graph.add("Sub", "heatmap", clutter), graph.constant(0.05))
    scales = graph.constant([1.0, 1.0, 224 / SHAPE[1], 224 / SHAPE[2]])
    x, channels = graph.add("Resize", scaled, "", scales, mode="linear"), SHAPE[0]
    for width, num_layers in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(num_layers):
            x, channels = graph.conv(x, (channels, width), size=3), width
        x = graph.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = graph.add("Relu", graph.linear(graph.add("Flatten", x), (512 * 7 * 7, 4096)))
    embedding = graph.linear(x, (4096, EMBEDDING), output="embedding")
    graph.add("Softmax", graph.linear(embedding, (EMBEDDING, len(CLASSES))), axis=1, output="probabilities")
    return graph.finish()


MODELS = {"tiny": tiny_model, "default": default_model}
_NUMBERS = 2048


def numbered(model: bytes, number: int) -> bytes:
    """`model` as version `number`: as slow, but its probabilities are those of `number` alone."""
    numbered = onnx.ModelProto.FromString(model)
    graph = numbered.graph
    for node in graph.node:
        node.output[:] = ["inner" if name == "probabilities" else name for name in node.output]
    first = number / _NUMBERS
    row = np.array([first, *[(1 - first) / (len(CLASSES) - 1)] * (len(CLASSES) - 1)], np.float32)
    graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "zero"))
    graph.initializer.append(numpy_helper.from_array(row, "row"))
    graph.node.append(helper.make_node("Mul", ["inner", "zero"], ["nothing"]))
    graph.node.append(helper.make_node("Add", ["nothing", "row"], ["probabilities"]))
    onnx.checker.check_model(numbered)
    return bytes(numbered.SerializeToString())


def number_of(probability: float) -> int:
    """The version behind the first probability of an answer of a `numbered` model."""
    return round(probability * _NUMBERS)


def publish(data_dir: Path, model: bytes) -> Path:
    """`model` as a new version and the champion of a registry under `data_dir`; returns the model's path."""
    registry = Registry(data_dir / "models", "radar")

    def describe(version: int) -> Manifest:
        return Manifest(
            name="radar",
            version=version,
            created_at_s=0.0,
            classes=CLASSES,
            input=InputContract(shape=SHAPE),
            sites=SITES,
            architecture={},
            preprocessing={},
            metrics={},
            lineage={},
        )

    version = registry.publish(describe, lambda _: None)
    aside = data_dir / "aside.onnx"
    aside.write_bytes(model)
    parity = Parity(
        num_frames=1, batch_sizes=(1,), max_abs_probability_error=0.0, max_allowed=1.0, num_label_changes=0
    )
    registry.attach_model(version, aside, parity)
    registry.promote(version, by="benchmark", why="its turn")
    return registry.path(version) / MODEL_FILE
