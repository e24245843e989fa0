"""An exported graph with its encoder in int8, calibrated on stored frames, and whether it may be served.

Static, in the QDQ format: weights by channel, activations unsigned, ReLU and max pooling taken into the
convolution before them, so that onnxruntime (VNNI) and OpenVINO (AMX) both run the encoder in integers. All else
stays in float: preprocessing, head, temperature, norm, unknown score, and small matrices. Frames are read one
batch at a time; no frame that judges has calibrated.
"""

import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from services.core.errors import ExportError
from services.core.frames import FrameId
from services.core.registry import Int8, Manifest
from services.core.store import StoredPair, StoreReader
from trainer.heldout import is_held_out, may_learn

Array = npt.NDArray[np.float32]
Sites = npt.NDArray[np.int64]

MAX_PROBABILITY_ERROR = 0.15
MEAN_PROBABILITY_ERROR = 0.01
MAX_ACCURACY_LOSS = 0.005
MIN_LABELLED = 200
"""With fewer labelled frames half a point is less than one frame."""
MAX_CALIBRATION_FRAMES = 256
MAX_JUDGED_FRAMES = 600
_BATCH = 8
_MIN_FRAMES = 32
_BUDGET_S = 60.0
"""For the calibration, and again for the judgement: a large network sees fewer frames, but never too few."""
_QUANTISED = ("Conv", "Gemm", "MatMul", "Relu", "MaxPool")
_MIN_MATRIX = 1_000_000
"""A product with fewer weights takes no time to speak of, and stays exact."""
_ENCODER = "/encoder/"


@dataclass(frozen=True, slots=True)
class Frames:
    """Stored frames of a store that fit a manifest: what calibrates, and what judges, in a seeded order.

    labels: the class index of a judged frame that a person has named.
    """

    calibrating: Sequence[StoredPair]
    judging: Sequence[StoredPair]
    labels: dict[tuple[str, FrameId], int]


def choose_frames(reader: StoreReader, manifest: Manifest) -> Frames:
    """Named frames of held-out time judge first, then any of held-out time; what may be learnt calibrates.

    Without held-out time (a share of 0) every second stored frame judges.
    """
    share = float(manifest.lineage.get("configuration", {}).get("held_out_share", 0.0))
    pairs = _across_sites(reader.pairs)
    if share > 0:
        calibrating = [pair for pair in pairs if may_learn(pair.site, pair.id.captured_at_ns, share=share)]
        judging = [pair for pair in pairs if is_held_out(pair.site, pair.id.captured_at_ns, share=share)]
    else:
        calibrating, judging = pairs[::2], pairs[1::2]
    named = {
        (pair.site, pair.id): manifest.classes.index(label.label)
        for pair, label in reader.labelled()
        if label.label in manifest.classes
    }
    judging = sorted(judging, key=lambda pair: (pair.site, pair.id) not in named)
    return Frames(calibrating[:MAX_CALIBRATION_FRAMES], judging[:MAX_JUDGED_FRAMES], named)


def quantize(model: Path, to: Path, *, frames: Frames, manifest: Manifest, budget_s: float = _BUDGET_S) -> Int8:
    """Write the int8 graph of `model` to `to`, and say whether it may be served, and why.

    Raises ExportError where there is nothing to quantise or too little to calibrate or judge on; OSError.
    """
    began_s = time.monotonic()
    graph = model.with_suffix(".folded.onnx")
    nodes = _fold_and_find(model, graph)
    reader = _Calibration(frames.calibrating, manifest, budget_s=budget_s)
    logging.disable(logging.WARNING)  # a page of advice on preprocessing, which has been done
    try:
        quantize_static(
            str(graph),
            str(to),
            reader,
            quant_format=QuantFormat.QDQ,
            nodes_to_quantize=nodes,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    finally:
        logging.disable(logging.NOTSET)
        graph.unlink()
    if reader.num_frames < _MIN_FRAMES:
        raise ExportError(
            f"{reader.num_frames} stored frames to calibrate on, {_MIN_FRAMES} are needed",
            remedy="let ingest store more",
        )
    calibrated_s = time.monotonic()
    judged = _judge(model, to, frames, manifest, budget_s=budget_s)
    return judged.model_copy(
        update={
            "num_calibration_frames": reader.num_frames,
            "calibration_s": round(calibrated_s - began_s, 1),
            "judgement_s": round(time.monotonic() - calibrated_s, 1),
        }
    )


def batches(pairs: Sequence[StoredPair], manifest: Manifest) -> Iterator[tuple[list[StoredPair], Array, Sites]]:
    """The pairs that can be read and fit, in batches: them, heatmap (B, C, R, A) float32, site (B,) int64."""
    sites = {site: index for index, site in enumerate(manifest.sites)}
    fitting = ((pair, radar) for pair in pairs if (radar := pair.radar()) and radar.shape == manifest.input.shape)
    for batch in iter(lambda: list(itertools.islice(fitting, _BATCH)), []):
        heatmap = np.stack([radar.heatmap.astype(np.float32) for _, radar in batch])
        site = np.array([sites.get(pair.site, 0) for pair, _ in batch], np.int64)
        yield [pair for pair, _ in batch], heatmap.reshape(-1, *manifest.input.shape), site


class _Calibration(CalibrationDataReader):  # type: ignore[misc]
    """Hands out batches until there are no more, or the time is up and the least was seen."""

    def __init__(self, pairs: Sequence[StoredPair], manifest: Manifest, *, budget_s: float) -> None:
        self.num_frames = 0
        self._batches = batches(pairs, manifest)
        self._ends_s = time.monotonic() + budget_s

    def get_next(self) -> dict[str, npt.NDArray[np.generic]] | None:
        if self.num_frames >= _MIN_FRAMES and time.monotonic() > self._ends_s:
            return None
        _, heatmap, site = next(self._batches, ([], None, None))
        if heatmap is None or site is None:
            return None
        self.num_frames += len(heatmap)
        return {"heatmap": heatmap, "site": site}


def _judge(model: Path, quantized: Path, frames: Frames, manifest: Manifest, *, budget_s: float) -> Int8:
    """fp32 and int8 on the same frames."""
    exact, coarse = _session(model), _session(quantized)
    expected: list[Array] = []
    found: list[Array] = []
    targets: list[int] = []
    began_s = time.monotonic()
    for pairs, heatmap, site in batches(frames.judging, manifest):
        if len(targets) >= MIN_LABELLED and time.monotonic() - began_s > budget_s:
            break
        feed = {"heatmap": heatmap, "site": site}
        expected.append(exact.run(["probabilities"], feed)[0])
        found.append(coarse.run(["probabilities"], feed)[0])
        targets += [frames.labels.get((pair.site, pair.id), -1) for pair in pairs]
    if len(targets) < _MIN_FRAMES:
        raise ExportError(
            f"{len(targets)} stored frames to compare int8 on, {_MIN_FRAMES} are needed",
            remedy="let ingest store more",
        )
    return compare(np.concatenate(expected), np.concatenate(found), np.array(targets))


def compare(expected: Array, found: Array, targets: npt.NDArray[np.int64]) -> Int8:
    """The record of int8 beside fp32. expected, found: (N, classes) float32; targets: (N,), -1 without a label.

    Where labels disagree on at most half a point of the frames, accuracy differs by no more, whatever is right.
    """
    difference = np.abs(found - expected)
    is_number = bool(np.isfinite(found).all())
    error, mean_error = (float(difference.max()), float(difference.mean())) if is_number else (math.inf, math.inf)
    ours, theirs = found.argmax(1), expected.argmax(1)
    named = targets >= 0
    num_named = int(named.sum())
    num_right, num_right_exact = (int((labels == targets)[named].sum()) for labels in (ours, theirs))
    num_changed = int((ours != theirs).sum())
    if num_named >= MIN_LABELLED:
        num_lost, num = num_right_exact - num_right, num_named
        why = f"{100 * num_lost / num:+.2f} points of accuracy lost on {num} held-out labelled frames"
    else:
        num_lost, num = num_changed, len(targets)
        why = f"labels agree on {100 - 100 * num_lost / num:.2f} % of {num} frames that did not calibrate"
    why += f"; probabilities differ by {error:.3f} at most, {mean_error:.4f} on average"
    bounds = f"{100 * MAX_ACCURACY_LOSS:g} points, {MAX_PROBABILITY_ERROR}, {MEAN_PROBABILITY_ERROR}"
    return Int8(
        is_kept=num_lost <= MAX_ACCURACY_LOSS * num
        and error <= MAX_PROBABILITY_ERROR
        and mean_error <= MEAN_PROBABILITY_ERROR,
        why=f"{why}; allowed: {bounds}",
        num_frames=len(targets),
        label_agreement=1 - num_changed / len(targets),
        max_abs_probability_error=error,
        mean_abs_probability_error=mean_error,
        num_labelled=num_named,
        accuracy_fp32=num_right_exact / num_named if num_named else None,
        accuracy_int8=num_right / num_named if num_named else None,
    )


def _fold_and_find(model: Path, to: Path) -> list[str]:
    """A copy of the graph in which every constant stands where it is used; the encoder's nodes to quantise."""
    proto = onnx.load(str(model))
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    kept = []
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in constants:  # the exporter's, for equal weights
            copied = graph.initializer.add()
            copied.CopyFrom(constants[node.input[0]])
            copied.name = node.output[0]
        else:
            kept.append(node)
    nodes = [
        node.name
        for node in kept
        if node.name.startswith(_ENCODER)
        and node.op_type in _QUANTISED
        and (node.op_type not in ("Gemm", "MatMul") or _num_weights(node, constants) >= _MIN_MATRIX)
    ]
    if not nodes:
        raise ExportError("the graph has no encoder layer that could be int8", remedy="it is served in fp32")
    del graph.node[:]
    graph.node.extend(kept)
    onnx.save(proto, str(to))
    return nodes


def _num_weights(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> int:
    return max(math.prod(constants[name].dims) if name in constants else 0 for name in node.input)


def _across_sites(pairs: Sequence[StoredPair]) -> list[StoredPair]:
    """One of each site in turn, each site's in a seeded order: the first n are spread over sites and times."""
    rng = np.random.default_rng(0)
    by_site: dict[str, list[StoredPair]] = {}
    for pair in pairs:
        by_site.setdefault(pair.site, []).append(pair)
    shuffled = [[of_site[i] for i in rng.permutation(len(of_site))] for of_site in by_site.values()]
    turns = itertools.zip_longest(*shuffled)
    return [pair for turn in turns for pair in turn if pair is not None]


def _session(model: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
