"""Learning on several processes or GPUs: the leader's learner tells the followers each step before it takes it.

    torchrun --nproc-per-node 4 -m trainer

The leader (rank 0) is the trainer worker as it is on one process. A follower has settings and a learner, and does
as it is told; it knows no store.
"""

import io

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.core.logs import Log
from services.core.registry import InputContract
from trainer.contrast import Contrast
from trainer.feed import Batch
from trainer.learner import DivergedError, Learner
from trainer.queue import Scenes
from trainer.ranks import Ranks
from trainer.settings import TrainerSettings


class LeadingLearner(Learner):
    """A learner whose every change happens at the followers as well."""

    def __init__(
        self,
        settings: TrainerSettings,
        *,
        contract: InputContract,
        key_dim: int,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        super().__init__(settings, contract=contract, key_dim=key_dim, device=device, ranks=ranks)
        ranks.tell(
            "new", contract=contract.model_dump(mode="json"), key_dim=key_dim, precision=self.precision.dtype
        )

    def step(self, batch: Batch) -> Contrast:
        """As `Learner.step`, on the whole batch: each rank gets its part, all of them equally many."""
        self.ranks.tell("step")
        return super().step(_part(self.ranks, batch.first(len(batch.site) // self.ranks.size * self.ranks.size)))

    def set_input(self, clutter: npt.NDArray[np.float32], *, scale: float | None = None) -> None:
        self.ranks.tell("set_input", scale=scale)
        self.ranks.share(torch.from_numpy(clutter))
        super().set_input(clutter, scale=scale)

    def restore(self, state: dict[str, object]) -> None:
        super().restore(state)
        buffer = io.BytesIO()
        torch.save(self.state(), buffer)
        self.ranks.tell("restore")
        self.ranks.share(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))


def follow(settings: TrainerSettings, *, ranks: Ranks, device: torch.device, log: Log) -> None:
    """Do as the leader says until it stops."""
    learner: Learner | None = None
    while (message := ranks.hear())["what"] != "stop":
        if message["what"] == "new":
            learner = Learner(
                settings.model_copy(update={"precision": message["precision"]}),
                contract=InputContract.model_validate(message["contract"]),
                key_dim=message["key_dim"],
                device=device,
                ranks=ranks,
            )
            log.info("following", rank=ranks.rank, of=ranks.size)
            continue
        assert learner is not None
        match message["what"]:
            case "step":
                try:
                    learner.step(_part(ranks, None))
                except DivergedError as error:  # at every rank alike; the leader decides what follows
                    log.warning("diverged", reason=str(error), rank=ranks.rank)
            case "set_input":
                learner.set_input(ranks.share(torch.empty(0)).numpy(), scale=message["scale"])
            case "restore":
                state = io.BytesIO(ranks.share(torch.empty(0)).numpy().tobytes())
                learner.settings = settings  # with the precision that was asked for: the state has what it became
                learner.restore(torch.load(state, map_location="cpu", weights_only=True))


def _part(ranks: Ranks, batch: Batch | None) -> Batch:
    """This rank's part of the batch that the leader has."""

    def of(tensor: Tensor | None) -> Tensor:
        return ranks.part(tensor)

    scenes = batch.scenes if batch else None
    return Batch(
        heatmap=of(batch.heatmap if batch else None),
        site=of(batch.site if batch else None),
        mirrored=of(batch.mirrored if batch else None),
        k=of(batch.k if batch else None),
        scenes=Scenes(
            id=of(scenes.id if scenes else None),
            site=of(scenes.site if scenes else None),
            at_ns=of(scenes.at_ns if scenes else None),
        ),
    )
