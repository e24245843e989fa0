"""The contrastive step: Eq. 1 of the paper, and the queue of past image encodings.

    L(q, k+, k-) = -log  exp(q.k+ / tau) / ( exp(q.k+ / tau) + sum_j exp(q.k-_j / tau) )

q: the radar encoding that learns; k+: the frozen encoding of the image that saw the same instant; k-: K encodings
of past images. The module does not know where encodings come from, nor what a label is.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Scenes:
    """Which scenes a batch of encodings shows. id, site, at_ns: (B,) int64; id is unique over all sites."""

    id: Tensor
    site: Tensor
    at_ns: Tensor

    def to(self, device: torch.device) -> "Scenes":
        return Scenes(self.id.to(device), self.site.to(device), self.at_ns.to(device))


@dataclass(frozen=True, slots=True)
class Contrast:
    """loss: () float32, nats. chance: log(mean number of candidates). top1: share of k+ ranked first."""

    loss: Tensor
    chance: float
    top1: float


class Queue(nn.Module):
    """The last K image encodings with their scenes: a ring that starts empty and takes batches of any size."""

    keys: Tensor
    id: Tensor
    site: Tensor
    at_ns: Tensor
    num_seen: Tensor

    def __init__(self, K: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(K, dim))
        self.register_buffer("id", torch.full((K,), -1, dtype=torch.int64))
        self.register_buffer("site", torch.full((K,), -1, dtype=torch.int64))
        self.register_buffer("at_ns", torch.zeros(K, dtype=torch.int64))
        self.register_buffer("num_seen", torch.zeros((), dtype=torch.int64))

    @property
    def K(self) -> int:  # noqa: N802 - the paper's letter
        return len(self.keys)

    @torch.no_grad()
    def push(self, k: Tensor, scenes: Scenes) -> None:
        """Take in k: (B, D) float32, L2 norm; the oldest fall out."""
        k, new_id = k[-self.K :], scenes.id[-self.K :]
        at = (int(self.num_seen) + torch.arange(len(k), device=k.device)) % self.K
        self.keys[at] = k
        self.id[at] = new_id
        self.site[at] = scenes.site[-self.K :]
        self.at_ns[at] = scenes.at_ns[-self.K :]
        self.num_seen += len(k)

    def is_negative(self, scenes: Scenes, *, exclude_within_ns: int) -> Tensor:
        """(B, K) bool: filled, not the query's own scene, and not close in time to it on its site."""
        filled = self.id >= 0
        other = scenes.id[:, None] != self.id[None, :]
        apart = (scenes.at_ns[:, None] - self.at_ns[None, :]).abs() > exclude_within_ns
        elsewhere = scenes.site[:, None] != self.site[None, :]
        return filled[None, :] & other & (apart | elsewhere)


def info_nce(q: Tensor, k: Tensor, *, negatives: Tensor, is_negative: Tensor, scale: Tensor | float) -> Contrast:
    """Eq. 1.

    q, k: (B, D) float32, any norm; k is detached. negatives: (K, D) float32, L2 norm, detached.
    is_negative: (B, K) bool. scale: 1 / tau.
    """
    q = F.normalize(q.float(), dim=1)
    k = F.normalize(k.float(), dim=1)
    l_pos = (q * k).sum(1, keepdim=True)  # (B, 1)
    l_neg = q @ negatives.T  # (B, K)
    logits = torch.cat([l_pos, l_neg], 1) * scale  # (B, 1 + K)
    # Masked after scaling: -inf times a learned scale would have a gradient of nan.
    logits[:, 1:] = logits[:, 1:].masked_fill(~is_negative, -math.inf)
    loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))
    candidates = 1.0 + is_negative.sum(1).float().mean()
    top1 = (logits.argmax(1) == 0).float().mean()
    return Contrast(loss, chance=math.log(float(candidates)), top1=float(top1))
