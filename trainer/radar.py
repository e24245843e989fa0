"""The radar side: preprocessing and encoders.

All of it goes into the ONNX graph: what is posted is the raw heatmap, and the index of its site.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.core.errors import SettingsError
from trainer.timm_nets import create_timm_net, features_of
from trainer.vgg import vgg16_features

_MAX_CELLS = 128 * 64  # what the small encoder's stem works at; larger maps are pooled down to it first


class Preprocess(nn.Module):
    """Raw heatmap to network input: subtract the site's clutter map, divide by one fixed scale.

    The scale is never per frame: absolute echo strength tells a car from a pedestrian.
    clutter: (1 + S, C, R, A) float32, in the heatmap's unit; row 0 serves frames of no known site.
    """

    clutter: Tensor
    scale: Tensor

    def __init__(self, num_sites: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.register_buffer("clutter", torch.zeros(1 + num_sites, *shape))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, heatmap: Tensor, site: Tensor) -> Tensor:
        """heatmap: (B, C, R, A) float32; site: (B,) int64 -> (B, C, R, A) float32, about unit variance."""
        return (heatmap - self.clutter.index_select(0, site)) / self.scale


class SmallEncoder(nn.Module):
    """A small residual network at the radar's own resolution: (B, C, R, A) -> (B, feature_dim)."""

    def __init__(self, shape: tuple[int, int, int], *, width: int = 32, feature_dim: int = 128) -> None:
        super().__init__()
        channels, num_ranges, num_azimuths = shape
        pool = 1
        while num_ranges * num_azimuths / pool**2 > 2 * _MAX_CELLS:
            pool *= 2
        self.stem = nn.Sequential(
            nn.MaxPool2d(pool) if pool > 1 else nn.Identity(),
            nn.Conv2d(channels, width, 5, stride=2, padding=2, bias=False),
            nn.GroupNorm(4, width),
            nn.ReLU(),
        )
        self.stages = nn.Sequential(
            _Residual(width, width, stride=2),
            _Residual(width, 2 * width, stride=2),
            _Residual(2 * width, 4 * width, stride=2),
        )
        self.feature_dim = feature_dim
        self.head = nn.Sequential(nn.Linear(8 * width, 256), nn.ReLU(), nn.Linear(256, feature_dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x))
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        features: Tensor = self.head(pooled)
        return features


class _Residual(nn.Module):
    def __init__(self, num_in: int, num_out: int, *, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(num_in, num_out, 3, stride=stride, padding=1, bias=False),
            nn.GroupNorm(4, num_out),
            nn.ReLU(),
            nn.Conv2d(num_out, num_out, 3, padding=1, bias=False),
            nn.GroupNorm(4, num_out),
        )
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or num_in != num_out:
            self.skip = nn.Conv2d(num_in, num_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


class Vgg16Encoder(nn.Module):
    """The paper's radar branch: VGG-16 on a heatmap resampled to 224 x 224 and replicated three times; 4096-d."""

    def __init__(self, *, with_last_relu: bool, weights: str = "") -> None:
        super().__init__()
        self.net = vgg16_features(weights, from_hub=False, with_last_relu=with_last_relu)
        self.feature_dim = 4096

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x.mean(1, keepdim=True), size=(224, 224), mode="bilinear", antialias=False)
        features: Tensor = self.net(x.expand(-1, 3, -1, -1))
        return features


class TimmEncoder(nn.Module):
    """Any convolutional network of timm at the radar's own resolution and channels: (B, C, R, A) -> (B, D)."""

    def __init__(self, name: str, *, num_channels: int, weights: str = "") -> None:
        super().__init__()
        self.net = create_timm_net(name, in_chans=num_channels, weights=weights)
        self.feature_dim = features_of(self.net)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.net(x)
        return features


def build_encoder(architecture: dict[str, Any], shape: tuple[int, int, int], *, weights: str = "") -> nn.Module:
    """The encoder that a manifest's `architecture` names, for heatmaps of `shape` (C, R, A).

    weights: a file to start VGG-16 or a network of timm from; empty: random ones. Raises SettingsError.
    """
    match architecture["encoder"]:
        case "small":
            return SmallEncoder(shape, width=architecture["width"], feature_dim=architecture["feature_dim"])
        case "vgg16" | "vgg16_relu":
            return Vgg16Encoder(with_last_relu=architecture["encoder"] == "vgg16_relu", weights=weights)
        case str(name) if name.startswith("timm:"):
            return TimmEncoder(name.removeprefix("timm:"), num_channels=shape[0], weights=weights)
        case other:
            raise SettingsError(
                f"radar encoder is {other!r}",
                remedy="use small, vgg16, vgg16_relu or timm:NAME, timm:resnet18 for one",
            )


def feature_dim_of(encoder: nn.Module) -> int:
    """How many features an encoder of this module gives."""
    assert isinstance(encoder, SmallEncoder | Vgg16Encoder | TimmEncoder)
    return encoder.feature_dim


def default_architecture(encoder: str) -> dict[str, Any]:
    """What a manifest says of a new encoder, besides its `feature_dim`; enough to build it again."""
    return {"encoder": encoder} | ({"width": 32, "feature_dim": 128} if encoder == "small" else {})
