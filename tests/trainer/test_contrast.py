"""Eq. 1 by value, its variants, and what may be in the queue."""

import math

import pytest
import torch
import torch.nn.functional as F

from trainer.contrast import contrast
from trainer.queue import Queue, Scenes, is_negative


def scenes(*ids: int, site: int = 0, at_s: tuple[float, ...] | None = None) -> Scenes:
    times = at_s or tuple(float(i) for i in ids)
    return Scenes(
        id=torch.tensor(ids),
        site=torch.full((len(ids),), site),
        at_ns=torch.tensor([round(1e9 * t) for t in times]),
    )


def test_loss_is_equation_one() -> None:
    torch.manual_seed(0)
    q, k, past, tau = torch.randn(3, 5), torch.randn(3, 5), torch.randn(7, 5), 0.2
    unit = [F.normalize(x, dim=1) for x in (q, k, past)]
    expected = 0.0
    for i in range(3):
        positive = math.exp(float(unit[0][i] @ unit[1][i]) / tau)
        negative = sum(math.exp(float(unit[0][i] @ other) / tau) for other in unit[2])
        expected -= math.log(positive / (positive + negative)) / 3
    found = contrast(q, k, negatives=unit[2], is_negative=torch.ones(3, 7, dtype=torch.bool), scale=1 / tau)
    assert float(found.loss) == pytest.approx(expected, rel=1e-5)
    assert float(found.chance) == pytest.approx(math.log(8))


def test_random_encodings_stand_at_the_chance_line() -> None:
    torch.manual_seed(0)
    q, k, past = torch.randn(256, 512), torch.randn(256, 512), F.normalize(torch.randn(64, 512), dim=1)
    found = contrast(q, k, negatives=past, is_negative=torch.ones(256, 64, dtype=torch.bool), scale=1.0)
    assert float(found.loss) == pytest.approx(float(found.chance), abs=0.02)


def test_masked_negatives_count_for_nothing() -> None:
    q, k, past = torch.randn(2, 4), torch.randn(2, 4), F.normalize(torch.randn(6, 4), dim=1)
    mask = torch.tensor([[True, True, True, False, False, False]] * 2)
    masked = contrast(q, k, negatives=past, is_negative=mask, scale=5.0)
    short = contrast(q, k, negatives=past[:3], is_negative=mask[:, :3], scale=5.0)
    assert float(masked.loss) == pytest.approx(float(short.loss))
    assert float(masked.chance) == pytest.approx(math.log(4))


def test_gradients_are_finite_while_the_queue_is_empty() -> None:
    queue = Queue(8, 4)
    q = torch.randn(2, 4, requires_grad=True)
    scale = torch.tensor(10.0, requires_grad=True)
    mask = is_negative(scenes(1, 2), queue.scenes, exclude_within_ns=0)
    found = contrast(q, torch.randn(2, 4), negatives=queue.keys, is_negative=mask, scale=scale)
    found.loss.backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()
    assert scale.grad is not None
    assert scale.grad.isfinite()


def some(num: int, dim: int = 6) -> torch.Tensor:
    return F.normalize(torch.randn(num, dim), dim=1)


def test_decoupled_loss_leaves_the_positive_out_of_the_denominator() -> None:
    torch.manual_seed(0)
    q, k, past = some(2), some(2), some(5)
    found = contrast(
        q, k, negatives=past, is_negative=torch.ones(2, 5, dtype=torch.bool), scale=4.0, loss="decoupled"
    )
    expected = ((q @ past.T * 4).exp().sum(1).log() - (q * k).sum(1) * 4).mean()
    assert float(found.loss) == pytest.approx(float(expected), rel=1e-5)


def test_sigmoid_loss_is_one_decision_a_candidate() -> None:
    torch.manual_seed(0)
    q, k, past = some(2), some(2), some(3)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    found = contrast(q, k, negatives=past, is_negative=mask, scale=4.0, loss="sigmoid", bias=-2.0)
    yes = -((q * k).sum(1) * 4 - 2).sigmoid().log()
    no = -(1 - (q @ past.T * 4 - 2).sigmoid()).log()
    assert float(found.loss) == pytest.approx(float((yes + (no * mask).sum(1)).mean()), rel=1e-4)


def test_soft_targets_share_the_positive_with_what_looks_alike_and_never_with_what_is_masked() -> None:
    torch.manual_seed(0)
    q, k, past = some(1), some(1), some(3)
    past[1] = past[2] = k[0]  # its double twice, one of them masked
    mask = torch.tensor([[True, True, False]])
    found = contrast(
        q, k, negatives=past, is_negative=mask, scale=5.0, loss="info_nce", soft_share=0.5, soft_scale=1000.0
    )
    candidates = torch.stack([k[0], past[0], past[1]])
    log_p = (q @ candidates.T * 5).log_softmax(1)[0]
    expected = -(0.5 * log_p[0] + 0.5 * (0.5 * log_p[0] + 0.5 * log_p[2]))
    assert float(found.loss) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("loss", ["info_nce", "decoupled", "sigmoid"])
def test_every_loss_is_finite_without_negatives(loss) -> None:
    q = torch.randn(2, 4, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    k = some(2, 4)
    found = contrast(q, k, negatives=some(3, 4), is_negative=mask, scale=5.0, loss=loss)
    found.loss.backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()
    if loss == "decoupled":
        expected = -5 * F.cosine_similarity(q, k).mean()
        assert float(found.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 8, 11, 29])
def test_queue_takes_any_batch_size_and_keeps_the_newest(batch: int) -> None:
    queue, pushed = Queue(8, 1), []
    for start in range(0, 60, batch):
        ids = list(range(start, start + batch))
        queue.push(torch.tensor(ids)[:, None].float(), scenes(*ids))
        pushed += ids
    assert sorted(queue.id.tolist()) == pushed[-8:]
    assert queue.keys[:, 0].tolist() == queue.id.tolist()


def test_queue_never_offers_the_querys_own_scene_nor_unfilled_places() -> None:
    queue = Queue(4, 2)
    queue.push(torch.randn(3, 2), scenes(1, 2, 3))
    mask = is_negative(scenes(2, 9), queue.scenes, exclude_within_ns=0)
    assert mask.tolist() == [[True, False, True, False], [True, True, True, False]]


def test_scenes_close_in_time_are_no_negatives_on_the_same_site_only() -> None:
    queue = Queue(3, 2)
    queue.push(torch.randn(3, 2), scenes(1, 2, 3, at_s=(10.0, 10.4, 12.0)))
    near = is_negative(scenes(9, at_s=(10.1,)), queue.scenes, exclude_within_ns=500_000_000)
    assert near.tolist() == [[False, False, True]]
    elsewhere = is_negative(scenes(9, site=1, at_s=(10.1,)), queue.scenes, exclude_within_ns=500_000_000)
    assert elsewhere.tolist() == [[True, True, True]]
