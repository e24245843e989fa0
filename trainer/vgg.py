"""VGG-16 as the paper cuts it, for either side, and the reading of weights files.

It knows neither images nor heatmaps, and needs no image library: the export child builds it too.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from services.core.errors import SettingsError


def vgg16_features(weights: str, *, from_hub: bool, with_last_relu: bool = False) -> nn.Module:
    """VGG-16 with `classifier[:4]`, or `[:5]` with its last ReLU; 4096-d.

    weights: a state dict file, or "" for the hub's or random ones. Raises SettingsError.
    """
    from torchvision.models import VGG16_Weights, vgg16

    try:
        net = vgg16(weights=VGG16_Weights.IMAGENET1K_V1 if from_hub else None)
    except OSError as error:
        raise SettingsError(
            f"cannot download VGG-16 weights: {error}",
            remedy="download vgg16-397923af.pth elsewhere and name it in ECHOSIGHT_VISION_WEIGHTS",
        ) from None
    if weights:
        try:
            net.load_state_dict(load_state_dict(weights))
        except RuntimeError as error:
            raise SettingsError(
                f"{weights} does not hold VGG-16 weights: {str(error)[:200]}", remedy="use torchvision's file"
            ) from None
    net.classifier = net.classifier[: 5 if with_last_relu else 4]
    net.avgpool = nn.Identity()  # at 224 px the map is 7 x 7 already; ONNX has no pooling to a size
    loaded: nn.Module = net
    return loaded


def load_state_dict(path: str) -> dict[str, Tensor]:
    """A dict of tensors from a file; nothing else can be in it. Raises SettingsError."""
    if not Path(path).is_file():
        raise SettingsError(f"weights file {path} does not exist", remedy="check ECHOSIGHT_VISION_WEIGHTS")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is none of its own
        raise SettingsError(f"cannot read weights {path}: {error}", remedy="name a state dict file") from None
    return state
