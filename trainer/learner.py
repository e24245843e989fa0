"""The radar encoder, its contrastive step, its moving average, and the state that a resume needs.

The learner gets batches; it does not know the store, the clock or the registry.
"""

import copy
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from services.core.errors import EchosightError
from services.core.registry import InputContract
from trainer.contrast import Contrast, Queue, info_nce
from trainer.feed import Batch
from trainer.radar import Preprocess, build_encoder, default_architecture
from trainer.settings import TrainerSettings

_MAX_SCALE = 100.0


class DivergedError(EchosightError):
    """The loss is not finite; the step was not taken."""


class Learner:
    """Everything that changes while learning."""

    def __init__(
        self, settings: TrainerSettings, *, contract: InputContract, key_dim: int, device: torch.device
    ) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.contract = contract
        self.device = device
        self.architecture = default_architecture(settings.radar_encoder)
        shape = contract.shape
        self.preprocess = Preprocess(0, (shape[0], shape[1], shape[2])).to(device)
        self.encoder = (
            build_encoder(self.architecture, (shape[0], shape[1], shape[2]), weights=settings.radar_weights)
            .to(device)
            .to(memory_format=torch.channels_last)
        )
        feature_dim = self.architecture["feature_dim"]
        self.projection: nn.Module = nn.Identity()
        if feature_dim != key_dim:
            self.projection = nn.Linear(feature_dim, key_dim, bias=False).to(device)
        self.log_scale = nn.Parameter(
            torch.tensor(-math.log(settings.temperature), device=device), requires_grad=settings.learn_temperature
        )
        self.average = copy.deepcopy(self.encoder).requires_grad_(False)
        self.queue = Queue(settings.queue_size, key_dim).to(device)
        self.optimizer = self._make_optimizer()
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.step_num = 0
        self.num_learnt = 0  # pairs, each as often as it was in a batch

    def step(self, batch: Batch) -> Contrast:
        """One optimizer step on Eq. 1. Raises DivergedError before the weights are touched."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * self._schedule()
        self.encoder.train()
        x = self.preprocess(batch.heatmap.to(self.device), batch.site.to(self.device))  # (B, C, R, A)
        x = self._augment(x, batch.mirrored)
        q = self.projection(self.encoder(x.contiguous(memory_format=torch.channels_last)))  # (B, D)
        k = batch.k.to(self.device)  # (B, D)
        scenes = batch.scenes.to(self.device)
        contrast = info_nce(
            q,
            k,
            negatives=self.queue.keys.clone(),
            is_negative=self.queue.is_negative(scenes, exclude_within_ns=round(settings.exclude_within_s * 1e9)),
            scale=self.log_scale.exp().clamp(max=_MAX_SCALE),
        )
        if not torch.isfinite(contrast.loss):
            raise DivergedError(
                f"loss is {contrast.loss.item()} at step {self.step_num}", remedy="lower ECHOSIGHT_LEARNING_RATE"
            )
        self.optimizer.zero_grad(set_to_none=True)
        contrast.loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.queue.push(nn.functional.normalize(k, dim=1), scenes)
        self.step_num += 1
        self.num_learnt += len(k)
        self._update_average()
        return contrast

    def set_input(self, clutter: npt.NDArray[np.float32], *, scale: float | None = None) -> None:
        """Take the newest clutter table (1 + S, C, R, A), and the scale once it is known."""
        table = torch.from_numpy(clutter).to(self.device)
        self.preprocess.clutter = table if self.settings.subtract_clutter else torch.zeros_like(table)
        if scale is not None:
            self.preprocess.scale.fill_(scale)

    @torch.no_grad()
    def features(self, heatmap: Tensor, site: Tensor) -> Tensor:
        """(B, feature_dim) float32 on the CPU, by the averaged encoder."""
        encoder = self.average.eval()
        features: Tensor = encoder(self.preprocess(heatmap.to(self.device), site.to(self.device))).cpu()
        return features

    def state(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {
            "step_num": self.step_num,
            "num_learnt": self.num_learnt,
            "optimizer_name": self.settings.optimizer,
            "encoder": self.encoder.state_dict(),
            "projection": self.projection.state_dict(),
            "average": self.average.state_dict(),
            "log_scale": self.log_scale.detach(),
            "queue": self.queue.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "scale": self.preprocess.scale,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, under the settings of now. Raises RuntimeError if it is of another architecture."""
        self.encoder.load_state_dict(state["encoder"])
        self.projection.load_state_dict(state["projection"])
        self.average.load_state_dict(state["average"])
        if self.settings.learn_temperature:
            self.log_scale.data.copy_(state["log_scale"])
        self.queue.load_state_dict(state["queue"])
        if state["optimizer_name"] == self.settings.optimizer:
            self.optimizer.load_state_dict(state["optimizer"])
            for group, fresh in zip(self.optimizer.param_groups, self._make_optimizer().param_groups, strict=True):
                group.update({name: value for name, value in fresh.items() if name != "params"})
        self.generator.set_state(state["generator"])
        self.preprocess.scale.copy_(state["scale"])
        self.step_num, self.num_learnt = state["step_num"], state["num_learnt"]

    def _make_optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        weights = [*self.encoder.parameters(), *self.projection.parameters()]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in weights if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in weights if p.ndim <= 1] + [self.log_scale], "weight_decay": 0.0},
        ]
        if settings.optimizer == "sgd":
            groups[1]["weight_decay"] = settings.weight_decay
            return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9)
        return torch.optim.AdamW(groups, lr=settings.learning_rate)

    def _schedule(self) -> float:
        settings = self.settings
        if self.step_num < settings.warmup_steps:
            return (self.step_num + 1) / settings.warmup_steps
        if settings.schedule == "constant":
            return 1.0
        done = min(1.0, (self.step_num - settings.warmup_steps) / settings.schedule_steps)
        return 0.5 * (1 + math.cos(math.pi * done))

    def _augment(self, x: Tensor, mirrored: Tensor) -> Tensor:
        """Mirror what was encoded mirrored; jitter gain, add noise, shift: in units of the input's scale."""
        settings, unit = self.settings, float(self.preprocess.scale)
        mirrored = mirrored.to(x.device)
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        if settings.gain_jitter_db:
            gain = torch.randn(len(x), 1, 1, 1, generator=self.generator)
            x = x + (gain * settings.gain_jitter_db / unit).to(x.device)
        if settings.noise_db:
            noise = torch.randn(x.shape, generator=self.generator)
            x = x + (noise * settings.noise_db / unit).to(x.device)
        if settings.shift_bins:
            num = settings.shift_bins
            by = torch.randint(-num, num + 1, (2,), generator=self.generator).tolist()
            x = _shift(x, by[0], by[1])
        return x

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.settings.ema_decay, (1 + self.step_num) / (10 + self.step_num))
        if self.settings.ema_decay == 0:
            decay = 0.0
        for ours, theirs in zip(self.average.parameters(), self.encoder.parameters(), strict=True):
            ours.lerp_(theirs, 1 - decay)


def _shift(x: Tensor, num_ranges: int, num_azimuths: int) -> Tensor:
    """Move the map by whole bins; what comes in from outside is 0, the clutter's own level."""
    x = x.roll((num_ranges, num_azimuths), (2, 3))
    if num_ranges:
        x[:, :, slice(0, num_ranges) if num_ranges > 0 else slice(num_ranges, None)] = 0
    if num_azimuths:
        x[..., slice(0, num_azimuths) if num_azimuths > 0 else slice(num_azimuths, None)] = 0
    return x
