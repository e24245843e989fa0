"""Sites: what ships, what a person may write, and what is said about a bad file."""

import numpy as np
import pytest

from services.core.errors import SettingsError
from services.sensors.simulator import Scene, list_sites, load_site
from services.sensors.simulator.sites import SITES_DIR


def test_ships_sites_to_train_on_and_sites_kept_for_evaluation():
    sites = list_sites()
    assert sum(not site.eval_only for site in sites.values()) >= 8
    assert sum(site.eval_only for site in sites.values()) >= 4
    assert not sites["demo"].eval_only
    assert all(name == site.name for name, site in sites.items())
    assert len({site.seed for site in sites.values()}) == len(sites)


def test_shipped_views_fit_the_task():
    for site in list_sites().values():
        assert 46 <= site.mount.fov_deg <= 54
        assert site.ways.min_range_m >= 3.5
        assert site.ways.max_range_m <= 12


def test_a_small_file_is_a_site(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("walls:\n  - {start: [-8, 16], end: [8, 16], kind: hedge}\ntrees:\n  - {at: [3, 14]}\n")
    site = load_site(str(path))
    assert site.name == "mine"
    scene = Scene(site, seed=0)
    assert np.isfinite(scene.radar(1.0)).all()
    assert scene.camera(1.0).std() > 5


def test_an_empty_plain_is_a_site_too(tmp_path):
    path = tmp_path / "plain.yaml"
    path.write_text("name: plain\n")
    scene = Scene(load_site(str(path)), seed=0)
    assert scene.radar(0.0).shape == (2, 128, 64)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("mount: {height_m: -3}", "mount.height_m"),
        ("walls: 3", "walls"),
        ("wall: []", "wall"),
        ("name: 'a b'", "name"),
        ("ways: {min_range_m: 9, max_range_m: 10}", "ways"),
        ("boxes: [{at: [0, 5], size_m: [0, 1, 1]}]", "size_m"),
        ("- 1", "list"),
        ("a: [", "not YAML"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_bad_files_are_refused_with_the_place_of_the_fault(tmp_path, content, said):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(SettingsError, match=said) as raised:
        load_site(str(path))
    assert raised.value.remedy


@pytest.mark.parametrize("content", ["", "name: yard\n"])
def test_file_that_goes_by_the_name_of_a_shipped_site_is_refused_until_it_has_its_own(tmp_path, content):
    path = tmp_path / "yard.yaml"
    path.write_text(content or "mount: {height_m: 4}\n")
    with pytest.raises(SettingsError, match=r"named 'yard', as a shipped site is.*name: my_yard"):
        load_site(str(path))
    path.write_text("name: my_yard\n")
    assert load_site(str(path)).name == "my_yard"
    assert load_site(str(SITES_DIR / "yard.yaml")) == load_site("yard")


@pytest.mark.parametrize("name", ["atlantis", "../demo", "/nowhere/site.yaml", ""])
def test_unknown_site_is_refused_by_name(name):
    with pytest.raises(SettingsError) as raised:
        load_site(name)
    assert raised.value.remedy
