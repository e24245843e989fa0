"""A disk that refuses, at every place where the store writes: a StoreError, nothing lost, and it goes on later."""

import errno
import os
from pathlib import Path

import pytest

from services.core.errors import StoreError
from services.core.store import StoreLimits, StoreReader, StoreWriter
from tests.conftest import label, pair


class Disk:
    """Lets the calls of one function of `os` fail while it is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.is_full = False
        real = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            if self.is_full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def seqs(store_dir: Path) -> list[int]:
    reader = StoreReader(store_dir)
    reader.refresh()
    found = [stored.id.seq for stored in reader]
    reader.close()
    return found


@pytest.mark.parametrize("call", ["pwritev", "fdatasync"])
def test_refused_append_leaves_no_trace_and_works_later(store_dir, monkeypatch, call) -> None:
    writer = StoreWriter(store_dir, "north", limits=StoreLimits(min_free_bytes=0))
    writer.append([pair(0)])
    num_bytes = writer.num_bytes
    disk = Disk(monkeypatch, call)
    disk.is_full = True
    with pytest.raises(StoreError, match=r"cannot write to .*No space left"):
        writer.append([pair(1, seq=1), pair(2, seq=2)])
    assert (writer.num_bytes, len(writer)) == (num_bytes, 1)
    assert seqs(store_dir) == [0]
    disk.is_full = False
    assert writer.append([pair(1, seq=1), pair(2, seq=2)]) == 2
    assert seqs(store_dir) == [0, 1, 2]
    writer.close()


def test_new_segment_that_cannot_be_made_is_made_later(store_dir, monkeypatch) -> None:
    limits = StoreLimits(max_bytes=100_000, segment_bytes=500, min_free_bytes=0)
    writer = StoreWriter(store_dir, "north", limits=limits)
    writer.append([pair(0), pair(1, seq=1), pair(2, seq=2)])
    disk = Disk(monkeypatch, "open")
    disk.is_full = True
    for _ in range(2):
        with pytest.raises(StoreError, match="cannot write to"):
            writer.append([pair(3, seq=3)])
    disk.is_full = False
    assert writer.append([pair(3, seq=3)]) == 1
    assert seqs(store_dir) == [0, 1, 2, 3]
    writer.close()


@pytest.mark.parametrize("call", ["open", "mkdir", "write"])
def test_site_that_cannot_be_opened_is_a_store_error_holds_nothing_and_opens_later(
    store_dir, monkeypatch, call
) -> None:
    before = num_descriptors()
    disk = Disk(monkeypatch, call)
    disk.is_full = True
    for _ in range(3):
        with pytest.raises(StoreError, match=r"cannot write to .*No space left"):
            StoreWriter(store_dir, "north")
    disk.is_full = False
    assert num_descriptors() == before
    StoreWriter(store_dir, "north").close()


@pytest.mark.parametrize("call", ["fsync", "link", "write", "open"])
def test_segment_that_refused_a_write_is_sealed_later_and_never_written_again(
    store_dir, monkeypatch, call
) -> None:
    writer = StoreWriter(store_dir, "north", limits=StoreLimits(min_free_bytes=0))
    writer.append([pair(0)])
    broken = next(store_dir.rglob("*.seg"))
    disk, seal = Disk(monkeypatch, "fdatasync"), Disk(monkeypatch, call)
    disk.is_full = seal.is_full = True
    for _ in range(3):
        with pytest.raises(StoreError, match="No space left"):
            writer.append([pair(1, seq=1)])
    disk.is_full = seal.is_full = False
    assert writer.append([pair(2, seq=2)]) == 1
    after = broken.read_bytes()
    assert writer.append([pair(3, seq=3)]) == 1
    assert broken.read_bytes() == after
    assert broken.with_suffix(".end").exists()
    assert seqs(store_dir) == [0, 2, 3]
    writer.close()
    StoreWriter(store_dir, "north", limits=StoreLimits(min_free_bytes=0)).close()
    assert seqs(store_dir) == [0, 2, 3]


@pytest.mark.parametrize("call", ["unlink", "stat"])
def test_refused_eviction_is_a_store_error_and_works_later(store_dir, monkeypatch, call) -> None:
    limits = StoreLimits(max_bytes=100_000, segment_bytes=1000, min_free_bytes=0)
    writer = StoreWriter(store_dir, "north", limits=limits)
    for seq in range(6):
        writer.append([pair(seq, seq=seq)])
    writer.limits = StoreLimits(max_bytes=1, segment_bytes=1000, min_free_bytes=0)
    disk = Disk(monkeypatch, call)
    disk.is_full = True
    for _ in range(2):
        with pytest.raises(StoreError, match=r"cannot write to .*No space left"):
            writer.evict()
    disk.is_full = False
    assert seqs(store_dir) == [0, 1, 2, 3, 4, 5]
    assert writer.evict() > 0
    assert len(seqs(store_dir)) == len(writer) < 6
    assert len(list(store_dir.rglob("*.seg"))) == len(list(store_dir.rglob("*.idx"))) == 1
    writer.close()


def test_pinned_pairs_that_cannot_be_moved_are_moved_later(store_dir, monkeypatch) -> None:
    limits = StoreLimits(max_bytes=100_000, segment_bytes=1000, min_free_bytes=0)
    writer = StoreWriter(store_dir, "north", limits=limits)
    for seq in range(6):
        writer.append([pair(seq, seq=seq)])
    writer.append_labels([label(0, "car")])
    oldest = min(store_dir.rglob("*.idx"))
    os.utime(oldest, (1, 1))
    disk = Disk(monkeypatch, "pwritev")
    disk.is_full = True
    with pytest.raises(StoreError, match="cannot write to"):
        writer.evict()
    disk.is_full = False
    assert seqs(store_dir) == [0, 1, 2, 3, 4, 5]
    assert writer.evict() > 0
    assert not oldest.exists()
    assert 0 in seqs(store_dir)
    writer.close()


def test_segment_that_cannot_be_made_leaks_no_descriptor(store_dir, monkeypatch) -> None:
    limits = StoreLimits(max_bytes=10_000, segment_bytes=100, min_free_bytes=0)
    writer = StoreWriter(store_dir, "north", limits=limits)
    writer.append([pair(seq, seq=seq) for seq in range(6)])
    before = num_descriptors()
    disk = Disk(monkeypatch, "fsync")
    disk.is_full = True
    for _ in range(3):
        with pytest.raises(StoreError, match="cannot write to"):
            writer.append([pair(9, seq=9)])
    assert num_descriptors() == before
    disk.is_full = False
    assert writer.append([pair(9, seq=9)]) == 1
    writer.close()


def test_label_file_that_cannot_be_read_is_a_store_error(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=StoreLimits(min_free_bytes=0))
    (store_dir / "north" / f"writer-{writer.token}" / "labels.jsonl").mkdir()
    with pytest.raises(StoreError, match=r"cannot write to .*labels\.jsonl"):
        writer.append_labels([label(0, "car")])
    writer.close()


def test_refused_label_is_a_store_error_and_works_later(store_dir, monkeypatch) -> None:
    writer = StoreWriter(store_dir, "north", limits=StoreLimits(min_free_bytes=0))
    disk = Disk(monkeypatch, "fdatasync")
    disk.is_full = True
    with pytest.raises(StoreError, match=r"cannot write to .*labels\.jsonl"):
        writer.append_labels([label(0, "car")])
    disk.is_full = False
    writer.append_labels([label(0, "car")])
    assert [said.label for said in writer.labels.labels.values()] == ["car"]
    writer.close()
