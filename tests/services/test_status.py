"""What `up`'s line and `status`' tables say, from events that anybody may have written."""

import io
import time

import pytest
from rich.console import Console

from services.status import Status


def test_line_tells_rate_store_loss_against_chance_model_and_accuracy() -> None:
    status = Status()
    assert status.line(champion=None) == "0.0 pairs/s | 0 stored | trainer is starting | no model live yet"
    status.take_in(
        [
            {"kind": "ingest", "pairs_per_s": 9.84, "pairs": 1204},
            {"kind": "trainer", "pairs": 20, "needed": 128, "labels": 3, "step": 0, "accuracy": None},
        ]
    )
    assert "waiting for pairs: 20 of 128" in status.line(champion=None)
    status.take_in(
        [
            {
                "kind": "trainer",
                "step": 1240,
                "loss": 4.519,
                "chance": 6.234,
                "accuracy": 0.834,
                "version": 7,
                "tested": 63,
            }
        ]
    )
    assert status.line(champion=7) == (
        "9.8 pairs/s | 1,204 stored | step 1,240 | loss 4.52 (chance 6.23) | live model v7"
        " | accuracy 83 % (v7, 63 held-out labels)"
    )


@pytest.mark.parametrize(
    "event",
    [
        {"kind": "trainer"},
        {"kind": "trainer", "loss": 1.0},
        {"kind": "trainer", "loss": "low", "step": None, "chance": [], "accuracy": "good", "labels": {}},
        {"kind": "ingest", "pairs": "many", "pairs_per_s": None},
        {"kind": []},
        {},
        [],
        5,
        None,
    ],
)
def test_line_survives_an_event_that_is_not_as_it_should_be(event) -> None:
    status = Status()
    status.take_in([event])
    assert status.line(champion=1).startswith("0.0 pairs/s | 0 stored | ")


def replica(
    name: str, *, age_s: float = 0.0, site: str = "north", paired: int = 7, **of_site: object
) -> dict[str, object]:
    return {
        "kind": "ingest",
        "replica": name,
        "at_s": time.time() - age_s,
        "pairs_per_s": 2.0,
        "pairs": 10,
        "sites": {
            site: {
                "pairs": 10, "pairs_per_s": 2.0, "bytes": 2_500_000, "held": 3, "p50_ms": 120.4,
                "frames": {"radar.paired": paired, "camera.late": 1, "camera.no_partner": 30}, **of_site,
            }
        },
    }  # fmt: skip


def test_line_adds_up_the_replicas_that_still_speak() -> None:
    status = Status()
    status.take_in([replica("a"), replica("b", site="south"), replica("dead", age_s=60)])
    assert status.line(champion=None).startswith("4.0 pairs/s | 20 stored | ")


def test_line_calls_a_worker_silent_instead_of_repeating_what_it_said() -> None:
    status = Status()
    status.take_in([replica("a", age_s=60), {"kind": "trainer", "at_s": time.time() - 90, "loss": 1.0}])
    assert status.line(champion=None).startswith("ingest silent for 60 s | trainer silent for 90 s | ")


def test_site_counts_once_when_it_changed_hands_a_moment_ago() -> None:
    status = Status()
    status.take_in([replica("killed", age_s=4, token=5), replica("heir", token=6), replica("idle", site="south")])
    assert status.line(champion=None).startswith("4.0 pairs/s | 20 stored | ")
    assert printed(status).count("north") == 3  # a row in each table that has rows for it
    assert "killed" not in printed(status)
    told = {event["replica"]: event for event in status.ingest()}
    assert (told["killed"]["sites"], told["killed"]["pairs"]) == ({}, 0)
    assert told["heir"]["sites"].keys() == {"north"}


def test_hand_over_counts_whichever_replica_spoke_last() -> None:
    status = Status()
    status.take_in([replica("heir", age_s=1, token=6), replica("left", token=5)])
    assert "heir" in printed(status)
    assert status.line(champion=None).startswith("2.0 pairs/s | 10 stored | ")


def printed(status: Status, *, width: int = 160) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(status.tables())
    return text.getvalue()


def test_tables_tell_each_site_and_each_reason() -> None:
    status = Status()
    clocks = {
        "clock_offset_ms": -12.34, "clock_uncertainty_ms": 0.5, "clock_applied_ms": -12.0, "clock_drift_ppm": 3.14
    }  # fmt: skip
    curation = {"kept": 1200, "thinned_empty": 34, "near_duplicate": 0}
    status.take_in([replica("a", **clocks), replica("b", site="south", paired=1234, curation=curation)])
    lines = [" ".join(line.split()) for line in printed(status).splitlines()]
    assert "north a 10 2.0 2.5 3 120 -" in lines
    assert "north -12.3 ± 0.5 -12.0 +3.1" in lines
    assert "south radar paired 1,234" in lines
    assert "south camera no_partner 30 · late 1" in lines
    assert "south kept 1,200 · thinned_empty 34" in lines


def test_tables_fit_a_narrow_terminal_without_cutting_anything() -> None:
    status = Status()
    numbers = {"pairs": 12_345_678, "bytes": 8e9, "held": 1234, "p50_ms": 215.0, "p99_ms": 1376.0}
    frames = {f"radar.reason_{i}": 1_000_000 + i for i in range(12)}
    status.take_in([replica("0123456789ab", site="a-crossing-with-a-long-name", frames=frames, **numbers)])
    text = printed(status, width=80)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    assert all(number in text for number in ("12,345,678", "8,000.0", "1,234", "215", "1376", "1,000,011"))


@pytest.mark.parametrize(
    "sites",
    [None, [], {"north": 5}, {"north": {"frames": 7, "pairs": "many", "clock_offset_ms": None}}, {"[/]": {}}],
)
def test_tables_survive_an_event_that_is_not_as_it_should_be(sites) -> None:
    status = Status()
    status.take_in([{"kind": "ingest", "sites": sites}, replica("a", site="south")])
    assert "south" in printed(status)


def test_live_classification_is_told_in_a_line_and_survives_what_anybody_wrote() -> None:
    status = Status()
    assert status.live_lines() == []
    for live in ({"predictions": "many", "sites": 3, "skipped": {"stale": None}}, 5, None):
        status.take_in([{"kind": "api", "live": live}])
        assert status.live_lines() in ([], ["0 frames of 0 sites classified, 0 without an answer, 0 skipped"])
    status.take_in([{"kind": "api", "live": LIVE}])
    assert status.live_lines() == [
        "1,204 frames of 2 sites classified, 12 ms from capture (p99 40), 10 without an answer, 2 skipped"
    ]
    status.take_in([{"kind": "api", "live": LIVE, "at_s": time.time() - 60}])
    assert status.live_lines() == []


def test_live_classification_is_told_of_each_replica_that_still_speaks() -> None:
    status = Status()
    other = {"predictions": 7, "sites": {"west": 7}}
    for replica, live, age_s in (("b", other, 1), ("a", LIVE, 3), ("killed", LIVE, 60), ("off", None, 0)):
        status.take_in([{"kind": "api", "replica": replica, "live": live, "at_s": time.time() - age_s}])
    assert status.live() == {"a": LIVE, "b": other}
    first, second = status.live_lines()
    assert first.startswith("a: 1,204 frames of 2 sites classified")
    assert second == "b: 7 frames of 1 sites classified, 0 without an answer, 0 skipped"


LIVE = {
    "predictions": 1204,
    "sites": {"north": 1000, "south": 204},
    "abstained": {"unsure": 9, "unknown": 1},
    "skipped": {"stale": 2},
    "p50_ms": 12.3,
    "p99_ms": 40.1,
}
