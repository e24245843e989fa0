"""A store becomes arrays: what is in them, that images are encoded once, and that the store stays as it was."""

from pathlib import Path

import numpy as np
import pytest

from services.core.errors import StoreError
from services.core.frames import CLASSES
from tests.trainer.conftest import SHAPE
from tests.trainer.evaluation.conftest import NUM_FRAMES, SESSION_S, SITES, fill_site
from trainer.evaluation.dataset import UNLABELLED, clutter_table, load_dataset, sessions_of

S = 1_000_000_000


def test_arrays_hold_what_the_store_holds(dataset) -> None:
    assert dataset.sites == tuple(sorted(SITES))
    assert dataset.heatmap.shape == (len(SITES) * NUM_FRAMES, *SHAPE)
    pair = dataset.pairs[50]
    assert pair.site == dataset.sites[dataset.site[50]]
    np.testing.assert_array_equal(pair.radar().heatmap, dataset.heatmap[50])
    expected = CLASSES.index(("pedestrian", "car")[(pair.id.seq // 4) % 2])
    assert dataset.label[50] == expected
    assert 0.3 < dataset.has_mirrored_key.mean() < 0.7
    assert (dataset.mirrored_key[~dataset.has_mirrored_key] == 0).all()
    assert len(np.unique(dataset.session)) == len(SITES) * NUM_FRAMES * 2 / SESSION_S


def test_images_are_encoded_once_and_the_store_is_left_alone(filled: Path, vision, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in filled.rglob("*")}
    first = load_dataset(filled, vision=vision, cache_dir=tmp_path / "cache")
    encoded = vision.net.num_images
    again = load_dataset(filled, vision=vision, cache_dir=tmp_path / "cache")
    assert vision.net.num_images == encoded > 0
    np.testing.assert_array_equal(first.key, again.key)
    assert first.fingerprint == again.fingerprint
    assert {path: path.stat().st_mtime_ns for path in filled.rglob("*")} == before


def test_other_images_of_the_same_times_are_encoded_anew(filled: Path, vision, tmp_path: Path) -> None:
    load_dataset(filled, vision=vision, cache_dir=tmp_path / "cache")
    encoded = vision.net.num_images
    from tests.trainer.conftest import fill, scene

    fill(tmp_path / "other", [scene(seq, kind=1 - (seq // 4) % 2) for seq in range(8)])
    load_dataset(tmp_path / "other", vision=vision, cache_dir=tmp_path / "cache")
    assert vision.net.num_images >= encoded + 8


def test_frames_without_label_are_told_apart(tmp_path: Path, vision) -> None:
    fill_site(tmp_path / "store", "north", num_frames=10, num_labels=4)
    found = load_dataset(tmp_path / "store", vision=vision, cache_dir=tmp_path / "cache")
    assert (found.label >= 0).sum() == 4
    assert (found.label[4:] == UNLABELLED).all()


def test_empty_store_is_an_error_that_says_what_to_do(tmp_path: Path, vision) -> None:
    with pytest.raises(StoreError, match="--simulate"):
        load_dataset(tmp_path / "none", vision=vision, cache_dir=tmp_path / "cache")


def test_session_ends_with_its_length_a_gap_or_its_site() -> None:
    site = np.array([0, 0, 0, 0, 0, 1, 1])
    at_ns = np.array([0, 1, 2, 3, 100, 101, 102]) * S
    np.testing.assert_array_equal(sessions_of(site, at_ns, session_s=2.0), [0, 0, 1, 1, 2, 3, 3])


def test_clutter_of_a_training_site_is_of_its_training_frames_alone(dataset) -> None:
    north = np.flatnonzero(dataset.site == dataset.sites.index("north"))[:5]
    table = clutter_table(dataset, north)
    np.testing.assert_allclose(
        table[1 + dataset.sites.index("north")], dataset.heatmap[north].astype(float).mean(0), rtol=1e-3
    )
    np.testing.assert_allclose(table[0], table[1 + dataset.sites.index("north")])
    unseen = dataset.heatmap[dataset.site == 0].astype(float).mean(0)
    np.testing.assert_allclose(table[1], unseen, rtol=1e-3)
