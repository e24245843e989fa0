"""The unknown score: small for what classes look like, large for what none does, parted by the threshold."""

import pytest
import torch

from services.core.errors import RegistryError
from services.core.frames import CLASSES
from trainer.unknown import auroc, build_unknown, fit_open_set, fit_unknown


def clouds(num: int, *, dim: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes, each around its own axis."""
    torch.manual_seed(seed)
    targets = torch.arange(num) % 4
    return torch.eye(dim)[targets] * 5 + torch.randn(num, dim) * 0.5, targets


def test_the_score_is_the_mean_cosine_distance_to_the_three_nearest() -> None:
    features, targets = clouds(60)
    score = fit_unknown(features, targets)
    new = torch.randn(7, 16) * 3
    cosines = torch.nn.functional.cosine_similarity(new[:, None], features[None], dim=2)
    torch.testing.assert_close(score(new), 1 - cosines.sort(1, descending=True).values[:, :3].mean(1))
    assert fit_unknown(features[:2], targets[:2])(new).shape == (7,)


def test_what_is_known_is_accepted_and_what_no_class_looks_like_is_found() -> None:
    features, targets = clouds(400)
    strange = -features[:100] + torch.randn(100, 16)
    folds = torch.arange(400) // 10 % 5
    found = fit_open_set(features, targets, folds, classes=CLASSES, accepted_share=0.95, noise=strange)
    assert found is not None
    fresh = found.score(clouds(1000, seed=1)[0])
    assert float((fresh >= found.threshold).float().mean()) == pytest.approx(0.05, abs=0.03)
    assert found.metrics["auroc_noise"] > 0.99
    assert found.metrics["noise_found"] > 0.95
    assert all(value > 0.95 for value in found.metrics["auroc_class_left_out"].values())


def test_the_bank_is_bounded_and_spread_over_a_classs_frames() -> None:
    features, targets = clouds(1000)
    features[:, -1] = torch.arange(1000) / 100.0
    score = fit_unknown(features, targets)
    assert score.bank.shape == (256, 16)
    assert float(score.bank[:64, -1].max()) > 0.8


def test_a_description_builds_the_same_score_again() -> None:
    features, targets = clouds(100)
    score = fit_unknown(features, targets)
    again = build_unknown(score.describe(), 16)
    assert again is not None
    again.load_state_dict(score.state_dict())
    assert torch.equal(again(features), score(features))
    assert build_unknown(None, 16) is None
    with pytest.raises(RegistryError, match="unknown score is 'psychic'"):
        build_unknown({"score": "psychic"}, 16)


def test_class_whose_absence_leaves_one_stretch_of_time_is_not_left_out() -> None:
    """25 cars of one block, 6 pedestrians of another: without these nothing can be held out."""
    targets = torch.tensor([3] * 25 + [1] * 6)
    folds = torch.tensor([0] * 25 + [1] * 6)
    features = torch.eye(16)[targets] + torch.randn(31, 16, generator=torch.Generator().manual_seed(0)) * 0.1
    found = fit_open_set(features, targets, folds, classes=CLASSES, accepted_share=0.95, noise=features[:0])
    assert found is not None
    assert found.metrics["auroc_class_left_out"] == {}


def test_too_few_frames_give_no_score() -> None:
    features, targets = clouds(16)
    assert fit_open_set(features, targets, targets, classes=CLASSES, accepted_share=0.99, noise=features) is None


def test_the_area_under_the_curve_counts_a_tie_half() -> None:
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([3.0])) == 1.0
    assert auroc(torch.tensor([1.0, 3.0]), torch.tensor([2.0])) == 0.5
    assert auroc(torch.tensor([2.0]), torch.tensor([2.0])) == 0.5
