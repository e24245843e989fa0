"""Heads: right on separable features, honest about their split, alive with one class, deaf to a few mistakes."""

import pytest
import torch

from services.core.frames import CLASSES
from trainer.head import fit_head, train_head
from trainer.head_nets import build_head, describe_head


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


def ring(num: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One class within another: no plane parts them."""
    torch.manual_seed(seed)
    targets = torch.arange(num) % 2
    angle = torch.rand(num) * 6.28
    points = torch.stack([angle.cos(), angle.sin()], 1) * (1 + 2 * targets[:, None])
    return torch.cat([points, torch.zeros(num, 2)], 1) + torch.randn(num, 4) * 0.2, targets


def test_auto_takes_the_hidden_layer_where_it_helps_and_the_linear_one_where_not() -> None:
    features, targets = ring(400, seed=0)
    blocks = [("north", i // 10) for i in range(400)]
    fit = fit_head(features, targets, blocks=blocks, classes=CLASSES[:2], kind="auto")
    assert fit.metrics["kind"] == "mlp"
    assert fit.metrics["accuracy"] > 0.95
    straight = torch.nn.functional.one_hot(targets, 4) * 3.0 + torch.randn(400, 4) * 0.3
    fit = fit_head(straight, targets, blocks=blocks, classes=CLASSES[:2], kind="auto")
    assert fit.metrics["kind"] == "linear"
    assert set(fit.metrics["accuracy_by_kind"]) == {"linear", "mlp"}


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_two_mistakes_in_a_hundred_cost_next_to_nothing(kind) -> None:
    torch.manual_seed(0)
    targets = torch.arange(300) % 4
    features = torch.nn.functional.pad(torch.eye(4)[targets] * 2, (0, 28)) + torch.randn(300, 32) * 0.5
    named = targets.clone()
    named[::50] = (named[::50] + 1) % 4

    def accuracy(names: torch.Tensor) -> float:
        head = train_head(kind, features[:200], names[:200], torch.ones(200), num_classes=4)
        return float((head(features[200:]).argmax(1) == targets[200:]).float().mean())

    assert accuracy(named) > accuracy(targets) - 0.02


def test_a_person_outweighs_the_detector_where_they_differ() -> None:
    """Two clouds; the detector has them the wrong way round, more often than people have them right."""
    torch.manual_seed(0)
    truth = torch.arange(90) % 2
    features = truth[:, None] * 2.0 - 1 + torch.randn(90, 3) * 0.1
    by_people = torch.arange(90) < 30
    targets = torch.where(by_people, truth, 1 - truth)
    weights = torch.where(by_people, 1.0, 0.3)
    head = train_head("linear", features, targets, weights, num_classes=2)
    assert (head(features).argmax(1) == truth).float().mean() > 0.95


def test_classes_count_alike_however_many_names_each_has() -> None:
    torch.manual_seed(0)
    targets = (torch.arange(400) % 20 == 0).long()
    features = targets[:, None] * 1.0 + torch.randn(400, 2) * 0.7
    fit = fit_head(features, targets, blocks=[("n", i // 10) for i in range(400)], classes=CLASSES[:2])
    assert fit.metrics["recall"]["pedestrian"] > 0.6


def test_training_is_the_same_each_time_and_leaves_the_generator_alone() -> None:
    features, targets = ring(100, seed=1)
    before = torch.get_rng_state()
    first = train_head("mlp", features, targets, torch.ones(100), num_classes=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again = train_head("mlp", features, targets, torch.ones(100), num_classes=2)
    assert torch.equal(first(features), again(features))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_manifest_describes_the_head_well_enough_to_build_it_again(kind) -> None:
    features, targets = ring(50, seed=2)
    head = train_head(kind, features, targets, torch.ones(50), num_classes=2)
    again = build_head(describe_head(head), 4, 2)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again.eval()(features), head(features))
    assert describe_head(build_head({}, 4, 2)) == {"kind": "linear"}
