"""From named frames to a judged version: who may name, what decides, and what the registry is told."""

from dataclasses import replace

import numpy as np
import pytest
import structlog
import torch

from services.core.frames import Seen
from services.core.registry import InputContract, Registry
from services.core.segments import Pair
from tests.trainer.conftest import batch_of, fill, scene
from trainer.cooldown import cool_down
from trainer.features import Features
from trainer.feed import Feed
from trainer.learner import Learner
from trainer.names import Names, fair
from trainer.release import Releases, noise_of

NUM_PAIRS = 200


def seen(pair: Pair, *, confidence: float = 0.9, flags: tuple[str, ...] = (), label: str | None = None) -> Pair:
    name = ("pedestrian", "car")[pair.radar.seq % 2] if label is None else label
    return replace(pair, seen=Seen(name, confidence, flags=flags, detector="eye"))


def feed_of(settings, vision, pairs: list[Pair], *, num_labels: int = 0) -> Feed:
    fill(settings.store_dir, pairs, num_labels=num_labels)
    feed = Feed(
        settings.store_dir,
        vision=vision,
        settings=settings.model_copy(update={"mirror_share": 0.0}),
        centre=True,
        seed=0,
        held_out_share=settings.held_out_share,
    )
    feed.refresh()
    while feed.num_pending:
        feed.encode(64)
    return feed


def learner_of(settings, feed: Feed) -> Learner:
    assert feed.contract is not None
    learner = Learner(settings, contract=feed.contract, key_dim=12, device=torch.device("cpu"))
    learner.set_input(feed.clutter_table(), scale=5.0)
    return learner


def releases_of(settings, feed: Feed) -> Releases:
    registry = Registry(settings.registry_dir, settings.model_name)
    return Releases(settings, registry=registry, feed=feed, log=structlog.get_logger())


def blind(learner: Learner) -> None:
    """The average sees nothing any more."""
    with torch.no_grad():
        for weight in learner.average.parameters():
            weight.zero_()
    learner.step_num += 1


@pytest.fixture
def half_held_out(settings):
    return settings.model_copy(update={"held_out_share": 0.5, "min_gate_frames": 10})


def test_people_win_over_the_detector_which_abstains_where_it_was_not_sure(settings, vision) -> None:
    pairs = [scene(i) for i in range(12)]
    pairs = [seen(pair, label="cyclist") for pair in pairs[:6]] + [
        seen(pairs[6]),
        seen(pairs[7], confidence=0.79),
        seen(pairs[8], flags=("dark",)),
        seen(pairs[9], label=""),
        *pairs[10:],
    ]
    feed = feed_of(settings, vision, pairs, num_labels=4)
    found = {
        name.pair.id.seq: (name.is_human, name.target, name.weight) for name in Names(settings, feed).learnable()
    }
    assert found == {
        **{i: (True, (1, 3)[i % 2], 1.0) for i in range(4)},
        4: (False, 2, 0.3),
        5: (False, 2, 0.3),
        6: (False, 1, 0.3),
    }
    for names_from, expected in (("people", [0, 1, 2, 3]), ("detector", [0, 1, 2, 3, 4, 5, 6])):
        names = Names(settings.model_copy(update={"names_from": names_from}), feed)
        assert [name.pair.id.seq for name in names.learnable()] == expected


def test_held_out_names_are_for_the_gate_and_are_never_trained_on(half_held_out, vision) -> None:
    feed = feed_of(half_held_out, vision, [scene(i) for i in range(100)], num_labels=100)
    names = Names(half_held_out, feed)
    learnable, held_out = ({name.pair.id for name in found} for found in (names.learnable(), names.held_out()))
    assert len(held_out) > 30
    assert len(learnable) > 15
    assert not learnable & held_out
    assert len(learnable | held_out) < 100  # a guard between


def test_detector_names_no_frame_of_another_radar(settings, vision) -> None:
    """Of as many cells, at a site that the model knows."""
    pairs = [seen(scene(i)) for i in range(12)]
    other = replace(pairs[5].radar, heatmap=pairs[5].radar.heatmap.transpose(0, 2, 1).copy())
    pairs[5] = replace(pairs[5], radar=other)
    pairs[7] = replace(pairs[7], radar=replace(pairs[7].radar, unit="counts"))
    feed = feed_of(settings, vision, pairs)
    found = Names(settings, feed).learnable()
    assert [name.pair.id.seq for name in found] == [i for i in range(12) if i not in (5, 7)]
    learner = learner_of(settings, feed)
    features = Features(learner.preprocess, learner.average, sites=("", "north"), shape=learner.contract.shape)
    assert features.of(feed.reader.pairs)[1] == [i for i in range(12) if i != 5]


def test_noise_that_shows_nothing_is_in_the_unit_of_each_channel(settings, vision) -> None:
    """Powers around 23 dB, speeds of a quarter of a metre a second."""
    pairs = [scene(i) for i in range(12)]
    rng = np.random.default_rng(0)
    for i, pair in enumerate(pairs):
        heatmap = pair.radar.heatmap.copy()
        heatmap[1] = rng.normal(0.1, 0.25, heatmap[1].shape)
        radar = replace(pair.radar, heatmap=heatmap, channels=("integrated", "mean_speed_mps"))
        pairs[i] = replace(pair, radar=radar)
    feed = feed_of(settings, vision, pairs)
    preprocess = learner_of(settings, feed).preprocess
    preprocess.clutter.zero_()
    preprocess.scale.fill_(1.0)

    class Cells(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)

    features = Features(preprocess, Cells(), sites=("", "north"), shape=feed.contract.shape)
    noise, frames = noise_of(features, feed.reader.pairs), features.of(feed.reader.pairs)[0]
    assert noise.shape == (64, 4)
    torch.testing.assert_close(noise.mean(0), frames.mean(0), rtol=0.05, atol=0.05)
    assert len(noise_of(features, [])) == 0


def test_names_are_bounded_and_a_small_site_is_not_crowded_out(settings, vision) -> None:
    fill(settings.store_dir, [scene(i, site="old") for i in range(6)], num_labels=6, site="old")
    feed = feed_of(settings, vision, [scene(i) for i in range(60)], num_labels=60)
    names = Names(settings.model_copy(update={"max_head_frames": 16}), feed).learnable()
    sites = [name.pair.site for name in names]
    assert (sites.count("old"), len(sites)) == (6, 16)
    seqs = [name.pair.id.seq for name in names if name.pair.site == "north"]
    assert seqs == [0, 6, 12, 18, 24, 30, 36, 42, 48, 54]
    assert fair([], 5) == []


def test_no_person_at_all_is_enough_and_the_manifest_says_so(settings, vision) -> None:
    feed = feed_of(settings, vision, [seen(scene(i)) for i in range(60)])
    release = releases_of(settings, feed).make(learner_of(settings, feed), losses={})
    assert release is not None
    manifest = Registry(settings.registry_dir, "radar").manifest(release.version)
    assert manifest.metrics["names"] == {"people": 0, "detector": 60, "sources": {"eye": 60}}
    assert manifest.metrics["probe"]["judged_on"] == "detector"
    assert (manifest.lineage["num_labels"], manifest.lineage["num_pseudo_labels"]) == (0, 60)
    assert manifest.verdict == "promote"


def test_too_few_names_make_no_version(settings, vision) -> None:
    feed = feed_of(settings, vision, [scene(i) for i in range(40)], num_labels=3)
    assert releases_of(settings, feed).make(learner_of(settings, feed), losses={}) is None


def test_a_version_that_got_worse_on_held_out_names_is_refused_after_a_restart_too(half_held_out, vision) -> None:
    settings = half_held_out
    feed = feed_of(settings, vision, [scene(i) for i in range(NUM_PAIRS)], num_labels=NUM_PAIRS)
    learner, releases = learner_of(settings, feed), releases_of(settings, feed)
    first = releases.make(learner, losses={})
    assert first is not None
    assert (first.judgement.verdict, first.judgement.why[:13]) == ("promote", "first version")
    learner.step_num += 1
    same = releases.make(learner, losses={})
    assert same is not None
    assert same.judgement.verdict == "promote"
    assert "accuracy +0.0 [0.0, 0.0] points" in same.judgement.why
    blind(learner)
    for made_by in (releases, releases_of(settings, feed)):  # the second has to load what it compares with
        worse = made_by.make(learner, losses={})
        assert worse is not None
        assert worse.judgement.verdict == "refuse"
        assert "held out" in worse.metrics["gate"]["basis"]
        assert worse.metrics["gate"]["against"] == same.version
    registry = Registry(settings.registry_dir, "radar")
    assert set(registry.refused()) == {3, 4}
    assert registry.aliases()["candidate"] == same.version


def test_while_few_held_out_frames_have_names_encoders_are_cross_validated(settings, vision) -> None:
    feed = feed_of(settings, vision, [scene(i) for i in range(60)], num_labels=60)
    learner, releases = learner_of(settings, feed), releases_of(settings, feed)
    assert releases.make(learner, losses={})
    blind(learner)
    release = releases.make(learner, losses={})
    assert release is not None
    assert release.judgement.verdict == "refuse"
    assert "cross-validated" in release.metrics["gate"]["basis"]


def test_without_enough_names_retrieval_decides(half_held_out, vision) -> None:
    feed = feed_of(half_held_out, vision, [scene(i) for i in range(NUM_PAIRS)], num_labels=24)
    learner, releases = learner_of(half_held_out, feed), releases_of(half_held_out, feed)
    releases._registry.promote(_must(releases.make(learner, losses={})).version, by="test", why="test")
    learner.step_num += 1
    release = _must(releases.make(learner, losses={}))
    assert release.metrics["gate"]["what"] == "R@5"
    assert release.metrics["gate"]["class_points"] == {}
    assert release.metrics["gate"]["all_points"]["points"] == 0.0


def test_features_are_computed_once_for_each_encoder(half_held_out, vision, monkeypatch) -> None:
    feed = feed_of(half_held_out, vision, [scene(i) for i in range(NUM_PAIRS)], num_labels=NUM_PAIRS)
    learner, releases = learner_of(half_held_out, feed), releases_of(half_held_out, feed)
    first = _must(releases.make(learner, losses={}))
    features = releases._versions[first.version].features
    _must(releases.make(learner, losses={}))  # of the same step: held-out frames come on top
    num_computed = features.num_computed
    assert num_computed <= NUM_PAIRS
    learner.step_num += 1
    _must(releases.make(learner, losses={}))  # a new encoder; the champion's features are known
    assert features.num_computed == num_computed


def test_a_champion_of_another_radar_is_not_compared_with(settings, vision) -> None:
    feed = feed_of(settings, vision, [scene(i) for i in range(60)], num_labels=60)
    learner, releases = learner_of(settings, feed), releases_of(settings, feed)
    _must(releases.make(learner, losses={}))
    assert feed.contract is not None
    feed.contract = InputContract(shape=feed.contract.shape, unit="counts")
    release = _must(releases.make(learner, losses={}))
    assert "version 1 takes (2, 16, 8) dB, not (2, 16, 8) counts; accuracy" in release.judgement.why
    assert release.judgement.verdict == "promote"


def test_a_release_leaves_torchs_generator_and_the_learner_as_they_were(settings, vision) -> None:
    feed = feed_of(settings, vision, [scene(i) for i in range(60)], num_labels=60)
    learner, releases = learner_of(settings, feed), releases_of(settings, feed)
    before = torch.get_rng_state()
    weights = {name: value.clone() for name, value in learner.average.state_dict().items()}
    for _ in range(2):
        _must(releases.make(learner, losses={}))
        releases._versions.clear()  # the champion is loaded again
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[name]) for name, value in learner.average.state_dict().items())


def test_a_cool_down_ends_at_rate_zero_and_leaves_the_learner_as_it_was(settings, vision) -> None:
    feed = feed_of(settings, vision, [scene(i) for i in range(32)])
    learner = learner_of(settings, feed)
    rng = np.random.default_rng(0)

    def draw():
        return batch_of(feed, 16, rng=rng)

    learner.step(draw())
    before = {name: value.clone() for name, value in learner.encoder.state_dict().items()}
    queue = learner.queue.state_dict()["keys"].clone()
    fork = cool_down(learner, draw, num_steps=6, max_s=60.0)
    assert fork is not None
    assert fork.step_num == learner.step_num + 6
    rates = [group["lr"] for group in fork.optimizer.param_groups]
    assert max(rates) < 0.1 * settings.learning_rate
    assert all(torch.equal(value, before[name]) for name, value in learner.encoder.state_dict().items())
    assert torch.equal(learner.queue.state_dict()["keys"], queue)
    average, encoder = fork.average.state_dict(), fork.encoder.state_dict()
    assert all(torch.equal(value, encoder[name]) for name, value in average.items())
    assert any(not torch.equal(value, before[name]) for name, value in encoder.items())


def test_a_cool_down_is_given_up_when_told_to_stop_out_of_time_or_diverged(settings, vision) -> None:
    feed = feed_of(settings, vision, [scene(i) for i in range(32)])
    learner = learner_of(settings, feed)
    rng = np.random.default_rng(0)

    def draw():
        return batch_of(feed, 16, rng=rng)

    times = iter(range(100))
    assert cool_down(learner, draw, num_steps=50, max_s=3.0, now_s=lambda: float(next(times))) is None
    assert next(times) < 8
    assert cool_down(learner, draw, num_steps=50, max_s=60.0, is_stopping=lambda: True) is None

    def damaged():
        batch = draw()
        batch.heatmap[0] = torch.inf
        return batch

    assert cool_down(learner, damaged, num_steps=5, max_s=60.0) is None
    assert all(torch.isfinite(value).all() for value in learner.encoder.state_dict().values())


def _must(release):
    assert release is not None
    return release


def test_held_out_pairs_that_got_damaged_all_at_once_only_go_without_a_trial(half_held_out, vision) -> None:
    feed = feed_of(half_held_out, vision, [scene(i) for i in range(100)])
    releases = releases_of(half_held_out, feed)
    version = releases._encoder_of(learner_of(half_held_out, feed))
    samples = feed.heldout(every_s=0.5, newest=100)
    assert releases._trial._retrieve(version, samples) is not None
    [segment] = half_held_out.store_dir.rglob("*.seg")
    segment.write_bytes(bytes(segment.stat().st_size))
    assert releases._trial._retrieve(version, samples) is None
