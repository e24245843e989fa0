"""The step learns, refuses what is not finite, and goes on exactly where it was."""

import copy
import math

import numpy as np
import pytest
import torch

from services.core.registry import InputContract
from tests.trainer.conftest import batch_of, fill, scene
from trainer.feed import Feed
from trainer.feed_settings import FeedSettings
from trainer.learner import DivergedError, Learner


@pytest.fixture
def feed(store_dir, vision) -> Feed:
    fill(store_dir, [scene(i) for i in range(64)])
    feed = Feed(store_dir, vision=vision, settings=FeedSettings(), centre=True, seed=0)
    feed.refresh()
    while feed.num_pending:
        feed.encode(64)
    return feed


def learner_of(settings, feed: Feed, **changes) -> Learner:
    settings = settings.model_copy(update=changes)
    learner = Learner(settings, contract=feed.contract, key_dim=12, device=torch.device("cpu"))
    learner.set_input(feed.clutter_table(), scale=5.0)
    return learner


def steps(learner: Learner, feed: Feed, num: int, *, rng: np.random.Generator) -> list[float]:
    losses = []
    for _ in range(num):
        batch = batch_of(feed, 16, rng=rng)
        losses.append(learner.step(batch).loss.item())
    return losses


def test_radar_learns_to_name_its_image_among_the_queue(settings, feed) -> None:
    """Half of the queue shows the same kind of scene, so log(1 + K / 2) is the best there is."""
    learner = learner_of(settings, feed, in_batch_negatives=False)
    losses = steps(learner, feed, 25, rng=np.random.default_rng(0))
    chance = math.log(1 + settings.queue_size)
    assert np.mean(losses[-5:]) < chance - 0.5


def test_gain_and_noise_are_not_put_on_speeds(settings) -> None:
    contract = InputContract(shape=(3, 16, 8), channels=("integrated", "mean_speed_mps", "moving"))
    jittered = settings.model_copy(update={"gain_jitter_db": 3.0, "noise_db": 2.0, "shift_bins": 0})
    learner = Learner(jittered, contract=contract, key_dim=12, device=torch.device("cpu"))
    x, mirrored = torch.randn(4, 3, 16, 8), torch.tensor([True, False, False, True])
    augmented = learner.augment(x.clone(), mirrored)
    of_mirrored_scenes = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    assert torch.equal(augmented[:, 1], of_mirrored_scenes[:, 1])
    for power in (0, 2):
        assert (augmented[:, power] != of_mirrored_scenes[:, power]).all()


def test_restored_learner_takes_the_identical_next_steps(settings, feed) -> None:
    learner = learner_of(settings, feed)
    steps(learner, feed, 6, rng=np.random.default_rng(0))
    state = copy.deepcopy(learner.state())
    expected = steps(learner, feed, 3, rng=np.random.default_rng(1))
    again = learner_of(settings, feed)
    again.restore(state)
    assert steps(again, feed, 3, rng=np.random.default_rng(1)) == expected


def test_restored_learner_obeys_the_settings_of_now(settings, feed) -> None:
    learner = learner_of(settings, feed)
    steps(learner, feed, 3, rng=np.random.default_rng(0))
    changed = learner_of(settings, feed, optimizer="sgd", weight_decay=0.5, temperature=0.05)
    changed.restore(copy.deepcopy(learner.state()))
    steps(changed, feed, 1, rng=np.random.default_rng(1))
    assert changed.step_num == 4
    assert changed.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert float(changed.log_scale.exp()) == pytest.approx(20)
    same = learner_of(settings, feed, weight_decay=0.25)
    same.restore(copy.deepcopy(learner.state()))
    assert same.optimizer.param_groups[0]["weight_decay"] == 0.25


def test_loss_that_is_not_finite_stops_before_the_weights_change(settings, feed) -> None:
    learner = learner_of(settings, feed)
    batch = batch_of(feed, 16, rng=np.random.default_rng(0))
    batch.heatmap[0] = torch.inf
    before = copy.deepcopy(learner.encoder.state_dict())
    with pytest.raises(DivergedError, match="step 0"):
        learner.step(batch)
    assert all(torch.equal(before[name], value) for name, value in learner.encoder.state_dict().items())


def test_paper_mode_sets_the_papers_recipe_and_single_settings_still_win() -> None:
    from trainer.settings import TrainerSettings

    paper = TrainerSettings(mode="paper", queue_size=128)
    assert (paper.radar_encoder, paper.vision_encoder, paper.optimizer) == ("vgg16", "vgg16", "sgd")
    assert (paper.learning_rate, paper.batch_size, paper.queue_size) == (0.03, 64, 128)


def test_sgd_with_cosine_runs_the_same_step(settings, feed) -> None:
    learner = learner_of(
        settings,
        feed,
        optimizer="sgd",
        schedule="cosine",
        schedule_steps=10,
        ema_decay=0.0,
        learn_temperature=False,
    )
    steps(learner, feed, 9, rng=np.random.default_rng(0))
    assert 0 < learner.optimizer.param_groups[0]["lr"] < settings.learning_rate
    assert float(learner.log_scale.exp()) == pytest.approx(1 / 0.2, rel=1e-4)


def test_gradient_that_is_not_finite_stops_before_the_weights_change_too(settings, feed) -> None:
    """As a CPU library was seen to give, under a loss that looked well."""
    learner = learner_of(settings, feed)
    learner.encoder.stem[1].weight.register_hook(lambda gradient: gradient * torch.nan)
    before = copy.deepcopy(learner.encoder.state_dict())
    with pytest.raises(DivergedError, match="gradient nan long, at step 0"):
        learner.step(feed.batch(16))
    assert all(torch.equal(before[name], value) for name, value in learner.encoder.state_dict().items())


def test_what_is_told_stands_at_the_chance_line_while_nothing_is_learnt(settings, feed) -> None:
    """Both ways are minimised; radar to image is told, for that is what chance is of."""
    learner = learner_of(settings, feed, temperature=100.0, learning_rate=1e-9, seed=20261127)
    for _ in range(4):
        found = learner.step(feed.batch(16))
    assert float(found.loss) == pytest.approx(float(found.chance), abs=0.02)


def test_queue_of_another_length_starts_empty_after_a_resume(settings, feed) -> None:
    learner = learner_of(settings, feed)
    steps(learner, feed, 2, rng=np.random.default_rng(0))
    longer = learner_of(settings, feed, queue_size=80)
    longer.restore(copy.deepcopy(learner.state()))
    assert (longer.step_num, int(longer.queue.num_seen), longer.queue.K) == (2, 0, 80)
