"""Handoff 2: durable, idempotent, bounded, readable while written, and never half a pair."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.errors import StoreError
from services.core.frames import FrameId
from services.core.store import StoreLimits, StoreReader, StoreWriter
from tests.conftest import JPEG, MS, label, pair


@pytest.fixture
def writer(store_dir: Path):
    writer = StoreWriter(store_dir, "north", limits=StoreLimits(min_free_bytes=0))
    yield writer
    writer.close()


def seqs(store_dir: Path) -> list[int]:
    reader = StoreReader(store_dir)
    reader.refresh()
    found = [stored.id.seq for stored in reader]
    assert all(stored.radar() is not None and stored.camera() is not None for stored in reader)
    reader.close()
    return found


def test_reader_sees_what_was_appended_bit_for_bit(writer, store_dir) -> None:
    writer.append([pair(0), pair(100, seq=1)])
    reader = StoreReader(store_dir)
    assert reader.refresh() == 2
    stored = reader.find("north", FrameId(100 * MS, 1))
    assert stored is not None
    radar, camera = stored.radar(), stored.camera()
    assert radar is not None
    assert camera is not None
    assert (radar.heatmap == 1).all()
    assert radar.heatmap.dtype == np.float16
    assert (radar.axes, radar.site) == (("channel", "range", "azimuth"), "north")
    assert (camera.image, camera.captured_at_ns, camera.shape) == (JPEG, 103 * MS, (8, 8, 3))
    reader.close()


def test_open_reader_follows_a_growing_store(writer, store_dir) -> None:
    reader = StoreReader(store_dir)
    assert reader.refresh() == 0
    for seq in range(3):
        writer.append([pair(seq, seq=seq)])
        assert reader.refresh() == seq + 1
    reader.close()


def test_same_id_is_stored_once_also_after_a_restart(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=StoreLimits(min_free_bytes=0))
    assert writer.append([pair(0), pair(0)]) == 1
    assert writer.append([pair(0)]) == 0
    writer.close()
    again = StoreWriter(store_dir, "north", limits=StoreLimits(min_free_bytes=0))
    assert again.append([pair(0), pair(9, seq=1)]) == 1
    again.close()
    assert seqs(store_dir) == [0, 1]


def test_second_writer_is_refused(writer, store_dir) -> None:
    with pytest.raises(StoreError, match="another process writes site north"):
        StoreWriter(store_dir, "north")


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 400), file=st.sampled_from(["seg", "idx"]), is_zeroed=st.booleans())
def test_torn_tail_costs_at_most_the_torn_pairs(tmp_path_factory, cut, file, is_zeroed) -> None:
    store_dir = tmp_path_factory.mktemp("torn")
    writer = StoreWriter(store_dir, "north", limits=StoreLimits(min_free_bytes=0))
    for seq in range(4):
        writer.append([pair(seq, seq=seq)])
    writer.close()
    path = store_dir / "north" / f"00000001.{file}"
    data = path.read_bytes()
    kept = data[: max(64 if file == "idx" else 16, len(data) - cut)]
    path.write_bytes(kept + bytes(len(data) - len(kept)) if is_zeroed else kept)
    reader = StoreReader(store_dir)
    reader.refresh()
    for stored in reader:  # a reader before recovery: whole or refused, never torn
        radar = stored.radar()
        assert radar is None or (radar.heatmap == stored.id.seq).all()
    reader.close()
    writer = StoreWriter(store_dir, "north", limits=StoreLimits(min_free_bytes=0))
    survivors = len(writer)
    writer.append([pair(10, seq=10)])
    writer.close()
    assert seqs(store_dir) == [*range(survivors), 10]


def small_limits(**changes) -> StoreLimits:
    return StoreLimits(**{"max_bytes": 40_000, "segment_bytes": 4_000, "min_free_bytes": 0} | changes)


def fill(writer: StoreWriter, num: int, *, start: int = 0) -> None:
    for seq in range(start, start + num):
        writer.append([pair(seq, seq=seq, shape=(16, 16))])


def test_oldest_segments_go_first_when_the_bytes_are_used_up(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=small_limits())
    fill(writer, 200)
    assert writer.num_bytes <= 40_000 + 5_000
    assert writer.num_evicted > 0
    left = seqs(store_dir)
    assert left == list(range(200 - len(left), 200))
    on_disk = sum(path.stat().st_size for path in (store_dir / "north").glob("*.*g"))
    assert on_disk < 46_000
    writer.close()


def test_open_reader_lets_go_of_evicted_pairs(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=small_limits())
    reader = StoreReader(store_dir)
    fill(writer, 20)
    reader.refresh()
    first = reader.pairs[0]
    fill(writer, 200, start=20)
    assert first.radar() is not None  # until the next refresh what was listed stays readable
    reader.refresh()
    assert reader.find("north", first.id) is None
    assert len(reader) == len(writer)
    reader.close()
    writer.close()


def test_labelled_pairs_are_pinned_up_to_their_share(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=small_limits())
    writer.append_labels([label(seq, "car", seq=seq) for seq in (1, 3)])
    fill(writer, 300)
    assert {1, 3} <= set(seqs(store_dir))
    writer.append_labels([label(seq, "car", seq=seq) for seq in range(300, 600)])
    fill(writer, 300, start=300)
    assert writer.num_bytes <= 40_000 * 1.4
    writer.close()


def test_old_segments_go_by_age(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=small_limits(max_age_s=3600))
    fill(writer, 20)
    for path in sorted((store_dir / "north").glob("*.idx"))[:2]:
        os.utime(path, (1, 1))
    assert writer.evict() > 0
    assert seqs(store_dir)[0] > 0
    writer.close()


def test_full_disk_stops_writing_with_a_clear_error_and_resumes(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=small_limits(min_free_bytes=2**62))
    with pytest.raises(StoreError, match="bytes free, the floor is"):
        writer.append([pair(0)])
    writer.limits = small_limits()
    assert writer.append([pair(0)]) == 1
    writer.close()


def test_unknown_format_version_is_refused_aloud(writer, store_dir) -> None:
    writer.append([pair(0)])
    path = store_dir / "north" / "00000001.idx"
    path.write_bytes(b"ECHOIDX\x09" + path.read_bytes()[8:])
    reader = StoreReader(store_dir)
    with pytest.raises(StoreError, match="another version"):
        reader.refresh()


def test_random_batch_is_uniform_without_repeats(writer, store_dir) -> None:
    writer.append([pair(seq, seq=seq) for seq in range(50)])
    reader = StoreReader(store_dir)
    reader.refresh()
    rng = np.random.default_rng(0)
    drawn = [stored.id.seq for _ in range(200) for stored in reader.random_batch(10, rng=rng)]
    assert len({stored.id for stored in reader.random_batch(10, rng=rng)}) == 10
    assert np.bincount(drawn, minlength=50).min() > 15
    assert len(reader.random_batch(99, rng=rng)) == 50
    reader.close()


def test_last_label_wins_and_a_torn_line_is_survived(writer, store_dir) -> None:
    writer.append([pair(0)])
    assert writer.append_labels([label(0, "car")]) == 1
    assert writer.append_labels([label(0, "car")]) == 0
    with (store_dir / "north" / "labels.jsonl").open("ab") as file:
        file.write(b'{"v":1,"capt')
    assert writer.append_labels([label(0, "cyclist")]) == 1
    reader = StoreReader(store_dir)
    reader.refresh()
    [(stored, said)] = reader.labelled()
    assert said.label == "cyclist"
    assert reader.label(stored) == said
    reader.close()
