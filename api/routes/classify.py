"""POST /v1/classify, the hot route: read -> decode -> predict -> encode."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import orjson
from starlette.types import Receive, Scope

from api.access.gate import Gate
from api.access.tracing import timed
from api.answering.serving import Answer, Serving
from api.asked import asked_of
from api.bodies.frames import Posted, decode
from api.bodies.reading import BodyReader
from api.models.classifier import Classifier
from api.routes.endpoint import JSON, Endpoint, Reply
from api.routes.terms import terms_of

PATH = "/v1/classify"
DECODE_IN_LOOP_BYTES = 512 * 1024
"""A longer body is decoded on a thread, so that the others do not wait for it."""
_DECODERS = ThreadPoolExecutor(2, "decode")
"""Few: each holds all that a JSON text became, and on more they would only wait for one another."""

T = TypeVar("T")


class Classify(Endpoint):
    """The endpoint."""

    def __init__(self, serving: Serving, reader: BodyReader, gate: Gate, *, max_batch: int) -> None:
        super().__init__(gate, PATH)
        self._serving = serving
        self._reader = reader
        self._max_batch = max_batch

    async def answer(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> Reply:
        started_ns = time.monotonic_ns()
        body = await self._reader.read(scope, headers, receive)
        terms = terms_of(scope, headers, started_ns)
        read_ns = time.monotonic_ns()
        model = self._serving.model
        posted = await decode_posted(body, headers, scope["query_string"], model, max_batch=self._max_batch)
        decoded_ns = time.monotonic_ns()
        answer = await self._serving.predict(model, posted.heatmaps, posted.site, terms)
        timed(
            asked_of(scope).span,
            decode_ns=decoded_ns - read_ns,
            queue_ns=answer.queue_ns,
            inference_ns=answer.inference_ns,
            version=model.version,
            frames=len(posted.heatmaps),
        )
        content = encode(model, posted, answer)
        content["timing_ms"] = {
            "decode": (decoded_ns - read_ns) / 1e6,
            "queue": answer.queue_ns / 1e6,
            "inference": answer.inference_ns / 1e6,
            "total": (time.monotonic_ns() - started_ns) / 1e6,
        }
        return Reply([JSON, (b"x-model-version", b"%d" % model.version)], orjson.dumps(content))


async def decode_posted(
    body: bytes, headers: dict[bytes, bytes], query: bytes, model: Classifier, *, max_batch: int
) -> Posted:
    """The frames of a request, checked against the contract of `model`. Raises ProblemError."""

    def run() -> Posted:
        return decode(body, headers=headers, query=query, contract=model.contract, max_batch=max_batch)

    return run() if len(body) < DECODE_IN_LOOP_BYTES else await on_decoder(run)


async def on_decoder(run: Callable[[], T]) -> T:
    """What `run` returns, on one of the few threads for long bodies."""
    return await asyncio.get_running_loop().run_in_executor(_DECODERS, run)


def encode(model: Classifier, posted: Posted, answer: Answer) -> dict[str, object]:
    """What is answered, without the timing."""
    classes = model.classes
    rows: list[list[float]] = answer.probabilities.tolist()
    results: list[dict[str, object]] = [
        {
            "label": classes[row.index(max(row))],
            "probabilities": {name: round(value, 7) for name, value in zip(classes, row, strict=True)},
        }
        for row in rows
    ]
    threshold = model.unknown_threshold
    if threshold is not None and answer.unknown_scores is not None:
        for result, score in zip(results, answer.unknown_scores.tolist(), strict=True):
            result["unknown"] = {"score": score, "threshold": threshold, "is_unknown": score >= threshold}
    content: dict[str, object] = {"results": results} if posted.is_batch else dict(results[0])
    content["model"] = {"name": model.manifest.name, "version": model.version}
    content["site"] = {"name": posted.site, "known": model.site(posted.site)[1]}
    return content
