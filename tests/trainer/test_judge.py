"""The gauges beside a real learner and a real store: on what is held out, at a bounded cost, with warnings."""

from dataclasses import replace

import numpy as np
import pytest
import simplejpeg
import structlog
import torch
from prometheus_client import generate_latest

from services.core.frames import CameraFrame, RadarFrame
from services.core.segments import Pair
from tests.trainer.conftest import SHAPE, batch_of, fill, scene
from trainer import worker as worker_module
from trainer.feed import Feed
from trainer.judge import Judge
from trainer.learner import Learner
from trainer.worker import TrainerWorker

MS = 1_000_000


class Told:
    """Takes what a judge emits; a clock that the test turns."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict]] = []
        self.at_s = 0.0
        self.reading_s = 0.0

    def emit(self, kind: str, **values) -> None:
        self.events.append((kind, values))

    def now_s(self) -> float:
        self.at_s += self.reading_s
        return self.at_s

    def of(self, kind: str) -> list[dict]:
        return [values for name, values in self.events if name == kind]


def judge_of(settings, feed, told: Told) -> Judge:
    return Judge(settings, feed, log=structlog.get_logger(), emit=told.emit, now_s=told.now_s)


def feed_of(settings, vision, *, share: float) -> Feed:
    feed = Feed(
        settings.store_dir,
        vision=vision,
        settings=settings.model_copy(update={"mirror_share": 0.0}),
        centre=True,
        seed=0,
        held_out_share=share,
    )
    feed.refresh()
    encode_all(feed)
    return feed


def encode_all(feed: Feed) -> None:
    while feed.num_pending:
        feed.encode(64)


def learner_of(settings, feed, *, num_steps: int) -> Learner:
    assert feed.contract is not None
    learner = Learner(settings, contract=feed.contract, key_dim=12, device=torch.device("cpu"))
    learner.set_input(feed.clutter_table(), scale=4.0)
    learn(learner, feed, num_steps)
    return learner


def learn(learner, feed, num_steps: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(num_steps):
        learner.step(batch_of(feed, 16, rng=rng))


@pytest.fixture
def feed(settings, vision) -> Feed:
    fill(settings.store_dir, [scene(i) for i in range(450)], num_labels=450)  # 15 minutes
    return feed_of(settings, vision, share=0.1)


def test_readings_are_of_held_out_pairs_and_tell_learning_from_knowing_nothing(settings, feed) -> None:
    told = Told()
    judge = judge_of(settings, feed, told)
    losses = {"loss": 2.0, "chance": 3.0}
    assert judge.look(learner_of(settings, feed, num_steps=0), losses)
    before = judge.readings
    told.at_s += 1000
    assert judge.look(learner_of(settings, feed, num_steps=40), losses)
    after = judge.readings
    assert after["held_out_pairs"] == len(feed.heldout(every_s=0.5, newest=1000))
    assert after["mi_nats"] == pytest.approx(1.0)
    assert after["held_out_mi_nats"] > before["held_out_mi_nats"] + 0.1
    assert after["alignment"] < before["alignment"] - 0.2
    assert 1 <= after["rank"] <= after["features"]
    assert 0 < after["r5_chance"] < 0.2
    assert after["probe"]["num_tested"] >= 30
    assert set(after["probe"]["knn"]["recall"]) == {"pedestrian", "car"}
    assert told.of("gauges") == [before, after]
    assert judge.summary()["probe"] == after["probe"]["linear"]["accuracy"]


def test_judging_takes_no_more_than_its_share_and_says_how_much(settings, feed) -> None:
    told = Told()
    told.reading_s = 3.0  # each look at the clock
    settings = settings.model_copy(update={"gauges_every_s": 1.0, "gauges_max_share": 0.02})
    judge = judge_of(settings, feed, told)
    learner = learner_of(settings, feed, num_steps=0)
    num = sum(judge.look(learner, {}) for _ in range(300))
    assert num == pytest.approx(300 * 3 / 150, abs=1)
    assert judge.readings["cost_share"] <= 0.0201
    assert judge.readings["took_s"] == pytest.approx(3.0)


def test_judging_changes_neither_learner_nor_random_numbers(settings, feed) -> None:
    learner = learner_of(settings, feed, num_steps=3)
    torch.manual_seed(1)
    judge = judge_of(settings, feed, Told())
    before, state = learner.state(), torch.get_rng_state()
    weights = {name: value.clone() for name, value in before["encoder"].items()}
    assert judge.look(learner, {})
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, learner.encoder.state_dict()[name]) for name, value in weights.items())


def test_nothing_held_out_and_no_labels_leave_the_other_gauges(settings, vision) -> None:
    fill(settings.store_dir, [scene(i) for i in range(40)])
    feed = feed_of(settings, vision, share=0.0)
    judge = judge_of(settings, feed, Told())
    assert judge.look(learner_of(settings, feed, num_steps=0), {})
    assert judge.readings["held_out_pairs"] == 0
    assert not {"r5", "rank", "probe", "mi_nats"} & judge.readings.keys()
    assert judge.readings["sites"]["north"]["levels"]["pairing_residual"] == pytest.approx(1.0)


def test_collapse_is_told_once_and_once_when_it_is_over(settings, feed) -> None:
    told = Told()
    judge = judge_of(settings, feed, told)
    learner = learner_of(settings, feed, num_steps=30)
    healthy = {name: value.clone() for name, value in learner.average.state_dict().items()}
    for weights in ("healthy", "healthy", "gone", "gone", "healthy"):
        learner.average.load_state_dict(healthy)
        if weights == "gone":
            torch.nn.init.zeros_(learner.average.head[-1].weight)
        told.at_s += 1000
        judge.look(learner, {})
    alarms = [event for event in told.of("alarm") if event["alarm"] == "collapse"]
    assert [event["is_on"] for event in alarms] == [True, False]
    assert "ECHOSIGHT_LEARNING_RATE" in alarms[0]["do"]


def test_weights_that_are_no_numbers_are_told_and_do_not_stop_the_judge(settings, feed) -> None:
    told = Told()
    judge = judge_of(settings, feed, told)
    learner = learner_of(settings, feed, num_steps=0)
    with torch.no_grad():
        learner.average.head[-1].bias.fill_(float("nan"))
    assert judge.look(learner, {})
    assert [event["alarm"] for event in told.of("alarm")] == ["not_finite"]


def test_radar_whose_gain_changes_is_told_once(settings, vision) -> None:
    told = Told()
    feed = feed_of(settings, vision, share=0.0)
    judge, learner = None, None
    for i in range(24):
        pairs = [scene(j) for j in range(12 * i, 12 * i + 12)]
        if i >= 14:
            pairs = [replace(pair, radar=replace(pair.radar, heatmap=pair.radar.heatmap + 4)) for pair in pairs]
        fill(settings.store_dir, pairs)
        feed.refresh()
        encode_all(feed)
        learner = learner or learner_of(settings, feed, num_steps=0)
        judge = judge or judge_of(settings, feed, told)
        told.at_s += 1000
        judge.look(learner, {})
    [drift] = told.of("drift")
    assert (drift["site"], drift["part"], drift["unit"]) == ("north", "radar", "dB")
    assert drift["now"] - drift["was"] == pytest.approx(4, abs=1)
    assert judge is not None
    assert judge.readings["sites"]["north"]["changes"] == {"radar": 1}


def street(num: int, *, first: int, camera_ahead_ms: int = 0, seed: int = 0) -> list[Pair]:
    """10 pairs a second of one thing that moves: where it is the echo shows by range, the image by colour."""
    rng = np.random.default_rng(seed + first)
    pairs = []
    for i in range(first, first + num):
        heatmap = rng.normal(20, 1, SHAPE)
        at = 0.5 + 0.5 * np.array([np.sin(2 * np.pi * hertz * i / 10) for hertz in (0.13, 0.29)])
        shown = 0.5 + 0.5 * np.array(
            [np.sin(2 * np.pi * hertz * (i / 10 - camera_ahead_ms / 1e3)) for hertz in (0.13, 0.29)]
        )
        for channel in range(2):
            middle = 2 + 11 * at[channel]
            heatmap[channel] += 15 * np.exp(-((np.arange(SHAPE[1]) - middle) ** 2) / 4)[:, None]
        image = np.full((16, 16, 3), 40, np.uint8)
        image[..., :2] = (30 + 200 * shown).astype(np.uint8)
        at_ns = i * 100 * MS
        radar = RadarFrame(
            "north", i, at_ns, heatmap=heatmap.astype(np.float16), axes=("channel", "range", "azimuth")
        )
        pairs.append(
            Pair(radar, CameraFrame("north", i, at_ns + 5 * MS, simplejpeg.encode_jpeg(image), (16, 16, 3)))
        )
    return pairs


def test_camera_that_falls_out_of_step_is_told_within_minutes_without_labels(settings, vision) -> None:
    """600 pairs in step to learn from, 20 s a look; then a camera whose clock is 200 ms ahead."""
    told = Told()
    settings = settings.model_copy(update={"learning_rate": 3e-3})
    fill(settings.store_dir, street(600, first=0))
    feed = feed_of(settings, vision, share=0.1)
    judge, learner = judge_of(settings, feed, told), learner_of(settings, feed, num_steps=150)
    shown: list[float] = []
    for i in range(16):
        fill(settings.store_dir, street(200, first=600 + 200 * i, camera_ahead_ms=200 if i >= 7 else 0))
        feed.refresh()
        encode_all(feed)
        learn(learner, feed, 2)
        told.at_s += 1000
        judge.look(learner, {})
        shown.append(judge.readings["sites"]["north"].get("lag_ms", np.nan))
    assert shown[6] == pytest.approx(0, abs=50)
    assert shown[-1] == pytest.approx(200, abs=50)
    [alarm] = told.of("alarm")
    assert (alarm["alarm"], alarm["is_on"], alarm["site"]) == ("sync_lag north", True, "north")
    assert "ECHOSIGHT_CLOCK_OFFSETS_MS" in alarm["do"]
    assert judge.summary()["alarms"] == ["sync_lag north"]


def later(pairs: list[Pair], *, by_ns: int) -> list[Pair]:
    """The same by a clock that is so far ahead."""
    return [
        Pair(
            replace(pair.radar, captured_at_ns=pair.radar.captured_at_ns + by_ns),
            replace(pair.camera, captured_at_ns=pair.camera.captured_at_ns + by_ns),
        )
        for pair in pairs
    ]


def test_drift_and_lag_follow_a_site_whose_clock_was_ahead_and_is_set_back(settings, vision) -> None:
    """As ingest hands it on: first times that are a day ahead, then right ones, which are older."""
    told = Told()
    settings = settings.model_copy(update={"learning_rate": 3e-3})
    fill(settings.store_dir, street(600, first=0))
    feed = feed_of(settings, vision, share=0.1)
    judge, learner = judge_of(settings, feed, told), learner_of(settings, feed, num_steps=150)
    judge.look(learner, {})
    shown: list[float] = []
    for i in range(14):
        pairs = street(200, first=600 + 200 * i, camera_ahead_ms=200 if i >= 5 else 0)
        fill(settings.store_dir, later(pairs, by_ns=86_400 * 1_000_000_000) if i < 3 else pairs)
        feed.refresh()
        encode_all(feed)
        told.at_s += 1000
        judge.look(learner, {})
        shown.append(judge.readings["sites"]["north"].get("lag_ms", np.nan))
    assert shown[-1] == pytest.approx(200, abs=50)
    assert [alarm["alarm"] for alarm in told.of("alarm")] == ["sync_lag north"]


class Log:
    """Takes a worker's events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict]] = []

    def emit(self, kind: str, **values) -> bool:
        self.events.append((kind, values))
        return True


def test_worker_tells_gauges_in_an_event_of_their_own_and_in_short_in_its_own(
    settings, vision, monkeypatch
) -> None:
    monkeypatch.setattr(worker_module, "_REPORT_EVERY_S", 0.0)
    fill(settings.store_dir, [scene(i) for i in range(60)])
    events = Log()
    worker = TrainerWorker(settings, vision=vision, log=structlog.get_logger(), events=events)
    worker.run(max_steps=8)
    [gauges] = [values for kind, values in events.events if kind == "gauges"]
    assert gauges["mi_nats"] == pytest.approx(gauges["chance"] - gauges["loss"], abs=1e-3)
    last = [values for kind, values in events.events if kind == "trainer"][-1]
    assert last["gauges"]["mi_nats"] == gauges["mi_nats"]
    assert len(str(last["gauges"])) < 500
    text = generate_latest(worker.metrics.registry).decode()
    assert "echosight_trainer_steps_total 8.0" in text
    assert worker.feed.num_encoded >= 16
    assert f"echosight_trainer_encoded_images_total {worker.feed.num_encoded}.0" in text


def test_pairs_that_got_damaged_all_at_once_do_not_stop_the_judge(settings, feed) -> None:
    told = Told()
    judge = judge_of(settings, feed, told)
    learner = learner_of(settings, feed, num_steps=0)
    for segment in settings.store_dir.rglob("*.seg"):
        segment.write_bytes(bytes(segment.stat().st_size))
    assert judge.look(learner, {})
    assert judge.readings["held_out_pairs"] > 0
    assert "rank" not in judge.readings
