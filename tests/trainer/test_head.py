"""The linear probe: right on separable features, honest about its split, alive with one class."""

import torch

from services.core.frames import CLASSES
from trainer.head import fit_head


def test_separable_features_are_classified_and_tested_on_unseen_blocks() -> None:
    torch.manual_seed(0)
    targets = torch.arange(200) % 4
    features = torch.eye(4)[targets] * 4 + torch.randn(200, 4) * 0.3
    fit = fit_head(features, targets, blocks=[("north", i // 8) for i in range(200)], classes=CLASSES)
    assert fit.metrics["accuracy"] > 0.98
    assert fit.metrics["num_tested"] == 200
    assert fit.metrics["num_labels"] == dict.fromkeys(CLASSES, 50)
    assert set(fit.metrics["recall"]) == set(CLASSES)


def test_a_block_is_never_on_both_sides_of_the_split() -> None:
    """Features that only name their block: whoever saw the block knows it, whoever did not is lost."""
    torch.manual_seed(0)
    blocks = torch.arange(400) // 10
    targets = torch.randint(0, 4, (40,))[blocks]
    features = torch.randn(40, 64)[blocks]
    fit = fit_head(features, targets, blocks=[("north", int(b)) for b in blocks], classes=CLASSES)
    assert fit.metrics["accuracy"] < 0.6
    assert (fit.head(features).argmax(1) == targets).float().mean() > 0.95


def test_one_class_alone_still_gives_a_head() -> None:
    fit = fit_head(torch.randn(10, 8), torch.full((10,), 3), blocks=[("n", 0)] * 10, classes=CLASSES)
    assert fit.head(torch.randn(5, 8)).argmax(1).tolist() == [3] * 5
    assert "accuracy" not in fit.metrics
