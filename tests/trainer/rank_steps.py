"""Steps on batches that follow from a seed, by as many ranks as torchrun started; the leader prints losses."""

import json
import sys

import numpy as np
import torch

from services.core.logs import logger
from services.core.registry import InputContract
from trainer.distributed import LeadingLearner, follow
from trainer.feed import Batch
from trainer.learner import Learner
from trainer.queue import Scenes
from trainer.ranks import Ranks
from trainer.settings import TrainerSettings

SHAPE, KEY_DIM, BATCH, CPU = (2, 16, 8), 12, 24, torch.device("cpu")


def settings_of(**changes: object) -> TrainerSettings:
    """Without augmentation: its noise differs between ranks, and so between their numbers."""
    plain = {"mirror_share": 0.0, "gain_jitter_db": 0.0, "noise_db": 0.0, "shift_bins": 0, "precision": "fp32"}
    return TrainerSettings(
        batch_size=BATCH, queue_size=40, warmup_steps=2, exclude_within_s=0.0, **plain | changes
    )


def take_steps(learner: Learner, num: int) -> list[float]:
    """Losses; the learner is put back to its own state half-way, as after a resume."""
    rng = np.random.default_rng(0)
    learner.set_input(rng.normal(0, 1, (2, *SHAPE)).astype(np.float32), scale=2.0)
    losses = []
    for step in range(num):
        if step == num // 2:
            learner.restore(learner.state())
        heatmap = torch.from_numpy(rng.normal(0, 2, (BATCH, *SHAPE)).astype(np.float32))
        k = heatmap.mean((2, 3)) @ torch.from_numpy(rng.normal(0, 1, (2, KEY_DIM)).astype(np.float32))
        at = torch.arange(step * BATCH, (step + 1) * BATCH)
        batch = Batch(
            heatmap=heatmap,
            site=torch.ones(BATCH, dtype=torch.int64),
            mirrored=torch.zeros(BATCH, dtype=torch.bool),
            k=k,
            scenes=Scenes(id=at, site=torch.zeros_like(at), at_ns=at * 1_000_000),
        )
        losses.append(float(learner.step(batch).loss))
    return losses


def main() -> None:
    torch.set_num_threads(1)
    settings, ranks = settings_of(**json.loads(sys.argv[1])), Ranks.join(wants_cuda=False)
    if ranks.leads:
        contract = InputContract(shape=SHAPE)
        learner = LeadingLearner(settings, contract=contract, key_dim=KEY_DIM, device=CPU, ranks=ranks)
        losses = take_steps(learner, 8)
        ranks.tell("stop")
        print(json.dumps({"losses": losses, "queue": learner.queue.id.tolist()}))
    else:
        follow(settings, ranks=ranks, device=CPU, log=logger("follower"))
    ranks.leave()


if __name__ == "__main__":
    main()
