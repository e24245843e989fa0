"""What can run a model on this machine: which graph, by which of onnxruntime's execution providers, how exactly.

It opens sessions; which of them is the fastest here is `api.models.execution`'s matter.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from services.core.errors import ExportError, SettingsError
from services.core.registry import INT8_FILE, MODEL_FILE

Name = Literal[
    "cpu-fp32", "cpu-int8", "openvino-fp32", "openvino-bf16", "openvino-int8", "cuda", "tensorrt"
]  # fmt: skip
BATCH = 8
"""Frames of the batch that a compiling provider is given a graph for, beside the one for a single frame."""
CPUINFO = Path("/proc/cpuinfo")
_MAX_STREAMS = 8
_FLAGS = ("amx_int8", "amx_bf16", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512f", "avx2")

ort.set_default_logger_severity(4)  # what fails is raised as well


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run a model. max_error: how far its probabilities may be from the checkpoint's.

    is_tried: whether a measurement on its own account looks at it; what is never the fastest is left to who asks.
    """

    name: Name
    file: str
    provider: str
    max_error: float
    package: str = "onnxruntime"
    openvino_precision: str = ""
    needs_flags: tuple[str, ...] = ()
    is_tried: bool = True


_OPENVINO, _GPU = "onnxruntime-openvino", "onnxruntime-gpu"
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (  # the more exact one first: a later one has to be clearly faster
        Variant("cpu-fp32", MODEL_FILE, "CPUExecutionProvider", 1e-3),
        Variant("openvino-fp32", MODEL_FILE, "OpenVINOExecutionProvider", 1e-3, _OPENVINO, "f32", is_tried=False),
        Variant("cuda", MODEL_FILE, "CUDAExecutionProvider", 0.03, _GPU),
        Variant("tensorrt", MODEL_FILE, "TensorrtExecutionProvider", 0.03, _GPU),
        Variant(
            "openvino-bf16", MODEL_FILE, "OpenVINOExecutionProvider", 0.05, _OPENVINO, "bf16",
            ("amx_bf16", "avx512_bf16"),
        ),
        Variant("cpu-int8", INT8_FILE, "CPUExecutionProvider", 0.15),
        Variant("openvino-int8", INT8_FILE, "OpenVINOExecutionProvider", 0.15, _OPENVINO, "f32"),
    )
}  # fmt: skip
CPU_FP32 = VARIANTS["cpu-fp32"]


class Session(Protocol):
    """What answers: onnxruntime's InferenceSession, or one that looks like it."""

    def run(self, outputs: Sequence[str], feed: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]: ...
    def get_inputs(self) -> list[Any]: ...
    def get_outputs(self) -> list[Any]: ...


class FixedBatches:
    """Answers any batch by a graph for one frame and one for BATCH of them.

    A batch of another size than the last costs OpenVINO milliseconds, and TensorRT a new engine.
    """

    def __init__(self, one: Session, many: Session) -> None:
        self._one = one
        self._many = many
        self.fill_from = BATCH // 2
        """From so many frames on, those left over are filled up to BATCH rather than asked one by one."""

    def get_inputs(self) -> list[Any]:
        return self._one.get_inputs()

    def get_outputs(self) -> list[Any]:
        return self._one.get_outputs()

    def run(self, outputs: Sequence[str], feed: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        num = len(feed["heatmap"])
        if num == 1:
            return self._one.run(outputs, feed)
        if num == BATCH:
            return self._many.run(outputs, feed)
        whole = num - num % BATCH
        parts = [self._many.run(outputs, _rows(feed, start, start + BATCH)) for start in range(0, whole, BATCH)]
        left = num - whole
        if left >= self.fill_from or num == 0:
            rows = np.minimum(np.arange(whole, whole + BATCH), num - 1)
            filled = {name: array[rows] if num else np.zeros((BATCH, *array.shape[1:]), array.dtype)
                      for name, array in feed.items()}  # fmt: skip
            parts.append([value[:left] for value in self._many.run(outputs, filled)])
        else:
            parts += [self._one.run(outputs, _rows(feed, row, row + 1)) for row in range(whole, num)]
        return [np.concatenate(values) for values in zip(*parts, strict=True)]


def has(variant: Variant) -> bool:
    """Whether this onnxruntime has its provider. A GPU's may still find none when it is opened."""
    return variant.provider in ort.get_available_providers()


def candidates(directory: Path, *, has_int8: bool) -> list[Variant]:
    """What is worth measuring for the version in `directory`, the more exact first."""
    flags = cpu_flags()
    return [
        variant
        for variant in VARIANTS.values()
        if variant.is_tried
        and has(variant)
        and (not variant.needs_flags or not flags.isdisjoint(variant.needs_flags))
        and (variant.file != INT8_FILE or (has_int8 and (directory / INT8_FILE).is_file()))
    ]


def wanted(name: str) -> Variant:
    """The variant that a setting asks for. Raises SettingsError if this machine cannot have it."""
    if name not in VARIANTS:
        known = ", ".join(("auto", *VARIANTS))
        raise SettingsError(f"ECHOSIGHT_EXECUTION is {name!r}", remedy=f"use one of {known}")
    variant = VARIANTS[name]
    if not has(variant):
        raise SettingsError(
            f"ECHOSIGHT_EXECUTION is {name}, but onnxruntime {ort.__version__} here has no {variant.provider}",
            remedy=f"install {variant.package} in place of onnxruntime (docs/execution.md), or use auto",
        )
    return variant


def open_session(directory: Path, variant: Variant, *, threads: int, cores: int) -> Session:
    """The version in `directory`, run by `variant`. threads: of one call; `cores // threads` calls run at a time.

    Raises ExportError if it does not load, or the provider is not what came of it.
    """
    model = directory / variant.file
    match variant.provider:
        case "CPUExecutionProvider":
            session: Session = _open(model, variant, {}, threads=threads)
        case "OpenVINOExecutionProvider":
            options = _openvino_options(variant, threads=threads, cores=cores)
            session = _fixed(model, variant, options)
        case "TensorrtExecutionProvider":
            session = _fixed(model, variant, {"trt_fp16_enable": "1"})
        case _:
            session = _open(model, variant, {}, threads=1)
    return session


def cpu_flags(cpuinfo: Path = CPUINFO) -> set[str]:
    """What of the processor's instructions matters here: of matrices, of int8 and of bf16."""
    return set(_cpuinfo(cpuinfo, "flags").split()) & set(_FLAGS)


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """Its model, and the instructions that matter: virtual machines often say no more than the vendor."""
    name = _cpuinfo(cpuinfo, "model name") or "unknown processor"
    return " ".join([name, *sorted(cpu_flags(cpuinfo))])


def _cpuinfo(path: Path, wanted_key: str) -> str:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() == wanted_key), "")


def _fixed(model: Path, variant: Variant, options: dict[str, str]) -> FixedBatches:
    """The provider's threads are its own: onnxruntime's would only wait."""
    one, many = (_open(model, variant, options, threads=1, batch=batch) for batch in (1, BATCH))
    return FixedBatches(one, many)


def _open(
    model: Path, variant: Variant, options: dict[str, str], *, threads: int, batch: int = 0
) -> ort.InferenceSession:
    providers = [(variant.provider, options)] if options else [variant.provider]
    try:
        session = ort.InferenceSession(str(model), _session_options(threads, batch), providers=providers)
    except Exception as error:  # onnxruntime's errors have no common class
        raise ExportError(
            f"{model} does not load as {variant.name}: {_first_line(error)}", remedy="export the version again"
        ) from None
    got = session.get_providers()[0]
    if got != variant.provider:  # it falls back to the CPU without a word
        raise ExportError(
            f"{model} was to run as {variant.name}, but {variant.provider} does not start here",
            remedy="look at its driver and libraries (docs/execution.md)",
        )
    return session


def _session_options(threads: int, batch: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    if batch:
        options.add_free_dimension_override_by_name("batch", batch)
    return options


def _openvino_options(variant: Variant, *, threads: int, cores: int) -> dict[str, str]:
    """One stream a call at a time. Without pinning: pinned streams of two sessions share one core."""
    streams = max(1, min(cores // threads, _MAX_STREAMS))
    config = {
        "INFERENCE_PRECISION_HINT": variant.openvino_precision,
        "NUM_STREAMS": str(streams),
        "INFERENCE_NUM_THREADS": str(streams * threads),
        "ENABLE_CPU_PINNING": "NO",
    }
    return {"device_type": "CPU", "load_config": json.dumps({"CPU": config})}


def _rows(feed: Mapping[str, npt.NDArray[Any]], start: int, end: int) -> dict[str, npt.NDArray[Any]]:
    return {name: array[start:end] for name, array in feed.items()}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
