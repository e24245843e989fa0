"""Each call of the protocol as the HTTP request that means the same, and its answer back. Pure.

So there is one implementation of the protocol, whichever way it is asked: limits, keys, statistics and words of
problems are those of /v2. It does not know gRPC, nor who carries a request out.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import orjson
from google.protobuf import json_format  # type: ignore[import-untyped]
from google.protobuf.message import Message  # type: ignore[import-untyped]

from api.bodies import tensors
from api.problems import BAD_REQUEST_VALUE, WRONG_DTYPE, ProblemError
from api.routes.inference import HEADER_LENGTH
from api.rpc import open_inference_pb2 as pb

SERVICE = "inference.GRPCInferenceService"
INFER = "ModelInfer"

_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    tensors.BYTES: "bytes_contents",
}
"""Where InferTensorContents has the elements of a datatype."""
_GONE = (404, 503)
"""What makes a model or a server not ready, where asking for it is no mistake."""
_Parameters = dict[str, bool | int | float | str]


class Request(NamedTuple):
    """path: percent-encoded in all that came from the client. headers: those that the body needs."""

    method: str
    path: str
    body: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Reply(NamedTuple):
    """headers: by their names in lower case."""

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes

    @property
    def is_good(self) -> bool:
        return self.status < 400


class Call(NamedTuple):
    """One method. to_http: raises ProblemError. from_http: None where the reply is a problem of this call."""

    asked: type[Message]
    answered: type[Message]
    to_http: Callable[[Any], Request]
    from_http: Callable[[Any, Reply], Message | None]


def _of_model(name: str, version: str, end: str = "") -> str:
    """Below /v2, of the live version where none is named. Nothing that a client writes can leave its place."""
    version_path = f"/versions/{quote(version, safe='')}" if version else ""
    return f"/v2/models/{quote(name, safe='')}{version_path}{end}"


def _statistics(asked: pb.ModelStatisticsRequest) -> Request:
    path = _of_model(asked.name, asked.version, "/stats") if asked.name else "/v2/models/stats"
    return Request("GET", path)


def _index(asked: pb.RepositoryIndexRequest) -> Request:
    return _posted("index", {"repository_name": asked.repository_name, "ready": asked.ready})


def _load(asked: pb.RepositoryModelLoadRequest) -> Request:
    return _posted(f"models/{quote(asked.model_name, safe='')}/load", {"parameters": _values(asked.parameters)})


def _unload(asked: pb.RepositoryModelUnloadRequest) -> Request:
    return _posted(f"models/{quote(asked.model_name, safe='')}/unload", {"parameters": _values(asked.parameters)})


def _posted(where: str, value: dict[str, Any]) -> Request:
    return Request(
        "POST", f"/v2/repository/{where}", orjson.dumps(value), ((b"content-type", b"application/json"),)
    )


def _values(parameters: Mapping[str, Any]) -> _Parameters:
    """The values of InferParameter or ModelRepositoryParameter by their names. Raises ProblemError for bytes."""
    found: _Parameters = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice == "bytes_param":
            raise ProblemError(
                BAD_REQUEST_VALUE,
                f"parameter {name[:40]!r} is a file",
                remedy="models come from the registry; name a version",
            )
        if choice is not None:
            found[name] = getattr(parameter, choice)
    return found


def _infer(asked: pb.ModelInferRequest) -> Request:
    """JSON that describes the tensors, and their bytes behind it."""
    raw = _raw_inputs(asked)
    header = {
        "parameters": _values(asked.parameters) | {"binary_data_output": True},
        "inputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": list(tensor.shape),
                "parameters": {"binary_data_size": len(data)},
            }
            for tensor, data in zip(asked.inputs, raw, strict=True)
        ],
        "outputs": [
            {"name": output.name, "parameters": _values(output.parameters) | {"binary_data": True}}
            for output in asked.outputs
        ],
    }
    if asked.id:
        header["id"] = asked.id
    head = orjson.dumps(header)
    headers = ((b"content-type", b"application/octet-stream"), (HEADER_LENGTH, b"%d" % len(head)))
    return Request(
        "POST", _of_model(asked.model_name, asked.model_version, "/infer"), b"".join((head, *raw)), headers
    )


def _raw_inputs(asked: pb.ModelInferRequest) -> list[bytes]:
    """The bytes of each input. Raises ProblemError."""
    if not asked.raw_input_contents:
        return [_raw(tensor) for tensor in asked.inputs]
    if len(asked.raw_input_contents) != len(asked.inputs):
        raise ProblemError(
            BAD_REQUEST_VALUE,
            f"raw_input_contents has {len(asked.raw_input_contents)} tensors, inputs are {len(asked.inputs)}",
            remedy="send the bytes of all inputs, in their order, or the contents of all",
        )
    return list(asked.raw_input_contents)


def _raw(tensor: pb.ModelInferRequest.InferInputTensor) -> bytes:
    """The contents of a tensor as bytes. Raises ProblemError."""
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise ProblemError(
            WRONG_DTYPE,
            f"datatype of {tensor.name[:40]} is {tensor.datatype[:40]!r}, which contents do not have",
            remedy=f"send it in raw_input_contents, or as one of {', '.join(_CONTENTS)}",
        )
    values = getattr(tensor.contents, field)
    if tensor.datatype == tensors.BYTES:
        array = np.empty(len(values), dtype=object)
        array[:] = list(values)
        return tensors.to_binary(array)
    try:
        return np.array(values, dtype=tensors.DATATYPES[tensor.datatype]).tobytes()
    except OverflowError as error:
        raise ProblemError(
            WRONG_DTYPE, f"{tensor.name[:40]}: {error}", remedy=f"send what {tensor.datatype} holds"
        ) from None


def _inferred(asked: pb.ModelInferRequest, reply: Reply) -> pb.ModelInferResponse | None:
    """As it was asked: raw where the inputs came raw, or there is a datatype that contents do not have."""
    if not reply.is_good:
        return None
    num_head_bytes = int(reply.headers.get(HEADER_LENGTH, len(reply.body)))
    head = orjson.loads(reply.body[:num_head_bytes])
    answer = pb.ModelInferResponse(
        model_name=head["model_name"], model_version=head["model_version"], id=head.get("id", "")
    )
    is_raw = bool(asked.raw_input_contents) or any(row["datatype"] not in _CONTENTS for row in head["outputs"])
    rest, position = memoryview(reply.body)[num_head_bytes:], 0
    for row in head["outputs"]:
        name, datatype, shape = row["name"], row["datatype"], row["shape"]
        tensor = answer.outputs.add(name=name, datatype=datatype, shape=shape)
        size = row["parameters"]["binary_data_size"]
        data = rest[position : position + size]
        position += size
        if is_raw:
            answer.raw_output_contents.append(bytes(data))
        else:
            array = tensors.from_binary(data, name=name, datatype=datatype, shape=tuple(shape))
            getattr(tensor.contents, _CONTENTS[datatype]).extend(array.reshape(-1).tolist())
    return answer


def _parsed(kind: type[Message], member: str = "") -> Callable[[Any, Reply], Message | None]:
    """The JSON of a reply as a message, or as one member of it."""

    def parse(_: Any, reply: Reply) -> Message | None:
        if not reply.is_good:
            return None
        found = orjson.loads(reply.body)
        return json_format.ParseDict({member: found} if member else found, kind(), ignore_unknown_fields=True)

    return parse


def _is_ready(kind: type[Message]) -> Callable[[Any, Reply], Message | None]:
    """Not being ready is an answer, not a failure to give one."""

    def parse(_: Any, reply: Reply) -> Message | None:
        return kind(ready=reply.is_good) if reply.is_good or reply.status in _GONE else None

    return parse


def _empty(kind: type[Message]) -> Callable[[Any, Reply], Message | None]:
    return lambda _, reply: kind() if reply.is_good else None


CALLS = {
    "ServerLive": Call(
        pb.ServerLiveRequest,
        pb.ServerLiveResponse,
        lambda _: Request("GET", "/v2/health/live"),
        _parsed(pb.ServerLiveResponse),
    ),
    "ServerReady": Call(
        pb.ServerReadyRequest,
        pb.ServerReadyResponse,
        lambda _: Request("GET", "/v2/health/ready"),
        _is_ready(pb.ServerReadyResponse),
    ),
    "ModelReady": Call(
        pb.ModelReadyRequest,
        pb.ModelReadyResponse,
        lambda asked: Request("GET", _of_model(asked.name, asked.version, "/ready")),
        _is_ready(pb.ModelReadyResponse),
    ),
    "ServerMetadata": Call(
        pb.ServerMetadataRequest,
        pb.ServerMetadataResponse,
        lambda _: Request("GET", "/v2"),
        _parsed(pb.ServerMetadataResponse),
    ),
    "ModelMetadata": Call(
        pb.ModelMetadataRequest,
        pb.ModelMetadataResponse,
        lambda asked: Request("GET", _of_model(asked.name, asked.version)),
        _parsed(pb.ModelMetadataResponse),
    ),
    INFER: Call(pb.ModelInferRequest, pb.ModelInferResponse, _infer, _inferred),
    "ModelConfig": Call(
        pb.ModelConfigRequest,
        pb.ModelConfigResponse,
        lambda asked: Request("GET", _of_model(asked.name, asked.version, "/config")),
        _parsed(pb.ModelConfigResponse, "config"),
    ),
    "ModelStatistics": Call(
        pb.ModelStatisticsRequest, pb.ModelStatisticsResponse, _statistics, _parsed(pb.ModelStatisticsResponse)
    ),
    "RepositoryIndex": Call(
        pb.RepositoryIndexRequest,
        pb.RepositoryIndexResponse,
        _index,
        _parsed(pb.RepositoryIndexResponse, "models"),
    ),
    "RepositoryModelLoad": Call(
        pb.RepositoryModelLoadRequest,
        pb.RepositoryModelLoadResponse,
        _load,
        _empty(pb.RepositoryModelLoadResponse),
    ),
    "RepositoryModelUnload": Call(
        pb.RepositoryModelUnloadRequest,
        pb.RepositoryModelUnloadResponse,
        _unload,
        _empty(pb.RepositoryModelUnloadResponse),
    ),
}
