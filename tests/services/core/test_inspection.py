"""What a person sees of the store and can do to it."""

from pathlib import Path

import pytest

from services.core.errors import StoreError
from services.core.fence import data_dir
from services.core.inspection import describe, repair, verify
from services.core.store import StoreLimits, StoreReader, StoreWriter
from tests.conftest import MS, label, pair

LIMITS = StoreLimits(min_free_bytes=0, segment_bytes=500, max_bytes=50_000)


@pytest.fixture
def directory(store_dir: Path) -> Path:
    """Where the files of a site of nine pairs in three segments are."""
    writer = StoreWriter(store_dir, "north", limits=LIMITS, owner="ingest-1")
    for seq in range(0, 9, 3):
        writer.append([pair(at, seq=at) for at in range(seq, seq + 3)])
    writer.append_labels([label(4, "car", seq=4)])
    writer.close()
    StoreWriter(store_dir, "north", limits=LIMITS, owner="ingest-2").close()
    return data_dir(store_dir / "north")


def spoil(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def seqs(store_dir: Path) -> list[int]:
    reader = StoreReader(store_dir)
    reader.refresh()
    found = [one.id.seq for one in reader if one.radar() is not None and one.camera() is not None]
    reader.close()
    return found


def test_site_is_described_by_what_it_holds(store_dir, directory) -> None:
    StoreWriter(store_dir, "south", limits=LIMITS).close()
    north, south = describe(store_dir)
    assert (north.site, north.num_segments, north.num_pairs, north.num_labels) == ("north", 3, 9, 1)
    assert (north.oldest_at_ns, north.newest_at_ns) == (0, 8 * MS)
    assert (north.versions, north.token, north.owner, north.num_images_dropped) == ((2,), 2, "ingest-2", 0)
    assert north.num_bytes > 9 * 100
    assert (south.num_pairs, south.oldest_at_ns, south.versions) == (0, None, ())


def test_sound_site_has_no_findings_and_nothing_to_repair(store_dir, directory) -> None:
    steps = []
    assert list(verify(store_dir, "north", progress=lambda *step: steps.append(step))) == []
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert repair(store_dir, "north") == []
    assert seqs(store_dir) == list(range(9))


def test_everything_that_is_wrong_is_found_and_repaired_without_losing_a_whole_pair(store_dir, directory) -> None:
    spoil(directory / "00000001-1.seg", 64 + 64 + 5)  # meta of pair 0
    size = (directory / "00000002-1.seg").stat().st_size
    spoil(directory / "00000002-1.seg", size - 90)  # image of pair 5
    spoil(directory / "00000002-1.seg", 64)  # row of pair 3; its copy is whole
    (directory / "00000003-1.idx").unlink()
    (directory / "00000009.idx").write_bytes(b"x")
    with (directory / "labels.jsonl").open("ab") as file:
        file.write(b'{"v":\n')
    found = [(finding.file, finding.row) for finding in verify(store_dir, "north")]
    assert found == [
        ("00000001-1.seg", 0),
        ("00000002-1.seg", 0),
        ("00000002-1.seg", 2),
        ("00000003-1.idx", None),
        ("00000009.seg", None),
        ("labels.jsonl", 2),
    ]
    done = repair(store_dir, "north")
    assert sorted(done) == [
        "00000001-1: 1 damaged pairs made void",
        "00000002-1: 1 damaged pairs made void",
        "00000003-1: 3 pairs found again",
        "00000009.idx: removed",
    ]
    assert seqs(store_dir) == [1, 2, 3, 4, 6, 7, 8]
    assert [finding.file for finding in verify(store_dir, "north")] == ["labels.jsonl"]
    assert repair(store_dir, "north") == []


def test_damaged_index_and_seal_are_found_and_made_again(store_dir, directory) -> None:
    spoil(directory / "00000001-1.idx", 64 + 64 + 20)
    spoil(directory / "00000002-1.end", 12)
    assert {finding.file for finding in verify(store_dir, "north")} == {"00000001-1.seg", "00000002-1.end"}
    repair(store_dir, "north")
    assert list(verify(store_dir, "north")) == []
    assert seqs(store_dir) == list(range(9))


@pytest.mark.parametrize("act", [repair, lambda *at: list(verify(*at))])
def test_site_that_is_not_there_is_named(store_dir, act) -> None:
    with pytest.raises(StoreError, match="has no site nowhere"):
        act(store_dir, "nowhere")
