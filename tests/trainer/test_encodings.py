"""The cache of encodings: a crash while it is written anew costs nothing."""

import gc
import os
import weakref

import numpy as np
import pytest

from services.core.errors import StoreError
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


def test_vector_keeps_nothing_but_itself_alive(store_dir) -> None:
    def cache() -> EncodingCache:
        return EncodingCache(store_dir, site="north", encoder_id="e", dim=12)

    cache().append([(scene(i).id, False, np.full(12, i, np.float16)) for i in range(1200)])
    loaded = cache()
    old = loaded.get(scene(5).id, mirrored=False)
    assert old is not None
    assert old.base is None
    gone = weakref.ref(old)
    del old
    loaded.forget_all_but({scene(i).id for i in range(10)})
    kept = loaded.get(scene(5).id, mirrored=False)
    assert kept is gone()  # whoever holds one holds no second copy
    assert kept is not None
    assert kept.base is None
    loaded.forget_all_but(())
    del kept, loaded
    gc.collect()
    assert gone() is None


def test_file_from_before_it_had_a_header_is_computed_again(store_dir) -> None:
    path = store_dir / "north" / "encodings" / "e.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(48 * 3))
    cache = EncodingCache(store_dir, site="north", encoder_id="e", dim=12)
    assert len(cache) == 0
    cache.append([(scene(1).id, True, np.ones(12, np.float16))])
    assert len(EncodingCache(store_dir, site="north", encoder_id="e", dim=12)) == 1


def test_unknown_version_and_other_length_are_refused_aloud(store_dir) -> None:
    EncodingCache(store_dir, site="north", encoder_id="e", dim=12)
    with pytest.raises(StoreError, match="have 12 numbers each, expected 13; delete the file"):
        EncodingCache(store_dir, site="north", encoder_id="e", dim=13)
    path = store_dir / "north" / "encodings" / "e.bin"
    path.write_bytes(path.read_bytes()[:7] + b"\x09" + path.read_bytes()[8:])
    with pytest.raises(StoreError, match="version 9, expected 2"):
        EncodingCache(store_dir, site="north", encoder_id="e", dim=12)


def test_damaged_vector_is_computed_again(store_dir) -> None:
    cache = EncodingCache(store_dir, site="north", encoder_id="e", dim=12)
    cache.append([(scene(i).id, False, np.full(12, i, np.float16)) for i in range(3)])
    path = store_dir / "north" / "encodings" / "e.bin"
    data = bytearray(path.read_bytes())
    data[-60] ^= 1
    path.write_bytes(data)
    again = EncodingCache(store_dir, site="north", encoder_id="e", dim=12)
    assert [again.get(scene(i).id, mirrored=False) is not None for i in range(3)] == [True, False, True]


def test_whole_rows_of_a_refused_append_are_not_written_over(store_dir, monkeypatch) -> None:
    cache = EncodingCache(store_dir, site="north", encoder_id="e", dim=12)
    real, num_calls = os.pwrite, 0

    def refuse(fd: int, data: memoryview, at: int) -> int:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            return real(fd, data[:70], at)  # one row, and a part of the next
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        with pytest.raises(StoreError, match="No space left"):
            cache.append([(scene(i).id, False, np.full(12, i, np.float16)) for i in range(3)])
    cache.append([(scene(7).id, False, np.full(12, 7, np.float16))])
    again = EncodingCache(store_dir, site="north", encoder_id="e", dim=12)
    assert [again.get(scene(i).id, mirrored=False) is not None for i in (0, 1, 7)] == [True, False, True]
