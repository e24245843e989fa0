"""A simulated site straight into a store: exact pairs, the truth as label, the same frames again, gone on with."""

from pathlib import Path

import numpy as np
import pytest

from services.core.store import StoreReader
from services.sensors.simulate import scene_maker, simulation_settings
from services.sensors.simulator import LabelSettings, Scene
from services.sensors.stored import START_NS, store_scene

TRUTH = LabelSettings(share=1.0, mistakes=0.0)
INTERVAL_S = 1.5


@pytest.fixture(scope="module")
def scene() -> Scene:
    return scene_maker(
        "demo", seed=3, settings=simulation_settings(radar="cruw_77ghz", radar_fps=1, camera_fps=1)
    )(0)


def read(store_dir: Path) -> StoreReader:
    reader = StoreReader(store_dir)
    reader.refresh()
    return reader


def test_pairs_are_of_one_instant_and_labelled_with_the_truth(scene: Scene, tmp_path: Path) -> None:
    seen: list[int] = []
    num_new = store_scene(
        scene, tmp_path, num_frames=5, interval_s=INTERVAL_S, labels=TRUTH, on_progress=seen.append
    )
    reader = read(tmp_path)
    assert num_new == len(reader) == seen[-1] == 5
    for seq, pair in enumerate(reader):
        t_s = seq * INTERVAL_S
        radar, label = pair.radar(), reader.label(pair)
        assert radar is not None
        assert label is not None
        assert pair.id == (START_NS + round(t_s * 1e9), seq)
        assert pair.camera_at_ns == pair.id.captured_at_ns
        np.testing.assert_array_equal(radar.heatmap, scene.radar(t_s))
        assert radar.channels == ("integrated", "moving")
        assert label.label == scene.truth(t_s).label
    reader.close()


def test_what_is_stored_is_not_made_again(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store_scene(scene, tmp_path, num_frames=3, interval_s=INTERVAL_S, labels=TRUTH)
    asked: list[float] = []
    honest = Scene.radar
    monkeypatch.setattr(Scene, "radar", lambda self, t_s: asked.append(t_s) or honest(self, t_s))
    assert store_scene(scene, tmp_path, num_frames=4, interval_s=INTERVAL_S, labels=TRUTH) == 1
    assert asked == [3 * INTERVAL_S]


def test_annotator_may_leave_frames_out_and_err(scene: Scene, tmp_path: Path) -> None:
    store_scene(scene, tmp_path, num_frames=8, interval_s=0.5, labels=LabelSettings(share=0.5, mistakes=1.0))
    reader = read(tmp_path)
    labelled = reader.labelled()
    assert 0 < len(labelled) < 8
    for pair, label in labelled:
        assert label.label != scene.truth((pair.id.captured_at_ns - START_NS) / 1e9).label
    reader.close()
