"""How much of what the camera saw can be read out of radar features: a judgement that needs no names.

A ridge regression from features to image encodings, fitted on the other blocks of time, and then retrieval: is a
frame's own image among the five most alike? The same for any encoder, whatever it was trained with, so that two of
them can be compared; an encoder's own projection is not kept with a version.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.head import Block, folds_of

_RIDGE = 0.1
_AMONG = 5


def retrieve(
    features: Tensor, k: Tensor, *, blocks: Sequence[Block], is_other: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Whether each frame's image is among the five most alike (N,) float64, its cosine to it (N,), and chance.

    features: (N, D) float32, of frames from several blocks; k: (N, Dk) float32, image encodings. is_other: (N, N)
    bool, which images may be mistaken for a frame's own. A tie counts against us.
    """
    q, k = F.normalize(_read_out(features, k, folds_of(blocks)), dim=1), F.normalize(k, dim=1)
    similarity = q @ k.T
    own = similarity.diagonal()
    others = is_other & ~torch.eye(len(q), dtype=torch.bool)
    rank = 1 + (others & (similarity >= own[:, None])).sum(1)
    chance = float((_AMONG / (1 + others.sum(1).double())).clamp(max=1).mean())
    return (rank <= _AMONG).double(), own.double(), chance


def _read_out(features: Tensor, k: Tensor, folds: Tensor) -> Tensor:
    """(N, Dk): what a regression that has not seen a row's fold expects of its image."""
    expected = torch.zeros_like(k)
    for fold in sorted(set(folds.tolist())):
        known = folds != fold
        mean, std = features[known].mean(0), features[known].std(0, unbiased=False).clamp_min(1e-4)
        x, level = (features - mean) / std, k[known].mean(0)
        expected[~known] = _ridge(x[known], k[known] - level, x[~known]) + level
    return expected


def _ridge(x: Tensor, y: Tensor, new: Tensor) -> Tensor:
    """(M, Dk): what a ridge regression of y (N, Dk) on x (N, D) says of `new` (M, D)."""
    num, dim = x.shape
    if dim <= num:
        weight = torch.linalg.solve(x.T @ x + _RIDGE * num * torch.eye(dim), x.T @ y)
    else:
        weight = x.T @ torch.linalg.solve(x @ x.T + _RIDGE * num * torch.eye(num), y)
    found: Tensor = new @ weight
    return found
