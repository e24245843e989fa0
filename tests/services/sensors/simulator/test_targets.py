"""Road users as the radar meets them: sizes, brightness, and motion that belongs to a body."""

import numpy as np
import pytest

from services.sensors.simulator import TrafficSettings, load_site
from services.sensors.simulator.bodies import BICYCLE, JOINT, cyclist, shape_of, walker
from services.sensors.simulator.clutter import ghosts, static_echoes
from services.sensors.simulator.radar import CRUW_77GHZ
from services.sensors.simulator.sites import Site, Wall
from services.sensors.simulator.targets import scatterers
from services.sensors.simulator.traffic import Track, Traffic

SENSOR = np.array((0.0, 0.0, 1.7))


@pytest.fixture(scope="module")
def tracks() -> dict[str, list[Track]]:
    traffic = Traffic(load_site("demo"), seed=2, settings=TrafficSettings(stop_share=0.0))
    found: dict[str, dict[int, Track]] = {"pedestrian": {}, "cyclist": {}, "car": {}}
    for t_s in np.arange(0, 900, 1.0):
        for track in traffic.tracks(float(t_s)):
            found[track.kind][track.look] = track
    return {kind: list(by_look.values()) for kind, by_look in found.items()}


def _middle(track: Track) -> float:
    return 0.5 * (track.start_s + track.end_s)


def test_mean_cross_sections_are_of_the_published_size(tracks):
    mean_db = {}
    for kind, some in tracks.items():
        total = [scatterers(track, _middle(track), sensor_m=SENSOR).rcs_m2.sum() for track in some[:30]]
        mean_db[kind] = float(np.mean(10 * np.log10(total)))
    assert mean_db["pedestrian"] == pytest.approx(-8, abs=2.5)
    assert mean_db["cyclist"] == pytest.approx(0, abs=3)
    assert mean_db["car"] == pytest.approx(10, abs=4)


@pytest.mark.parametrize(("kind", "spread_mps"), [("pedestrian", 0.4), ("cyclist", 1.0), ("car", 1.0)])
def test_parts_move_faster_and_slower_than_the_body(tracks, kind, spread_mps):
    spreads = []
    for track in tracks[kind][:10]:
        target = scatterers(track, _middle(track), sensor_m=SENSOR)
        speeds = np.linalg.norm(target.velocity_mps[:, :2], axis=1)
        spreads.append(np.ptp(speeds))
        assert np.median(speeds) == pytest.approx(track.cruise_mps, rel=0.35)
    assert np.mean(spreads) > spread_mps


def test_bottom_of_a_rolling_wheel_stands_and_its_top_goes_twice_as_fast(tracks):
    track = tracks["cyclist"][0]
    fastest = max(
        np.linalg.norm(scatterers(track, t, sensor_m=SENSOR).velocity_mps, axis=1).max()
        for t in np.linspace(track.start_s + 0.5, track.end_s - 0.5, 8)
    )
    assert fastest == pytest.approx(1.93 * track.cruise_mps, rel=0.06)  # rim points at 0.93 of the radius


def test_planted_foot_slides_little(tracks):
    track = tracks["pedestrian"][0]
    shape, ratios = shape_of(track), []
    for t_s in np.linspace(track.start_s + 1, track.end_s - 1, 40):
        ankles = []
        for t in (t_s - 0.01, t_s + 0.01):
            state = track.state(t)
            local = walker(shape, state, cruise_mps=track.cruise_mps, t_s=t)
            ankles.append(local[[JOINT["ankle_l"], JOINT["ankle_r"]], 0] + state.travelled_m)
        ratios.append(np.abs(ankles[1] - ankles[0]).min() / 0.02 / track.cruise_mps)
    assert np.median(ratios) < 0.35


def test_riders_feet_stay_on_the_pedals_while_riding(tracks):
    track = tracks["cyclist"][0]
    joints = cyclist(shape_of(track), track.state(_middle(track)))
    for side in "lr":
        foot = joints[JOINT[f"ankle_{side}"]]
        reach = np.hypot(foot[0] - (BICYCLE.crank[0] - 0.06), foot[2] - (BICYCLE.crank[1] + 0.09))
        assert reach == pytest.approx(BICYCLE.pedal_m, abs=0.03)


def test_car_is_brightest_square_on(tracks):
    track = tracks["car"][0]
    state = track.state(_middle(track))
    heading = state.heading_rad

    def seen_from(angle: float) -> float:
        sensor = np.array((*(state.xy_m + 8 * np.array((np.cos(heading + angle), np.sin(heading + angle)))), 1.0))
        return float(scatterers(track, _middle(track), sensor_m=sensor).rcs_m2.sum())

    broadside, oblique = seen_from(np.pi / 2), seen_from(np.pi / 4)
    assert 10 * np.log10(broadside / oblique) > 3


def test_ghost_of_a_wall_lies_where_its_mirror_image_is():
    site = Site(name="mirror", walls=(Wall(start=(4.0, 0.0), end=(4.0, 30.0)),))
    position = np.array([(1.0, 8.0, 0.0)])
    velocity = np.array([(1.0, 0.0, 0.0)])  # towards the wall: the image comes the other way
    found = ghosts(site, CRUW_77GHZ, position_m=position, velocity_mps=velocity, rcs_m2=np.ones(1))
    image = np.hypot(7.0, 8.0)
    assert found.range_m[2] == pytest.approx(image)
    assert found.sin_azimuth[2] == pytest.approx(7.0 / image)
    assert found.range_m[0] == pytest.approx(0.5 * (np.hypot(1, 8) + image))
    assert found.speed_mps[2] < 0


def test_no_ghost_where_the_wall_does_not_reach():
    site = Site(name="mirror", walls=(Wall(start=(4.0, 20.0), end=(4.0, 30.0)),))
    point = np.array([(1.0, 8.0, 0.0)])
    found = ghosts(site, CRUW_77GHZ, position_m=point, velocity_mps=np.zeros((1, 3)), rcs_m2=np.ones(1))
    assert len(found.range_m) == 0


def test_clutter_is_the_sites_own_and_always_the_same():
    demo, park = load_site("demo"), load_site("park")
    first, again, other = (static_echoes(site, CRUW_77GHZ) for site in (demo, demo, park))
    assert np.array_equal(first.amplitude, again.amplitude)
    assert len(first.amplitude) != len(other.amplitude) or not np.array_equal(first.amplitude, other.amplitude)
    assert not first.speed_mps.any()
