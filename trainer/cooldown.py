"""A cool-down for a release: a copy of the learner whose rate falls to zero; the learner stays as it is.

At a constant rate the weights wander about a minimum; a short fall of the rate settles them (Haegele et al. 2024,
whose shape it has: 1 - sqrt). Nothing of it is saved: killed in the middle, it has cost its steps, and a resume
knows nothing of it.
"""

import copy
import time
from collections.abc import Callable

from trainer.feed import Batch
from trainer.learner import DivergedError, Learner


def cool_down(
    learner: Learner,
    draw: Callable[[], Batch],
    *,
    num_steps: int,
    max_s: float,
    is_stopping: Callable[[], bool] = lambda: False,
    now_s: Callable[[], float] = time.monotonic,
) -> Learner | None:
    """A copy of `learner` after `num_steps` steps down to rate zero, its last weights in place of the average.

    draw: stored pairs, by a random generator that learning does not use. None if it did not get to its end: it
    was told to stop, took longer than `max_s`, or diverged. The rate would not be down yet, and the learner's own
    average is the better release.
    """
    deadline_s = now_s() + max_s
    fork = _copy_of(learner)
    for done in range(num_steps):
        if is_stopping() or now_s() > deadline_s:
            return None
        fork.rate_factor = learner.rate_factor * (1 - (done / num_steps) ** 0.5)
        try:
            fork.step(draw())
        except DivergedError:
            return None
    fork.average.load_state_dict(fork.encoder.state_dict())
    return fork


def _copy_of(learner: Learner) -> Learner:
    """The same state in a learner of its own, on this rank alone: others go on waiting for the one they know."""
    fork = Learner(
        learner.settings.model_copy(update={"precision": learner.precision.dtype}),
        contract=learner.contract,
        key_dim=learner.queue.keys.shape[1],
        device=learner.device,
    )
    fork.restore(copy.deepcopy(learner.state()))
    fork.preprocess = copy.deepcopy(learner.preprocess)
    return fork
