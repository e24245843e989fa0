"""The queue of past image encodings: a ring of K keys, each with the scene that it shows.

A frozen encoder made them, so they never go stale. The queue starts empty, takes batches of any size and is part
of the checkpoint. It does not know the loss.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Scenes:
    """Which scenes encodings show. id, site, at_ns: (B,) int64; id is unique over all sites, -1 for none."""

    id: Tensor
    site: Tensor
    at_ns: Tensor

    def to(self, device: torch.device) -> "Scenes":
        return Scenes(self.id.to(device), self.site.to(device), self.at_ns.to(device))

    def gathered(self, ranks: Ranks) -> "Scenes":
        """Those of all ranks."""
        return Scenes(ranks.gather(self.id), ranks.gather(self.site), ranks.gather(self.at_ns))


def is_negative(scenes: Scenes, others: Scenes, *, exclude_within_ns: int) -> Tensor:
    """(B, M) bool: which of `others` (M,) are false pairings for `scenes` (B,).

    One that is there, is not the same scene, and is not close in time to it on its site: neighbouring frames show
    the same object.
    """
    there = others.id >= 0
    other = scenes.id[:, None] != others.id[None, :]
    apart = (scenes.at_ns[:, None] - others.at_ns[None, :]).abs() > exclude_within_ns
    elsewhere = scenes.site[:, None] != others.site[None, :]
    return there[None, :] & other & (apart | elsewhere)


class Queue(nn.Module):
    """The last K image encodings. keys: (K, D) float32, unit L2 norm; scenes: (K,)."""

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

    @property
    def scenes(self) -> Scenes:
        return Scenes(self.id, self.site, self.at_ns)

    @torch.no_grad()
    def push(self, k: Tensor, scenes: Scenes) -> None:
        """Take in k: (B, D) float32, unit L2 norm; the oldest fall out."""
        k, new_id = k[-self.K :], scenes.id[-self.K :]
        at = (int(self.num_seen) + torch.arange(len(k), device=k.device)) % self.K
        self.keys[at] = k
        self.id[at] = new_id
        self.site[at] = scenes.site[-self.K :]
        self.at_ns[at] = scenes.at_ns[-self.K :]
        self.num_seen += len(k)
