"""The whole scene: pure in t, one class at a time, radar and camera of the same instant and place."""

from dataclasses import replace

import numpy as np
import pytest

from services.core.errors import SettingsError
from services.core.frames import CLASSES, check_heatmap
from services.sensors.simulator import (
    IWR6843_60GHZ,
    RadarSettings,
    Scene,
    SimulationSettings,
    load_site,
    save_preview,
)
from services.sensors.simulator.pinhole import Pinhole

QUIET = SimulationSettings(radar=RadarSettings(interference_share=0.0))


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene(load_site("demo"), seed=4, settings=QUIET)


def _instants(scene: Scene, label: str, *, count: int, visible: float = 0.95) -> list[float]:
    found = []
    for t_s in np.arange(0.0, 600.0, 1.3):
        truth = scene.truth(float(t_s))
        objects = truth.objects
        if truth.label == label and (
            label == "empty" or (objects[0].visible_share > visible and len(objects) == 1)
        ):
            found.append(float(t_s))
    return found[:count]


def test_frames_have_the_promised_shape_and_type(scene):
    heatmap, picture = scene.radar(3.0), scene.camera(3.0)
    assert (heatmap.shape, heatmap.dtype) == ((2, 128, 64), np.float16)
    assert (picture.shape, picture.dtype) == ((224, 224, 3), np.uint8)
    check_heatmap(heatmap)


def test_speeds_come_after_maps_that_they_leave_as_they_were(scene):
    radar = replace(QUIET.radar, speed_moments=2)
    with_speeds = Scene(load_site("demo"), seed=4, settings=replace(QUIET, radar=radar))
    heatmap = with_speeds.radar(3.0)
    assert np.array_equal(heatmap[:2], scene.radar(3.0))
    assert radar.channels == ("integrated", "moving", "mean_speed_mps", "speed_spread_mps")
    assert (heatmap.shape, heatmap.dtype) == ((4, 128, 64), np.float16)
    check_heatmap(heatmap)


def test_same_seed_gives_same_frames_in_any_order(scene):
    times = [31.5, 2.0, 140.25, 31.5, 77.7]
    again = Scene(load_site("demo"), seed=4, settings=QUIET)
    forward = {t: (scene.radar(t), scene.camera(t), scene.truth(t)) for t in times}
    for t in reversed(times):
        camera, truth, radar = again.camera(t), again.truth(t), again.radar(t)
        assert np.array_equal(radar, forward[t][0])
        assert np.array_equal(camera, forward[t][1])
        assert truth == forward[t][2]


def test_another_seed_gives_other_traffic():
    other = Scene(load_site("demo"), seed=5, settings=QUIET)
    this = Scene(load_site("demo"), seed=4, settings=QUIET)
    times = np.arange(0, 60, 2.0)
    assert [this.truth(float(t)).label for t in times] != [other.truth(float(t)).label for t in times]


def test_one_class_at_a_time_and_all_four_share_the_time(scene):
    labels = []
    for t_s in np.arange(0, 900, 0.9):
        truth = scene.truth(float(t_s))
        assert len({found.label for found in truth.objects}) <= 1
        assert len(truth.objects) <= 2
        labels.append(truth.label)
    shares = {name: labels.count(name) / len(labels) for name in CLASSES}
    assert all(0.12 < share < 0.42 for share in shares.values()), shares


def test_objects_stay_within_the_ranges_of_the_site(scene):
    ranges = [found.range_m for t in np.arange(0, 600, 0.7) for found in scene.truth(float(t)).objects]
    assert min(ranges) > scene.site.ways.min_range_m - 0.1
    assert max(ranges) < scene.site.ways.max_range_m + 3.0


@pytest.mark.parametrize("label", ["pedestrian", "cyclist", "car"])
def test_radar_sees_the_object_where_the_truth_has_it(scene, label):
    """The brightest cell that the object adds lies on its body: within its half length of the middle."""
    half_length = {"pedestrian": 0.6, "cyclist": 1.2, "car": 2.8}[label]
    settings = scene.settings.radar
    empty = (
        np.stack([scene.radar(t)[0] for t in _instants(scene, "empty", count=8)]).astype(np.float32).max(axis=0)
    )
    hits = []
    for t_s in _instants(scene, label, count=10):
        truth = scene.truth(t_s).objects[0]
        added = scene.radar(t_s)[0].astype(np.float32) - empty
        row, column = np.unravel_index(np.argmax(added), added.shape)
        range_m, sin_azimuth = row * settings.range_bin_m, settings.sin_azimuth[column]
        off_m = (sin_azimuth - np.sin(np.radians(truth.azimuth_deg))) * range_m
        hits.append(np.hypot(range_m - truth.range_m, off_m) < half_length + 0.6)
    assert len(hits) >= 5
    assert np.mean(hits) >= 0.8


def test_radial_speed_is_the_rate_of_the_range(scene):
    step = 0.05
    for t_s in _instants(scene, "pedestrian", count=6) + _instants(scene, "car", count=6):
        before, now, after = (scene.truth(t_s + d).objects for d in (-step, 0.0, step))
        if not len(before) == len(now) == len(after) == 1:
            continue
        rate = (after[0].range_m - before[0].range_m) / (2 * step)
        assert now[0].radial_speed_mps == pytest.approx(rate, abs=0.35)


@pytest.mark.parametrize("label", ["pedestrian", "cyclist", "car"])
def test_box_looks_in_the_direction_that_the_radar_measures(scene, label):
    eye = Pinhole.of(scene.site.mount, size_px=224)
    slack_deg = {"pedestrian": 1.0, "cyclist": 2.5, "car": 5.0}[label]  # a long body's middle is not its box's
    for t_s in _instants(scene, label, count=10):
        found = scene.truth(t_s).objects[0]
        left, top, right, bottom = found.box_px
        azimuth = np.degrees(eye.azimuth_rad((left + right) / 2, (top + bottom) / 2))
        assert azimuth == pytest.approx(found.azimuth_deg, abs=slack_deg)


def test_picture_changes_inside_the_box_and_nowhere_far_from_it(scene):
    (t_s, *_) = _instants(scene, "pedestrian", count=1)
    left, top, right, bottom = (round(edge) for edge in scene.truth(t_s).objects[0].box_px)
    renderer, weather = scene._renderer, _noon()
    empty, full = (
        renderer.render(tracks, weather, t_s, np.random.default_rng(0)).astype(int)
        for tracks in ((), scene._traffic.tracks(t_s))
    )
    changed = np.abs(full - empty).max(axis=2) > 25
    rows, columns = np.nonzero(changed)
    assert changed[top:bottom, left:right].mean() > 0.15
    assert left - 8 <= columns.min()
    assert columns.max() <= right + 8
    assert top - 6 <= rows.min()


def _noon():
    from services.sensors.simulator.weather import Weather

    return Weather(daylight=1.0, sun=0.0, fog_per_m=0.0, wind_mps=0.0, drift=0.0, exposure=1.0)


def test_night_is_darker_and_fog_paler():
    scene = Scene(load_site("demo"), seed=0, settings=QUIET)
    render = scene._renderer.render
    rng = np.random.default_rng
    noon, night, fog = (
        render((), weather, 0.0, rng(0)).astype(float)
        for weather in (_noon(), replace(_noon(), daylight=0.1), replace(_noon(), fog_per_m=0.07))
    )
    assert night[:8].mean() < 0.6 * noon[:8].mean()
    assert night.mean() < noon.mean()
    assert fog.std() < 0.7 * noon.std()


def test_pixel_direction_and_projection_are_inverse():
    eye = Pinhole.of(load_site("street").mount, size_px=224)
    points = np.array([(1.0, 7.0, 0.4), (-2.5, 11.0, 1.9), (0.0, 4.0, 0.0)])
    pixels, depth = eye.project(points)
    back = eye.rays(pixels) * depth[:, None] + (0, 0, eye.height_m)
    assert np.allclose(back, points)


def test_other_radar_gives_its_own_shape():
    site = load_site("park")
    small = replace(IWR6843_60GHZ, num_azimuth_bins=48)
    scene = Scene(site, seed=0, settings=SimulationSettings(radar=small))
    assert scene.radar(1.0).shape == (2, 128, 48)
    assert scene.radar_maps(1.0).range_doppler.shape == (128, 64)


def test_time_before_the_start_is_refused(scene):
    with pytest.raises(SettingsError, match="-1"):
        scene.truth(-1.0)
    with pytest.raises(SettingsError, match="seed"):
        Scene(load_site("demo"), seed=-1)


def test_memory_stays_bounded_over_time(scene):
    for t_s in range(0, 3000, 50):
        scene.truth(float(t_s))
    assert len(scene._traffic._blocks) <= 4


def test_preview_writes_a_picture(scene, tmp_path):
    path = tmp_path / "preview.png"
    save_preview(scene, path, times_s=[3.0, 20.0])
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SettingsError, match="no instants"):
        save_preview(scene, path, times_s=[])
    with pytest.raises(SettingsError, match="cannot write"):
        save_preview(scene, tmp_path / "missing" / "preview.png", times_s=[3.0])
