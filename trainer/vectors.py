"""Many vectors of one length in few large blocks: a slot each, free slots taken again.

A block is never moved or given back: what is held is what was needed at most, and nothing is copied as it grows.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float16]
_BLOCK_SLOTS = 1024


class Vectors:
    """(dim,) float16 by slot. digest: of the image that each was made of."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._blocks: list[Vector] = []
        self._digests: list[npt.NDArray[np.uint64]] = []
        self._free: list[int] = []

    def __len__(self) -> int:
        """Slots that are taken."""
        return self.num_slots - len(self._free)

    @property
    def num_slots(self) -> int:
        return len(self._blocks) * _BLOCK_SLOTS

    def __getitem__(self, slot: int) -> Vector:
        """A view, good until the slot is freed."""
        vector: Vector = self._blocks[slot // _BLOCK_SLOTS][slot % _BLOCK_SLOTS]
        return vector

    def digest(self, slot: int) -> int:
        return int(self._digests[slot // _BLOCK_SLOTS][slot % _BLOCK_SLOTS])

    def put(self, vector: npt.NDArray[Any], *, digest: int) -> int:
        """Copy a vector in; return its slot."""
        if not self._free:
            first = self.num_slots
            self._blocks.append(np.empty((_BLOCK_SLOTS, self.dim), np.float16))
            self._digests.append(np.empty(_BLOCK_SLOTS, np.uint64))
            self._free.extend(range(first + _BLOCK_SLOTS - 1, first - 1, -1))
        slot = self._free.pop()
        self._blocks[slot // _BLOCK_SLOTS][slot % _BLOCK_SLOTS] = vector
        self._digests[slot // _BLOCK_SLOTS][slot % _BLOCK_SLOTS] = digest
        return slot

    def free(self, slot: int) -> None:
        self._free.append(slot)
