"""The format on disk: what a crash leaves at any byte, damage, and segments of the version before."""

import fcntl
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.errors import StoreError
from services.core.records import end_of
from services.core.sealing import Seal, write_seal
from services.core.segments import SegmentReader
from services.core.store import StoreLimits, StoreReader, StoreWriter
from tests.conftest import JPEG, MS, label, pair
from tests.services.core.version_1 import write_version_1

LIMITS = StoreLimits(min_free_bytes=0)


def filled(store_dir: Path, num: int) -> Path:
    """A store of `num` pairs, each appended alone, whose writer died; return where its files are."""
    writer = StoreWriter(store_dir, "north", limits=LIMITS)
    for seq in range(num):
        writer.append([pair(seq, seq=seq)])
    writer.close()
    return store_dir / "north" / "writer-1"


def stored(store_dir: Path) -> list[int]:
    """Numbers of all pairs that a reader lists; each must be whole and its own."""
    reader = StoreReader(store_dir)
    reader.refresh()
    for one in reader:
        radar, camera = one.radar(), one.camera()
        assert radar is not None
        assert camera is not None
        assert (radar.heatmap == one.id.seq).all()
        assert camera.image == JPEG
    found = [one.id.seq for one in reader]
    reader.close()
    return found


def ends(directory: Path) -> list[int]:
    """Where the record of each pair ends."""
    reader = SegmentReader(directory, "00000001-1")
    reader.refresh()
    found = [end_of(row) for row in reader.rows]
    reader.close()
    return found


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store_dir = tmp_path_factory.mktemp("crashed") / "store"
    filled(store_dir, 3)
    return store_dir


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_data_cut_or_zeroed_at_any_byte_costs_exactly_the_pairs_behind_it(tmp_path_factory, crashed, data) -> None:
    store_dir = tmp_path_factory.mktemp("cut") / "store"
    shutil.copytree(crashed, store_dir)
    path = store_dir / "north" / "writer-1" / "00000001-1.seg"
    whole, record_ends = path.read_bytes(), ends(path.parent)
    near = [at + near for at in record_ends for near in (-1, 0, 1)]
    cut = data.draw(st.one_of(st.integers(0, len(whole)), st.sampled_from(near)))
    is_zeroed, has_index = data.draw(st.booleans()), data.draw(st.booleans())
    path.write_bytes(whole[:cut] + bytes(len(whole) - cut) if is_zeroed else whole[:cut])
    if not has_index:
        path.with_suffix(".idx").unlink()
    survivors = sum(end <= cut for end in record_ends)
    for _ in range(2):  # also after a second restart
        writer = StoreWriter(store_dir, "north", limits=LIMITS)
        assert len(writer) == survivors
        writer.close()
    writer = StoreWriter(store_dir, "north", limits=LIMITS)
    assert writer.append([pair(seq, seq=seq) for seq in range(3)]) == 3 - survivors
    writer.close()
    assert stored(store_dir) == [0, 1, 2]


@settings(max_examples=80, deadline=None)
@given(cut=st.integers(0, 64 + 3 * 64), is_zeroed=st.booleans())
def test_index_cut_or_zeroed_at_any_byte_costs_nothing(tmp_path_factory, crashed, cut, is_zeroed) -> None:
    store_dir = tmp_path_factory.mktemp("index") / "store"
    shutil.copytree(crashed, store_dir)
    path = store_dir / "north" / "writer-1" / "00000001-1.idx"
    whole = path.read_bytes()
    path.write_bytes(whole[:cut] + bytes(len(whole) - cut) if is_zeroed else whole[:cut])
    StoreWriter(store_dir, "north", limits=LIMITS).close()
    assert stored(store_dir) == [0, 1, 2]


@pytest.mark.parametrize("is_sealed", [False, True])
@pytest.mark.parametrize("missing", [".idx", ".seg"])
def test_pair_is_there_as_long_as_the_data_file_is(store_dir, missing, is_sealed) -> None:
    directory = filled(store_dir, 2)
    if is_sealed:
        StoreWriter(store_dir, "north", limits=LIMITS).close()
        directory = store_dir / "north" / "writer-2"
    (directory / f"00000001-1{missing}").unlink()
    StoreWriter(store_dir, "north", limits=LIMITS).close()
    assert stored(store_dir) == ([0, 1] if missing == ".idx" else [])
    assert len(list(store_dir.rglob("0*"))) == (3 if missing == ".idx" else 0)


@pytest.mark.parametrize("part", ["row", "row and its copy", "meta", "radar", "image"])
@pytest.mark.parametrize("index", [0, 1])
def test_damage_before_the_tail_costs_that_pair_alone(store_dir, part, index) -> None:
    directory = filled(store_dir, 3)
    reader = SegmentReader(directory, "00000001-1")
    reader.refresh()
    row = reader.rows[index]
    reader.close()
    meta = int(row["offset"])
    radar, image = meta + int(row["meta_bytes"]), meta + int(row["meta_bytes"]) + int(row["radar_bytes"])
    at = {"meta": meta, "radar": radar, "image": image}.get(part, meta - 64)
    spoil(directory / "00000001-1.seg", at)
    if part == "row and its copy":
        spoil(directory / "00000001-1.idx", 64 + 64 * index)
    survivors = [0, 1, 2] if part == "row" else [seq for seq in range(3) if seq != index]
    for _ in range(2):  # also after a second restart
        writer = StoreWriter(store_dir, "north", limits=LIMITS)
        assert len(writer) == len(survivors)
        writer.close()
    assert stored(store_dir) == survivors


def spoil(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + 24] = b"\xfe" * 24
    path.write_bytes(data)


def test_void_row_is_passed_over_by_readers_that_had_the_segment_open(store_dir) -> None:
    directory = filled(store_dir, 3)
    reader = StoreReader(store_dir)
    assert reader.refresh() == 3
    spoil(directory / "00000001-1.seg", ends(directory)[1] - 10)
    StoreWriter(store_dir, "north", limits=LIMITS).close()
    reader.refresh()
    assert [one.id.seq for one in reader if one.camera() is not None] == [0, 2]
    reader.close()


def test_first_seal_of_a_segment_holds(store_dir) -> None:
    directory = filled(store_dir, 3)
    assert write_seal(directory, "00000001-1", Seal(2, 500)) == Seal(2, 500)
    assert write_seal(directory, "00000001-1", Seal(3, 900)) == Seal(2, 500)
    StoreWriter(store_dir, "north", limits=LIMITS).close()
    assert stored(store_dir) == [0, 1]


@pytest.mark.parametrize("at", [0, 9, 30])
def test_damaged_seal_is_made_again_from_the_data(store_dir, at) -> None:
    filled(store_dir, 3)
    StoreWriter(store_dir, "north", limits=LIMITS).close()
    directory = store_dir / "north" / "writer-2"
    data = bytearray((directory / "00000001-1.end").read_bytes())
    data[at] ^= 1
    (directory / "00000001-1.end").write_bytes(data)
    StoreWriter(store_dir, "north", limits=LIMITS).close()
    assert stored(store_dir) == [0, 1, 2]


def version_1_pairs() -> list:
    return [pair(seq, seq=seq) for seq in range(3)]


def test_store_of_version_1_is_read_before_and_after_it_moves(store_dir) -> None:
    write_version_1(store_dir / "north", version_1_pairs())
    (store_dir / "north" / "labels.jsonl").write_bytes(
        b'{"v":1,"captured_at_ns":0,"seq":0,"label":"car","source":"annotator"}\n'
    )
    reader = StoreReader(store_dir)
    assert reader.refresh() == 3
    assert stored(store_dir) == [0, 1, 2]
    assert [(one.id.seq, said.label) for one, said in reader.labelled()] == [(0, "car")]
    writer = StoreWriter(store_dir, "north", limits=LIMITS)
    assert writer.append([pair(1, seq=1), pair(3, seq=3)]) == 1
    assert reader.refresh() == 4
    assert {segment.version for segment in reader.segments("north")} == {1, 2}
    assert stored(store_dir) == [0, 1, 2, 3]
    assert [(one.id.seq, said.label) for one, said in reader.labelled()] == [(0, "car")]
    assert [one.clock_offset_ns for one in reader] == [0] * 4
    reader.close()
    writer.close()


@pytest.mark.parametrize(("file", "survivors"), [("seg", [0, 1]), ("idx", [0, 1])])
def test_torn_tail_of_version_1_is_cut_off_as_it_was(store_dir, file, survivors) -> None:
    write_version_1(store_dir / "north", version_1_pairs())
    path = store_dir / "north" / f"00000001.{file}"
    path.write_bytes(path.read_bytes()[:-9])
    StoreWriter(store_dir, "north", limits=LIMITS).close()
    assert stored(store_dir) == survivors


def test_pinned_pair_of_version_1_moves_into_version_2(store_dir) -> None:
    write_version_1(store_dir / "north", version_1_pairs())
    writer = StoreWriter(store_dir, "north", limits=LIMITS)
    writer.append_labels([label(1, "car", seq=1)])
    writer.limits = StoreLimits(min_free_bytes=2**62, segment_bytes=10**6)
    assert writer.evict() == 2
    assert stored(store_dir) == [1]
    writer.close()


def test_writer_of_version_1_that_still_runs_is_refused(store_dir) -> None:
    write_version_1(store_dir / "north", version_1_pairs())
    with (store_dir / "north" / "writer.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="older version writes site north"):
            StoreWriter(store_dir, "north")
    StoreWriter(store_dir, "north", limits=LIMITS).close()
    assert stored(store_dir) == [0, 1, 2]


def test_heatmaps_of_each_dtype_come_back_bit_for_bit(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=LIMITS)
    rng = np.random.default_rng(0)
    heatmaps = [rng.integers(0, 200, (4, 3)).astype(dtype) for dtype in ("float16", "float32", "uint8")]
    for seq, heatmap in enumerate(heatmaps):
        one = pair(seq, seq=seq, shape=(4, 3))
        object.__setattr__(one.radar, "heatmap", heatmap[::-1])  # not contiguous
        writer.append([one])
    writer.close()
    reader = StoreReader(store_dir)
    reader.refresh()
    for heatmap, one in zip(heatmaps, reader, strict=True):
        radar = one.radar()
        assert radar is not None
        assert radar.heatmap.dtype == heatmap.dtype
        np.testing.assert_array_equal(radar.heatmap, heatmap[::-1])
    assert reader.find("north", pair(2, seq=2).id).id.captured_at_ns == 2 * MS
    reader.close()
