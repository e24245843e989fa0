"""POST /v1/embed: heatmaps in, embeddings of length 1 out, as JSON or, if the client accepts it, as .npy."""

import io
import time

import numpy as np
import numpy.typing as npt
import orjson
from starlette.types import Receive, Scope

from api.access.gate import Gate
from api.access.tracing import timed
from api.answering.serving import Serving
from api.asked import asked_of
from api.bodies.reading import BodyReader
from api.routes.classify import decode_posted
from api.routes.endpoint import JSON, Endpoint, Reply
from api.routes.terms import terms_of

PATH = "/v1/embed"
_NPY = (b"content-type", b"application/x-npy")
_MIN_NORM = 1e-12


class Embed(Endpoint):
    """The endpoint. Its bodies are those of /v1/classify."""

    def __init__(self, serving: Serving, reader: BodyReader, gate: Gate, *, max_batch: int) -> None:
        super().__init__(gate, PATH)
        self._serving = serving
        self._reader = reader
        self._max_batch = max_batch

    async def answer(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> Reply:
        started_ns = time.monotonic_ns()
        body = await self._reader.read(scope, headers, receive)
        terms = terms_of(scope, headers, started_ns)
        read_ns = time.perf_counter_ns()
        model = self._serving.model
        posted = await decode_posted(body, headers, scope["query_string"], model, max_batch=self._max_batch)
        decoded_ns = time.perf_counter_ns()
        site_index, is_known = model.site(posted.site)
        sites = model.sites(site_index, len(posted.heatmaps))
        outputs = await self._serving.infer(model, posted.heatmaps, sites, ("embedding",), terms)
        timed(
            asked_of(scope).span,
            decode_ns=decoded_ns - read_ns,
            queue_ns=outputs.queue_ns,
            inference_ns=outputs.inference_ns,
            version=model.version,
            frames=len(posted.heatmaps),
        )
        embeddings = unit_norm(outputs.values[0])
        version = (b"x-model-version", b"%d" % model.version)
        if b"application/x-npy" in headers.get(b"accept", b""):
            return Reply([_NPY, version], _npy(embeddings if posted.is_batch else embeddings[0]))
        content = {
            **({"embeddings": embeddings} if posted.is_batch else {"embedding": embeddings[0]}),
            "model": {"name": model.manifest.name, "version": model.version},
            "site": {"name": posted.site, "known": is_known},
        }
        return Reply([JSON, version], orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY))


def unit_norm(embeddings: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """embeddings: (B, D) float32. returns: (B, D) float32, each row of L2 norm 1; a row of zeros stays one."""
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return np.ascontiguousarray(embeddings / np.maximum(norms, _MIN_NORM), dtype=np.float32)


def _npy(array: npt.NDArray[np.float32]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
