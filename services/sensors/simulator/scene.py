"""The whole: one site, its traffic and weather, seen by radar and camera at any instant, with the truth.

Every answer is a pure function of (site, seed, settings, t): frames can be made in any order, by any number of
processes. It does not know where frames go.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import degrees
from zlib import crc32

import numpy as np
import numpy.typing as npt
import simplejpeg

from services.core.errors import SettingsError
from services.core.frames import CLASSES, CameraFrame, Label, RadarFrame
from services.sensors.simulator import clutter
from services.sensors.simulator.bodies import shape_of
from services.sensors.simulator.camera import CameraRenderer, CameraSettings, outline
from services.sensors.simulator.pinhole import Pinhole
from services.sensors.simulator.radar import (
    CRUW_77GHZ,
    Complex,
    Echoes,
    RadarMaps,
    RadarProcessor,
    RadarSettings,
    interference,
    point_echoes,
    synthesize,
    thermal_noise,
)
from services.sensors.simulator.sites import Site
from services.sensors.simulator.targets import scatterers
from services.sensors.simulator.traffic import Track, Traffic, TrafficSettings
from services.sensors.simulator.troubles import DeliverySettings, Planned, plan
from services.sensors.simulator.weather import weather_at

_LEAST_VISIBLE = 0.12  # of an object's box; or, of a big one, this share of the picture
_PLAINLY_VISIBLE = 0.015

_RADAR, _CAMERA, _LABELS = 1, 2, 3


@dataclass(frozen=True, slots=True)
class SimulationSettings:
    """All that can be chosen besides the site and the seed."""

    radar: RadarSettings = CRUW_77GHZ
    camera: CameraSettings = field(default_factory=CameraSettings)
    traffic: TrafficSettings = field(default_factory=TrafficSettings)
    radar_delivery: DeliverySettings = field(default_factory=lambda: DeliverySettings(rate_hz=10.0))
    camera_delivery: DeliverySettings = field(
        default_factory=lambda: DeliverySettings(rate_hz=15.0, latency_s=0.05, latency_jitter_s=0.01)
    )


@dataclass(frozen=True, slots=True)
class LabelSettings:
    """An annotator: the share of radar frames it labels, the share of those it gets wrong, how long it takes."""

    share: float = 0.0
    mistakes: float = 0.0
    delay_s: float = 2.0

    def __post_init__(self) -> None:
        for name in ("share", "mistakes"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"labels {name} is {getattr(self, name)}", remedy="use a share from 0 to 1")
        if not 0 <= self.delay_s <= 3600:
            raise SettingsError(f"labels delay_s is {self.delay_s}", remedy="use 0 to 3600 s")


@dataclass(frozen=True, slots=True)
class ObjectTruth:
    """One road user. box_px: left, top, right, bottom in the camera's picture, not cut at its edge.

    range_m: slant range from the sensors to its middle. azimuth_deg: from boresight to the right.
    radial_speed_mps: positive recedes. visible_share: of the box, within the picture.
    """

    label: str
    box_px: tuple[float, float, float, float]
    range_m: float
    azimuth_deg: float
    radial_speed_mps: float
    visible_share: float


@dataclass(frozen=True, slots=True)
class Truth:
    """label: one of CLASSES, what a person would say of the picture. objects: whoever is there, nearest first."""

    label: str
    objects: tuple[ObjectTruth, ...]


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message of a sensor or the annotator. at_s: when to send it, from the start."""

    at_s: float
    frame: RadarFrame | CameraFrame | Label


class Scene:
    """One site from one seed. Making one takes about a second; a frame takes milliseconds."""

    def __init__(self, site: Site, *, seed: int = 0, settings: SimulationSettings = SimulationSettings()) -> None:
        if seed < 0:
            raise SettingsError(f"scene seed is {seed}", remedy="use 0 or more")
        self.site, self.seed, self.settings = site, seed, settings
        self._key = (seed, crc32(site.name.encode()))
        self._traffic = Traffic(site, seed=seed, settings=settings.traffic)
        self._processor = RadarProcessor(settings.radar)
        self._renderer = CameraRenderer(site, settings.camera)
        self._eye = Pinhole.of(site.mount, size_px=settings.camera.size_px)
        self._sensor_m = clutter.sensor_position(site)
        self._channel_gains = _channel_gains(site, settings.radar)
        still = synthesize(settings.radar, clutter.static_echoes(site, settings.radar), num_chirps=1)
        self._still = still * self._channel_gains  # (V, 1, N), the same in every chirp
        self._foliage = clutter.Foliage.of(site)

    def truth(self, t_s: float) -> Truth:
        """What is there at t_s. Raises SettingsError for a time before 0."""
        objects = sorted(
            (self._object(track, t_s) for track in self._traffic.tracks(t_s)), key=lambda o: o.range_m
        )
        seen = [found.label for found in objects if self._is_seen(found)]
        return Truth(seen[0] if seen else "empty", tuple(objects))

    def radar(self, t_s: float) -> npt.NDArray[np.float16]:
        """(C, R, A) float16, what `settings.radar.channels` names: (2, 128, 64) in dB over noise as shipped."""
        return self._processor.heatmaps(self.radar_cube(t_s)).astype(np.float16)

    def radar_maps(self, t_s: float) -> RadarMaps:
        """All maps of the instant, snapshot and range-Doppler too."""
        return self._processor.maps(self.radar_cube(t_s))

    def camera(self, t_s: float) -> npt.NDArray[np.uint8]:
        """(S, S, 3) uint8 RGB; S is 224 as shipped."""
        weather = weather_at(self.site, seed=self.seed, t_s=t_s)
        return self._renderer.render(self._traffic.tracks(t_s), weather, t_s, self._rng(_CAMERA, t_s))

    def radar_cube(self, t_s: float) -> Complex:
        """(V, M, N) complex64 samples of the frame at t_s, thermal noise of power 1 included."""
        settings, weather = self.settings.radar, weather_at(self.site, seed=self.seed, t_s=t_s)
        rng = self._rng(_RADAR, t_s)
        moving = [self._foliage.echoes(settings, t_s, wind_mps=weather.wind_mps)]
        for track in self._traffic.tracks(t_s):
            moving += self._echoes(track, t_s)
        cube = synthesize(settings, Echoes.join(moving), num_chirps=settings.num_chirps)
        cube *= self._channel_gains
        cube += self._still
        cube *= np.float32(10 ** (settings.gain_jitter_db * weather.drift / 20))
        if rng.random() < settings.interference_share:
            cube += interference(settings, rng)
        cube += thermal_noise(settings, rng)
        return cube

    def deliveries(self, *, start_ns: int, seconds: float | None, labels: LabelSettings) -> Iterator[Delivery]:
        """What the sensors and the annotator send, in the order of at_s; for ever where seconds is None.

        start_ns: what a true clock says at scene time 0. A label names its radar frame by captured_at_ns and seq.
        """
        streams = (
            self._radar_deliveries(start_ns, seconds),
            self._camera_deliveries(start_ns, seconds),
            self._label_deliveries(start_ns, seconds, labels),
        )
        yield from heapq.merge(*streams, key=lambda delivery: delivery.at_s)

    def _plan(self, sensor: int, seconds: float | None) -> Iterator[Planned]:
        delivery = self.settings.radar_delivery if sensor == _RADAR else self.settings.camera_delivery
        return plan(delivery, seed=(*self._key, sensor), seconds=seconds)

    def _radar_deliveries(self, start_ns: int, seconds: float | None) -> Iterator[Delivery]:
        for planned in self._plan(_RADAR, seconds):
            frame = RadarFrame(
                self.site.name,
                planned.seq,
                _stamp(start_ns, planned),
                heatmap=self.radar(planned.captured_s),
                axes=("channel", "range", "azimuth"),
                channels=self.settings.radar.channels,
            )
            yield Delivery(planned.at_s, frame)

    def _camera_deliveries(self, start_ns: int, seconds: float | None) -> Iterator[Delivery]:
        size = self.settings.camera.size_px
        for planned in self._plan(_CAMERA, seconds):
            image = simplejpeg.encode_jpeg(
                self.camera(planned.captured_s), quality=self.settings.camera.jpeg_quality, colorspace="RGB"
            )
            stamp = _stamp(start_ns, planned)
            yield Delivery(
                planned.at_s, CameraFrame(self.site.name, planned.seq, stamp, image=image, shape=(size, size, 3))
            )

    def _label_deliveries(self, start_ns: int, seconds: float | None, labels: LabelSettings) -> Iterator[Delivery]:
        if labels.share == 0:
            return
        for planned in self._plan(_RADAR, seconds):
            rng = np.random.default_rng((*self._key, _LABELS, planned.seq))
            chosen, mistaken = rng.random(2) < (labels.share, labels.mistakes)
            if planned.is_copy or not chosen:
                continue
            label = self.truth(planned.captured_s).label
            if mistaken:
                label = str(rng.choice([name for name in CLASSES if name != label]))
            at_s = planned.at_s + labels.delay_s
            yield Delivery(at_s, Label(self.site.name, planned.seq, _stamp(start_ns, planned), label=label))

    def _is_seen(self, found: ObjectTruth) -> bool:
        left, top, right, bottom = found.box_px
        picture_share = found.visible_share * (right - left) * (bottom - top) / self._eye.size_px**2
        return found.visible_share >= _LEAST_VISIBLE or picture_share >= _PLAINLY_VISIBLE

    def _rng(self, sensor: int, t_s: float) -> np.random.Generator:
        return np.random.default_rng((*self._key, sensor, round(t_s * 1e9)))

    def _echoes(self, track: Track, t_s: float) -> list[Echoes]:
        """Direct echoes with the bounce off the ground, and those that walls mirror."""
        settings = self.settings.radar
        target = scatterers(track, t_s, sensor_m=self._sensor_m)
        position = target.position_m - self._sensor_m
        points = {"position_m": position, "velocity_mps": target.velocity_mps, "rcs_m2": target.rcs_m2}
        direct = point_echoes(settings, **points)
        direct = clutter.ground_bounce(
            self.site, direct, height_m=target.position_m[:, 2], wavelength_m=settings.wavelength_m
        )
        return [direct, clutter.ghosts(self.site, settings, **points)]

    def _object(self, track: Track, t_s: float) -> ObjectTruth:
        state = track.state(t_s)
        pixels, _ = self._eye.project(outline(track, shape_of(track), state, t_s))
        (left, top), (right, bottom) = pixels.min(axis=0), pixels.max(axis=0)
        size = self._eye.size_px
        inside_px = max(0.0, min(right, size) - max(left, 0.0)) * max(0.0, min(bottom, size) - max(top, 0.0))
        middle = np.array((*state.xy_m, 0.8)) - self._sensor_m
        range_m = float(np.linalg.norm(middle))
        heading = np.array((np.cos(state.heading_rad), np.sin(state.heading_rad), 0.0))
        return ObjectTruth(
            label=track.kind,
            box_px=(float(left), float(top), float(right), float(bottom)),
            range_m=range_m,
            azimuth_deg=degrees(float(np.arctan2(middle[0], middle[1]))),
            radial_speed_mps=float(middle @ heading) / range_m * state.speed_mps,
            visible_share=float(inside_px / max((right - left) * (bottom - top), 1e-9)),
        )


def _channel_gains(site: Site, settings: RadarSettings) -> Complex:
    """(V, 1, 1) complex64: what calibration left, transmitter and receiver errors multiplied."""
    rng = np.random.default_rng((site.seed, 30))

    def errors(count: int) -> npt.NDArray[np.complex128]:
        gain_db = rng.normal(0, site.array_error.gain_db, count)
        phase_rad = np.radians(rng.normal(0, site.array_error.phase_deg, count))
        return np.asarray(10 ** (gain_db / 20) * np.exp(1j * phase_rad))

    gains = np.outer(errors(settings.num_tx), errors(settings.num_rx)).ravel()
    return gains.astype(np.complex64)[:, None, None]


def _stamp(start_ns: int, planned: Planned) -> int:
    return max(0, start_ns + round(planned.stamped_s * 1e9))
