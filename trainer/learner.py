"""The radar encoder, its contrastive step, its moving average, and the state that a resume needs.

The learner gets batches; it does not know the store, the clock or the registry. With several ranks each has a
learner with the same weights and a part of every batch; keys are gathered, gradients averaged.
"""

import copy
import hashlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from services.core.errors import EchosightError
from services.core.frames import is_speed
from services.core.registry import InputContract
from trainer.contrast import Contrast, contrast
from trainer.feed import Batch
from trainer.precision import Precision, choose_precision
from trainer.queue import Queue, Scenes, is_negative
from trainer.radar import Preprocess, build_encoder, default_architecture, feature_dim_of
from trainer.ranks import ALONE, Ranks
from trainer.settings import TrainerSettings

_MAX_SCALE = 100.0
_NOISE_PLACES = 1 << 20
_LOWER_RATE = "lower ECHOSIGHT_LEARNING_RATE"


class DivergedError(EchosightError):
    """The loss is not finite; the step was not taken."""


class Learner:
    """Everything that changes while learning."""

    def __init__(
        self,
        settings: TrainerSettings,
        *,
        contract: InputContract,
        key_dim: int,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.contract = contract
        self._speeds = [number for number, name in enumerate(contract.channels) if is_speed(name)]
        self.key_dim = key_dim
        self.device = device
        self.ranks = ranks
        self.architecture = default_architecture(settings.radar_encoder)
        shape = (contract.shape[0], contract.shape[1], contract.shape[2])
        self.preprocess = Preprocess(0, shape).to(device)
        encoder = build_encoder(self.architecture, shape, weights=settings.radar_weights).to(device)
        feature_dim = feature_dim_of(encoder)
        self.architecture["feature_dim"] = feature_dim
        self.precision = choose_precision(settings.precision, encoder, shape=shape, device=device)
        self.encoder = self.precision.lay_out_net(encoder)
        self._compiled = torch.compile(self.encoder) if settings.compile else self.encoder  # the same weights
        self.projection = _projection(settings, feature_dim, key_dim).to(device)
        self.log_scale = nn.Parameter(
            torch.tensor(-math.log(settings.temperature), device=device), requires_grad=settings.learn_temperature
        )
        self.bias = nn.Parameter(
            torch.tensor(-math.log(settings.queue_size), device=device), requires_grad=settings.loss == "sigmoid"
        )
        self.average = copy.deepcopy(self.encoder).requires_grad_(False)
        self.average_projection = copy.deepcopy(self.projection).requires_grad_(False)
        self.queue = Queue(settings.queue_size, key_dim).to(device)
        self._noise = torch.empty(0, device=device)  # drawn with the first batch that needs it
        self.optimizer = self._make_optimizer()
        self.step_num = 0
        self.num_learnt = 0  # pairs, each as often as it was in a batch
        self.rate_factor = 1.0  # of the learning rate; a cool-down lowers it in a copy

    def step(self, batch: Batch) -> Contrast:
        """One optimizer step on this rank's part of a batch. Raises DivergedError before the weights are touched.

        All random numbers of a step follow from seed, step and rank: a resume needs no generator's state.
        """
        torch.manual_seed(_seed_of(self.settings.seed, self.step_num, self.ranks.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self._schedule() * self.rate_factor
        self.encoder.train()
        x = self.preprocess(batch.heatmap.to(self.device), batch.site.to(self.device))  # (B, C, R, A)
        x = self.augment(x, batch.mirrored)
        q = self._encode(x)  # (B, D)
        k = nn.functional.normalize(batch.k.to(self.device), dim=1)  # (B, D)
        scenes = batch.scenes.to(self.device)
        all_k, all_scenes = self.ranks.gather(k), scenes.gathered(self.ranks)  # of all ranks
        objective, found = self._contrast(q, k, scenes, all_k=all_k, all_scenes=all_scenes)
        self.optimizer.zero_grad(set_to_none=True)
        objective.backward()  # type: ignore[no-untyped-call]
        loss, size = self.ranks.mean(found.loss.detach().clone()), self._average_gradients()
        if not torch.isfinite(loss + size):  # one look for both: on a GPU it waits for all that was asked for
            raise DivergedError(
                f"loss is {loss.item()}, its gradient {size.item():g} long, at step {self.step_num}",
                remedy=_LOWER_RATE,
            )
        self.optimizer.step()
        self.queue.push(all_k, all_scenes)
        self.step_num += 1
        self.num_learnt += len(all_k)
        self._update_average()
        return Contrast(loss, found.chance, found.top1)

    @property
    def scale(self) -> Tensor:
        """1 / tau, ()."""
        return self.log_scale.exp().clamp(max=_MAX_SCALE)

    def _encode(self, x: Tensor) -> Tensor:
        """(B, C, R, A) float32, preprocessed -> (B, D) float32."""
        mixed = self.ranks.mixed(x, round_num=self.step_num) if self.settings.shuffle_bn else None
        with self.precision.autocast(self.device):
            q: Tensor = self.projection(self._compiled(self.precision.lay_out(mixed.rows if mixed else x)))
        return mixed.back(q.float()) if mixed else q.float()

    def _contrast(
        self, q: Tensor, k: Tensor, scenes: Scenes, *, all_k: Tensor, all_scenes: Scenes
    ) -> tuple[Tensor, Contrast]:
        """What is minimised, and the contrast of radar to image, which is what is told.

        Radar to image is against the queue and, if so asked, the batch; then image to radar may count as much. q:
        (B, D) float32. k: (B, D) float32, unit L2 norm. all_k, all_scenes: of all ranks, ours among them.
        """
        settings, within_ns = self.settings, round(self.settings.exclude_within_s * 1e9)
        mask = is_negative(scenes, self.queue.scenes, exclude_within_ns=within_ns)  # (B, K)
        # A copy either way: the push that follows must not change what backward needs.
        if settings.in_batch_negatives:
            beside = is_negative(scenes, all_scenes, exclude_within_ns=within_ns)  # (B, all B)
            negatives, mask = torch.cat([all_k, self.queue.keys]), torch.cat([beside, mask], 1)
        else:
            negatives = self.queue.keys.clone()
        options: dict[str, Any] = {"scale": self.scale, "loss": settings.loss, "bias": self.bias}
        soft: dict[str, Any] = {"soft_share": settings.soft_share, "soft_scale": 1 / settings.soft_temperature}
        found = contrast(q, k, negatives=negatives, is_negative=mask, **options, **soft)
        if settings.in_batch_negatives and settings.symmetric:
            all_q = nn.functional.normalize(self.ranks.gather_with_gradient(q), dim=1)
            back = contrast(k, q, negatives=all_q, is_negative=beside, **options)
            return (found.loss + back.loss) / 2, found
        return found.loss, found

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

    @torch.no_grad()
    def project(self, features: Tensor) -> Tensor:
        """(B, feature_dim) -> (B, D) float32 on the CPU, unit L2 norm: where the image encodings are."""
        projected: Tensor = self.average_projection(features.to(self.device))
        return nn.functional.normalize(projected, dim=1).cpu()

    def state(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {
            "step_num": self.step_num,
            "num_learnt": self.num_learnt,
            "optimizer_name": self.settings.optimizer,
            "precision": [self.precision.dtype, self.precision.layout],
            "encoder": self.encoder.state_dict(),
            "projection": self.projection.state_dict(),
            "average": self.average.state_dict(),
            "average_projection": self.average_projection.state_dict(),
            "log_scale": self.log_scale.detach(),
            "bias": self.bias.detach(),
            "queue": self.queue.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scale": self.preprocess.scale,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, under the settings of now. Raises RuntimeError if it is of another architecture."""
        dtype, layout = state["precision"]  # what was chosen stays: the next steps are to be the same
        self.precision = Precision(dtype if self.settings.precision == "auto" else self.precision.dtype, layout)
        self.precision.lay_out_net(self.encoder)
        self.encoder.load_state_dict(state["encoder"])
        self.projection.load_state_dict(state["projection"])
        self.average.load_state_dict(state["average"])
        self.average_projection.load_state_dict(state["average_projection"])
        if self.settings.learn_temperature:
            self.log_scale.data.copy_(state["log_scale"])
        self.bias.data.copy_(state["bias"])
        if len(state["queue"]["keys"]) == self.queue.K:  # one of another length starts empty
            self.queue.load_state_dict(state["queue"])
        if state["optimizer_name"] == self.settings.optimizer:
            self.optimizer.load_state_dict(state["optimizer"])
            for group, fresh in zip(self.optimizer.param_groups, self._make_optimizer().param_groups, strict=True):
                group.update({name: value for name, value in fresh.items() if name != "params"})
        self.preprocess.scale.copy_(state["scale"])
        self.step_num, self.num_learnt = state["step_num"], state["num_learnt"]

    def _average_gradients(self) -> Tensor:
        """The mean over ranks of equal parts is the whole batch's gradient; return its L2 norm, ()."""
        gradients = [
            p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        if self.ranks.size > 1:
            self._exchange(gradients)
        return nn.utils.get_total_norm(gradients)

    def _exchange(self, gradients: list[Tensor]) -> None:
        """Put the mean over the ranks in place of each gradient, all of them at once."""
        mean = self.ranks.mean(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        for gradient, part in zip(gradients, torch.split(mean, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _make_optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        weights = [*self.encoder.parameters(), *self.projection.parameters()]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in weights if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in weights if p.ndim <= 1] + [self.log_scale, self.bias], "weight_decay": 0.0},
        ]
        if settings.optimizer == "sgd":
            groups[1]["weight_decay"] = settings.weight_decay
            return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9)
        return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)

    def _schedule(self) -> float:
        settings = self.settings
        if self.step_num < settings.warmup_steps:
            return (self.step_num + 1) / settings.warmup_steps
        if settings.schedule == "constant":
            return 1.0
        done = min(1.0, (self.step_num - settings.warmup_steps) / settings.schedule_steps)
        return 0.5 * (1 + math.cos(math.pi * done))

    def augment(self, x: Tensor, mirrored: Tensor) -> Tensor:
        """Mirror what was encoded mirrored; jitter gain, add noise, shift: in units of the input's scale.

        Gain and noise are of power: a channel of speeds gets neither. A mirrored scene has the same radial speeds.
        Changes `x` in place, where it can.
        """
        settings, unit = self.settings, float(self.preprocess.scale)
        rows = mirrored.nonzero()[:, 0].to(x.device)
        x[rows] = x[rows].flip(-1)
        speeds = x[:, self._speeds]  # a copy
        if settings.gain_jitter_db:
            x += torch.empty(len(x), 1, 1, 1).normal_(0.0, settings.gain_jitter_db / unit).to(x.device)
        if settings.noise_db:
            x.add_(self._noise_like(x), alpha=settings.noise_db / unit)
        x[:, self._speeds] = speeds
        if settings.shift_bins:
            num = settings.shift_bins
            by = torch.randint(-num, num + 1, (2,)).tolist()
            x = _shift(x, by[0], by[1])
        return x

    def _noise_like(self, x: Tensor) -> Tensor:
        """Standard normal noise in the shape of `x`: from a random place on in a stretch of it that is drawn once.

        It follows from the seed alone, so a resume has the same. Numbers of its own for every step would be 2 % of
        the step.
        """
        if len(self._noise) < x.numel() + _NOISE_PLACES:
            num = max(self.settings.batch_size * x[0].numel(), x.numel()) + _NOISE_PLACES
            generator = torch.Generator().manual_seed(self.settings.seed)  # on the CPU: the same for any device
            self._noise = torch.randn(num, generator=generator).to(x.device)
        place = int(torch.randint(_NOISE_PLACES, ()))
        return self._noise[place : place + x.numel()].view_as(x)

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.settings.ema_decay, (1 + self.step_num) / (10 + self.step_num))
        if self.settings.ema_decay == 0:
            decay = 0.0
        for average, net in ((self.average, self.encoder), (self.average_projection, self.projection)):
            ours: list[Tensor] = [*average.parameters()]
            theirs: list[Tensor] = [*net.parameters()]
            if ours:
                torch._foreach_lerp_(ours, theirs, 1 - decay)
        for held, newest in zip(self.average.buffers(), self.encoder.buffers(), strict=True):
            held.copy_(newest)  # batch norm's statistics are an average already


def _seed_of(*numbers: int) -> int:
    """63 bits that follow from the numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big") >> 1


def _projection(settings: TrainerSettings, feature_dim: int, key_dim: int) -> nn.Module:
    """From radar features to where the image encodings are; it is not part of what is served."""
    if settings.projection == "mlp":
        return nn.Sequential(
            nn.Linear(feature_dim, 512), nn.LayerNorm(512), nn.ReLU(), nn.Linear(512, key_dim, bias=False)
        )
    return nn.Identity() if feature_dim == key_dim else nn.Linear(feature_dim, key_dim, bias=False)


def _shift(x: Tensor, num_ranges: int, num_azimuths: int) -> Tensor:
    """Move the map by whole bins; what comes in from outside is 0, the clutter's own level."""
    shifted = torch.zeros_like(x)
    to, of = zip(_overlap(num_ranges), _overlap(num_azimuths), strict=True)
    shifted[:, :, *to] = x[:, :, *of]
    return shifted


def _overlap(num: int) -> tuple[slice, slice]:
    """Where what stays inside comes to lie, and where it lay, if an axis moves by `num` bins."""
    inside, moved = slice(max(num, 0), None if num >= 0 else num), slice(max(-num, 0), None if num <= 0 else -num)
    return inside, moved
