"""What the learner is fed: samples, and batches of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from services.core.frames import RadarFrame
from services.core.reader import StoredPair
from trainer.queue import Scenes
from trainer.vectors import Vector, Vectors


@dataclass(frozen=True, slots=True)
class Sample:
    """One encoded pair, good until the store is looked at again.

    uid: unique over sites, the same in every process. site: index into `Feed.sites`. slot: of its vector.
    may_learn, is_held_out: see `trainer.heldout`; a pair in a guard between is neither.
    """

    uid: int
    pair: StoredPair
    site: int
    mirrored: bool
    vectors: Vectors
    slot: int
    may_learn: bool = True
    is_held_out: bool = False

    @property
    def vector(self) -> Vector:
        """(D,) float16, the image's encoding; a view."""
        return self.vectors[self.slot]


@dataclass(frozen=True, slots=True)
class Batch:
    """heatmap: (B, C, R, A), raw, in the dtype it was stored in, or float32. site: (B,) int64, row of the clutter
    table (0: no known site). mirrored: (B,) bool. k: (B, D) float32, image encodings, centred if so asked.
    """

    heatmap: Tensor
    site: Tensor
    mirrored: Tensor
    k: Tensor
    scenes: Scenes

    def first(self, num: int) -> "Batch":
        """The first `num` pairs."""
        return self._map(lambda tensor: tensor[:num])

    def float(self) -> "Batch":
        return replace(self, heatmap=self.heatmap.float())

    def pinned(self) -> "Batch":
        """In memory that a GPU can copy from by itself."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """On `device`; a copy from pinned memory is only begun."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(
            heatmap=change(self.heatmap),
            site=change(self.site),
            mirrored=change(self.mirrored),
            k=change(self.k),
            scenes=Scenes(change(self.scenes.id), change(self.scenes.site), change(self.scenes.at_ns)),
        )


def stack_heatmaps(frames: list[RadarFrame], *, shape: tuple[int, ...]) -> Tensor:
    """(B, C, R, A) in the stored dtype, each frame copied once. frames: at least one, all of `shape`."""
    dtypes = {frame.heatmap.dtype for frame in frames}
    batch = np.empty((len(frames), *shape), dtypes.pop() if len(dtypes) == 1 else np.float32)
    for row, frame in zip(batch, frames, strict=True):
        row[...] = frame.heatmap.reshape(shape)
    return torch.from_numpy(batch)
