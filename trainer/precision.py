"""How the encoder's passes are computed: fp32 or bf16, channels first or last. The loss itself stays in fp32.

bf16 pays where the hardware multiplies it (AMX, AVX-512 BF16, tensor cores) and costs where it does not; so it is
timed on the machine that learns.
"""

import contextlib
import copy
import itertools
import statistics
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

PrecisionName = Literal["auto", "fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FORMATS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}
_BATCH = 8
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Precision:
    """dtype: fp32 or bf16. layout: channels_first or channels_last. Plain names, for a checkpoint."""

    dtype: str = "fp32"
    layout: str = "channels_last"

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        if self.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=_DTYPES[self.dtype])

    def lay_out(self, x: Tensor) -> Tensor:
        """(B, C, R, A) in the memory format that was chosen."""
        return x.contiguous(memory_format=_FORMATS[self.layout])

    def lay_out_net(self, net: nn.Module) -> nn.Module:
        return net.to(memory_format=_FORMATS[self.layout])


def choose_precision(
    name: PrecisionName, encoder: nn.Module, *, shape: tuple[int, int, int], device: torch.device
) -> Precision:
    """The fastest way through `encoder`, forward and backward, out of those that `name` allows.

    shape: (C, R, A) of a heatmap. Takes some dozen passes with a batch of 8; changes neither `encoder` nor the
    random generators.
    """
    dtypes = list(_DTYPES) if name == "auto" else [name]
    choices = [Precision(*choice) for choice in itertools.product(dtypes, _FORMATS)]
    x = torch.zeros(_BATCH, *shape, device=device)
    times: dict[Precision, list[float]] = {choice: [] for choice in choices}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        nets = {choice: choice.lay_out_net(copy.deepcopy(encoder)).train() for choice in choices}
        for _ in range(1 + _ROUNDS):  # interleaved: a busy machine is busy for all of them
            for choice, net in nets.items():
                times[choice].append(_time_pass(choice, net, x))
    return min(choices, key=lambda choice: statistics.median(times[choice][1:]))


def _time_pass(choice: Precision, net: nn.Module, x: Tensor) -> float:
    """Seconds for one forward and backward pass."""
    started_s = time.perf_counter()
    with choice.autocast(x.device):
        features: Tensor = net(choice.lay_out(x))
    features.float().square().sum().backward()  # type: ignore[no-untyped-call]
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - started_s
