"""Runs model calls: at once in the event loop where that is faster than a thread, else on a few threads."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from api.bodies import Heatmaps
from api.classifier import Classifier, Probabilities, Scores


class Answer(NamedTuple):
    """probabilities: (B, classes) float32. queue_ns: waited for a thread; inference_ns: in the model.

    unknown_scores: (B,) float32; None from a model without a threshold for them.
    """

    probabilities: Probabilities
    queue_ns: int
    inference_ns: int
    unknown_scores: Scores | None = None


class Outputs(NamedTuple):
    """values: arrays as the graph gives them, in the order asked for. The times are those of Answer."""

    values: list[npt.NDArray[Any]]
    queue_ns: int
    inference_ns: int


class Engine:
    """As many model calls at a time as there are cores; the others wait in line."""

    def __init__(self, *, threads: int, in_loop_below_ms: float) -> None:
        self.threads = threads
        self._in_loop_below_ms = in_loop_below_ms
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="inference")

    async def predict(self, model: Classifier, heatmaps: Heatmaps, site_index: int) -> Answer:
        """heatmaps: (B, C, R, A) float32."""
        asked_ns = time.perf_counter_ns()
        if model.frame_ms * len(heatmaps) < self._in_loop_below_ms:
            return _predict(model, heatmaps, site_index, asked_ns)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, _predict, model, heatmaps, site_index, asked_ns)

    async def infer(
        self, model: Classifier, heatmaps: Heatmaps, sites: npt.NDArray[np.int64], outputs: tuple[str, ...]
    ) -> Outputs:
        """Any outputs of the graph. heatmaps: (B, C, R, A) float32; sites: (B,) int64."""
        asked_ns = time.perf_counter_ns()
        if model.frame_ms * len(heatmaps) < self._in_loop_below_ms:
            return _infer(model, heatmaps, sites, outputs, asked_ns)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, _infer, model, heatmaps, sites, outputs, asked_ns)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _predict(model: Classifier, heatmaps: Heatmaps, site_index: int, asked_ns: int) -> Answer:
    started_ns = time.perf_counter_ns()
    probabilities, scores = model.answer(heatmaps, site_index)
    return Answer(probabilities, started_ns - asked_ns, time.perf_counter_ns() - started_ns, scores)


def _infer(
    model: Classifier,
    heatmaps: Heatmaps,
    sites: npt.NDArray[np.int64],
    outputs: tuple[str, ...],
    asked_ns: int,
) -> Outputs:
    started_ns = time.perf_counter_ns()
    values = model.run(heatmaps, sites, outputs)
    return Outputs(values, started_ns - asked_ns, time.perf_counter_ns() - started_ns)
