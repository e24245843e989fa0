"""The processes that learn together, started by torchrun: who they are, and what they tell each other.

Rank 0 leads: it alone knows store, registry and checkpoints. It tells the others what to do next and hands each
its part of every batch, so that N processes take the very steps that one would. Nothing is pickled: messages are
JSON and tensors. A process that is alone exchanges nothing.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import orjson
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from services.core.errors import SettingsError

_PATIENCE = timedelta(days=365)
"""Followers wait for as long as the leader waits for pairs; torchrun ends them all when one dies."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `size`; rank 0 leads. control: the group that carries messages, on the CPU."""

    rank: int = 0
    size: int = 1
    control: Any = None

    @classmethod
    def join(cls, *, wants_cuda: bool) -> Self:
        """Join the others if torchrun started us; alone otherwise. Raises SettingsError."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        backend = "nccl" if wants_cuda else "gloo"
        if wants_cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        try:
            dist.init_process_group(backend, timeout=_PATIENCE)
            control = dist.new_group(backend="gloo", timeout=_PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise SettingsError(
                f"cannot join {size} ranks by {backend}: {error}", remedy="start them all with torchrun"
            ) from None
        return cls(dist.get_rank(), size, control)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def tell(self, what: str, **values: Any) -> None:
        """Leader to followers: what to do next, with plain values."""
        self._broadcast(orjson.dumps({"what": what, **values}))

    def hear(self) -> dict[str, Any]:
        """Wait for what the leader tells."""
        message: dict[str, Any] = orjson.loads(self._broadcast(b""))
        return message

    def share(self, tensor: Tensor) -> Tensor:
        """The leader's tensor, at every rank; shape and dtype need not be known. On the CPU."""
        if self.size == 1:
            return tensor
        about = self._broadcast(orjson.dumps([str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]))
        dtype, shape = orjson.loads(about)
        held = tensor.cpu().contiguous() if self.leads else torch.empty(shape, dtype=getattr(torch, dtype))
        dist.broadcast(held, 0, group=self.control)
        return held

    def part(self, tensor: Tensor | None) -> Tensor:
        """This rank's rows of a tensor that the leader has: (B, ...) -> (B / size, ...), on the CPU."""
        empty = torch.empty(0)
        if self.size == 1:
            assert tensor is not None
            return tensor
        about = (
            b"" if tensor is None else orjson.dumps([str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        )
        dtype, (num, *rest) = orjson.loads(self._broadcast(about))
        mine = torch.empty(num // self.size, *rest, dtype=getattr(torch, dtype))
        parts = (
            list((empty if tensor is None else tensor).cpu().contiguous().chunk(self.size)) if self.leads else None
        )
        dist.scatter(mine, parts, src=0, group=self.control)
        return mine

    def gather(self, tensor: Tensor) -> Tensor:
        """All ranks' rows in the order of the ranks: (B / size, ...) -> (B, ...), without gradient."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def gather_with_gradient(self, tensor: Tensor) -> Tensor:
        """As `gather`; what the other ranks' losses say of our rows comes back in the backward pass."""
        if self.size == 1:
            return tensor
        return torch.cat(all_gather(tensor.contiguous()))  # type: ignore[no-untyped-call]

    def mixed(self, x: Tensor, *, round_num: int) -> "Mixed":
        """Rows of all ranks, shuffled and dealt out again: no rank's batch norm sees its own batch.

        He et al. 2020 (MoCo), "shuffling BN". x: (B / size, ...).
        """
        order = torch.randperm(len(x) * self.size, generator=torch.Generator().manual_seed(round_num))
        here = slice(self.rank * len(x), (self.rank + 1) * len(x))
        return Mixed(self, self.gather(x)[order[here]], order.argsort()[here])

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def _broadcast(self, message: bytes) -> bytes:
        length = torch.tensor([len(message)])
        dist.broadcast(length, 0, group=self.control)
        body = torch.frombuffer(bytearray(message), dtype=torch.uint8) if self.leads else None
        held = body if body is not None else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(held, 0, group=self.control)
        return held.numpy().tobytes()


@dataclass(frozen=True, slots=True)
class Mixed:
    """rows: what this rank encodes, of anybody's. place: (B,) int64, where our own came to lie among all."""

    ranks: Ranks
    rows: Tensor
    place: Tensor

    def back(self, encoded: Tensor) -> Tensor:
        """The encodings of our own rows, out of everybody's."""
        return self.ranks.gather_with_gradient(encoded)[self.place]


ALONE = Ranks()
