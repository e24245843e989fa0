"""Pairing by capture time: closest first, one to one, decided as early as can be and not before."""

from collections import Counter
from collections.abc import Iterator
from itertools import combinations_with_replacement

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.frames import FrameId
from services.ingest.matcher import Decision, Matcher, Paired, Side, Unpaired


class Bench:
    """A matcher on plain milliseconds. A frame is (time, seq); its payload is the side's letter and the time."""

    def __init__(
        self, *, window: int = 20, grace: int = 10, idle_timeout_s: float = 2.0, max_bytes: int = 10**6
    ) -> None:
        self.now_s = 0.0
        self.matcher: Matcher[str] = Matcher(
            window_ns=window, grace_ns=grace, idle_timeout_s=idle_timeout_s, max_bytes=max_bytes, now_s=0.0
        )
        self.decisions: list[Decision[str]] = []

    def radar(self, *times: int, seq: int = 0) -> list[Decision[str]]:
        return self._add("radar", times, seq)

    def camera(self, *times: int, seq: int = 0) -> list[Decision[str]]:
        return self._add("camera", times, seq)

    def _add(self, side: Side, times: tuple[int, ...], seq: int) -> list[Decision[str]]:
        found = []
        for at in times:
            found += self.matcher.add(side, FrameId(at, seq), f"{side[0]}{at}", now_s=self.now_s, num_bytes=100)
        return self._keep(found + self.matcher.decide(now_s=self.now_s))

    def wait(self, seconds: float) -> list[Decision[str]]:
        self.now_s += seconds
        return self._keep(self.matcher.decide(now_s=self.now_s))

    def flush(self) -> list[Decision[str]]:
        return self._keep(self.matcher.flush())

    def _keep(self, decisions: list[Decision[str]]) -> list[Decision[str]]:
        self.decisions += decisions
        return decisions

    @property
    def pairs(self) -> set[tuple[str, str]]:
        return {(d.radar, d.camera) for d in self.decisions if isinstance(d, Paired)}

    @property
    def leftovers(self) -> dict[str, str]:
        return {d.payload: d.reason for d in self.decisions if isinstance(d, Unpaired)}


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_nearest_camera_frame_within_the_window_wins(bench) -> None:
    bench.radar(100)
    bench.camera(85, 104, 118)
    bench.flush()
    assert bench.pairs == {("r100", "c104")}
    assert bench.leftovers == {"c85": "partner_taken", "c118": "partner_taken"}


def test_window_is_inclusive_and_no_wider(bench) -> None:
    bench.radar(100, 200)
    bench.camera(120, 221)
    bench.flush()
    assert bench.pairs == {("r100", "c120")}
    assert bench.leftovers == {"r200": "no_partner", "c221": "no_partner"}


def test_each_frame_has_one_partner_and_the_closest_two_go_first(bench) -> None:
    bench.radar(100, 110)
    bench.camera(108, 125)
    bench.flush()
    assert bench.pairs == {("r110", "c108")}  # not r100 with c108, though r100 came first
    assert bench.leftovers == {"r100": "partner_taken", "c125": "partner_taken"}


def test_frame_behind_another_may_reach_past_it_for_the_second_of_two(bench) -> None:
    bench.camera(100, 104, 105)
    bench.radar(103, 104)
    bench.flush()
    assert bench.pairs == {("r104", "c104"), ("r103", "c105")}  # 2 apart, not 3


def test_frames_become_neighbours_when_all_pairs_between_them_are_taken_out(bench) -> None:
    bench.camera(37, 45, 51)
    bench.radar(42, 50, 56)
    bench.flush()
    assert bench.pairs == {("r50", "c51"), ("r42", "c45"), ("r56", "c37")}


def test_frame_whose_partner_has_gone_with_another_is_told_from_one_that_never_had_any(bench) -> None:
    bench.radar(100, 200)
    bench.camera(101, 115, 150)
    assert bench.pairs == {("r100", "c101")}
    bench.camera(118)
    bench.radar(300)
    assert bench.leftovers["c118"] == "partner_taken"
    assert bench.leftovers["c150"] == "no_partner"


def test_equally_close_frames_pair_earliest_first(bench) -> None:
    bench.radar(100, 120)
    bench.camera(110, 130)
    bench.flush()
    assert bench.pairs == {("r100", "c110"), ("r120", "c130")}


def test_pair_is_decided_as_soon_as_no_closer_frame_can_come_and_not_before(bench) -> None:
    bench.radar(100)
    assert bench.camera(103) == []
    assert bench.camera(113) == []  # cameras: nothing up to 103 is to come; a radar frame at 105 still may
    assert bench.radar(114) == []
    assert bench.radar(115) == [Paired("r100", "c103")]  # radar: one at 106 is as near, but not earlier


def test_pair_waits_for_the_camera_too(bench) -> None:
    bench.radar(100, 200)
    assert bench.camera(104) == []
    assert Paired("r100", "c104") not in bench.camera(113)  # one at 104 may come, with a lower number
    assert Paired("r100", "c104") in bench.camera(114)


def test_frame_whose_only_partner_is_sure_to_go_to_another_leaves_before_that_is_settled(bench) -> None:
    bench.radar(100, 200)
    assert bench.camera(104, 113) == [Unpaired("camera", "c113", "partner_taken")]  # r100 may yet get a closer one
    assert Paired("r100", "c104") in bench.camera(114)


def test_perfect_match_needs_only_the_grace() -> None:
    bench = Bench(grace=0)
    assert bench.radar(100) == []
    assert bench.camera(100) == [Paired("r100", "c100")]


def test_leftover_is_decided_as_soon_as_no_partner_can_come_and_not_before(bench) -> None:
    bench.radar(100)
    assert bench.camera(129) == []  # a camera frame at 120 is still possible
    assert bench.camera(130) == [Unpaired("radar", "r100", "no_partner")]


def test_out_of_order_within_the_grace_gives_the_same_as_in_order() -> None:
    results = []
    for radars, cameras in (((100, 108, 133), (101, 110, 131)), ((108, 100, 133), (110, 101, 131))):
        bench = Bench()
        bench.radar(*radars)
        bench.camera(*cameras)
        bench.flush()
        results.append((bench.pairs, bench.leftovers))
    assert results[0] == results[1]
    assert results[0][0] == {("r100", "c101"), ("r108", "c110"), ("r133", "c131")}


def test_dead_camera_holds_radar_back_no_longer_than_the_timeout_at_start_up_too() -> None:
    bench = Bench(idle_timeout_s=2.0)
    bench.now_s = 1.9
    assert bench.radar(100, 400) == []
    assert bench.wait(0.1) == [
        Unpaired("radar", "r100", "no_partner"),
        Unpaired("radar", "r400", "no_partner"),
    ]
    assert bench.radar(500) == [Unpaired("radar", "r500", "no_partner")]  # and no longer waits at all


def test_last_pair_of_a_stream_that_ended_is_decided_after_the_timeout(bench) -> None:
    bench.radar(100)
    bench.camera(103)
    assert bench.wait(1.9) == []
    assert bench.wait(0.2) == [Paired("r100", "c103")]


def test_camera_that_comes_back_is_waited_for_again(bench) -> None:
    bench.wait(3.0)
    bench.camera(90)
    assert bench.radar(100) == []
    bench.camera(101, 111)
    bench.radar(112)
    assert ("r100", "c101") in bench.pairs


def test_site_slower_than_the_timeout_still_pairs(bench) -> None:
    for at in (0, 5000, 10000):  # both sensors are silent for 5 s at a time, then one comes first
        bench.wait(5.0)
        assert bench.radar(at) == []
        bench.camera(at + 3)
    bench.flush()
    assert bench.pairs == {("r0", "c3"), ("r5000", "c5003"), ("r10000", "c10003")}


def test_excused_silence_does_not_time_out(bench) -> None:
    bench.camera(100)
    bench.now_s = 3.0
    bench.matcher.excuse("camera", now_s=3.0)
    assert bench.radar(101, 300) == []
    assert Paired("r101", "c100") in bench.camera(112)


def test_late_frame_is_told_from_one_without_partner(bench) -> None:
    bench.radar(300)
    bench.camera(300)
    bench.camera(250)
    bench.flush()
    assert bench.leftovers == {"c250": "late"}


def test_late_frame_still_pairs_if_its_partner_waits() -> None:
    bench = Bench(idle_timeout_s=60.0)
    bench.radar(100)
    bench.camera(115)  # 100 is later than the grace allows by now
    bench.camera(102)
    bench.flush()
    assert ("r100", "c102") in bench.pairs


def test_duplicate_leaves_at_once_and_the_first_stays(bench) -> None:
    bench.radar(100)
    assert bench.radar(100) == [Unpaired("radar", "r100", "duplicate")]
    bench.camera(101)
    bench.flush()
    assert bench.pairs == {("r100", "c101")}
    assert bench.radar(100) == [Unpaired("radar", "r100", "duplicate")]


def test_frames_of_one_instant_are_told_apart_by_their_sequence(bench) -> None:
    bench.radar(100, seq=1)
    bench.radar(100, seq=2)
    bench.camera(100, seq=7)
    bench.camera(101, seq=8)
    bench.flush()
    assert [d for d in bench.decisions if isinstance(d, Unpaired)] == []
    assert len(bench.decisions) == 2


FAR = 3_600 * 10**9


def test_one_frame_from_the_future_leaves_as_a_stray_and_pairing_goes_on(bench) -> None:
    bench.radar(100, 200 + FAR)
    bench.camera(103)
    for at in range(300, 1000, 100):
        bench.radar(at)
        bench.camera(at + 3)
    bench.flush()
    assert bench.pairs == {(f"r{at}", f"c{at + 3}") for at in (100, *range(300, 1000, 100))}
    assert bench.leftovers == {f"r{200 + FAR}": "stray"}


def test_first_frame_from_the_future_costs_no_more_than_the_two_after_it(bench) -> None:
    bench.radar(FAR)
    for at in range(100, 1000, 100):
        bench.camera(at + 3)
        bench.radar(at)
    bench.flush()
    assert bench.pairs >= {(f"r{at}", f"c{at + 3}") for at in range(300, 1000, 100)}
    assert bench.leftovers[f"r{FAR}"] == "evicted"


@pytest.mark.parametrize("jump", [FAR, -FAR])
def test_clock_that_jumped_is_followed_from_its_second_frame_on(bench, jump) -> None:
    for at in (*range(0, 1000, 100), *range(jump, jump + 1000, 100)):
        bench.radar(at)
        bench.camera(at + 3)
    decided_early = len(bench.pairs)
    bench.flush()
    assert bench.pairs >= {(f"r{at}", f"c{at + 3}") for at in range(0, 900, 100)}
    assert bench.pairs >= {(f"r{at}", f"c{at + 3}") for at in range(jump + 200, jump + 1000, 100)}
    assert decided_early >= 16


def test_strays_one_after_the_other_do_not_pile_up(bench) -> None:
    for number in range(50):
        bench.radar(number * 100, FAR + number * 1000)
        bench.camera(number * 100 + 3)
    assert bench.matcher.num_waiting("radar") <= 4
    bench.flush()
    assert len(bench.pairs) == 50


MS = 10**6
SECOND = 10**9


class Site:
    """Both sensors at 10 fps for real: each frame is decided about as it comes. Camera frames are 3 ms younger."""

    def __init__(self) -> None:
        self.bench = Bench(window=50 * MS, grace=100 * MS, max_bytes=10**7)
        self.shift: dict[Side, int] = {"radar": 0, "camera": 0}
        self.num = 0

    def run(self, num: int) -> list[Decision[str]]:
        decisions = []
        for _ in range(num):
            self.num += 1
            self.bench.now_s += 0.1
            at = FAR + self.num * 100 * MS
            decisions += self.bench.radar(at + self.shift["radar"], seq=self.num)
            decisions += self.bench.camera(at + self.shift["camera"] + 3 * MS, seq=self.num)
        return decisions


def num_pairs(decisions: list[Decision[str]]) -> int:
    return sum(isinstance(decision, Paired) for decision in decisions)


@pytest.mark.parametrize("leap", [-40 * SECOND, -2050 * MS, -FAR // 2, FAR, 30 * SECOND, -550 * MS])
def test_clocks_that_leap_together_pair_again_within_a_second_at_the_cost_of_a_handful(leap) -> None:
    site = Site()
    site.run(30)
    site.shift = {"radar": leap, "camera": leap}
    site.run(10)
    assert num_pairs(site.run(5)) == 5
    site.run(20)
    site.bench.flush()
    assert num_pairs(site.bench.decisions) >= 65 - 6


@pytest.mark.parametrize("leap", [-40 * SECOND, -FAR // 2, FAR])
def test_leap_of_a_clock_is_told_once_for_each_sensor_and_with_its_size(leap) -> None:
    site = Site()
    site.run(30)
    assert site.bench.matcher.take_leaps() == []
    site.shift = {"radar": leap, "camera": leap}
    site.run(30)
    told = site.bench.matcher.take_leaps()
    assert [side for side, _ in told] == ["radar", "camera"]
    assert all(abs(size_ns - leap) <= SECOND for _, size_ns in told)
    assert site.bench.matcher.take_leaps() == []


def test_step_ahead_of_less_than_a_minute_is_taken_as_it_comes() -> None:
    site = Site()
    site.run(30)
    site.shift = {"radar": 50 * SECOND, "camera": 50 * SECOND}
    site.run(30)
    site.bench.flush()
    assert len(site.bench.pairs) == 60
    assert site.bench.matcher.take_leaps() == []


def test_frames_from_before_a_clock_was_set_back_leave_at_once_and_paired_if_they_can_be() -> None:
    bench = Bench(window=50 * MS, grace=100 * MS)
    bench.radar(FAR, FAR + 200 * MS)
    bench.camera(FAR + 3 * MS)
    assert bench.pairs == set()
    back = [FAR - 5 * SECOND + number * 100 * MS for number in range(5)]
    assert bench.radar(*back[:4]) == [Unpaired("radar", f"r{at}", "late") for at in back[:4]]
    decided = bench.radar(back[4])
    assert decided[:2] == [
        Paired(f"r{FAR}", f"c{FAR + 3 * MS}"),
        Unpaired("radar", f"r{FAR + 200 * MS}", "evicted"),
    ]


def test_late_burst_mixed_with_live_frames_is_not_a_clock_set_back() -> None:
    site = Site()
    site.run(30)
    newest = FAR + 30 * 100 * MS
    for number in range(12):  # four old ones between two live ones, in order
        site.bench.radar(newest - 20 * SECOND + number * 100 * MS)
        if number % 4 == 3:
            site.run(1)
    assert site.bench.matcher.take_leaps() == []
    site.run(10)
    site.bench.flush()
    assert len(site.bench.pairs) == 43
    assert Counter(site.bench.leftovers.values()) == {"late": 12}


def test_late_frames_out_of_order_or_twice_are_not_a_clock_set_back(bench) -> None:
    bench = Bench(window=50 * MS, grace=100 * MS)
    bench.radar(FAR)
    bench.radar(*(FAR - number * SECOND for number in range(2, 12)))
    bench.radar(*([FAR - 2 * SECOND] * 10))
    assert bench.matcher.take_leaps() == []


def test_two_frames_from_different_far_times_confirm_nothing(bench) -> None:
    bench.radar(100, FAR, 7 * FAR, 3 * FAR, 120)
    bench.camera(101, 131)
    bench.radar(130)
    bench.flush()
    assert bench.matcher.take_leaps() == []
    assert bench.pairs >= {("r100", "c101"), ("r130", "c131")}
    assert {bench.leftovers[f"r{at}"] for at in (FAR, 3 * FAR, 7 * FAR)} == {"stray"}


def test_sensor_that_restarts_its_sequence_goes_on_pairing(bench) -> None:
    for number, at in enumerate(range(100, 1000, 100)):
        bench.radar(at, seq=number % 3)
        bench.camera(at + 3, seq=number)
    bench.flush()
    assert len(bench.pairs) == 9
    assert bench.leftovers == {}


def test_clock_that_stands_still_holds_the_other_sensor_back_no_longer_than_a_silent_one(bench) -> None:
    bench.camera(100)
    for number in range(1, 25):
        bench.now_s += 0.1
        bench.camera(100, seq=number)
        bench.radar(200 + number)
    assert bench.leftovers["r201"] == "no_partner"
    assert bench.matcher.num_waiting("radar") <= 1


def test_too_many_bytes_evict_the_oldest_and_pair_first_what_can_be_paired() -> None:
    bench = Bench(idle_timeout_s=60.0, max_bytes=10 * 612)
    bench.camera(103)
    bench.radar(100, 200, 300, 400)
    bench.radar(1000, 1100, 1200, 1300, 1400)
    assert bench.decisions == []
    assert bench.matcher.num_bytes == 10 * 612
    assert bench.radar(1500) == [Paired("r100", "c103"), Unpaired("radar", "r200", "evicted")]
    assert bench.matcher.num_bytes == 8 * 612
    bench.radar(*range(2000, 5000, 100))
    assert bench.matcher.num_bytes <= 10 * 612
    assert bench.matcher.counts["radar", "evicted"] >= 25


def test_what_is_decided_frees_bytes_before_anything_is_evicted() -> None:
    bench = Bench(max_bytes=4 * 612)
    bench.camera(1, 180)
    decisions = bench.radar(100, 200, 300)  # c1 and r100 have nothing to hope for once the fifth frame is in
    assert decisions[:2] == [Unpaired("radar", "r100", "no_partner"), Unpaired("camera", "c1", "no_partner")]
    for at in range(400, 10_000, 100):
        bench.radar(at)
        bench.camera(at + 3)
    assert bench.matcher.counts["radar", "evicted"] == bench.matcher.counts["camera", "evicted"] == 0


def test_frame_larger_than_the_bound_leaves_alone(bench) -> None:
    assert bench.matcher.add("radar", FrameId(100, 0), "big", now_s=0.0, num_bytes=10**6) == [
        Unpaired("radar", "big", "evicted")
    ]
    assert bench.matcher.num_bytes == 0


def test_camera_times_are_compared_less_the_clock_offset(bench) -> None:
    bench.matcher.set_clock_offset(1000)
    bench.radar(100, 200)
    bench.camera(1103, 1204, 1250)
    bench.flush()
    assert bench.pairs == {("r100", "c1103"), ("r200", "c1204")}


def test_new_clock_offset_holds_for_frames_that_wait_and_duplicates_are_known_all_the_same(bench) -> None:
    bench.radar(100, 120)
    bench.camera(103, 108)
    bench.matcher.set_clock_offset(-15)
    assert bench.camera(103) == [Unpaired("camera", "c103", "duplicate")]
    bench.camera(150)
    bench.flush()
    assert bench.pairs == {("r120", "c103")}  # 118; and 123 is as near to nothing that is free
    assert bench.leftovers == {
        "c103": "duplicate",
        "c108": "partner_taken",
        "r100": "partner_taken",
        "c150": "no_partner",
    }


@pytest.mark.parametrize("offset", [120 * MS, -120 * MS, 3 * SECOND, -3 * SECOND])
def test_clock_offset_that_is_found_later_costs_no_more_than_what_waits(offset) -> None:
    site = Site()
    site.shift["camera"] = offset
    site.run(30)
    site.bench.matcher.set_clock_offset(offset)
    site.run(5)
    assert num_pairs(site.run(20)) == 20
    assert site.bench.matcher.take_leaps() == []


Ids = list[FrameId]
Pairs = set[tuple[FrameId, FrameId]]
Frames = list[tuple[Side, FrameId]]


def all_matchings(radars: Ids, cameras: Ids, window: int) -> Iterator[Pairs]:
    """Every way to pair frames one to one within the window, each once; also those that leave pairs out."""
    if not radars:
        yield set()
        return
    first, rest = radars[0], radars[1:]
    yield from all_matchings(rest, cameras, window)
    for camera in cameras:
        if abs(first[0] - camera[0]) <= window:
            for pairs in all_matchings(rest, [other for other in cameras if other != camera], window):
                yield pairs | {(first, camera)}


def rank(pairs: Pairs, num: int) -> list[tuple[float, ...]]:
    """What is smallest for the best matching: its sorted distances, infinity for each pair that it lacks."""
    found = sorted((float(abs(radar[0] - camera[0])), *radar, *camera) for radar, camera in pairs)
    return found + [(float("inf"),)] * (num - len(found))


def closest_first(frames: Frames, window: int) -> Pairs:
    """The rule, literally, over the complete set."""
    radars = [i for side, i in frames if side == "radar"]
    cameras = [i for side, i in frames if side == "camera"]
    near = sorted((abs(r[0] - c[0]), r, c) for r in radars for c in cameras if abs(r[0] - c[0]) <= window)
    pairs: Pairs = set()
    taken: set[tuple[Side, FrameId]] = set()
    for _, radar, camera in near:
        if ("radar", radar) not in taken and ("camera", camera) not in taken:
            pairs.add((radar, camera))
            taken |= {("radar", radar), ("camera", camera)}
    return pairs


def times(max_size: int, last: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, last), max_size=max_size)


@st.composite
def arrivals(draw, side: Side, *, grace: int, max_size: int, last: int) -> Frames:
    """Frames of one sensor in an order in which none comes later than the grace allows."""
    ids = [FrameId(at, seq) for seq, at in enumerate(draw(times(max_size, last)))]
    delays = [draw(st.integers(0, max(grace - 1, 0))) for _ in ids]
    order = sorted(range(len(ids)), key=lambda i: (ids[i].captured_at_ns + delays[i], draw(st.integers(0, 3))))
    return [(side, ids[i]) for i in order]


@st.composite
def streams(draw, *, max_size: int, last: int, max_window: int, max_grace: int = 15) -> tuple[int, int, Frames]:
    """Window, grace, and both sensors' frames, interleaved anyhow: one may be far ahead of the other."""
    window, grace = draw(st.integers(0, max_window)), draw(st.integers(1, max_grace))
    sides: tuple[Side, Side] = ("radar", "camera")
    queues = [draw(arrivals(side, grace=grace, max_size=max_size, last=last)) for side in sides]
    merged: Frames = []
    while queues[0] or queues[1]:
        first = draw(st.booleans()) if queues[0] and queues[1] else bool(queues[0])
        merged.append(queues[0 if first else 1].pop(0))
    return window, grace, merged


def decide_all(window: int, grace: int, frames: Frames, chunk: int) -> list[Decision[tuple[Side, FrameId]]]:
    matcher: Matcher[tuple[Side, FrameId]] = Matcher(
        window_ns=window, grace_ns=grace, idle_timeout_s=1.0, max_bytes=10**6, now_s=0.0
    )
    decisions: list[Decision[tuple[Side, FrameId]]] = []
    for number, (side, frame_id) in enumerate(frames):
        decisions += matcher.add(side, frame_id, (side, frame_id), now_s=0.0, num_bytes=0)
        if number % chunk == 0:
            decisions += matcher.decide(now_s=0.0)
    return decisions + matcher.flush()


@settings(max_examples=300, deadline=None)
@given(streams(max_size=12, last=60, max_window=12), st.integers(1, 8))
def test_any_arrival_order_within_the_grace_in_any_chunks_pairs_closest_first(case, chunk) -> None:
    window, grace, frames = case
    decisions = decide_all(window, grace, frames, chunk)
    pairs = {(d.radar[1], d.camera[1]) for d in decisions if isinstance(d, Paired)}
    assert pairs == closest_first(frames, window)
    assert not any(isinstance(d, Unpaired) and d.reason in ("late", "duplicate", "evicted") for d in decisions)


@settings(max_examples=150, deadline=None)
@given(streams(max_size=5, last=14, max_window=12))
def test_pairs_are_the_best_of_all_matchings(case) -> None:
    window, grace, frames = case
    pairs = {(d.radar[1], d.camera[1]) for d in decide_all(window, grace, frames, 1) if isinstance(d, Paired)}
    radars = [i for side, i in frames if side == "radar"]
    cameras = [i for side, i in frames if side == "camera"]
    num = min(len(radars), len(cameras))
    assert rank(pairs, num) == min(rank(one, num) for one in all_matchings(radars, cameras, window))


def futures(frames: Frames, *, grace: int, last: int) -> Iterator[Frames]:
    """What may still come: up to three more frames of one sensor and one of the other, as the grace allows.

    Only the times matter, and of equal times that a new frame may come before one that is there: sequence -1 does.
    """
    open_times: dict[Side, range] = {"radar": range(0), "camera": range(0)}
    for side in open_times:
        newest = max((i.captured_at_ns for of, i in frames if of == side), default=None)
        first = -last if newest is None else newest - grace + 1
        open_times[side] = range(first, last)
    for one, other in (("radar", "camera"), ("camera", "radar")):
        for num in range(4):
            for ats in combinations_with_replacement(open_times[one], num):
                for more in [(), *((at,) for at in open_times[other])]:
                    new = [(one, FrameId(at, k - 10)) for k, at in enumerate(ats)]
                    yield [*frames, *new, *((other, FrameId(at, -1)) for at in more)]


def settled(frames: Frames, window: int, grace: int, last: int) -> set[tuple[Side, FrameId]]:
    """The frames whose partner, or lack of one, is the same whatever comes."""
    fates: dict[tuple[Side, FrameId], FrameId | None] = {}
    unsure: set[tuple[Side, FrameId]] = set()
    for future in futures(frames, grace=grace, last=last):
        pairs = closest_first(future, window)
        partners: dict[tuple[Side, FrameId], FrameId] = {("radar", radar): camera for radar, camera in pairs}
        partners |= {("camera", camera): radar for radar, camera in pairs}
        for frame in frames:
            fate = partners.get(frame)
            if fates.setdefault(frame, fate) != fate:
                unsure.add(frame)
    return set(frames) - unsure


@settings(max_examples=40, deadline=None)
@given(streams(max_size=3, last=6, max_window=4, max_grace=3))
def test_each_decision_falls_as_soon_as_no_frame_to_come_can_change_it_and_not_before(case) -> None:
    window, grace, frames = case
    matcher: Matcher[tuple[Side, FrameId]] = Matcher(
        window_ns=window, grace_ns=grace, idle_timeout_s=1.0, max_bytes=10**6, now_s=0.0
    )
    decided: set[tuple[Side, FrameId]] = set()
    for number, (side, frame_id) in enumerate(frames, start=1):
        matcher.add(side, frame_id, (side, frame_id), now_s=0.0, num_bytes=0)
        for decision in matcher.decide(now_s=0.0):
            if isinstance(decision, Paired):
                decided |= {decision.radar, decision.camera}
            else:
                decided.add(decision.payload)
        assert decided == settled(frames[:number], window, grace, last=7 + window)


Step = tuple[str, Side, int, int]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["frame"] * 12 + ["wait", "decide", "excuse", "offset", "burst"]),
            st.sampled_from(["radar", "camera"]),
            st.integers(-40, 40) | st.sampled_from([-FAR, FAR, 2 * FAR, -5 * SECOND, 5 * SECOND]),
            st.integers(0, 2),
        ),
        max_size=60,
    )
)
def test_every_frame_in_comes_out_once_and_the_counts_add_up(steps: list[Step]) -> None:
    """With leaps, clocks set back, bursts, silence, duplicates, strays, clock offsets and too many bytes mixed."""
    matcher: Matcher[int] = Matcher(window_ns=5, grace_ns=3, idle_timeout_s=1.0, max_bytes=10 * 600, now_s=0.0)
    now_s, num = 0.0, 0
    sides: list[Side] = []
    out: list[int] = []

    def note(decisions: list[Decision[int]]) -> None:
        for decision in decisions:
            out.extend([decision.radar, decision.camera] if isinstance(decision, Paired) else [decision.payload])

    for kind, side, at, seq in steps:
        if kind in ("frame", "burst"):
            for number in range(1 if kind == "frame" else 6):
                sides.append(side)
                note(matcher.add(side, FrameId(at + number * 2, seq), num, now_s=now_s, num_bytes=seq * 100))
                num += 1
        elif kind == "offset":
            matcher.set_clock_offset(at)
        elif kind == "excuse":
            matcher.excuse(side, now_s=now_s)
        if kind != "burst":
            now_s += 0.7 * seq if kind == "wait" else 0.1
            note(matcher.decide(now_s=now_s))
        assert matcher.num_bytes <= 10 * 600
        assert len(out) + matcher.num_waiting("radar") + matcher.num_waiting("camera") == num
    note(matcher.flush())
    assert sorted(out) == list(range(num))
    assert matcher.num_waiting("radar") == matcher.num_waiting("camera") == matcher.num_bytes == 0
    for side in ("radar", "camera"):
        assert sum(num for (of, _), num in matcher.counts.items() if of == side) == sides.count(side)
    assert matcher.counts["radar", "paired"] == matcher.counts["camera", "paired"]
