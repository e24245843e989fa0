"""The radar side: shapes, clutter, and a fixed scale."""

import pytest
import torch

from trainer.classifier import RadarClassifier
from trainer.head_nets import LinearHead
from trainer.radar import Preprocess, SmallEncoder


@pytest.mark.parametrize("shape", [(2, 128, 64), (1, 576, 400), (1, 128, 128), (3, 16, 8)])
def test_small_encoder_takes_any_radars_shape(shape: tuple[int, int, int]) -> None:
    encoder = SmallEncoder(shape)
    assert encoder(torch.randn(3, *shape)).shape == (3, 128)
    assert sum(p.numel() for p in encoder.parameters()) < 500_000


def test_each_sites_clutter_is_subtracted_before_the_one_fixed_scale() -> None:
    preprocess = Preprocess(2, (1, 2, 2))
    preprocess.clutter = torch.stack([torch.full((1, 2, 2), value) for value in (5.0, 10.0, 20.0)])
    preprocess.scale.fill_(2.0)
    out = preprocess(torch.full((3, 1, 2, 2), 30.0), torch.tensor([0, 1, 2]))
    assert out[:, 0, 0, 0].tolist() == [12.5, 10.0, 5.0]


def test_classifier_gives_probabilities_and_unit_embeddings() -> None:
    shape = (2, 16, 8)
    model = RadarClassifier(Preprocess(1, shape), SmallEncoder(shape), LinearHead(128, 4)).eval()
    probabilities, embedding = model(torch.randn(5, *shape), torch.tensor([0, 1, 0, 1, 0]))
    assert torch.allclose(probabilities.sum(1), torch.ones(5))
    assert torch.allclose(embedding.norm(dim=1), torch.ones(5), atol=1e-5)


def test_an_echo_twice_as_strong_is_not_normalised_away() -> None:
    preprocess = Preprocess(0, (1, 4, 4))
    weak, strong = torch.full((1, 1, 4, 4), 10.0), torch.full((1, 1, 4, 4), 13.0)
    site = torch.zeros(1, dtype=torch.int64)
    assert float((preprocess(strong, site) - preprocess(weak, site)).mean()) == pytest.approx(3.0)
