"""An FMCW radar with time-division MIMO: from point echoes to complex samples to heatmaps, by the textbook.

Samples are scaled so that thermal noise has power 1, hence every map is in dB over thermal noise. Positive radial
speed recedes. It does not know what the echoes come from (targets, clutter).

Sources: Richards, Fundamentals of Radar Signal Processing (radar equation, window losses); Texas Instruments
SWRA554 (MIMO Radar: time-division phase compensation); Doviak and Zrnic, Doppler Radar and Weather Observations
(moments of the Doppler spectrum).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from math import pi

import numpy as np
import numpy.typing as npt

from services.core.errors import SettingsError

LIGHT_MPS = 299_792_458.0
BOLTZMANN_J_PER_K = 1.380649e-23
ROOM_K = 290.0

Complex = npt.NDArray[np.complex64]
Float = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RadarSettings:
    """What the radar's data sheet and its chirp configuration say. Raises SettingsError where it cannot work."""

    name: str = "cruw_77ghz"
    carrier_hz: float = 77e9
    bandwidth_hz: float = 640e6  # swept while sampling; decides the range bin
    num_samples: int = 128  # complex, per chirp
    sample_rate_hz: float = 2.56e6
    chirp_interval_s: float = 60e-6  # from one chirp to the next, of whichever transmitter
    num_chirps: int = 32  # per transmitter and frame
    num_tx: int = 2
    num_rx: int = 4
    tx_power_dbm: float = 12.0
    antenna_gain_dbi: float = 10.0  # each way
    noise_figure_db: float = 15.0
    losses_db: float = 2.0
    azimuth_beamwidth_deg: float = 90.0  # of one element, one way, at half power
    elevation_beamwidth_deg: float = 34.0
    num_azimuth_bins: int = 64
    still_bins: int = 1  # Doppler bins on each side of zero that the moving map leaves out
    speed_moments: int = 0  # further maps, of the Doppler spectrum in each cell: 1 its mean, 2 its spread too
    gain_jitter_db: float = 0.6  # of the whole receiver, slow
    interference_share: float = 0.04  # of frames, hit by another radar's chirps
    interference_db: float = 22.0  # over thermal noise, while it crosses the band

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            positive = field.name.startswith(
                ("num_", "carrier", "bandwidth", "sample", "chirp", "azimuth", "elev")
            )
            if positive and value <= 0:
                raise SettingsError(f"radar {field.name} is {value}", remedy="use a number above 0")
        if self.num_samples / self.sample_rate_hz > self.chirp_interval_s:
            raise SettingsError(
                f"radar chirp_interval_s is {self.chirp_interval_s}, shorter than the samples of one chirp",
                remedy=f"use more than {self.num_samples / self.sample_rate_hz:.2e} s",
            )
        if not 0 <= 2 * self.still_bins + 1 < self.num_chirps:
            raise SettingsError(
                f"radar still_bins is {self.still_bins}", remedy="leave some bins for moving things"
            )
        if not 0 <= self.speed_moments <= 2:
            raise SettingsError(f"radar speed_moments is {self.speed_moments}", remedy="use 0, 1 or 2")

    @property
    def wavelength_m(self) -> float:
        return LIGHT_MPS / self.carrier_hz

    @property
    def range_bin_m(self) -> float:
        return LIGHT_MPS / (2 * self.bandwidth_hz)

    @property
    def max_range_m(self) -> float:
        return self.num_samples * self.range_bin_m

    @property
    def frame_interval_s(self) -> float:
        """From one chirp of a transmitter to its next."""
        return self.num_tx * self.chirp_interval_s

    @property
    def max_speed_mps(self) -> float:
        """Radial speeds beyond plus or minus this one alias."""
        return self.wavelength_m / (4 * self.frame_interval_s)

    @property
    def speed_bin_mps(self) -> float:
        return 2 * self.max_speed_mps / self.num_chirps

    @property
    def num_virtual(self) -> int:
        return self.num_tx * self.num_rx

    @property
    def channels(self) -> tuple[str, ...]:
        """What each map of a frame is: powers in dB, then speeds in m/s."""
        return ("integrated", "moving", *("mean_speed_mps", "speed_spread_mps")[: self.speed_moments])

    @cached_property
    def sin_azimuth(self) -> Double:
        """(A,) centres of the azimuth bins: even in sin(azimuth), symmetric about boresight."""
        return np.asarray((np.arange(self.num_azimuth_bins) + 0.5) * 2 / self.num_azimuth_bins - 1)

    @cached_property
    def speed_mps(self) -> Double:
        """(D,) centres of the Doppler bins, ascending; zero is at D // 2."""
        return np.asarray((np.arange(self.num_chirps) - self.num_chirps // 2) * self.speed_bin_mps)

    def snr_per_sample(self, *, rcs_m2: Double, range_m: Double) -> Double:
        """Power of one sample of one channel over thermal noise, on boresight: the radar equation."""
        power_w = 10 ** ((self.tx_power_dbm - 30 + 2 * self.antenna_gain_dbi - self.losses_db) / 10)
        noise_w = BOLTZMANN_J_PER_K * ROOM_K * self.sample_rate_hz * 10 ** (self.noise_figure_db / 10)
        received_w = power_w * self.wavelength_m**2 * rcs_m2 / ((4 * pi) ** 3 * range_m**4)
        return np.asarray(received_w / noise_w)


CRUW_77GHZ = RadarSettings()
"""As in the CRUW recordings (TI AWR1843, 77 GHz, 2 Tx x 4 Rx): 0.23 m bins to 30 m, aliases at 8.1 m/s."""

IWR6843_60GHZ = RadarSettings(
    name="iwr6843_60ghz",
    carrier_hz=60.5e9,
    bandwidth_hz=800e6,
    sample_rate_hz=3.2e6,
    chirp_interval_s=50e-6,
    num_chirps=64,
    tx_power_dbm=12.0,
    antenna_gain_dbi=7.0,
    noise_figure_db=12.0,
    azimuth_beamwidth_deg=100.0,
    elevation_beamwidth_deg=40.0,
)
"""A TI IWR6843ISK, 60 GHz, azimuth transmitters only: 0.19 m bins to 24 m, aliases at 12.4 m/s."""

RADARS = {preset.name: preset for preset in (CRUW_77GHZ, IWR6843_60GHZ)}


@dataclass(frozen=True, slots=True)
class Echoes:
    """Point echoes as the array meets them, each (P,).

    range_m: half the path, float64 (its carrier phase counts). sin_azimuth: direction cosine along the array.
    speed_mps: rate of range_m. amplitude: complex64, root of the SNR of one sample, less the carrier phase.
    """

    range_m: Double
    sin_azimuth: Double
    speed_mps: Double
    amplitude: Complex

    @staticmethod
    def join(parts: Sequence["Echoes"]) -> "Echoes":
        return Echoes(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Echoes)))


def point_echoes(settings: RadarSettings, *, position_m: Double, velocity_mps: Double, rcs_m2: Double) -> Echoes:
    """The direct echo of each point scatterer, by the radar equation and the two-way element pattern.

    position_m, velocity_mps: (P, 3) float64 from the radar, x along the array, y boresight, z up. rcs_m2: (P,).
    """
    range_m = np.maximum(np.sqrt(np.einsum("pi,pi->p", position_m, position_m)), 0.2)
    speed_mps = np.einsum("pi,pi->p", position_m, velocity_mps) / range_m
    azimuth = np.arctan2(position_m[:, 0], position_m[:, 1])
    elevation = position_m[:, 2] / range_m
    widths = np.radians((settings.azimuth_beamwidth_deg, settings.elevation_beamwidth_deg))
    pattern = 2.0 ** (-4 * ((azimuth / widths[0]) ** 2 + (elevation / widths[1]) ** 2))  # amplitude, two-way
    amplitude = np.sqrt(settings.snr_per_sample(rcs_m2=rcs_m2, range_m=range_m)) * pattern
    return Echoes(range_m, position_m[:, 0] / range_m, speed_mps, amplitude.astype(np.complex64))


def synthesize(settings: RadarSettings, echoes: Echoes, *, num_chirps: int) -> Complex:
    """Noise-free samples of one frame: (V, M, N) complex64, virtual channel x chirp x sample.

    A sum over echoes of amplitude x carrier phase x range tone x Doppler tone x array tone, as one matrix product.
    Virtual channel v is receiver v % num_rx of transmitter v // num_rx, which fires v // num_rx chirps later.
    """
    s, wavenumber = settings, 4 * pi / settings.wavelength_m
    cycles = (echoes.range_m / s.max_range_m).astype(np.float32)  # per sample
    ranges = _tones(2 * pi * cycles, s.num_samples)  # (P, N)
    ranges *= (echoes.amplitude * _unit(wavenumber * echoes.range_m))[:, None]
    chirps = _tones(wavenumber * echoes.speed_mps * s.frame_interval_s, num_chirps)  # (P, M)
    receivers = _tones(-pi * echoes.sin_azimuth, s.num_rx)
    step = wavenumber * echoes.speed_mps * s.chirp_interval_s - pi * s.num_rx * echoes.sin_azimuth
    transmitters = _tones(step, s.num_tx)
    channels = (transmitters[:, :, None] * receivers[:, None, :]).reshape(len(cycles), s.num_virtual)  # (P, V)
    spread = (channels[:, :, None] * chirps[:, None, :]).reshape(
        len(cycles), s.num_virtual * num_chirps
    )  # (P, V*M)
    return np.asarray((spread.T @ ranges).reshape(s.num_virtual, num_chirps, s.num_samples))


def _tones(step_rad: npt.NDArray[np.floating], count: int) -> Complex:
    """(P,) phase steps to (P, count) phasors that start at 1."""
    wrapped = np.remainder(step_rad.astype(np.float64), 2 * pi).astype(np.float32)
    return _unit(wrapped[:, None] * np.arange(count, dtype=np.float32))


def _unit(phase_rad: npt.NDArray[np.floating]) -> Complex:
    if phase_rad.dtype == np.float64:
        phase_rad = np.remainder(phase_rad, 2 * pi).astype(np.float32)
    phasor = np.empty(phase_rad.shape, np.complex64)
    np.cos(phase_rad, out=phasor.real)
    np.sin(phase_rad, out=phasor.imag)
    return phasor


def thermal_noise(settings: RadarSettings, rng: np.random.Generator) -> Complex:
    """(V, M, N) complex64: circular Gaussian of power 1 in every sample."""
    shape = (settings.num_virtual, settings.num_chirps, settings.num_samples * 2)
    noise = rng.standard_normal(shape, dtype=np.float32)
    noise *= np.float32(0.5**0.5)
    return noise.view(np.complex64)


def interference(settings: RadarSettings, rng: np.random.Generator) -> Complex:
    """(V, M, N) complex64: another FMCW radar, whose chirps sweep through our band in a fraction of ours."""
    s = settings
    samples = np.arange(s.num_samples, dtype=np.float32)
    chirps = rng.random((s.num_chirps, s.num_tx)) < rng.uniform(0.1, 0.5)  # those that cross
    centre = rng.uniform(0, s.num_samples, (s.num_chirps, s.num_tx, 1)).astype(np.float32)
    width = np.float32(rng.uniform(4, 20))
    offset = (samples - centre) / width
    burst = chirps[:, :, None] * (np.abs(offset) < 1) * 10 ** (s.interference_db / 20)
    signal = burst * _unit((pi / 2 * width * offset**2 + rng.uniform(0, 2 * pi, centre.shape)).astype(np.float32))
    receivers = _tones(np.asarray([-pi * rng.uniform(-0.9, 0.9)]), s.num_rx)[0]
    cube = signal.transpose(1, 0, 2)[:, None] * receivers[:, None, None]  # (Tx, Rx, M, N)
    return np.asarray(cube.reshape(s.num_virtual, s.num_chirps, s.num_samples), np.complex64)


@dataclass(frozen=True, slots=True)
class RadarMaps:
    """Heatmaps of one frame in dB over thermal noise, float32.

    snapshot: (R, A) one chirp per transmitter, as in CRUW. integrated: (R, A) mean power over Doppler.
    moving: (R, A) greatest power outside the still Doppler bins. range_doppler: (R, D) mean over channels.
    """

    snapshot: Float
    integrated: Float
    moving: Float
    range_doppler: Float


class RadarProcessor:
    """Samples to maps: Hann range FFT, Hann Doppler FFT, TDM compensation, Hamming azimuth beamforming."""

    def __init__(self, settings: RadarSettings) -> None:
        self.settings = s = settings
        self._range_window = _noise_neutral(np.hanning(s.num_samples + 1)[:-1])
        self._doppler_window = _noise_neutral(np.hanning(s.num_chirps + 1)[:-1])[:, None]
        taper = _noise_neutral(np.hamming(s.num_virtual) if s.num_virtual > 1 else np.ones(1))
        elements = np.arange(s.num_virtual)
        steering = np.exp(1j * pi * s.sin_azimuth[:, None] * elements)  # undoes the array tone
        self._beams = (steering * taper).astype(np.complex64)  # (A, V)
        bins = np.arange(s.num_chirps) - s.num_chirps // 2
        lag = (elements // s.num_rx)[:, None] / s.num_tx  # of a transmitter, in frame intervals
        self._tdm = np.exp(-2j * pi * bins / s.num_chirps * lag).astype(np.complex64)[:, :, None]  # (V, D, 1)
        self._moves = np.flatnonzero(np.abs(bins) > s.still_bins)
        self._powers_of_speed = s.speed_mps.astype(np.float32) ** np.arange(3, dtype=np.float32)[:, None]  # (3, D)

    def range_doppler_cube(self, cube: Complex) -> Complex:
        """(V, M, N) samples to (V, D, R), TDM-compensated, noise still 1. Doppler ascends, zero is at D // 2."""
        spectrum = np.fft.fft(cube * self._range_window, axis=2)
        spectrum *= self._doppler_window
        return np.asarray(np.fft.fftshift(np.fft.fft(spectrum, axis=1), axes=1) * self._tdm)

    def beamform(self, spectrum: Complex) -> Float:
        """(V, ..., R) to powers (A, ..., R) on the sin(azimuth) grid, noise power 1."""
        beams = self._beams @ spectrum.reshape(len(spectrum), -1)
        power = np.square(beams.real)
        power += np.square(beams.imag)
        return np.asarray(power.reshape(-1, *spectrum.shape[1:]))

    def heatmaps(self, cube: Complex) -> Float:
        """(V, M, N) samples to (C, R, A) float32, what `settings.channels` names."""
        power = self.beamform(self.range_doppler_cube(cube))
        maps = _decibels(np.stack(self._heatmaps(power)))
        num = self.settings.speed_moments
        return np.concatenate([maps, self._speeds(power)[:num]]) if num else maps

    def maps(self, cube: Complex) -> RadarMaps:
        """(V, M, N) samples to all maps."""
        spectrum = self.range_doppler_cube(cube)
        integrated, moving = self._heatmaps(self.beamform(spectrum))
        snapshot = self.beamform(np.fft.fft(cube[:, 0] * self._range_window, axis=1).astype(np.complex64)).T
        range_doppler = (np.abs(spectrum) ** 2).mean(axis=0).T
        return RadarMaps(*(_decibels(power) for power in (snapshot, integrated, moving, range_doppler)))

    def _heatmaps(self, power: Float) -> tuple[Float, Float]:
        """(A, D, R) powers to integrated and moving, (R, A) each."""
        return power.mean(axis=1).T, power[:, self._moves].max(axis=1).T

    def _speeds(self, power: Float) -> Float:
        """(A, D, R) powers to (2, R, A) m/s: the mean radial speed weighted by power, and the deviation from it.

        What aliases counts where it aliases to. Noise alone has a mean near 0, the deviation of a flat spectrum.
        """
        total, first, second = (self._powers_of_speed @ power).transpose(1, 2, 0)  # (R, A) each
        total = np.maximum(total, 1e-3)
        mean = first / total
        return np.stack([mean, np.sqrt(np.maximum(second / total - mean**2, 0))])


def _noise_neutral(window: Double) -> Float:
    """The window scaled so that white noise of power 1 stays of power 1 through window and sum."""
    return np.asarray(window / np.sqrt(np.sum(window**2)), np.float32)


def _decibels(power: Float) -> Float:
    return np.asarray(10 * np.log10(np.maximum(power, 1e-3)), np.float32)
