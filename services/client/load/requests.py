"""The bytes of a request, for each way in which frames can be posted."""

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BODIES = ("npy", "float16", "octet-stream", "json", "v2-binary", "v2-json")

Frames = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go. shape: (C, R, A) of one frame of the live model. prefix: what comes before each path."""

    host: str
    port: int
    is_tls: bool = False
    prefix: str = ""
    model: str = "radar"
    version: int = 0
    shape: tuple[int, ...] = ()
    unit: str = "dB"
    key: str = ""


def request_for(body: str, frames: Frames, target: Target) -> bytes:
    """A whole request, head and body. body: one of BODIES. frames: (B, C, R, A); one goes without a batch axis."""
    posted = frames[0] if len(frames) == 1 else frames
    if body in ("npy", "float16"):
        file = io.BytesIO()
        np.save(file, posted.astype(np.float16 if body == "float16" else np.float32), allow_pickle=False)
        return _request(target, "/v1/classify", "application/x-npy", file.getvalue())
    if body == "octet-stream":
        headers = (f"x-shape: {','.join(map(str, posted.shape))}", "x-dtype: float32")
        return _request(target, "/v1/classify", "application/octet-stream", posted.tobytes(), *headers)
    if body == "json":
        name = "heatmap" if len(frames) == 1 else "heatmaps"
        text = json.dumps({name: posted.tolist()}, separators=(",", ":")).encode()
        return _request(target, "/v1/classify", "application/json", text)
    return _infer(body == "v2-binary", frames, target)


def _infer(is_binary: bool, frames: Frames, target: Target) -> bytes:
    tensor: dict[str, Any] = {"name": "heatmap", "shape": list(frames.shape), "datatype": "FP32"}
    wanted = {"name": "probabilities", "parameters": {"binary_data": is_binary}}
    if is_binary:
        tensor["parameters"] = {"binary_data_size": frames.nbytes}
    else:
        tensor["data"] = frames.reshape(-1).tolist()
    head = json.dumps({"inputs": [tensor], "outputs": [wanted]}, separators=(",", ":")).encode()
    path = f"/v2/models/{target.model}/infer"
    if not is_binary:
        return _request(target, path, "application/json", head)
    length = f"inference-header-content-length: {len(head)}"
    return _request(target, path, "application/octet-stream", head + frames.tobytes(), length)


def _request(target: Target, path: str, content_type: str, body: bytes, *headers: str) -> bytes:
    key = (f"authorization: Bearer {target.key}",) if target.key else ()
    lines = [
        f"POST {target.prefix}{path} HTTP/1.1",
        f"host: {target.host}:{target.port}",
        f"content-type: {content_type}",
        *key,
        *headers,
        f"content-length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
