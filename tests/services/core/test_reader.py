"""A reader that tracks changes says once what came, moved and went."""

import shutil
from pathlib import Path

from services.core.frames import CameraFrame
from services.core.store import Pair, StoreLimits, StoreReader, StoreWriter
from tests.conftest import label, radar_frame

LIMITS = StoreLimits(min_free_bytes=0, max_bytes=10**6, segment_bytes=10_000)


def pair(seq: int) -> Pair:
    return Pair(
        radar_frame(seq, seq=seq), CameraFrame("north", seq, seq, image=b"\xff\xd8" * 500, shape=(8, 8, 3))
    )


def changes(reader: StoreReader) -> dict[int, bool]:
    """By number, whether the pair is there."""
    reader.refresh()
    return {at.seq: found is not None for at, found in reader.changes().get("north", {}).items()}


def test_what_came_and_went_is_said_once_and_adds_up_to_what_is_there(store_dir: Path) -> None:
    writer = StoreWriter(store_dir, "north", limits=LIMITS)
    reader = StoreReader(store_dir, tracks_changes=True)
    there: set[int] = set()
    for start in range(0, 60, 10):
        writer.append([pair(seq) for seq in range(start, start + 10)])
        if start == 20:
            writer.append_labels([label(seq, "car", seq=seq) for seq in (3, 4)])
        if start == 40:
            writer.limits = StoreLimits(min_free_bytes=0, max_bytes=30_000, segment_bytes=10_000)
            assert writer.evict() > 0
        for seq, is_there in changes(reader).items():
            (there.add if is_there else there.discard)(seq)
        assert there == {found.id.seq for found in reader}
    assert len(there) < 60
    assert changes(reader) == {}
    writer.close()
    shutil.rmtree(store_dir / "north")
    assert changes(reader) == dict.fromkeys(sorted(there), False)
    assert changes(reader) == {}


def test_reader_that_nobody_asks_remembers_nothing(store_dir: Path) -> None:
    writer = StoreWriter(store_dir, "north", limits=LIMITS)
    writer.append([pair(seq) for seq in range(10)])
    reader = StoreReader(store_dir)
    reader.refresh()
    assert reader.changes() == {}
    assert len(reader) == 10
    writer.close()


def test_pairs_that_came_and_went_between_two_looks_leave_no_ghosts(store_dir: Path) -> None:
    writer = StoreWriter(store_dir, "north", limits=LIMITS)
    writer.append([pair(0)])
    reader = StoreReader(store_dir, tracks_changes=True)
    assert changes(reader) == {0: True}
    for seq in range(1, 40):
        writer.append([pair(seq)])
    writer.limits = StoreLimits(min_free_bytes=0, max_bytes=30_000, segment_bytes=10_000)
    assert writer.evict() > 1
    assert changes(reader)[0] is False
    assert len(reader) == len(writer)
    assert all(found.radar() is not None for found in reader)
    writer.close()
