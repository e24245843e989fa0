"""The client: arrays in, predictions out."""

import contextlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlencode

import numpy as np
import numpy.typing as npt

from services.client.errors import RefusedError, StreamClosedError, error_from
from services.client.events import EventStream
from services.client.http import Connection, read_json
from services.client.websocket import WebSocket

Heatmap = npt.NDArray[Any]

BATCH = 32
_NPY = {"content-type": "application/x-npy"}
_WELCOME = ("float32", "float16", "uint8")


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says of one frame. probabilities: by class. version: of the model that said so.

    site: as it was named. is_site_known: whether the model has learnt what is always there at that site.
    is_unknown: whether the frame is like nothing that the model has a name for, so that `label` means little; None
    from a model that cannot tell.
    """

    label: str
    probabilities: dict[str, float]
    version: int
    site: str
    is_site_known: bool
    is_unknown: bool | None = None

    @property
    def confidence(self) -> float:
        """The probability of `label`."""
        return self.probabilities[self.label]


class Client:
    """Keeps a connection open. For one thread at a time; make one for each."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        timeout_s: float = 30.0,
        retries: int = 4,
        api_key: str = "",
    ) -> None:
        """Nothing is sent yet. retries: how often a busy or unreachable server is asked again. api_key: as
        `echosight keys add` printed it, "" for a server without keys.

        Raises UnreachableError for a URL that cannot be one, RefusedError for a key that cannot be one.
        """
        self._connection = Connection(url, timeout_s=timeout_s, retries=retries, api_key=api_key)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def classify(self, heatmap: Heatmap, *, site: str = "") -> Prediction:
        """heatmap: (C, R, A) or (R, A), as the radar delivers it. Raises ClientError."""
        frame = _welcome(heatmap)
        if frame.ndim > 3:
            raise RefusedError(f"heatmap shape is {frame.shape}: several frames", remedy="use classify_many")
        answer = self._post("/v1/classify", _npy(frame), site)
        return _prediction(answer, answer)

    def classify_many(
        self, heatmaps: Sequence[Heatmap] | Heatmap, *, site: str = "", batch: int = BATCH
    ) -> list[Prediction]:
        """One prediction a frame, in their order. heatmaps: (B, C, R, A), or B of (C, R, A). Raises ClientError.

        batch: frames a request, at most what the server allows.
        """
        found: list[Prediction] = []
        for start in range(0, len(heatmaps), batch):
            body = _npy(_stacked(heatmaps[start : start + batch]))
            answer = self._post("/v1/classify", body, site)
            found += [_prediction(row, answer) for row in answer["results"]]
        return found

    def embed(
        self, heatmaps: Sequence[Heatmap] | Heatmap, *, site: str = "", batch: int = BATCH
    ) -> npt.NDArray[np.float32]:
        """(B, D) float32, rows of length 1: their scalar products say how alike frames are. Raises ClientError."""
        parts = []
        for start in range(0, len(heatmaps), batch):
            body = _npy(_stacked(heatmaps[start : start + batch]))
            headers = _NPY | {"accept": "application/x-npy"}
            _, content = self._connection.ask("POST", _path("/v1/embed", site), body=body, headers=headers)
            parts.append(np.load(io.BytesIO(content), allow_pickle=False))
        return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)

    def label(self, label: str, *, site: str, captured_at_ns: int, seq: int, source: str = "client") -> None:
        """Say what the frame (site, captured_at_ns, seq) shows; its last label wins. Raises ClientError."""
        row = {"site": site, "captured_at_ns": captured_at_ns, "seq": seq, "label": label, "source": source}
        headers = {"content-type": "application/json"}
        self._connection.ask("POST", "/v1/labels", body=json.dumps(row).encode(), headers=headers)

    def models(self) -> dict[str, Any]:
        """The registry as GET /v1/models shows it. Raises ClientError."""
        found: dict[str, Any] = read_json(self._connection.ask("GET", "/v1/models")[1])
        return found

    def stream(self, *, site: str = "") -> "Stream":
        """A stream of frames on a connection of its own: less of a round trip than a request each.

        Raises ClientError.
        """
        return Stream(WebSocket(self._connection, _path("/v1/stream", site)))

    def events(self, *, kinds: Sequence[str] = (), sites: Sequence[str] = ()) -> EventStream:
        """What happens from now on, on a connection of its own: all kinds and sites where none are named.

        `prediction` is what the server makes of each frame that a radar streams. Raises ClientError.
        """
        query = urlencode([*(("kind", kind) for kind in kinds), *(("site", site) for site in sites)])
        return EventStream(self._connection.another(), f"/v1/events?{query}" if query else "/v1/events")

    def _post(self, path: str, body: bytes, site: str) -> dict[str, Any]:
        answer: dict[str, Any] = read_json(
            self._connection.ask("POST", _path(path, site), body=body, headers=_NPY)[1]
        )
        return answer


class Stream:
    """Frames go out, predictions come back in that order. For one thread at a time.

    Who says nothing for half a minute is let go by the server: its pings are answered in `receive` only.
    """

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def send(self, heatmap: Heatmap) -> None:
        """heatmap: (C, R, A). Raises StreamClosedError, and RefusedError for what is no array of real numbers."""
        self._websocket.send(_npy(_welcome(heatmap)))

    def receive(self) -> Prediction:
        """The answer to the oldest frame that has none yet.

        Raises RefusedError and the like for a frame that was wrong, after which the stream goes on, and
        StreamClosedError.
        """
        answer = read_json(self._websocket.receive())
        if "status" in answer:
            raise error_from(answer["status"], answer)
        return _prediction(answer, answer)

    def classify(self, heatmaps: Iterable[Heatmap], *, ahead: int = 2) -> Iterator[Prediction]:
        """A prediction for each frame, in their order, while up to `ahead` more are on their way.

        Raises what `receive` raises. However it ends, no answer is left over: the stream can be used again.
        """
        num_waiting = 0
        try:
            for heatmap in heatmaps:
                self.send(heatmap)
                num_waiting += 1
                if num_waiting > ahead:
                    num_waiting -= 1
                    yield self.receive()
            while num_waiting:
                num_waiting -= 1
                yield self.receive()
        finally:
            with contextlib.suppress(StreamClosedError):
                for _ in range(num_waiting):
                    self._websocket.receive()

    def close(self) -> None:
        self._websocket.close()


def _welcome(heatmap: Heatmap) -> Heatmap:
    """In a dtype that the server takes: what Python made float64 becomes float32. Raises RefusedError."""
    try:
        array = np.asarray(heatmap)
    except ValueError as error:  # rows of different lengths
        raise RefusedError(f"heatmap is no array: {error}", remedy="make every row equally long") from None
    if array.dtype.kind not in "biuf":
        raise RefusedError(f"heatmap dtype is {array.dtype}", remedy="send real numbers, power in dB")
    return array if array.dtype.name in _WELCOME else array.astype(np.float32)


def _frame(heatmap: Heatmap) -> Heatmap:
    """A part of a batch: (R, A) has one channel."""
    array = _welcome(heatmap)
    return array[np.newaxis] if array.ndim == 2 else array


def _stacked(heatmaps: Sequence[Heatmap] | Heatmap) -> Heatmap:
    """(B, C, R, A). Raises RefusedError."""
    frames = [_frame(heatmap) for heatmap in heatmaps]
    shapes = {frame.shape for frame in frames}
    if len(shapes) > 1:
        raise RefusedError(f"heatmaps have shapes {sorted(shapes)[:4]}", remedy="send those of one shape together")
    return np.stack(frames)


def _npy(array: Heatmap) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _path(path: str, site: str) -> str:
    return f"{path}?{urlencode({'site': site})}" if site else path


def _prediction(row: dict[str, Any], answer: dict[str, Any]) -> Prediction:
    return Prediction(
        label=row["label"],
        probabilities=row["probabilities"],
        version=answer["model"]["version"],
        site=answer["site"]["name"],
        is_site_known=answer["site"]["known"],
        is_unknown=row["unknown"]["is_unknown"] if "unknown" in row else None,
    )
