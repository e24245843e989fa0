"""A simulated site through the publishing code: options, a folder that plays back, restarts at the present."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import pytest

from services.core.errors import SettingsError
from services.core.frames import Frame, Label, RadarFrame
from services.core.streams import StreamsLost
from services.sensors.preview import pick_moments, preview
from services.sensors.publish import AS_FAST_AS_CONSUMED, Pace
from services.sensors.recordings import FolderRecording
from services.sensors.simulate import record_scene, scene_maker, simulation_settings, stream_scene
from services.sensors.simulator import LabelSettings, Scene, preview_row

LABELS = LabelSettings(share=1.0, mistakes=0.0, delay_s=0.0)


@dataclass
class Sink:
    """Takes frames; refuses the first few."""

    failures: int = 0
    frames: list[Frame] = field(default_factory=list)

    async def publish(self, frames: Sequence[Frame]) -> None:
        if self.failures:
            self.failures -= 1
            raise StreamsLost[0]("connection refused")
        self.frames += frames

    async def backlog(self, site: str) -> int:  # noqa: ARG002
        return 0


@pytest.fixture(scope="module")
def scene() -> Scene:
    settings = simulation_settings(radar="cruw_77ghz", radar_fps=10, camera_fps=15)
    return scene_maker("demo", seed=3, settings=settings)(0)


def test_options_become_settings() -> None:
    settings = simulation_settings(
        radar="iwr6843_60ghz",
        radar_fps=5,
        camera_fps=20,
        changes=("radar.drop_share=0.1", "camera.clock_offset_s=0.02"),
    )
    assert settings.radar.name == "iwr6843_60ghz"
    assert (settings.radar_delivery.rate_hz, settings.radar_delivery.drop_share) == (5, 0.1)
    assert (settings.camera_delivery.rate_hz, settings.camera_delivery.clock_offset_s) == (20, 0.02)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"radar": "sonar"}, "cruw_77ghz"),
        ({"changes": ("lidar.drop_share=1",)}, "GROUP.NAME=VALUE"),
        ({"changes": ("radar.mood=1",)}, "drop_share"),
        ({"changes": ("radar.drop_share=some",)}, "give it a number"),
        ({"changes": ("radar.drop_share=2",)}, "share from 0 to 1"),
        ({"radar_fps": 0.0}, "rate_hz"),
    ],
)
def test_refuses_options_with_a_remedy(given: dict[str, object], named: str) -> None:
    options: dict[str, object] = {"radar": "cruw_77ghz", "radar_fps": 10.0, "camera_fps": 15.0, **given}
    with pytest.raises(SettingsError, match=named):
        simulation_settings(**options)  # type: ignore[arg-type]


def test_recorded_scene_plays_back(scene: Scene, tmp_path: Path) -> None:
    report = record_scene(scene, tmp_path / "demo", seconds=1.0, labels=LABELS)
    assert report.counts == {"radar": 10, "camera": 15, "labels": 10}
    recording = FolderRecording(tmp_path / "demo")
    frames = list(recording.frames())
    assert recording.report().counts == report.counts
    radar = next(frame for frame in frames if isinstance(frame, RadarFrame))
    assert (radar.site, radar.channels) == ("demo", ("integrated", "moving"))
    assert radar.heatmap.dtype == "float16"


async def test_streams_a_bounded_scene_from_now_on(scene: Scene) -> None:
    sink, began_ns = Sink(), time.time_ns()
    published = await stream_scene(
        lambda _: scene,
        seconds=1.0,
        labels=LABELS,
        publisher=sink,
        pace=Pace(speed=AS_FAST_AS_CONSUMED),
        stop=asyncio.Event(),
    )
    assert published.counts == {"radar": 10, "camera": 15, "labels": 10}
    radar = [frame for frame in sink.frames if isinstance(frame, RadarFrame)]
    assert all(0 <= frame.captured_at_ns - began_ns + 10**7 < 30 * 10**9 for frame in radar)
    labelled = {frame.id for frame in sink.frames if isinstance(frame, Label)}
    assert labelled == {frame.id for frame in radar}


async def test_endless_scene_that_fell_behind_starts_again_at_the_present(scene: Scene) -> None:
    sink, stop, made = Sink(failures=1), asyncio.Event(), []

    def make(number: int) -> Scene:
        made.append(number)
        if number == 1:
            stop.set()
        return scene

    async with asyncio.timeout(30):
        published = await stream_scene(
            make, seconds=None, labels=LABELS, publisher=sink, pace=Pace(max_lag_s=0.05), stop=stop
        )
    assert made == [0, 1]
    assert published.ended == "stopped"


def test_preview_shows_every_class_that_occurs(scene: Scene, tmp_path: Path) -> None:
    moments = pick_moments(scene, seconds=60)
    assert all(scene.truth(t_s) == truth for t_s, truth in moments)
    assert len({truth.label for _, truth in moments}) >= 2
    preview(scene, tmp_path / "look.png", seconds=5)
    assert cv2.imread(str(tmp_path / "look.png")).std() > 10
    preview(scene, tmp_path / "look.mp4", seconds=0.3)
    assert cv2.VideoCapture(str(tmp_path / "look.mp4")).read()[1].shape == preview_row(scene, 0.0).shape
    with pytest.raises(SettingsError, match=r"\.png or \.mp4"):
        preview(scene, tmp_path / "look.gif", seconds=1)
