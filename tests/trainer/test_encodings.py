"""The cache of encodings: a crash while it is written anew costs nothing."""

import os
import shutil

import numpy as np
import pytest

from services.core.encodings import UNKNOWN_DIGEST, checksum, header_of, row_dtype
from services.core.errors import StoreError
from services.core.files import write_atomically
from services.core.frames import FrameId
from tests.trainer.conftest import scene
from trainer import encodings
from trainer.encodings import Encoded, EncodingCache


def scene_id(seq: int) -> FrameId:
    return FrameId(seq * 1_000_000, seq)


@pytest.mark.parametrize("is_renamed", [False, True])
def test_crash_while_the_file_is_written_anew_loses_no_live_vector(store_dir, monkeypatch, is_renamed) -> None:
    cache = EncodingCache(store_dir, site="north", encoder_id="e", dim=12)
    cache.append([Encoded(scene(i).id, False, np.full(12, i, np.float16)) for i in range(1200)])

    def crash(path, data) -> None:
        if is_renamed:
            write_atomically(path, data)
        raise KeyboardInterrupt

    monkeypatch.setattr(encodings, "write_atomically", crash)
    with pytest.raises(KeyboardInterrupt):
        cache.forget(scene(i).id for i in range(1190))
    again = EncodingCache(store_dir, site="north", encoder_id="e", dim=12)
    assert len(again) == (10 if is_renamed else 1200)
    for i in range(1190, 1200):
        vector = again.get(scene(i).id, mirrored=False)
        assert vector is not None
        assert (vector == i).all()


def test_slots_of_vectors_that_went_are_taken_again(store_dir) -> None:
    cache = EncodingCache(store_dir, site="north", encoder_id="e", dim=12)
    for start in range(0, 10_000, 500):
        ids = [scene_id(i) for i in range(start, start + 500)]
        cache.append([Encoded(at, False, np.full(12, at.seq % 100, np.float16), at.seq + 1) for at in ids])
        cache.forget(scene_id(i) for i in range(start))
        for at in ids:
            assert (cache.get(at, mirrored=False) == at.seq % 100).all()
    assert (len(cache), cache.vectors.num_slots) == (500, 1024)
    assert cache.find(9_000, mirrored=False) is None
    assert cache.find(9_999, mirrored=False) is not None
    assert cache._path.stat().st_size < 3_000 * cache._row.itemsize


def test_vector_is_found_by_the_content_of_its_image(store_dir) -> None:
    def cache() -> EncodingCache:
        return EncodingCache(store_dir, site="north", encoder_id="e", dim=12)

    cache().append([Encoded(scene_id(1), True, np.full(12, 7, np.float16), 99)])
    again = cache()
    assert again.digest(scene_id(1)) == 99
    assert again.find(99, mirrored=False) is None
    found = again.find(99, mirrored=True)
    assert found is not None
    assert (found == 7).all()
    assert again.digest(scene_id(2)) is None


def test_file_of_version_2_is_taken_over(store_dir) -> None:
    path = store_dir / "north" / "encodings" / "e.bin"
    path.parent.mkdir(parents=True)
    rows = np.zeros(3, row_dtype(12, version=2))
    for i, row in enumerate(rows):
        row["captured_at_ns"], row["seq"] = scene_id(i)
        row["mirrored"], row["vector"] = i % 2, i
        row["sum"] = checksum(row)
    path.write_bytes(header_of(12)[:7] + b"\x02" + header_of(12)[8:] + rows.tobytes())
    for num_taken_over in (3, 0):
        cache = EncodingCache(store_dir, site="north", encoder_id="e", dim=12)
        assert cache.num_taken_over == num_taken_over
        vector = cache.get(scene_id(1), mirrored=True)
        assert vector is not None
        assert (vector == 1).all()
        assert cache.digest(scene_id(1)) == UNKNOWN_DIGEST
        assert cache.find(UNKNOWN_DIGEST, mirrored=True) is None


def test_file_from_before_it_had_a_header_is_computed_again(store_dir) -> None:
    path = store_dir / "north" / "encodings" / "e.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(48 * 3))
    cache = EncodingCache(store_dir, site="north", encoder_id="e", dim=12)
    assert len(cache) == 0
    cache.append([Encoded(scene(1).id, True, np.ones(12, np.float16))])
    assert len(EncodingCache(store_dir, site="north", encoder_id="e", dim=12)) == 1


def test_unknown_version_and_other_length_are_refused_aloud(store_dir) -> None:
    EncodingCache(store_dir, site="north", encoder_id="e", dim=12)
    with pytest.raises(StoreError, match="have 12 numbers each, expected 13; delete the file"):
        EncodingCache(store_dir, site="north", encoder_id="e", dim=13)
    path = store_dir / "north" / "encodings" / "e.bin"
    path.write_bytes(path.read_bytes()[:7] + b"\x09" + path.read_bytes()[8:])
    with pytest.raises(StoreError, match="version 9, expected 3"):
        EncodingCache(store_dir, site="north", encoder_id="e", dim=12)


def test_damaged_vector_is_computed_again(store_dir) -> None:
    cache = EncodingCache(store_dir, site="north", encoder_id="e", dim=12)
    cache.append([Encoded(scene(i).id, False, np.full(12, i, np.float16)) for i in range(3)])
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
            cache.append([Encoded(scene(i).id, False, np.full(12, i, np.float16)) for i in range(3)])
    cache.append([Encoded(scene(7).id, False, np.full(12, 7, np.float16))])
    again = EncodingCache(store_dir, site="north", encoder_id="e", dim=12)
    assert [again.get(scene(i).id, mirrored=False) is not None for i in (0, 1, 7)] == [True, False, True]


def test_removed_site_is_forgotten_and_written_anew_once_it_is_there_again(store_dir) -> None:
    cache = EncodingCache(store_dir, site="north", encoder_id="e", dim=12)
    cache.append([Encoded(scene_id(i), False, np.full(12, 1, np.float16)) for i in range(1200)])
    shutil.rmtree(store_dir / "north")
    cache.forget(scene_id(i) for i in range(1200))  # many enough for the file to be written anew
    cache.append([Encoded(scene_id(1), False, np.full(12, 1, np.float16))])
    assert not (store_dir / "north").exists()
    (store_dir / "north").mkdir()
    cache.append([Encoded(scene_id(2), False, np.full(12, 2, np.float16))])
    cache.append([Encoded(scene_id(3), False, np.full(12, 3, np.float16))])
    again = EncodingCache(store_dir, site="north", encoder_id="e", dim=12)
    assert [float((again.get(scene_id(i), mirrored=False))[0]) for i in (1, 2, 3)] == [1, 2, 3]


def test_what_a_killed_writer_left_aside_is_removed(store_dir) -> None:
    EncodingCache(store_dir, site="north", encoder_id="e", dim=12)
    left, others = (store_dir / "north" / "encodings" / f".{name}.bin.77.aside" for name in ("e", "e2"))
    left.write_bytes(b"half")
    others.write_bytes(b"of an encoder that may be running")
    EncodingCache(store_dir, site="north", encoder_id="e", dim=12)
    assert (left.exists(), others.exists()) == (False, True)
