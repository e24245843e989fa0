"""What every route that answers from a model shares: which model is live, the engine, and what is counted."""

import numpy as np
import numpy.typing as npt

from api import problems
from api.bodies import Heatmaps
from api.classifier import Classifier
from api.engine import Answer, Engine, Outputs
from api.metrics import Metrics
from api.models import LiveModel
from api.problems import ProblemError
from api.statistics import Statistics


class Serving:
    """Answers of the live model, or of one that the caller names, counted."""

    def __init__(self, live: LiveModel, engine: Engine, metrics: Metrics, statistics: Statistics) -> None:
        self.live = live
        self.statistics = statistics
        self._engine = engine
        self._metrics = metrics

    @property
    def model(self) -> Classifier:
        """The live model. Take it once a request: the next one may be another's. Raises ProblemError."""
        model = self.live.current
        if model is None:
            raise not_ready(self.live)
        return model

    async def predict(self, model: Classifier, heatmaps: Heatmaps, site: str) -> Answer:
        """Probabilities. heatmaps: (B, C, R, A) float32, all of one site, "" if none was named."""
        answer = await self._engine.predict(model, heatmaps, model.site(site)[0])
        self._count(model, len(heatmaps), answer.queue_ns, answer.inference_ns)
        return answer

    async def infer(
        self, model: Classifier, heatmaps: Heatmaps, sites: npt.NDArray[np.int64], outputs: tuple[str, ...]
    ) -> Outputs:
        """Any outputs of the graph. heatmaps: (B, C, R, A) float32; sites: (B,) int64, the graph's indices."""
        answer = await self._engine.infer(model, heatmaps, sites, outputs)
        self._count(model, len(heatmaps), answer.queue_ns, answer.inference_ns)
        return answer

    def _count(self, model: Classifier, num_frames: int, queue_ns: int, inference_ns: int) -> None:
        self._metrics.inference_s.observe(inference_ns / 1e9)
        self._metrics.frames.inc(num_frames)
        self.statistics.count(model.version, num_frames, queue_ns=queue_ns, inference_ns=inference_ns)


def not_ready(live: LiveModel) -> ProblemError:
    """The problem of a server that cannot answer (any more, or yet)."""
    what = "the server is stopping" if live.is_stopping else f"waiting for {live.waiting_for}"
    remedy = "ask another server" if live.is_stopping else "try again soon; GET /readyz says when"
    return ProblemError(problems.NOT_READY, what, remedy=remedy, headers={"retry-after": "2"})
