"""The site profile: saved whole, read back, and refused aloud when damaged."""

import numpy as np
import pytest

from services.core.errors import StoreError
from services.core.profiles import FILE_NAME, SiteProfile, load_profile


def saved(store_dir) -> SiteProfile:
    (store_dir / "north").mkdir(parents=True)
    profile = SiteProfile("north", np.zeros((1, 2, 3), np.float32))
    profile.take_in(np.ones((1, 2, 3), np.float32))
    profile.save(store_dir)
    return profile


def test_profile_is_read_back_as_saved(store_dir) -> None:
    saved(store_dir)
    profile = load_profile(store_dir, "north")
    assert profile is not None
    assert (profile.version, profile.num_frames) == (1, 1)
    assert (profile.clutter == 1).all()


def test_site_without_a_profile_has_none(store_dir) -> None:
    assert load_profile(store_dir, "north") is None


@pytest.mark.parametrize("num_bytes", [0, 3, 100, -1])
def test_damaged_profile_is_a_store_error_with_a_remedy(store_dir, num_bytes) -> None:
    saved(store_dir)
    path = store_dir / "north" / FILE_NAME
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(StoreError, match="delete it: it is made anew"):
        load_profile(store_dir, "north")
