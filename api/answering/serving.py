"""What every route that answers from a model shares: which model is live, the engine, and what is counted."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from api import problems
from api.answering.calls import Outputs, Terms
from api.answering.engine import ANYBODY, Engine, Limits
from api.answering.shadow import Comparison, Shadow
from api.answering.statistics import Statistics
from api.bodies.frames import Heatmaps
from api.metrics import Metrics
from api.models.classifier import Classifier, Probabilities, Scores
from api.models.live import LiveModel
from api.problems import ProblemError


class Answer(NamedTuple):
    """probabilities: (B, classes) float32. queue_ns: waited for a thread; inference_ns: in the model.

    unknown_scores: (B,) float32; None from a model without a threshold for them.
    """

    probabilities: Probabilities
    queue_ns: int
    inference_ns: int
    unknown_scores: Scores | None = None


class Serving:
    """Answers of the live model, or of one that the caller names, counted."""

    def __init__(
        self,
        live: LiveModel,
        metrics: Metrics,
        *,
        threads: int,
        in_loop_below_ms: float,
        limits: Limits,
    ) -> None:
        self.live = live
        self.statistics = Statistics()
        self._metrics = metrics
        self._engine = Engine(
            threads=threads, in_loop_below_ms=in_loop_below_ms, limits=limits, count_batch=self._count_batch
        )
        self._shadow: Shadow | None = None
        metrics.waiting_frames.set_function(lambda: self._engine.num_waiting_rows)

    @property
    def model(self) -> Classifier:
        """The live model. Take it once a request: the next one may be another's. Raises ProblemError."""
        model = self.live.current
        if model is None:
            raise not_ready(self.live)
        return model

    async def predict(self, model: Classifier, heatmaps: Heatmaps, site: str, terms: Terms = ANYBODY) -> Answer:
        """Probabilities. heatmaps: (B, C, R, A) float32, all of one site, "" if none was named."""
        sites = model.sites(model.site(site)[0], len(heatmaps))
        values, queue_ns, inference_ns = await self.infer(model, heatmaps, sites, model.answers, terms)
        if self._shadow is not None and model is self.live.current:
            self._shadow.offer(heatmaps, site, values[0])
        return Answer(values[0], queue_ns, inference_ns, values[1] if len(values) > 1 else None)

    async def infer(
        self,
        model: Classifier,
        heatmaps: Heatmaps,
        sites: npt.NDArray[np.int64],
        outputs: tuple[str, ...],
        terms: Terms = ANYBODY,
    ) -> Outputs:
        """Any outputs of the graph. heatmaps: (B, C, R, A) float32; sites: (B,) int64, the graph's indices."""
        found = await self._engine.run(model, heatmaps, sites, outputs, terms)
        self._metrics.frames.inc(len(heatmaps))
        self._metrics.queue_s.observe(found.queue_ns / 1e9)
        self.statistics.count(
            model.version, len(heatmaps), queue_ns=found.queue_ns, inference_ns=found.inference_ns
        )
        return found

    async def compare(self, candidate: Classifier, num_frames: int, *, timeout_s: float) -> Comparison:
        """Let a candidate answer, unseen, what the live model is asked. Raises ExportError if it fails."""
        self._shadow = Shadow(candidate, self._engine)
        try:
            return await self._shadow.compare(num_frames, timeout_s=timeout_s)
        finally:
            self._shadow = None

    def close(self) -> None:
        """End the inference threads."""
        self._engine.close()

    def _count_batch(self, model: Classifier, num_rows: int, took_ns: int) -> None:
        self._metrics.inference_s.observe(took_ns / 1e9)
        self._metrics.batch_frames.observe(num_rows)
        self.statistics.count_batch(model.version, num_rows, took_ns)


def not_ready(live: LiveModel) -> ProblemError:
    """The problem of a server that cannot answer (any more, or yet)."""
    what = "the server is stopping" if live.is_stopping else f"waiting for {live.waiting_for}"
    remedy = "ask another server" if live.is_stopping else "try again soon; GET /readyz says when"
    return ProblemError(problems.NOT_READY, what, remedy=remedy, headers={"retry-after": "2"})
