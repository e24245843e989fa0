"""How the encoder's passes are computed: fp32 or bf16, channels first or last. The loss itself stays in fp32.

bf16 pays where the hardware multiplies it (AMX, AVX-512 BF16, tensor cores) and costs where it does not; so it is
timed on the machine that learns. It is also watched there: on small maps a CPU library was seen to give other
numbers, now and then NaN, for the same input each time.
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

    auto: both types, but bf16 only where it gives the same numbers each time. shape: (C, R, A) of a heatmap. Takes
    some dozen passes with a batch of 8; changes neither `encoder` nor the random generators.
    """
    dtypes = list(_DTYPES) if name == "auto" else [name]
    choices = [Precision(*choice) for choice in itertools.product(dtypes, _FORMATS)]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        x = torch.randn(_BATCH, *shape).to(device)
        nets = {choice: choice.lay_out_net(copy.deepcopy(encoder)).train() for choice in choices}
        # Interleaved: a busy machine is busy for all of them.
        rounds = [{choice: _pass(choice, net, x) for choice, net in nets.items()} for _ in range(1 + _ROUNDS)]
    times = {choice: statistics.median(done[choice][0] for done in rounds[1:]) for choice in choices}
    sums = {choice: {done[choice][1] for done in rounds} for choice in choices}
    steady = [choice for choice in choices if name != "auto" or choice.dtype == "fp32" or len(sums[choice]) == 1]
    return min(steady, key=lambda choice: times[choice])


def _pass(choice: Precision, net: nn.Module, x: Tensor) -> tuple[float, float]:
    """Seconds for one forward and backward pass, and a sum over all gradients; NaN equals nothing."""
    torch.manual_seed(0)  # dropout, where there is any
    net.zero_grad(set_to_none=True)
    started_s = time.perf_counter()
    with choice.autocast(x.device):
        features: Tensor = net(choice.lay_out(x))
    features.float().square().mean().backward()  # type: ignore[no-untyped-call]
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    seconds = time.perf_counter() - started_s
    return seconds, float(sum(p.grad.double().abs().sum() for p in net.parameters() if p.grad is not None))
