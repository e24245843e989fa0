"""Each gauge at values that are known: chance, perfect, collapsed."""

import math

import pytest
import torch
import torch.nn.functional as F

from trainer import gauges
from trainer.gauges import Labelled


def unit(num: int, dim: int, *, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def all_others(num: int) -> torch.Tensor:
    return ~torch.eye(num, dtype=torch.bool)


def test_unrelated_encodings_retrieve_at_chance_and_share_nothing() -> None:
    q, k = unit(400, 64), unit(400, 64, seed=1)
    found = gauges.retrieval(q, k, is_candidate=all_others(400))
    assert (found.r1_chance, found.r5_chance) == pytest.approx((1 / 400, 5 / 400))
    assert found.r5 < 0.04
    loss, chance = gauges.contrast_loss(q, k, is_candidate=all_others(400), scale=1.0)
    assert chance == pytest.approx(math.log(400))
    assert gauges.mi_bound(loss, chance) == pytest.approx(0, abs=0.03)


def test_equal_encodings_retrieve_all_and_share_up_to_the_log_of_the_candidates() -> None:
    q = unit(100, 64)
    found = gauges.retrieval(q, q, is_candidate=all_others(100))
    assert (found.r1, found.r5) == (1.0, 1.0)
    loss, chance = gauges.contrast_loss(q, q, is_candidate=all_others(100), scale=100.0)
    assert gauges.mi_bound(loss, chance) == pytest.approx(math.log(100), abs=1e-3)
    assert gauges.alignment(q, q) == pytest.approx(0, abs=1e-6)


def test_a_collapse_retrieves_nothing_though_all_ties() -> None:
    same = unit(1, 8).expand(50, 8)
    found = gauges.retrieval(same, same, is_candidate=all_others(50))
    assert (found.r1, found.r5) == (0.0, 0.0)


def test_what_may_not_be_mistaken_is_no_candidate_and_no_part_of_chance() -> None:
    q, k = unit(6, 4), unit(6, 4, seed=1)
    pairs_only = torch.zeros(6, 6, dtype=torch.bool)
    found = gauges.retrieval(q, k, is_candidate=pairs_only)
    assert (found.r1, found.r1_chance) == (1.0, 1.0)
    assert gauges.contrast_loss(q, k, is_candidate=pairs_only, scale=5.0) == pytest.approx((0.0, 0.0), abs=1e-6)


def test_alignment_and_uniformity_by_value() -> None:
    q, k = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert gauges.alignment(q, k) == pytest.approx(1.0)
    assert gauges.uniformity(q) == pytest.approx(-4.0)  # squared distance 2, times -2
    assert gauges.uniformity(q[:1].expand(3, 2)) == pytest.approx(0.0)


@pytest.mark.parametrize("num_directions", [1, 3, 16])
def test_effective_rank_counts_the_directions_in_use(num_directions) -> None:
    x = torch.randn(4000, num_directions, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(torch.randn(16, num_directions, generator=torch.Generator().manual_seed(1)))[0]
    assert gauges.effective_rank(5 + x @ basis.T) == pytest.approx(num_directions, rel=0.02)


def test_effective_rank_of_a_collapse_is_one_and_its_spread_nothing() -> None:
    collapsed = torch.ones(64, 16)
    assert gauges.effective_rank(collapsed) == 1.0
    assert gauges.feature_std(collapsed) == pytest.approx(0.0, abs=1e-6)
    assert gauges.feature_std(unit(4000, 16)) == pytest.approx(1.0, rel=0.02)


def labelled(num: int, *, seed: int, shift: float) -> Labelled:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(num) % 3
    centres = torch.tensor([[shift, 0.0], [0.0, shift], [-shift, -shift]])
    features = torch.randn(num, 2, generator=generator) + centres[targets]
    return Labelled(features, targets, [("north", i // 6) for i in range(num)])


def test_probes_tell_classes_apart_where_features_do_and_not_where_they_do_not() -> None:
    classes = ("empty", "pedestrian", "cyclist", "car")
    found = gauges.probe(labelled(90, seed=0, shift=5.0), labelled(60, seed=1, shift=5.0), classes=classes)
    assert (found["num_trained"], found["num_tested"]) == (90, 60)
    for kind in ("linear", "knn"):
        assert found[kind]["accuracy"] > 0.95
        assert set(found[kind]["recall"]) == {"empty", "pedestrian", "cyclist"}
    blind = gauges.probe(labelled(90, seed=0, shift=0.0), labelled(300, seed=1, shift=0.0), classes=classes)
    for kind in ("linear", "knn"):
        assert blind[kind]["accuracy"] == pytest.approx(1 / 3, abs=0.12)


def test_neighbours_vote_by_class_not_by_how_many_labels_it_has() -> None:
    many, few = labelled(90, seed=0, shift=4.0), labelled(60, seed=1, shift=4.0)
    keep = (many.targets != 2) | (torch.arange(90) < 12)
    thin = Labelled(
        many.features[keep], many.targets[keep], [b for b, k in zip(many.blocks, keep, strict=True) if k]
    )
    recall = gauges.probe(thin, few, classes=("empty", "pedestrian", "cyclist"))["knn"]["recall"]
    assert min(recall.values()) > 0.8
