"""An inference of the Open Inference Protocol V2: its body to what the model takes, arrays to its answer.

The body is a JSON object, or one followed by the binary data of its tensors (its length is then in the header
Inference-Header-Content-Length), or the raw bytes of one tensor (that header is 0). Pure.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from api.bodies import tensors
from api.bodies.frames import Heatmaps, as_batch, as_float32, check_dtype, check_json_length, checked_site
from api.models.classifier import Classifier
from api.problems import (
    BAD_REQUEST_VALUE,
    BAD_SITE,
    UNREADABLE_BODY,
    WRONG_DTYPE,
    WRONG_SHAPE,
    ProblemError,
)

HEADER_LENGTH = b"inference-header-content-length"
INPUTS = ("heatmap", "site")
HEATMAP_DATATYPES = {"FP32": "float32", "FP16": "float16", "FP64": "", "UINT8": "uint8"}
"""To the name in an input contract; FP64 stands for whatever Python calls a float, and is always welcome."""
CLASSIFIED = "probabilities"
"""The output that the classification extension works on."""

Array = npt.NDArray[Any]
Inputs = dict[str, tuple[str, Array]]
"""Datatype and array of each input."""
_EXAMPLE = '{"inputs": [{"name": "heatmap", "shape": [1, 2, 128, 64], "datatype": "FP32", "data": [...]}]}'
_MAX_OUTPUTS = 16
_MAX_TIMEOUT_US = 10**12


@dataclass(frozen=True, slots=True)
class Wanted:
    """One output that was asked for. num_classes: the best so many as texts, 0: the tensor itself."""

    name: str
    is_binary: bool
    num_classes: int = 0


@dataclass(frozen=True, slots=True)
class Inference:
    """heatmaps: (B, C, R, A) float32. sites: (B,) int64, the graph's indices. id: to be echoed, "" if none.

    timeout_us: how long the client waits, 0: as long as it takes.
    """

    id: str
    heatmaps: Heatmaps
    sites: npt.NDArray[np.int64]
    wanted: tuple[Wanted, ...]
    timeout_us: int = 0


def read_inference(body: bytes, header_length: bytes | None, model: Classifier, *, max_batch: int) -> Inference:
    """What is asked of `model`. Raises ProblemError."""
    if header_length is not None:
        num_bytes = _header_bytes(header_length, len(body))
        if num_bytes == 0:
            return _read_raw(body, model, max_batch)
        header, rest = body[:num_bytes], memoryview(body)[num_bytes:]
    else:
        header, rest = body, memoryview(b"")
    request = _object(header)
    parameters = _parameters(request, "the request")
    inputs = _inputs(request, rest)
    heatmaps = _heatmaps(inputs, model, max_batch)
    sites = _sites(inputs, parameters.get("site"), model, len(heatmaps))
    request_id = request.get("id", "")
    if not isinstance(request_id, str):
        raise _bad_value(f"id is {str(request_id)[:40]!r}", "send a text")
    is_binary = _flag(parameters, "binary_data_output")
    wanted = _wanted(request.get("outputs"), model, is_binary)
    return Inference(request_id, heatmaps, sites, wanted, _timeout_us(parameters))


def write_inference(
    inference: Inference, values: Mapping[str, Array], model: Classifier
) -> tuple[bytes, int | None]:
    """The body of the answer, and the length of its JSON where binary data follows."""
    outputs: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for wanted in inference.wanted:
        array = values[wanted.name]
        if wanted.num_classes:
            array = best_classes(array, wanted.num_classes, model.classes)
        output: dict[str, Any] = {
            "name": wanted.name,
            "datatype": tensors.datatype_of(array),
            "shape": array.shape,
        }
        if wanted.is_binary:
            parts.append(tensors.to_binary(array))
            output["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            output["data"] = tensors.to_json(array)
        outputs.append(output)
    answer: dict[str, Any] = {
        "model_name": model.manifest.name,
        "model_version": str(model.version),
        "outputs": outputs,
    }
    if inference.id:
        answer["id"] = inference.id
    head = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join((head, *parts)), len(head)) if parts else (head, None)


def best_classes(probabilities: Array, num_classes: int, classes: tuple[str, ...]) -> Array:
    """(B, k) of b"score:index:label", best first: the classification extension."""
    count = min(num_classes, probabilities.shape[1])
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :count]
    texts = np.empty(order.shape, dtype=object)
    for (row, place), index in np.ndenumerate(order):
        texts[row, place] = f"{probabilities[row, index]:f}:{index}:{classes[index]}".encode()
    return texts


def _header_bytes(text: bytes, num_body_bytes: int) -> int:
    if not text.isdigit() or len(text) > 12 or int(text) > num_body_bytes:
        raise ProblemError(
            UNREADABLE_BODY,
            f"Inference-Header-Content-Length is {text[:20].decode('latin-1')!r},"
            f" the body has {num_body_bytes} bytes",
            remedy="say how many bytes of the body are JSON; 0: the body is one raw heatmap",
        )
    return int(text)


def _read_raw(body: bytes, model: Classifier, max_batch: int) -> Inference:
    """Frames of FP32, the datatype of the model's metadata, as many as the bytes are."""
    frame_bytes = 4 * int(np.prod(model.contract.shape))
    num_frames, rest = divmod(len(body), frame_bytes)
    if rest or not body:
        raise ProblemError(
            WRONG_SHAPE,
            f"raw body has {len(body)} bytes, one frame of {list(model.contract.shape)} FP32 takes {frame_bytes}",
            remedy="send whole frames of little-endian float32, or a JSON header that says what they are",
        )
    array = np.frombuffer(body, "<f4").reshape(num_frames, *model.contract.shape)
    heatmaps = as_float32(as_batch(array, model.contract, max_batch)[0])
    return Inference("", heatmaps, model.sites(0, num_frames), _all_outputs(model, is_binary=True))


def _object(header: bytes) -> dict[str, Any]:
    check_json_length(header)
    try:
        request = orjson.loads(header)
    except orjson.JSONDecodeError as error:
        raise ProblemError(
            UNREADABLE_BODY,
            f"JSON is broken at line {error.lineno}, column {error.colno}: {error.msg}",
            remedy=f"send {_EXAMPLE}; with binary data after it, set Inference-Header-Content-Length",
        ) from None
    if not isinstance(request, dict):
        raise ProblemError(
            UNREADABLE_BODY, f"JSON is a {type(request).__name__}, not an object", remedy=f"send {_EXAMPLE}"
        )
    return request


def _inputs(request: dict[str, Any], rest: memoryview) -> Inputs:
    """The tensors by their names; binary data lies in `rest` in their order, and nothing else."""
    rows = request.get("inputs")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ProblemError(UNREADABLE_BODY, f"inputs is {str(rows)[:40]}", remedy=f"send {_EXAMPLE}")
    found: Inputs = {}
    position = 0
    for row in rows:
        name = row.get("name")
        if name not in INPUTS or name in found:
            what = "twice" if isinstance(name, str) and name in found else "unknown to the model"
            raise _bad_value(f"input {str(name)[:40]!r} is {what}", "send heatmap and, if you like, site")
        shape = tensors.check_shape(row.get("shape"), name)
        datatype = row.get("datatype")
        if not isinstance(datatype, str):
            raise _bad_value(f"datatype of {name} is {str(datatype)[:40]}", "send FP32, FP16, FP64 or UINT8")
        size = _parameters(row, name).get("binary_data_size")
        if size is None:
            found[name] = datatype, tensors.from_json(row.get("data"), name=name, datatype=datatype, shape=shape)
            continue
        if type(size) is not int or not 0 <= size <= len(rest) - position:
            raise ProblemError(
                UNREADABLE_BODY,
                f"binary_data_size of {name} is {str(size)[:20]}, {len(rest) - position} bytes are left",
                remedy="send the data of all tensors after the JSON, in their order",
            )
        data = rest[position : position + size]
        found[name] = datatype, tensors.from_binary(data, name=name, datatype=datatype, shape=shape)
        position += size
    if position != len(rest):
        raise ProblemError(
            UNREADABLE_BODY,
            f"{len(rest) - position} bytes follow after the last tensor",
            remedy="set binary_data_size of each input",
        )
    return found


def _heatmaps(inputs: Inputs, model: Classifier, max_batch: int) -> Heatmaps:
    if "heatmap" not in inputs:
        raise _bad_value(f"inputs are {', '.join(inputs)}", f"send {_EXAMPLE}")
    datatype, heatmap = inputs["heatmap"]
    if datatype not in HEATMAP_DATATYPES:
        raise ProblemError(
            WRONG_DTYPE,
            f"datatype of heatmap is {datatype}",
            remedy=f"send one of {', '.join(HEATMAP_DATATYPES)}",
        )
    if HEATMAP_DATATYPES[datatype]:
        check_dtype(HEATMAP_DATATYPES[datatype], model.contract)
    return as_float32(as_batch(heatmap, model.contract, max_batch)[0])


def _sites(inputs: Inputs, named: Any, model: Classifier, num_frames: int) -> npt.NDArray[np.int64]:
    """One index a frame, from the input `site` (names or indices) or from the request's parameter."""
    if "site" not in inputs:
        name = checked_site("" if named is None else named)
        return model.sites(model.site(name)[0], num_frames)
    datatype, tensor = inputs["site"]
    if named is not None:
        raise ProblemError(BAD_SITE, "site is an input and a parameter", remedy="send one of the two")
    if tensor.size not in (1, num_frames):
        raise ProblemError(
            WRONG_SHAPE,
            f"site has {tensor.size} elements for {num_frames} frames",
            remedy="send one, or one for each frame",
        )
    if tensor.dtype == object:
        names = [checked_site(item.decode("latin-1")) for item in tensor.ravel()]
        indices = np.array([model.site(name)[0] for name in names], np.int64)
    elif tensor.dtype.kind in "iu":
        num_sites = max(1, len(model.manifest.sites))
        if not 0 <= int(tensor.min()) <= int(tensor.max()) < num_sites:
            raise ProblemError(
                BAD_SITE,
                f"site reaches from {tensor.min()} to {tensor.max()}",
                remedy=f"send indices of 0 to {num_sites - 1}, 0 for any other site, or names as BYTES",
            )
        indices = tensor.reshape(-1).astype(np.int64)
    else:
        raise ProblemError(
            WRONG_DTYPE,
            f"datatype of site is {datatype}",
            remedy="send names as BYTES, or indices as INT64",
        )
    return np.ascontiguousarray(np.broadcast_to(indices, (num_frames,)))


def _wanted(rows: Any, model: Classifier, is_binary: bool) -> tuple[Wanted, ...]:
    if rows is None or rows == []:
        return _all_outputs(model, is_binary=is_binary)
    if not isinstance(rows, list) or len(rows) > _MAX_OUTPUTS or not all(isinstance(row, dict) for row in rows):
        raise _bad_value(f"outputs is {str(rows)[:40]}", 'send a list of {"name": ...}')
    wanted = tuple(_wanted_one(row, model, is_binary) for row in rows)
    if len({one.name for one in wanted}) < len(wanted):
        raise _bad_value("an output is asked for twice", "name each output once")
    return wanted


def _wanted_one(row: dict[str, Any], model: Classifier, is_binary: bool) -> Wanted:
    name = row.get("name")
    if not isinstance(name, str) or name not in model.outputs:
        raise _bad_value(f"output is {str(name)[:40]!r}", f"ask for {', '.join(model.outputs)}")
    parameters = _parameters(row, name)
    num_classes = parameters.get("classification", 0)
    if type(num_classes) is not int or num_classes < 0 or (num_classes and name != CLASSIFIED):
        raise _bad_value(
            f"classification of {name} is {str(num_classes)[:20]}", f"send a count, for {CLASSIFIED} alone"
        )
    if "shared_memory_region" in parameters:
        raise _bad_value(f"output {name} names shared memory", "ask for it in the answer")
    is_binary = _flag(parameters, "binary_data") if "binary_data" in parameters else is_binary
    return Wanted(name, is_binary, num_classes)


def _all_outputs(model: Classifier, *, is_binary: bool) -> tuple[Wanted, ...]:
    return tuple(Wanted(name, is_binary) for name in model.outputs)


def _parameters(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    parameters = row.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise _bad_value(f"parameters of {name} is {str(parameters)[:40]}", "send an object")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise _bad_value(f"{name} is {str(value)[:20]!r}", "send true or false")
    return value


def _timeout_us(parameters: Mapping[str, Any]) -> int:
    value = parameters.get("timeout", 0)
    if type(value) is not int or not 0 <= value <= _MAX_TIMEOUT_US:
        raise _bad_value(f"timeout is {str(value)[:20]!r}", f"send whole microseconds, at most {_MAX_TIMEOUT_US}")
    return value


def _bad_value(what: str, remedy: str) -> ProblemError:
    return ProblemError(BAD_REQUEST_VALUE, what, remedy=remedy)
