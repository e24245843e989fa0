"""The cache of encodings: a crash while it is written anew costs nothing."""

import numpy as np
import pytest

from services.core.files import write_atomically
from tests.trainer.conftest import scene
from trainer import encodings
from trainer.encodings import EncodingCache


@pytest.mark.parametrize("is_renamed", [False, True])
def test_crash_while_the_file_is_written_anew_loses_no_live_vector(store_dir, monkeypatch, is_renamed) -> None:
    cache = EncodingCache(store_dir, site="north", encoder_id="e", dim=12)
    cache.append([(scene(i).id, False, np.full(12, i, np.float16)) for i in range(1200)])

    def crash(path, data) -> None:
        if is_renamed:
            write_atomically(path, data)
        raise KeyboardInterrupt

    monkeypatch.setattr(encodings, "write_atomically", crash)
    live = {scene(i).id for i in range(1190, 1200)}
    with pytest.raises(KeyboardInterrupt):
        cache.forget_all_but(live)
    again = EncodingCache(store_dir, site="north", encoder_id="e", dim=12)
    assert len(again) == (10 if is_renamed else 1200)
    for i in range(1190, 1200):
        vector = again.get(scene(i).id, mirrored=False)
        assert vector is not None
        assert (vector == i).all()
