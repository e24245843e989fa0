"""The mean of a site's image encodings, which is taken from each of them; kept up as pairs come and go."""

import numpy as np
import numpy.typing as npt

from trainer.vectors import Vector


class Mean:
    """Of float16 vectors, summed in float64: exact, so it depends on which they are, not on their order."""

    def __init__(self, dim: int) -> None:
        self._total = np.zeros(dim)
        self._num = 0
        self._mean: npt.NDArray[np.float32] | None = None

    def add(self, vector: Vector, sign: int) -> None:
        self._total += sign * vector.astype(np.float64)
        self._num += sign
        self._mean = None

    def mean(self) -> npt.NDArray[np.float32]:
        if self._mean is None:
            self._mean = (self._total / self._num).astype(np.float32)
        return self._mean
