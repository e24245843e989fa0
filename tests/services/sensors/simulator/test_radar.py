"""The radar by value: where a point echo lands, how bright it is, what aliases, what the array can tell apart."""

from dataclasses import replace

import numpy as np
import pytest

from services.core.errors import SettingsError
from services.sensors.simulator.radar import (
    CRUW_77GHZ,
    IWR6843_60GHZ,
    RadarProcessor,
    RadarSettings,
    interference,
    point_echoes,
    synthesize,
    thermal_noise,
)

PRESETS = (CRUW_77GHZ, IWR6843_60GHZ)


def _point(sin_azimuth: float, range_m: float, *, height_m: float = 0.0) -> np.ndarray:
    x = range_m * sin_azimuth
    return np.array((x, np.sqrt(range_m**2 - x**2 - height_m**2), height_m))


def _cube(settings, points, *, speeds_mps=None, rcs_m2=1.0):
    """Noise-free samples of points that move radially."""
    position = np.array(points, float).reshape(-1, 3)
    speeds = np.zeros(len(position)) if speeds_mps is None else np.array(speeds_mps, float)
    velocity = position / np.linalg.norm(position, axis=1, keepdims=True) * speeds[:, None]
    rcs = np.broadcast_to(np.asarray(rcs_m2, float), len(position))
    echoes = point_echoes(settings, position_m=position, velocity_mps=velocity, rcs_m2=rcs)
    return synthesize(settings, echoes, num_chirps=settings.num_chirps)


def _peak(heatmap):
    return np.unravel_index(np.argmax(heatmap), heatmap.shape)


@pytest.mark.parametrize("settings", PRESETS, ids=lambda s: s.name)
@pytest.mark.parametrize(("range_m", "sin_azimuth"), [(4.0, 0.0), (8.3, -0.42), (15.7, 0.31), (11.0, 0.7)])
def test_peak_is_at_slant_range_and_sin_azimuth(settings, range_m, sin_azimuth):
    maps = RadarProcessor(settings).maps(_cube(settings, _point(sin_azimuth, range_m, height_m=-1.2)))
    for heatmap in (maps.integrated, maps.snapshot):
        row, column = _peak(heatmap)
        assert row * settings.range_bin_m == pytest.approx(range_m, abs=0.51 * settings.range_bin_m)
        assert settings.sin_azimuth[column] == pytest.approx(sin_azimuth, abs=1.01 / settings.num_azimuth_bins)


def test_snr_falls_with_the_fourth_power_of_range_and_grows_with_cross_section():
    settings, bin_m = CRUW_77GHZ, CRUW_77GHZ.range_bin_m
    processor = RadarProcessor(settings)

    def peak_db(range_m, rcs_m2):
        cube = _cube(settings, _point(settings.sin_azimuth[32], range_m), rcs_m2=rcs_m2)
        return float(processor.maps(cube).integrated.max())

    near, far = 20 * bin_m, 80 * bin_m  # both on a bin, so that no straddling loss differs
    assert peak_db(near, 1.0) - peak_db(far, 1.0) == pytest.approx(40 * np.log10(4), abs=0.05)
    assert peak_db(near, 10.0) - peak_db(near, 1.0) == pytest.approx(10.0, abs=0.05)


def test_snr_of_one_sample_is_the_radar_equation():
    received_dbm = 12 + 20 - 2 + 20 * np.log10(CRUW_77GHZ.wavelength_m) - 30 * np.log10(4 * np.pi) - 40
    noise_dbm = 10 * np.log10(1.380649e-23 * 290 * 2.56e6 * 1e3) + 15
    snr = CRUW_77GHZ.snr_per_sample(rcs_m2=np.array([1.0]), range_m=np.array([10.0]))
    assert 10 * np.log10(snr[0]) == pytest.approx(received_dbm - noise_dbm, abs=1e-6)


@pytest.mark.parametrize("settings", PRESETS, ids=lambda s: s.name)
@pytest.mark.parametrize("share", [-0.7, -0.2, 0.35, 0.9])
def test_doppler_has_the_sign_and_size_of_the_radial_speed(settings, share):
    speed = share * settings.max_speed_mps
    maps = RadarProcessor(settings).maps(_cube(settings, _point(0.1, 9.0), speeds_mps=[speed]))
    row, column = _peak(maps.range_doppler)
    assert row == pytest.approx(9.0 / settings.range_bin_m, abs=0.6)
    assert settings.speed_mps[column] == pytest.approx(speed, abs=0.51 * settings.speed_bin_mps)


def test_speed_beyond_the_unambiguous_one_aliases():
    settings = CRUW_77GHZ
    beyond = settings.max_speed_mps + 2.0
    maps = RadarProcessor(settings).maps(_cube(settings, _point(0.0, 9.0), speeds_mps=[beyond]))
    _, column = _peak(maps.range_doppler)
    assert settings.max_speed_mps == pytest.approx(8.11, abs=0.01)
    assert settings.speed_mps[column] == pytest.approx(2.0 - settings.max_speed_mps, abs=settings.speed_bin_mps)


def test_tdm_compensation_keeps_a_moving_target_at_its_azimuth():
    settings, speed = CRUW_77GHZ, 3.7
    processor = RadarProcessor(settings)
    cube = _cube(settings, _point(0.3, 10.0), speeds_mps=[speed])
    compensated = processor.maps(cube)
    _, column = _peak(compensated.moving)
    assert settings.sin_azimuth[column] == pytest.approx(0.3, abs=1.01 / settings.num_azimuth_bins)
    _, uncompensated = _peak(compensated.snapshot)  # one chirp each: the speed is not known, the angle is wrong
    assert abs(settings.sin_azimuth[uncompensated] - 0.3) > 0.05


def test_aliased_speed_defeats_tdm_compensation():
    """At an odd alias the second transmitter is half a turn off: the beam splits in two (SWRA554)."""
    settings = CRUW_77GHZ
    alias = 2 * settings.max_speed_mps + 3.0
    maps = RadarProcessor(settings).maps(_cube(settings, _point(0.0, 10.0), speeds_mps=[alias]))
    _, column = _peak(maps.moving)
    assert abs(settings.sin_azimuth[column]) > 0.1


@pytest.mark.parametrize("settings", PRESETS, ids=lambda s: s.name)
def test_thermal_noise_is_white_of_power_one_through_the_whole_chain(settings):
    rng = np.random.default_rng(1)
    noise = thermal_noise(settings, rng)
    assert noise.dtype == np.complex64
    assert np.mean(np.abs(noise) ** 2) == pytest.approx(1.0, rel=0.02)
    assert abs(np.mean(noise**2)) < 0.02  # circular
    maps = RadarProcessor(settings).maps(noise)
    assert 10 * np.log10(np.mean(10 ** (maps.integrated / 10))) == pytest.approx(0.0, abs=0.15)
    snapshot = 10 ** (maps.snapshot / 10)
    assert np.mean(snapshot) == pytest.approx(1.0, rel=0.1)
    assert np.mean(snapshot > 1.0) == pytest.approx(np.exp(-1), abs=0.05)  # exponential power


def test_array_tells_two_points_apart_only_beyond_its_beamwidth():
    settings = CRUW_77GHZ

    def dips(gap: float) -> bool:
        """Whether a valley of 1 dB or more lies between two equal points at +-gap / 2, mean over phases."""
        power = np.zeros(settings.num_azimuth_bins)
        for phase in range(8):
            offset = phase / 8 * settings.wavelength_m / 2
            points = [_point(-gap / 2, 10.0), _point(gap / 2, 10.0 + offset)]
            power += 10 ** (RadarProcessor(settings).maps(_cube(settings, points)).integrated.max(axis=0) / 10)
        inside = np.abs(settings.sin_azimuth) < gap / 2 + 0.05
        profile = 10 * np.log10(power[inside])
        return bool(profile.max() - profile[len(profile) // 2] > 1.0)

    assert dips(0.6)
    assert not dips(0.15)


def test_range_bin_tells_two_points_apart():
    settings, gap = CRUW_77GHZ, 4
    points = [_point(0, 30 * settings.range_bin_m), _point(0, (30 + gap) * settings.range_bin_m)]
    profile = RadarProcessor(settings).maps(_cube(settings, points)).integrated.max(axis=1)
    assert profile[30] > profile[32] + 6
    assert profile[34] > profile[32] + 6


def test_still_echo_leaves_the_moving_map_dark():
    settings = CRUW_77GHZ
    maps = RadarProcessor(settings).maps(_cube(settings, _point(0.0, 8.0)))
    assert maps.integrated.max() > 30
    assert maps.moving.max() < maps.integrated.max() - 50


@pytest.mark.parametrize("settings", PRESETS, ids=lambda s: s.name)
@pytest.mark.parametrize("share", [-0.6, 0.3, 1.4])
def test_speed_map_holds_the_radial_speed_of_what_moves_there_folded_into_the_unambiguous_ones(settings, share):
    limit = settings.max_speed_mps
    with_speeds = replace(settings, speed_moments=2)
    cube = _cube(with_speeds, _point(settings.sin_azimuth[36], 9.0), speeds_mps=[share * limit])
    integrated, _, mean, spread = RadarProcessor(with_speeds).heatmaps(cube)
    cell = _peak(integrated)
    folded = (share * limit + limit) % (2 * limit) - limit
    assert mean[cell] == pytest.approx(folded, abs=0.3 * settings.speed_bin_mps)
    assert spread[cell] < 1.0 * settings.speed_bin_mps  # the window's own width


def test_speed_spread_is_that_of_the_speeds_in_a_cell():
    settings = replace(CRUW_77GHZ, speed_moments=2)
    here = _point(settings.sin_azimuth[32], 9.0)
    cube = _cube(settings, [here, here], speeds_mps=[-3.0, 5.0])
    integrated, _, mean, spread = RadarProcessor(settings).heatmaps(cube)
    cell = _peak(integrated)
    assert mean[cell] == pytest.approx(1.0, abs=0.3)
    assert spread[cell] == pytest.approx(4.0, abs=0.3)


def test_noise_has_a_mean_speed_near_zero_and_the_spread_of_the_whole_spectrum():
    settings = replace(CRUW_77GHZ, speed_moments=2)
    heatmap = RadarProcessor(settings).heatmaps(thermal_noise(settings, np.random.default_rng(2)))
    assert heatmap[2].std() < 0.2 * settings.max_speed_mps
    assert heatmap[3].mean() == pytest.approx(settings.max_speed_mps / np.sqrt(3), rel=0.1)


def test_element_pattern_dims_echoes_off_boresight():
    settings = CRUW_77GHZ
    points = np.array([_point(0.0, 10.0), _point(float(np.sin(np.radians(45))), 10.0)])
    echoes = point_echoes(settings, position_m=points, velocity_mps=np.zeros((2, 3)), rcs_m2=np.ones(2))
    ratio_db = 20 * np.log10(abs(echoes.amplitude[1] / echoes.amplitude[0]))
    assert ratio_db == pytest.approx(2 * -3.01, abs=0.05)  # half power each way at half the 90 degree beamwidth


def test_interference_raises_the_floor_of_the_frame_it_hits():
    settings, rng = CRUW_77GHZ, np.random.default_rng(3)
    noise = thermal_noise(settings, rng)
    processor = RadarProcessor(settings)
    quiet, hit = (
        np.median(processor.maps(cube).integrated) for cube in (noise, noise + interference(settings, rng))
    )
    assert hit > quiet + 2


def test_no_echoes_is_silence():
    settings = CRUW_77GHZ
    empty = np.zeros((0, 3))
    echoes = point_echoes(settings, position_m=empty, velocity_mps=empty, rcs_m2=np.zeros(0))
    assert not synthesize(settings, echoes, num_chirps=settings.num_chirps).any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_samples": 0},
        {"chirp_interval_s": 1e-6},
        {"still_bins": 40},
        {"carrier_hz": -1.0},
        {"speed_moments": 3},
    ],
)
def test_settings_that_cannot_work_are_refused_with_a_remedy(wrong):
    with pytest.raises(SettingsError, match=next(iter(wrong))) as raised:
        replace(RadarSettings(), **wrong)
    assert raised.value.remedy
