"""Pairing by capture time: closest first, one to one, decided as early as can be and not before."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.frames import FrameId
from services.ingest.matcher import Decision, Matcher, Paired, Side, Unpaired


class Bench:
    """A matcher on plain milliseconds. A frame is (time, seq); its payload is the side's letter and the time."""

    def __init__(
        self, *, window: int = 20, grace: int = 10, idle_timeout_s: float = 2.0, now_s: float = 0.0
    ) -> None:
        self.now_s = now_s
        self.matcher: Matcher[str] = Matcher(
            window_ns=window, grace_ns=grace, idle_timeout_s=idle_timeout_s, now_s=now_s
        )
        self.decisions: list[Decision[str]] = []

    def radar(self, *times: int, seq: int = 0) -> list[Decision[str]]:
        return self._add("radar", times, seq)

    def camera(self, *times: int, seq: int = 0) -> list[Decision[str]]:
        return self._add("camera", times, seq)

    def _add(self, side: Side, times: tuple[int, ...], seq: int) -> list[Decision[str]]:
        found = []
        for at in times:
            found += self.matcher.add(side, FrameId(at, seq), f"{side[0]}{at}", now_s=self.now_s)
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


def test_equally_close_frames_pair_earliest_first(bench) -> None:
    bench.radar(100, 120)
    bench.camera(110, 130)
    bench.flush()
    assert bench.pairs == {("r100", "c110"), ("r120", "c130")}


def test_pair_is_decided_as_soon_as_no_closer_frame_can_come_and_not_before(bench) -> None:
    bench.radar(100)
    assert bench.camera(103) == []
    assert bench.camera(113) == []  # cameras: nothing up to 103 is to come; a radar frame at 105 still may
    assert bench.radar(115) == []
    assert bench.radar(116) == [Paired("r100", "c103")]  # radar: nothing up to 106 is to come


def test_pair_waits_for_the_camera_too(bench) -> None:
    bench.radar(100, 200)
    assert bench.camera(104, 113) == []  # a camera frame at 103 is still possible, and closer
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
    assert bench.leftovers[f"r{FAR}"] == "stray"


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


Times = st.lists(st.integers(0, 80), max_size=12)


@st.composite
def arrivals(draw, side: Side, grace: int) -> list[tuple[Side, FrameId]]:
    """Frames of one sensor in an order in which none comes later than the grace allows."""
    ids = [FrameId(at, seq) for seq, at in enumerate(draw(Times))]
    delays = [draw(st.integers(0, grace - 1)) for _ in ids]
    order = sorted(range(len(ids)), key=lambda i: (ids[i].captured_at_ns + delays[i], draw(st.integers(0, 3))))
    return [(side, ids[i]) for i in order]


@st.composite
def streams(draw) -> tuple[int, int, list[tuple[Side, FrameId]]]:
    """Window, grace, and both sensors' frames, interleaved anyhow: one may be far ahead of the other."""
    window, grace = draw(st.integers(0, 12)), draw(st.integers(1, 15))
    queues = [draw(arrivals("radar", grace)), draw(arrivals("camera", grace))]
    merged = []
    while queues[0] or queues[1]:
        first = draw(st.booleans()) if queues[0] and queues[1] else bool(queues[0])
        merged.append(queues[0 if first else 1].pop(0))
    return window, grace, merged


def closest_first(frames: list[tuple[Side, FrameId]], window: int) -> set[tuple[FrameId, FrameId]]:
    """The rule, literally, over the complete set."""
    radars = [i for side, i in frames if side == "radar"]
    cameras = [i for side, i in frames if side == "camera"]
    candidates = sorted((abs(r[0] - c[0]), r, c) for r in radars for c in cameras if abs(r[0] - c[0]) <= window)
    pairs: set[tuple[FrameId, FrameId]] = set()
    taken: set[tuple[Side, FrameId]] = set()
    for _, radar, camera in candidates:
        if ("radar", radar) not in taken and ("camera", camera) not in taken:
            pairs.add((radar, camera))
            taken |= {("radar", radar), ("camera", camera)}
    return pairs


@settings(max_examples=400, deadline=None)
@given(streams())
def test_any_arrival_order_within_the_grace_pairs_closest_first(case) -> None:
    window, grace, frames = case
    matcher: Matcher[tuple[Side, FrameId]] = Matcher(
        window_ns=window, grace_ns=grace, idle_timeout_s=1.0, now_s=0.0
    )
    decisions: list[Decision[tuple[Side, FrameId]]] = []
    for side, frame_id in frames:
        decisions += matcher.add(side, frame_id, (side, frame_id), now_s=0.0)
        decisions += matcher.decide(now_s=0.0)
    decisions += matcher.flush()
    pairs = {(d.radar[1], d.camera[1]) for d in decisions if isinstance(d, Paired)}
    assert pairs == closest_first(frames, window)
    assert not any(isinstance(d, Unpaired) and d.reason in ("late", "duplicate") for d in decisions)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["radar", "camera"]),
            st.integers(0, 40) | st.sampled_from([-FAR, FAR, 2 * FAR]),
            st.integers(0, 2),
        ),
        max_size=40,
    ),
    st.lists(st.floats(0, 3), max_size=40),
)
def test_every_frame_in_comes_out_once_and_the_counts_add_up(frames, pauses) -> None:
    matcher: Matcher[tuple[Side, int]] = Matcher(window_ns=5, grace_ns=3, idle_timeout_s=1.0, now_s=0.0)
    now_s = 0.0
    out: list[tuple[Side, int]] = []

    def note(decisions: list[Decision[tuple[Side, int]]]) -> None:
        for decision in decisions:
            out.extend([decision.radar, decision.camera] if isinstance(decision, Paired) else [decision.payload])

    for number, (side, at, seq) in enumerate(frames):
        now_s += pauses[number] if number < len(pauses) else 0.0
        note(matcher.add(side, FrameId(at, seq), (side, number), now_s=now_s))
        note(matcher.decide(now_s=now_s))
    note(matcher.flush())
    assert sorted(out) == sorted((side, number) for number, (side, _, _) in enumerate(frames))
    assert matcher.num_waiting("radar") == matcher.num_waiting("camera") == 0
    sides = Counter(side for side, _, _ in frames)
    for side in ("radar", "camera"):
        assert sum(num for (of, _), num in matcher.counts.items() if of == side) == sides[side]
    assert matcher.counts["radar", "paired"] == matcher.counts["camera", "paired"]
