"""Handoff 2: durable, idempotent, bounded, readable while written, and never half a pair."""

import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
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


@pytest.mark.parametrize(("file", "at"), [("seg", 40), ("seg", -90), ("seg", -40), ("idx", 64 + 64 + 8)])
def test_damage_before_the_tail_is_voided_and_its_pair_stored_again(store_dir, file, at) -> None:
    writer = StoreWriter(store_dir, "north", limits=StoreLimits(min_free_bytes=0))
    writer.append([pair(0)])
    start = writer.num_bytes - 128  # where the second payload begins
    writer.append([pair(1, seq=1)])
    end = writer.num_bytes - 192
    writer.append([pair(2, seq=2)])
    writer.close()
    path = store_dir / "north" / f"00000001.{file}"
    data = bytearray(path.read_bytes())
    if file == "seg":
        at += start if at > 0 else end
    data[at : at + 24] = b"\xff" * 24
    path.write_bytes(data)
    for _ in range(2):  # also after a second restart
        writer = StoreWriter(store_dir, "north", limits=StoreLimits(min_free_bytes=0))
        assert len(writer) == 2
        writer.close()
    assert seqs(store_dir) == [0, 2]
    writer = StoreWriter(store_dir, "north", limits=StoreLimits(min_free_bytes=0))
    assert writer.append([pair(0), pair(1, seq=1), pair(2, seq=2)]) == 1
    writer.close()
    assert seqs(store_dir) == [0, 1, 2]


def test_reader_refuses_the_camera_frame_of_a_damaged_pair(writer, store_dir) -> None:
    writer.append([pair(0), pair(1, seq=1)])
    path = store_dir / "north" / "00000001.seg"
    path.write_bytes(path.read_bytes()[:16] + bytes(32) + path.read_bytes()[48:])
    reader = StoreReader(store_dir)
    reader.refresh()
    damaged = reader.pairs[0]
    assert (damaged.radar(), damaged.camera()) == (None, None)
    reader.close()


def test_data_file_whose_index_went_in_a_crash_is_removed_at_the_next_start(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=StoreLimits(min_free_bytes=0))
    writer.append([pair(0)])
    writer.close()
    orphan = store_dir / "north" / "00000000.seg"
    orphan.write_bytes(b"x" * 1000)
    StoreWriter(store_dir, "north").close()
    assert not orphan.exists()
    assert seqs(store_dir) == [0]


def test_reader_that_saw_a_failed_append_forgets_its_rows(writer, store_dir, monkeypatch) -> None:
    writer.append([pair(0)])
    reader = StoreReader(store_dir)

    def fail(fd: int) -> None:
        assert reader.refresh() == 3
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(StoreError, match="No space left"):
            writer.append([pair(1, seq=1), pair(2, seq=2)])
    writer.append([pair(3, seq=3), pair(4, seq=4)])
    assert reader.refresh() == 3
    assert [stored.id.seq for stored in reader] == [0, 3, 4]
    assert [float(stored.radar().heatmap.max()) for stored in reader] == [0, 3, 4]
    reader.close()


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


def test_open_segment_goes_by_age_also_after_a_restart(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=small_limits(max_age_s=3600))
    for restarts in (False, True):
        writer.append([pair(0)])
        assert writer.evict() == 0
        newest = max((store_dir / "north").glob("*.idx"))
        os.utime(newest, (1, 1))
        if restarts:
            writer.close()
            writer = StoreWriter(store_dir, "north", limits=small_limits(max_age_s=3600))
        assert writer.evict() == 1
        assert (len(writer), seqs(store_dir)) == (0, [])
        assert len(list((store_dir / "north").glob("*.seg"))) == 1
    writer.close()


def test_segment_of_a_slow_site_is_sealed_long_before_it_is_full(store_dir, monkeypatch) -> None:
    writer = StoreWriter(store_dir, "north", limits=small_limits(max_age_s=3600))
    writer.append([pair(0)])
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + 500)
    assert writer.append([pair(1, seq=1)]) == 1
    assert len(list((store_dir / "north").glob("*.idx"))) == 2
    assert seqs(store_dir) == [0, 1]
    writer.close()


def test_eviction_ends_when_all_that_is_left_is_pinned(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=small_limits(pinned_share=1.0))
    writer.append_labels([label(seq, "car", seq=seq) for seq in range(30)])
    fill(writer, 30)
    writer.limits = small_limits(pinned_share=1.0, min_free_bytes=2**62)
    writer.evict()
    assert seqs(store_dir) == list(range(30))
    writer.close()


def test_eviction_from_another_thread_does_not_disturb_appends(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=small_limits())
    with ThreadPoolExecutor(1) as pool:
        filling = pool.submit(fill, writer, 300)
        while not filling.done():
            writer.evict()
        filling.result()
    left = seqs(store_dir)
    assert left == list(range(300 - len(left), 300))
    assert len(left) == len(writer)
    writer.close()


def test_segments_grow_with_the_store_so_that_readers_hold_few_files(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=small_limits(max_bytes=1_000_000, segment_bytes=100))
    fill(writer, 150)
    assert 10 < len(list((store_dir / "north").glob("*.idx"))) < 30
    writer.close()


def test_reader_lets_its_process_open_as_many_files_as_the_system_allows(store_dir) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        StoreReader(store_dir).close()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


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
