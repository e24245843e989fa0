"""Images that the trainer has encoded leave the disk for good; their pairs stay."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from services.core import disks
from services.core.encodings import checksum, header_of, row_dtype
from services.core.errors import StoreError
from services.core.frames import CameraFrame, FrameId
from services.core.inspection import describe, verify
from services.core.store import Pair, StoreLimits, StoreReader, StoreWriter
from tests.conftest import label, radar_frame
from tests.services.core.version_1 import write_version_1

LIMITS = StoreLimits(min_free_bytes=0, max_bytes=10**7, segment_bytes=100_000)
SECRET = b"faces and number plates" * 1000


def pair(seq: int) -> Pair:
    image = b"\xff\xd8" + SECRET + bytes([seq]) + b"\xff\xd9"
    return Pair(radar_frame(seq, seq=seq), CameraFrame("north", seq, seq, image=image, shape=(8, 8, 3)))


def encode(store_dir: Path, seqs: list[int], *, encoder: str = "e") -> None:
    """What the trainer appends to its file."""
    path = store_dir / "north" / "encodings" / f"{encoder}.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.zeros(len(seqs), row_dtype(4))
    for row, seq in zip(rows, seqs, strict=True):
        row["captured_at_ns"], row["seq"] = pair(seq).id
        row["sum"] = checksum(row)
    with path.open("ab") as file:
        file.write((b"" if path.stat().st_size else header_of(4)) + rows.tobytes())


def filled(store_dir: Path, num: int) -> StoreWriter:
    writer = StoreWriter(store_dir, "north", limits=LIMITS)
    for seq in range(num):
        writer.append([pair(seq)])
    return writer


def images(store_dir: Path) -> dict[int, bool]:
    """Whether the image of each pair is there. All radars must be."""
    reader = StoreReader(store_dir)
    reader.refresh()
    found = {}
    for stored in reader:
        assert stored.radar() is not None
        camera = stored.camera()
        assert (camera is not None) == stored.has_image
        found[stored.id.seq] = stored.has_image
    reader.close()
    return found


def num_secrets(store_dir: Path) -> int:
    return sum(path.read_bytes().count(SECRET) for path in store_dir.rglob("*") if path.is_file())


def test_encoded_images_are_gone_from_disk_and_their_pairs_stay(store_dir) -> None:
    writer = filled(store_dir, 10)
    reader = StoreReader(store_dir)
    reader.refresh()
    held = reader.pairs[0]
    before, on_disk = writer.num_bytes, disks.tree_bytes(store_dir)
    assert writer.drop_encoded_images() == 0
    encode(store_dir, [0, 1, 9])
    assert writer.drop_encoded_images() == 3
    assert writer.drop_encoded_images() == 0
    assert images(store_dir) == {seq: seq not in (0, 1, 9) for seq in range(10)}
    assert num_secrets(store_dir) == 7
    assert (held.camera(), held.has_image) == (None, False)
    writer.evict()
    assert before - writer.num_bytes > 2 * len(SECRET)
    assert on_disk - disks.tree_bytes(store_dir) > 2 * len(SECRET)
    assert list(verify(store_dir, "north")) == []
    assert describe(store_dir)[0].num_images_dropped == 3
    reader.close()
    writer.close()


@pytest.mark.parametrize("call", ["erase", "fdatasync"])
def test_crash_before_the_bytes_are_gone_is_made_good_by_the_next_call(store_dir, monkeypatch, call) -> None:
    writer = filled(store_dir, 3)
    encode(store_dir, [0, 1, 2])
    with monkeypatch.context() as patch:
        if call == "erase":
            patch.setattr("services.core.segments.erase", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        else:
            patch.setattr(os, "fdatasync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            writer.drop_encoded_images()
    writer.close()
    heir = StoreWriter(store_dir, "north", limits=LIMITS)
    heir.drop_encoded_images()
    assert num_secrets(store_dir) == 0
    assert images(store_dir) == dict.fromkeys(range(3), False)
    heir.close()


def test_images_go_only_once_it_is_on_disk_that_they_are_encoded_and_marked(store_dir, monkeypatch) -> None:
    writer = filled(store_dir, 2)
    encode(store_dir, [0, 1])
    steps: list[str] = []
    sync = os.fdatasync

    def note(fd: int) -> None:
        steps.append(Path(f"/proc/self/fd/{fd}").resolve().suffix)
        sync(fd)

    monkeypatch.setattr(os, "fdatasync", note)
    monkeypatch.setattr("services.core.segments.erase", lambda *_: steps.append("erase"))
    writer.drop_encoded_images()
    assert steps == [".bin", ".seg", "erase", "erase", ".seg"]
    writer.close()


def test_encodings_that_are_written_anew_while_they_are_read_drop_nothing_that_they_lack(
    store_dir, monkeypatch
) -> None:
    writer = filled(store_dir, 2)
    encode(store_dir, [0])
    encode(store_dir, [1], encoder="aside")
    path = store_dir / "north" / "encodings" / "aside.bin"
    aside = path.rename(store_dir / "aside")
    sync = os.fdatasync

    def replace(fd: int) -> None:
        if aside.exists():
            aside.rename(path.with_name("e.bin"))
        sync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", replace)
        assert writer.drop_encoded_images() == 0
    assert writer.drop_encoded_images() == 1
    assert images(store_dir) == {0: True, 1: False}
    writer.close()


def test_disk_that_refuses_is_a_store_error_and_the_images_go_later(store_dir, monkeypatch) -> None:
    writer = filled(store_dir, 3)
    encode(store_dir, [0, 1])

    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("services.core.segments.erase", refuse)
        with pytest.raises(StoreError, match="Input/output error"):
            writer.drop_encoded_images()
    writer.drop_encoded_images()
    assert num_secrets(store_dir) == 1
    writer.close()


def test_dropped_image_stays_dropped_when_the_segment_is_recovered_merged_or_its_index_made_again(
    store_dir,
) -> None:
    for seq in range(8):
        writer = StoreWriter(store_dir, "north", limits=LIMITS)
        writer.append([pair(seq)])
        writer.close()
    writer = StoreWriter(store_dir, "north", limits=LIMITS)
    encode(store_dir, [0, 7])
    assert writer.drop_encoded_images() == 2
    writer.close()
    writer = StoreWriter(store_dir, "north", limits=StoreLimits(min_free_bytes=0))  # makes one segment of all
    writer.close()
    [index] = store_dir.rglob("*.idx")
    index.unlink()
    StoreWriter(store_dir, "north", limits=LIMITS).close()
    assert images(store_dir) == {seq: seq not in (0, 7) for seq in range(8)}
    assert num_secrets(store_dir) == 6


def test_pinned_pair_moves_without_its_image_also_if_that_goes_at_that_moment(store_dir) -> None:
    writer = filled(store_dir, 12)
    writer.append_labels([label(seq, "car", seq=seq) for seq in (0, 1)])
    encode(store_dir, [0])
    writer.drop_encoded_images()
    writer.limits = StoreLimits(min_free_bytes=2**62, max_bytes=10**7, segment_bytes=100_000)
    assert writer.evict() > 0
    found = images(store_dir)
    assert (found[0], found[1]) == (False, True)
    assert list(verify(store_dir, "north")) == []
    writer.close()


def test_images_of_version_1_are_dropped_as_well(store_dir) -> None:
    write_version_1(store_dir / "north", [pair(seq) for seq in range(3)])
    writer = StoreWriter(store_dir, "north", limits=LIMITS)
    age = writer._age_s("00000001")
    encode(store_dir, [1])
    assert writer.drop_encoded_images() == 1
    assert images(store_dir) == {0: True, 1: False, 2: True}
    assert num_secrets(store_dir) == 2
    assert abs(writer._age_s("00000001") - age) < 60
    assert list(verify(store_dir, "north")) == []
    writer.close()


def test_zeros_are_written_where_the_file_system_knows_no_holes(store_dir, monkeypatch) -> None:
    monkeypatch.setattr(disks, "_fallocate", None)
    writer = filled(store_dir, 3)
    encode(store_dir, [0, 1, 2])
    assert writer.drop_encoded_images() == 3
    assert num_secrets(store_dir) == 0
    writer.close()


def test_torn_row_and_file_without_header_drop_nothing(store_dir) -> None:
    writer = filled(store_dir, 3)
    encode(store_dir, [0, 1])
    path = store_dir / "north" / "encodings" / "e.bin"
    path.write_bytes(path.read_bytes()[:-1])
    (path.parent / "old.bin").write_bytes(b"\x00" * 1000)
    assert writer.drop_encoded_images() == 1
    assert images(store_dir) == {0: False, 1: True, 2: True}
    writer.close()


def test_file_of_encodings_that_is_written_anew_is_read_from_its_start(store_dir) -> None:
    writer = filled(store_dir, 3)
    encode(store_dir, [0])
    writer.drop_encoded_images()
    path = store_dir / "north" / "encodings" / "e.bin"
    encode(store_dir, [1], encoder="aside")
    shutil.move(path.with_name("aside.bin"), path)
    assert writer.drop_encoded_images() == 1
    assert images(store_dir) == {0: False, 1: False, 2: True}
    writer.close()


def test_encodings_of_an_unknown_version_are_refused_aloud(store_dir) -> None:
    writer = filled(store_dir, 1)
    encode(store_dir, [0])
    path = store_dir / "north" / "encodings" / "e.bin"
    data = path.read_bytes()
    path.write_bytes(data[:7] + b"\x09" + data[8:])
    with pytest.raises(StoreError, match=r"version 9, expected 3; upgrade"):
        writer.drop_encoded_images()
    assert FrameId(0, 0) in writer
    writer.close()
