"""Handoff 2: durable, idempotent, bounded, readable while written, and never half a pair."""

import errno
import os
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from services.core.errors import StoreError
from services.core.frames import FrameId, Seen, SeenObject
from services.core.store import Pair, StoreLimits, StoreReader, StoreWriter
from tests.conftest import JPEG, MS, label, pair, stored_seqs


@pytest.fixture
def writer(store_dir: Path):
    writer = StoreWriter(store_dir, "north", limits=StoreLimits(min_free_bytes=0))
    yield writer
    writer.close()


def file_of(store_dir: Path, suffix: str, *, site: str = "north") -> Path:
    """The one file of a site with this suffix."""
    [path] = (store_dir / site).rglob(f"*{suffix}")
    return path


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
    assert stored_seqs(store_dir) == [0, 1]


def test_reader_refuses_a_damaged_pair_whole(writer, store_dir) -> None:
    writer.append([pair(0), pair(1, seq=1)])
    path = file_of(store_dir, ".seg")
    data = bytearray(path.read_bytes())
    data[128:160] = bytes(32)  # of the first pair's meta
    path.write_bytes(data)
    reader = StoreReader(store_dir)
    reader.refresh()
    damaged = reader.pairs[0]
    assert (damaged.radar(), damaged.camera(), damaged.seen()) == (None, None, None)
    assert reader.pairs[1].radar() is not None
    reader.close()


def test_pair_that_a_reader_holds_longer_than_the_reader_lives_reads_as_gone(writer, store_dir) -> None:
    writer.append([pair(0)])
    reader = StoreReader(store_dir)
    reader.refresh()
    held = reader.pairs[0]
    reader.close()
    assert (held.radar(), held.camera(), held.has_image) == (None, None, True)


def test_what_no_segment_needs_is_removed_at_the_next_start(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=StoreLimits(min_free_bytes=0))
    writer.append([pair(0)])
    writer.close()
    directory = file_of(store_dir, ".seg").parent
    names = ["00000000.seg", "00000009.idx", "00000008.end", "00000007.seg.merged", ".labels.jsonl.1.aside"]
    for name in names:
        (directory / name).write_bytes(b"x" * 1000)
    StoreWriter(store_dir, "north").close()
    assert not {path.name for path in store_dir.rglob("*")} & set(names)
    assert stored_seqs(store_dir) == [0]


def test_rows_of_an_append_that_failed_are_taken_back_from_readers(writer, store_dir, monkeypatch) -> None:
    writer.append([pair(0)])
    reader = StoreReader(store_dir)
    write, num_writes = os.pwritev, 0

    def fail(fd: int, chunks: list[bytes], offset: int) -> int:
        nonlocal num_writes
        num_writes += 1
        if num_writes == 1:  # the records
            return write(fd, chunks, offset)
        if num_writes == 2:  # the index: only a part gets through
            return write(fd, [chunks[0][:64]], offset)
        assert reader.refresh() == 2
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        with pytest.raises(StoreError, match="No space left"):
            writer.append([pair(1, seq=1), pair(2, seq=2)])
    writer.append([pair(3, seq=3), pair(4, seq=4)])
    assert reader.refresh() == 3
    assert [stored.id.seq for stored in reader] == [0, 3, 4]
    assert [float(stored.radar().heatmap.max()) for stored in reader] == [0, 3, 4]
    reader.close()


def test_offset_and_what_a_detector_saw_are_stored_with_the_pair(writer, store_dir) -> None:
    box = SeenObject("person", 0.75, (1.0, 2.0, 3.5, 4.0))
    seen = Seen("pedestrian", 0.7, (box,), ("dark",), "yolox")
    first = pair(0)
    writer.append([Pair(first.radar, first.camera, clock_offset_ns=-7, seen=seen), pair(1, seq=1)])
    reader = StoreReader(store_dir)
    reader.refresh()
    assert [(stored.clock_offset_ns, stored.seen()) for stored in reader] == [(-7, seen), (0, None)]
    reader.close()


def test_sync_error_is_taken_on_the_radar_clock() -> None:
    first = pair(0)
    assert Pair(first.radar, first.camera, clock_offset_ns=MS).sync_error_ns == 2 * MS


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
    left = stored_seqs(store_dir)
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


def test_old_segments_go_by_age(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=small_limits(max_age_s=3600))
    fill(writer, 20)
    for path in sorted((store_dir / "north").rglob("*.idx"))[:2]:
        os.utime(path, (1, 1))
    assert writer.evict() > 0
    assert stored_seqs(store_dir)[0] > 0
    writer.close()


def test_open_segment_goes_by_age_also_after_a_restart(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=small_limits(max_age_s=3600))
    for restarts in (False, True):
        writer.append([pair(0)])
        assert writer.evict() == 0
        newest = max((store_dir / "north").rglob("*.idx"))
        os.utime(newest, (1, 1))
        if restarts:
            writer.close()
            writer = StoreWriter(store_dir, "north", limits=small_limits(max_age_s=3600))
        assert writer.evict() == 1
        assert (len(writer), stored_seqs(store_dir)) == (0, [])
        assert list((store_dir / "north").rglob("*.seg")) == []
    writer.close()


def test_segment_of_a_slow_site_is_sealed_long_before_it_is_full(store_dir, monkeypatch) -> None:
    writer = StoreWriter(store_dir, "north", limits=small_limits(max_age_s=3600))
    writer.append([pair(0)])
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + 500)
    assert writer.append([pair(1, seq=1)]) == 1
    assert len(list((store_dir / "north").rglob("*.idx"))) == 2
    assert stored_seqs(store_dir) == [0, 1]
    writer.close()


def test_eviction_from_another_thread_does_not_disturb_appends(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=small_limits())
    with ThreadPoolExecutor(1) as pool:
        filling = pool.submit(fill, writer, 300)
        while not filling.done():
            writer.evict()
        filling.result()
    left = stored_seqs(store_dir)
    assert left == list(range(300 - len(left), 300))
    assert len(left) == len(writer)
    writer.close()


def test_segments_grow_with_the_store_so_that_readers_hold_few_files(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=small_limits(max_bytes=1_000_000, segment_bytes=100))
    fill(writer, 150)
    assert 10 < len(list((store_dir / "north").rglob("*.idx"))) < 30
    writer.close()


def test_reader_lets_its_process_open_as_many_files_as_the_system_allows(store_dir) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        StoreReader(store_dir).close()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_reader_that_may_open_no_more_files_says_so_and_goes_on_later(writer, store_dir, monkeypatch) -> None:
    writer.append([pair(0)])
    reader = StoreReader(store_dir)

    def refuse(*args: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(StoreError, match=r"Too many open files; .*ulimit -n"):
            reader.refresh()
    assert reader.refresh() == 1
    reader.close()


def test_bytes_of_a_site_count_labels_encodings_and_profile(writer, store_dir) -> None:
    writer.append([pair(0)])
    before = writer.num_bytes
    writer.append_labels([label(0, "car")])
    (store_dir / "north" / "encodings").mkdir()
    (store_dir / "north" / "encodings" / "e.bin").write_bytes(b"x" * 1000)
    (store_dir / "north" / "profile.npz").write_bytes(b"x" * 500)
    writer.evict()
    assert writer.num_bytes == before + 1500 + file_of(store_dir, "labels.jsonl").stat().st_size


def test_listing_that_misses_what_is_moving_is_asked_again(writer, store_dir, monkeypatch) -> None:
    writer.append([pair(0)])
    reader = StoreReader(store_dir)
    reader.refresh()
    iterdir, num_asked = Path.iterdir, 0

    def miss_once(path: Path) -> Iterator[Path]:
        nonlocal num_asked
        num_asked += 1
        return iter(()) if num_asked == 1 else iterdir(path)

    monkeypatch.setattr(Path, "iterdir", miss_once)
    assert reader.refresh() == 1
    assert num_asked == 2
    reader.close()


def test_names_of_segments_are_not_used_again_though_all_are_gone(store_dir) -> None:
    reader = StoreReader(store_dir)
    for seq in range(3):
        writer = StoreWriter(store_dir, "north", limits=small_limits(max_age_s=3600))
        writer.append([pair(seq, seq=seq)])
        reader.refresh()
        assert [stored.id.seq for stored in reader] == [seq]
        os.utime(file_of(store_dir, ".idx"), (1, 1))
        assert writer.evict() == 1
        writer.close()
    reader.close()


def test_full_disk_stops_writing_with_a_clear_error_and_resumes(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=small_limits(min_free_bytes=2**62))
    with pytest.raises(StoreError, match="bytes free, the floor is"):
        writer.append([pair(0)])
    writer.limits = small_limits()
    assert writer.append([pair(0)]) == 1
    writer.close()


@pytest.mark.parametrize("suffix", [".idx", ".seg"])
def test_unknown_format_version_is_refused_aloud(suffix, writer, store_dir) -> None:
    writer.append([pair(0)])
    path = file_of(store_dir, suffix)
    data = path.read_bytes()
    path.write_bytes(data[:7] + b"\x09" + data[8:])
    reader = StoreReader(store_dir)
    with pytest.raises(StoreError, match="another version"):
        reader.refresh()
    reader.close()


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
    with file_of(store_dir, "labels.jsonl").open("ab") as file:
        file.write(b'{"v":1,"capt')
    assert writer.append_labels([label(0, "cyclist")]) == 1
    reader = StoreReader(store_dir)
    reader.refresh()
    [(stored, said)] = reader.labelled()
    assert said.label == "cyclist"
    assert reader.label(stored) == said
    reader.close()
