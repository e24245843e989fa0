"""Frozen encoders: real weights, never training, and images from any camera."""

from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
import timm
import torch

from services.core.errors import SettingsError
from services.core.frames import CameraFrame
from trainer.radar import build_encoder
from trainer.vgg import vgg16_features
from trainer.vision import decode_image, load_vision_encoder


def picture() -> np.ndarray:
    rgb = np.zeros((120, 200, 3), np.uint8)
    rgb[:, :100, 0] = 220
    rgb[:, 100:, 2] = 220
    return rgb


@pytest.fixture(scope="module")
def lite0():
    return load_vision_encoder("efficientnet_lite0")


def test_efficientnet_lite0_has_its_pretrained_weights(lite0) -> None:
    images = torch.from_numpy(
        np.stack([picture(), picture()[:, ::-1].copy()]).repeat(2, 1).repeat(2, 2)[:, :224, :224]
    )
    features = lite0(images)
    assert features.shape == (2, 1280)
    assert features.dtype == torch.float32
    assert 0.05 < float(features.mean()) < 2  # ReLU6 features of a trained net; random weights give about 0
    assert lite0.id == "efficientnet_lite0-224-0e6eac392080"


def test_frozen_encoder_stays_in_eval_mode_whatever_a_parent_calls(lite0) -> None:
    parent = torch.nn.Sequential(lite0)
    parent.train()
    assert not any(module.training for module in lite0.modules())
    assert not any(parameter.requires_grad for parameter in lite0.parameters())


def test_vgg16_loads_a_state_dict_file_and_is_cut_at_the_fourth_layer(tmp_path: Path) -> None:
    from torchvision.models import vgg16

    with torch.device("meta"):
        shapes = {name: value.shape for name, value in vgg16(weights=None).state_dict().items()}
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    state["classifier.3.bias"] += torch.arange(4096.0)
    torch.save(state, tmp_path / "vgg16.pth")
    net = vgg16_features(str(tmp_path / "vgg16.pth"), from_hub=False).eval()
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 224, 224))[0].tolist() == list(range(4096))


def test_weights_that_are_no_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.pth").write_bytes(b"not weights")
    with pytest.raises(SettingsError, match="cannot read weights"):
        load_vision_encoder("efficientnet_lite0", weights=str(tmp_path / "bad.pth"))
    with pytest.raises(SettingsError, match="does not exist"):
        load_vision_encoder("efficientnet_lite0", weights=str(tmp_path / "absent.pth"))
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(SettingsError, match="does not hold EfficientNet-Lite0"):
        load_vision_encoder("efficientnet_lite0", weights=str(tmp_path / "other.pth"))


def camera(data: bytes, encoding: str) -> CameraFrame:
    return CameraFrame("north", 0, 0, image=data, shape=(120, 200, 3), encoding=encoding)  # type: ignore[arg-type]


def test_jpeg_and_png_decode_to_the_same_rgb() -> None:
    png = cv2.imencode(".png", picture()[..., ::-1])[1].tobytes()
    for frame in (camera(simplejpeg.encode_jpeg(picture(), quality=95), "jpeg"), camera(png, "png")):
        image = decode_image(frame)
        assert image is not None
        assert image.shape == (224, 224, 3)
        assert abs(int(image[100, 20, 0]) - 220) < 12
        assert abs(int(image[100, 200, 2]) - 220) < 12


def test_image_of_another_size_than_it_says_is_none() -> None:
    png = cv2.imencode(".png", picture())[1].tobytes()
    for data, encoding in ((png, "png"), (simplejpeg.encode_jpeg(picture()), "jpeg")):
        frame = CameraFrame("north", 0, 0, image=data, shape=(8, 8, 3), encoding=encoding)  # type: ignore[arg-type]
        assert decode_image(frame) is None


def test_damaged_image_is_none() -> None:
    assert decode_image(camera(b"\xff\xd8\xff\xe0 nothing \xff\xd9", "jpeg")) is None
    assert decode_image(camera(b"\x89PNG\r\n\x1a\n", "png")) is None


def test_networks_of_timm_serve_either_side_with_their_own_normalisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = timm.create_model("test_resnet", pretrained=False)
    torch.save(whole.state_dict(), tmp_path / "net.pth")
    encoder = load_vision_encoder("timm:test_resnet", weights=str(tmp_path / "net.pth"))
    image = np.full((1, 224, 224, 3), 255, np.uint8)
    mean, std = (torch.tensor(whole.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    expected = whole.eval().forward_head(
        whole.forward_features((1.0 - mean) / std * torch.ones(1, 3, 224, 224)), pre_logits=True
    )
    assert torch.allclose(encoder(torch.from_numpy(image)), expected, atol=1e-4)
    make = partial(timm.create_model, pretrained_cfg_overlay={"mean": (0.1, 0.1, 0.1)})  # as another timm might
    monkeypatch.setattr(timm, "create_model", make)
    assert load_vision_encoder("timm:test_resnet", weights=str(tmp_path / "net.pth")).id != encoder.id
    monkeypatch.undo()
    radar = build_encoder({"encoder": "timm:test_resnet"}, (2, 64, 32))
    assert radar(torch.randn(2, 2, 64, 32)).shape == (2, radar.feature_dim)


def test_features_of_a_network_with_a_layer_before_its_classifier_are_counted_after_it(tmp_path: Path) -> None:
    name = "mobilenetv3_small_050"
    radar = build_encoder({"encoder": f"timm:{name}"}, (2, 64, 32)).eval()
    assert radar(torch.randn(1, 2, 64, 32)).shape == (1, radar.feature_dim)
    torch.save(timm.create_model(name, pretrained=False).state_dict(), tmp_path / "net.pth")
    encoder = load_vision_encoder(f"timm:{name}", weights=str(tmp_path / "net.pth"))
    assert encoder(torch.zeros(1, 224, 224, 3, dtype=torch.uint8)).shape == (1, encoder.dim)


def test_network_that_timm_does_not_know_is_refused_with_names_like_it() -> None:
    with pytest.raises(SettingsError, match=r"resnet_18.*use another"):
        load_vision_encoder("timm:resnet_18")
    with pytest.raises(SettingsError, match="vgg61"):
        load_vision_encoder("vgg61")
