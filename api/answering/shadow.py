"""A candidate answers what the live model is asked, and nobody sees its answers: do the two agree on real traffic?

It asks the engine as one caller among others, and lets frames go when it cannot keep up: nobody waits for it.
"""

import asyncio
from typing import NamedTuple

import numpy as np

from api.answering.calls import Terms
from api.answering.engine import Engine
from api.bodies.frames import Heatmaps
from api.models.classifier import Classifier, Probabilities
from api.problems import OVERLOADED, TOO_LATE, ProblemError
from services.core.errors import ExportError

CALLER = "(shadow)"
"""No address and no key is called that."""
_MAX_PENDING = 8


class Comparison(NamedTuple):
    """What was seen. agreement: share of frames that both models give the same class; 1.0 of none."""

    num_frames: int
    agreement: float

    def __str__(self) -> str:
        if not self.num_frames:
            return "no live frame came to compare it on"
        return f"agrees with the live model on {self.agreement:.1%} of {self.num_frames} live frames"


class _Asked(NamedTuple):
    heatmaps: Heatmaps
    site: str
    probabilities: Probabilities


class Shadow:
    """One candidate beside one live model."""

    def __init__(self, candidate: Classifier, engine: Engine) -> None:
        self._candidate = candidate
        self._engine = engine
        self._asked: asyncio.Queue[_Asked] = asyncio.Queue(_MAX_PENDING)

    def offer(self, heatmaps: Heatmaps, site: str, probabilities: Probabilities) -> None:
        """What the live model was asked and has answered: (B, C, R, A) and (B, classes) float32."""
        if not self._asked.full():
            self._asked.put_nowait(_Asked(heatmaps, site, probabilities))

    async def compare(self, num_frames: int, *, timeout_s: float) -> Comparison:
        """Until so many frames were compared, or the time is over. Raises ExportError if the candidate fails."""
        num_seen, num_agreed = 0, 0
        try:
            async with asyncio.timeout(timeout_s):
                while num_seen < num_frames:
                    asked = await self._asked.get()
                    found = await self._answer(asked)
                    if found is None:
                        continue
                    num_seen += len(found)
                    num_agreed += int((found.argmax(1) == asked.probabilities.argmax(1)).sum())
        except TimeoutError:
            pass
        return Comparison(num_seen, num_agreed / num_seen if num_seen else 1.0)

    async def _answer(self, asked: _Asked) -> Probabilities | None:
        model = self._candidate
        sites = model.sites(model.site(asked.site)[0], len(asked.heatmaps))
        try:
            values, _, _ = await self._engine.run(model, asked.heatmaps, sites, model.answers, Terms(CALLER))
        except ProblemError as error:
            if error.kind in (OVERLOADED, TOO_LATE):
                return None
            raise
        except Exception as error:  # onnxruntime's errors have no common class
            raise ExportError(f"fails on a live frame: {str(error)[:200]}") from None
        probabilities: Probabilities = values[0]
        if not np.isfinite(probabilities).all():
            raise ExportError("answers NaN or infinity to a live frame", remedy="look at the checkpoint")
        return probabilities
