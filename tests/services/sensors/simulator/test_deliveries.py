"""Troubles of sensors: each setting does what it says, and nothing else."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import simplejpeg

from services.core.codec import decode, encode
from services.core.errors import SettingsError
from services.core.frames import CLASSES, CameraFrame, Label, RadarFrame
from services.sensors.simulator import (
    DeliverySettings,
    LabelSettings,
    RadarSettings,
    Scene,
    SimulationSettings,
    load_site,
)
from services.sensors.simulator.troubles import plan

SEED = (1, 2)
STEADY = DeliverySettings(rate_hz=20.0, jitter_s=0.0, latency_s=0.03, latency_jitter_s=0.0)


def _plan(seconds: float = 50.0, **troubles):
    return list(plan(replace(STEADY, **troubles), seed=SEED, seconds=seconds))


def test_steady_sensor_delivers_every_frame_once_at_its_rate():
    planned = _plan(10.0)
    assert [p.seq for p in planned] == list(range(200))
    assert np.allclose([p.captured_s for p in planned], np.arange(200) / 20)
    assert all(p.at_s == pytest.approx(p.captured_s + 0.03) and p.stamped_s == p.captured_s for p in planned)


def test_jitter_moves_captures_by_its_deviation():
    off = np.array([p.captured_s - p.seq / 20 for p in _plan(jitter_s=0.004)])
    assert np.std(off) == pytest.approx(0.004, rel=0.15)
    assert np.abs(off).max() <= 0.012 + 1e-9


def test_drops_lose_their_share_and_leave_gaps_in_seq():
    planned = _plan(drop_share=0.3)
    assert len(planned) == pytest.approx(700, abs=60)
    assert len({p.seq for p in planned}) == len(planned)


def test_duplicates_come_twice_and_are_the_same_frame():
    counts = Counter(p.seq for p in _plan(duplicate_share=0.25))
    assert sum(n == 2 for n in counts.values()) == pytest.approx(250, abs=60)
    assert max(counts.values()) == 2


def test_late_frames_are_overtaken():
    planned = _plan(late_share=0.2, late_by_s=0.4)
    held = [p for p in planned if p.at_s - p.captured_s > 0.2]
    assert len(held) == pytest.approx(200, abs=50)
    assert [p.seq for p in planned] != sorted(p.seq for p in planned)


def test_deliveries_are_ordered_by_time_whatever_the_trouble():
    planned = _plan(jitter_s=0.02, latency_jitter_s=0.05, late_share=0.3, duplicate_share=0.3, drop_share=0.1)
    times = [p.at_s for p in planned]
    assert times == sorted(times)


def test_dead_sensor_is_silent_for_its_spell_and_returns():
    captured = np.array([p.captured_s for p in _plan(100.0, dead_every_s=20.0, dead_for_s=4.0)])
    gaps = np.diff(captured)
    spells = gaps[gaps > 1.0]
    assert len(spells) in (4, 5)
    assert np.allclose(spells, 4.0, atol=0.11)


def test_clock_offset_and_drift_show_in_the_stamp_only():
    for p in _plan(50.0, clock_offset_s=0.25, clock_drift_ppm=200.0):
        assert p.stamped_s - p.captured_s == pytest.approx(0.25 + p.captured_s * 200e-6, abs=1e-9)
        assert p.captured_s == p.seq / 20


def test_endless_plan_needs_little_memory_and_goes_on():
    endless = plan(replace(STEADY, late_share=0.5, late_by_s=1.0), seed=SEED, seconds=None)
    assert len(list(islice(endless, 5000))) == 5000


def test_bounded_plan_is_the_start_of_the_endless_one():
    troubles = replace(STEADY, drop_share=0.2, late_share=0.2)
    bounded = set(plan(troubles, seed=SEED, seconds=5.0))
    endless = set(islice(plan(troubles, seed=SEED, seconds=None), 300))
    assert bounded <= endless


@pytest.mark.parametrize(
    "wrong",
    [{"rate_hz": 0.0}, {"drop_share": 1.5}, {"latency_s": -1.0}, {"dead_every_s": 2.0, "dead_for_s": 3.0}],
)
def test_impossible_troubles_are_refused(wrong):
    with pytest.raises(SettingsError, match=list(wrong)[-1]):
        DeliverySettings(**wrong)


@pytest.fixture(scope="module")
def scene() -> Scene:
    settings = SimulationSettings(
        radar=RadarSettings(num_chirps=4, num_samples=64, sample_rate_hz=1.28e6, still_bins=0),
        radar_delivery=DeliverySettings(rate_hz=10.0, drop_share=0.1, duplicate_share=0.1, clock_offset_s=0.02),
        camera_delivery=DeliverySettings(rate_hz=3.0),
    )
    return Scene(load_site("demo"), seed=1, settings=settings)


def test_deliveries_are_valid_frames_in_order_of_sending(scene):
    deliveries = list(scene.deliveries(start_ns=10**18, seconds=6.0, labels=LabelSettings(share=0.5, delay_s=1.0)))
    times = [delivery.at_s for delivery in deliveries]
    assert times == sorted(times)
    kinds = {RadarFrame: "radar", CameraFrame: "camera", Label: "labels"}
    for delivery in deliveries:
        entry = {key.encode(): bytes(value) for key, value in encode(delivery.frame).items()}
        again = decode(delivery.frame.site, kinds[type(delivery.frame)], entry)
        assert again.id == delivery.frame.id
    assert {type(delivery.frame) for delivery in deliveries} == set(kinds)


def test_camera_frames_are_jpegs_of_the_rendered_instant(scene):
    frames = [d.frame for d in scene.deliveries(start_ns=0, seconds=2.0, labels=LabelSettings())]
    cameras = [frame for frame in frames if isinstance(frame, CameraFrame)]
    picture = simplejpeg.decode_jpeg(cameras[1].image, colorspace="RGB").astype(int)
    truly = scene.camera(cameras[1].captured_at_ns / 1e9).astype(int)
    assert picture.shape == cameras[1].shape
    assert np.abs(picture - truly).mean() < 8


def _labelled(scene: Scene, labels: LabelSettings) -> tuple[dict, list[tuple[float, Label]]]:
    """Radar frames of 200 s by id (without rendering any), and the labels."""
    delivered = list(scene._label_deliveries(0, 200.0, labels))
    planned = {p.seq: p for p in scene._plan(1, 200.0)}
    return planned, [(d.at_s, d.frame) for d in delivered if isinstance(d.frame, Label)]


def test_labels_name_delivered_radar_frames_once_with_their_truth(scene):
    planned, labels = _labelled(scene, LabelSettings(share=0.4, delay_s=1.5))
    assert len(labels) == pytest.approx(0.4 * len(planned), rel=0.12)
    assert len({label.seq for _, label in labels}) == len(labels)
    for _, label in labels:
        assert label.captured_at_ns == round(planned[label.seq].stamped_s * 1e9)
        assert label.label == scene.truth(planned[label.seq].captured_s).label


def test_mistaken_labels_are_wrong_by_their_share(scene):
    planned, labels = _labelled(scene, LabelSettings(share=1.0, mistakes=0.2))
    wrong = [label.label != scene.truth(planned[label.seq].captured_s).label for _, label in labels]
    assert np.mean(wrong) == pytest.approx(0.2, abs=0.04)
    assert {label.label for _, label in labels} <= set(CLASSES)


def test_no_labels_by_default(scene):
    assert not _labelled(scene, LabelSettings())[1]
    with pytest.raises(SettingsError, match="share"):
        LabelSettings(share=2.0)


def test_endless_stream_starts_at_once(scene):
    stream = scene.deliveries(start_ns=0, seconds=None, labels=LabelSettings())
    assert len(list(islice(stream, 12))) == 12
