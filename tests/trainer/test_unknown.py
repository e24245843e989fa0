"""The unknown score: small for what classes look like, large for what none does, parted by the threshold."""

import pytest
import torch

from services.core.frames import CLASSES
from trainer.unknown import auroc, build_unknown, fit_open_set, fit_unknown


def clouds(num: int, *, dim: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes, each around its own axis."""
    torch.manual_seed(seed)
    targets = torch.arange(num) % 4
    return torch.eye(dim)[targets] * 5 + torch.randn(num, dim) * 0.5, targets


def test_the_score_is_mahalanobis_distance_under_the_shared_shrunk_covariance() -> None:
    features, targets = clouds(200)
    score = fit_unknown(features, targets)
    unit = torch.nn.functional.normalize(features, dim=1).double()
    means = torch.stack([unit[targets == i].mean(0) for i in range(4)])
    apart = unit - means[targets]
    covariance = apart.T @ apart / 200
    level = covariance.diagonal().mean()
    inverse = torch.linalg.inv(0.9 * covariance + 0.1 * level * torch.eye(16))
    new = torch.nn.functional.normalize(torch.randn(7, 16), dim=1)
    from_all = new.double()[:, None] - means
    expected = torch.einsum("ncd,de,nce->nc", from_all, inverse, from_all).amin(1) / 16
    torch.testing.assert_close(score(new).double(), expected, rtol=1e-3, atol=1e-3)


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


def test_a_wide_encoder_keeps_a_bounded_state_and_still_tells_strangers() -> None:
    torch.manual_seed(0)
    targets = torch.arange(600) % 4
    features = torch.nn.functional.pad(torch.eye(4)[targets] * 5, (0, 596)) + torch.randn(600, 600) * 0.2
    before = torch.get_rng_state()
    score = fit_unknown(features, targets)
    assert torch.equal(torch.get_rng_state(), before)
    assert score.directions.shape == (128, 600)
    assert auroc(score(features), score(torch.randn(100, 600))) > 0.95


def test_a_description_builds_the_same_score_again() -> None:
    features, targets = clouds(100)
    score = fit_unknown(features, targets)
    again = build_unknown(score.describe(), 16)
    assert again is not None
    again.load_state_dict(score.state_dict())
    assert torch.equal(again(features), score(features))
    assert build_unknown(None, 16) is None


def test_too_few_frames_give_no_score() -> None:
    features, targets = clouds(16)
    assert fit_open_set(features, targets, targets, classes=CLASSES, accepted_share=0.99, noise=features) is None


def test_the_area_under_the_curve_counts_a_tie_half() -> None:
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([3.0])) == 1.0
    assert auroc(torch.tensor([1.0, 3.0]), torch.tensor([2.0])) == 0.5
    assert auroc(torch.tensor([2.0]), torch.tensor([2.0])) == 0.5
