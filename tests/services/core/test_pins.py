"""Which pairs outlive the rest: by class, a person first, the newest first, up to a quota; and fair shares."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.frames import FrameId, Seen
from services.core.pins import Candidate, Pins
from services.core.shares import fair_shares, site_sizes
from services.core.store import Pair, StoreLimits, StoreReader, StoreWriter
from tests.conftest import label, pair, stored_seqs


def candidate(seq: int, *, said: str = "", seen: str = "") -> Candidate:
    return Candidate(seq, FrameId(seq, seq), said, seen)


def chosen(candidates: list[Candidate], *, others: list[Candidate], room: int) -> list[int]:
    pins = Pins()
    for one in [*candidates, *others]:
        pins.add(said=one.said, seen=one.seen)
    return [one.row for one in pins.choose(candidates, room=room)]


def test_pair_of_no_known_class_is_not_kept() -> None:
    assert chosen([candidate(0), candidate(1, seen="car")], others=[], room=5) == [1]


def test_newest_of_a_class_are_kept() -> None:
    assert chosen([candidate(seq, seen="car") for seq in range(5)], others=[], room=2) == [3, 4]


def test_word_of_a_person_comes_before_that_of_a_detector() -> None:
    candidates = [candidate(0, said="car"), candidate(1, seen="car"), candidate(2, seen="car")]
    assert chosen(candidates, others=[], room=2) == [0, 2]
    assert chosen(candidates, others=[candidate(9, seen="car")] * 2, room=2) == [0]


def test_what_a_person_said_counts_and_not_what_a_detector_saw() -> None:
    assert chosen([candidate(0, said="car", seen="empty")], others=[candidate(9, seen="empty")], room=1) == [0]


def test_common_class_does_not_crowd_out_a_rare_one() -> None:
    common = [candidate(seq, seen="empty") for seq in range(10)]
    rare = [candidate(20 + seq, seen="cyclist") for seq in range(2)]
    others = [candidate(90 + seq, seen="empty") for seq in range(50)]
    assert chosen(common + rare, others=others, room=3) == [20, 21]


def small_limits(**changes) -> StoreLimits:
    return StoreLimits(**{"max_bytes": 40_000, "segment_bytes": 4_000, "min_free_bytes": 0} | changes)


def fill(writer: StoreWriter, num: int, *, start: int = 0, seen: dict[int, Seen] | None = None) -> None:
    for seq in range(start, start + num):
        one = pair(seq, seq=seq, shape=(16, 16))
        writer.append([Pair(one.radar, one.camera, seen=(seen or {}).get(seq))])


def test_labelled_pairs_outlive_the_rest_up_to_the_quota_of_their_class(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=small_limits(pinned_share=0.4))
    writer.append_labels([label(seq, "car", seq=seq) for seq in (1, 3)])
    fill(writer, 300)
    assert {1, 3} <= set(stored_seqs(store_dir))
    writer.append_labels([label(seq, "car", seq=seq) for seq in range(300, 600)])
    fill(writer, 300, start=300)
    left = stored_seqs(store_dir)
    assert not {1, 3} & set(left)  # newer cars took their place
    assert writer.num_bytes - writer.labels.num_bytes <= 40_000 + 10_000
    writer.close()


def test_pairs_of_a_rare_class_outlive_those_that_a_sure_detector_calls_common(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=small_limits())
    seen = {seq: Seen("empty", 0.9) for seq in range(400)}
    seen |= {2: Seen("cyclist", 0.9), 4: Seen("cyclist", 0.5), 5: Seen("cyclist", 0.49), 6: Seen("", 0.9)}
    fill(writer, 400, seen=seen)
    left = stored_seqs(store_dir)
    assert left[:2] == [2, 4]
    assert left[2:] == list(range(402 - len(left), 400))
    reader = StoreReader(store_dir)
    reader.refresh()
    assert reader.pairs[0].seen() == Seen("cyclist", 0.9)
    reader.close()
    writer.close()


def test_pins_are_the_same_after_a_restart(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=small_limits())
    fill(writer, 30, seen={2: Seen("cyclist", 0.9), 7: Seen("car", 0.9)})
    writer.append_labels([label(7, "empty", seq=7), label(9, "car", seq=9)])
    writer.close()
    writer = StoreWriter(store_dir, "north", limits=small_limits())
    assert writer._pins.num_seen == {"cyclist": 1}
    assert writer._pins.num_said == {"empty": 1, "car": 1}
    writer.append_labels([label(9, "cyclist", seq=9)])
    assert {k: v for k, v in writer._pins.num_said.items() if v} == {"empty": 1, "cyclist": 1}
    fill(writer, 300, start=30)
    assert stored_seqs(store_dir)[:3] == [2, 7, 9]
    assert sum(writer._pins.num_said.values()) == 2
    writer.close()


def test_eviction_ends_when_all_that_is_left_is_pinned_and_copies_nothing_then(store_dir) -> None:
    names = ("empty", "pedestrian", "cyclist", "car")
    writer = StoreWriter(store_dir, "north", limits=small_limits(pinned_share=1.0))
    writer.append_labels([label(seq, names[seq % 4], seq=seq) for seq in range(30)])
    fill(writer, 30)
    writer.limits = small_limits(pinned_share=1.0, min_free_bytes=2**62)
    before = {path.name for path in store_dir.rglob("*.seg")}
    assert writer.evict() == 0
    assert stored_seqs(store_dir) == list(range(30))
    assert {path.name for path in store_dir.rglob("*.seg")} == before
    writer.close()


def test_one_eviction_moves_about_one_segment_of_pinned_pairs_at_most(store_dir) -> None:
    writer = StoreWriter(store_dir, "north", limits=small_limits(max_bytes=400_000, pinned_share=0.9))
    writer.append_labels([label(seq, "car", seq=seq) for seq in range(0, 100, 2)])
    fill(writer, 100)
    num_segments = len(list(store_dir.rglob("*.seg")))
    assert num_segments > 10
    writer.limits = small_limits(max_bytes=400_000, pinned_share=0.9, min_free_bytes=2**62)
    assert 0 < writer.evict() < 12
    assert len(stored_seqs(store_dir)) == len(writer) > 85
    writer.close()


@pytest.mark.parametrize("num_moved", [1, 2])
def test_crash_after_pinned_pairs_have_moved_shows_them_once(store_dir, monkeypatch, num_moved) -> None:
    writer = StoreWriter(store_dir, "north", limits=small_limits())
    fill(writer, 10, seen={seq: Seen("car", 0.9) for seq in range(num_moved)})
    monkeypatch.setattr(StoreWriter, "_remove", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    writer.limits = small_limits(min_free_bytes=2**62)
    with pytest.raises(KeyboardInterrupt):
        writer.evict()
    monkeypatch.undo()
    writer.close()
    assert stored_seqs(store_dir) == list(range(10))
    heir = StoreWriter(store_dir, "north", limits=small_limits())
    assert len(heir) == 10
    heir.limits = small_limits(min_free_bytes=2**62)
    heir.evict()
    assert set(range(num_moved)) <= set(stored_seqs(store_dir))
    heir.close()


sizes_of_sites = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(0, 10**12), max_size=30)


@given(sizes_of_sites, st.integers(10**4, 10**12))
def test_shares_are_max_min_fair_and_never_more_than_all(sizes, max_bytes) -> None:
    shares = fair_shares(sizes, max_bytes=max_bytes)
    assert shares.keys() == sizes.keys()
    if not sizes:
        return
    equal = max_bytes // len(sizes)
    assert max_bytes - len(sizes) <= sum(shares.values()) <= max_bytes
    for site, share in shares.items():
        assert share >= min(sizes[site] + equal // 8, equal)  # it may grow up to an equal share
        if share < sizes[site]:  # who gives way has as much as anyone
            assert share >= max(shares.values()) - 1


def test_quiet_site_leaves_the_rest_to_others() -> None:
    shares = fair_shares({"quiet": 0, "busy": 900, "busier": 5000}, max_bytes=2400)
    assert shares == {"quiet": 100, "busy": 1000, "busier": 1300}


def test_sizes_are_those_of_every_site_on_disk(store_dir) -> None:
    for site, num in (("north", 1), ("south", 20)):
        writer = StoreWriter(store_dir, site, limits=small_limits())
        fill(writer, num)
        writer.close()
    (store_dir / "not a site").mkdir()
    sizes = site_sizes(store_dir)
    assert sizes.keys() == {"north", "south"}
    assert sizes["north"] == sum(p.stat().st_size for p in (store_dir / "north").rglob("*") if p.is_file())
    assert sizes["south"] > 4 * sizes["north"]
