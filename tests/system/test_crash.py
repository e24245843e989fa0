"""Ingest and the server are killed amid the traffic, again and again; then every frame is accounted for.

Kills come at random moments, by a seed that a failure names. benchmarks/crash.py does the same hundreds of times.
"""

from pathlib import Path

import pytest

from services.core.frames import FrameId
from services.core.segments import Pair
from services.core.store import StoreWriter
from tests.system.chaos import Outcome, Rig
from tests.system.traffic import CAMERA_AFTER_NS, INSTANT_NS, Sent, account, camera_frame, radar_frame

pytestmark = pytest.mark.system


def check(outcome: Outcome, *, min_pairs: int) -> None:
    assert not outcome.faults(), f"seed {outcome.seed}: {outcome.faults()}"
    assert outcome.account.num_pairs >= min_pairs, "too little was sent for the test to mean anything"
    assert outcome.account.num_alone > 0
    assert outcome.num_reads > min_pairs


def test_killed_worker_loses_no_frame_and_stores_none_twice(tmp_path: Path) -> None:
    with Rig(tmp_path, seed=1, num_replicas=1, instants_per_s=100) as rig:
        rig.suffer(8, kinds=["kill"])
        outcome = rig.settle()
    check(outcome, min_pairs=300)


def test_replicas_that_are_killed_paused_and_joined_hand_over_without_loss(tmp_path: Path) -> None:
    with Rig(tmp_path, seed=2, num_replicas=2, instants_per_s=50) as rig:
        rig.suffer(10, kinds=["kill", "pause", "pause", "join", "leave"])
        outcome = rig.settle()
    check(outcome, min_pairs=300)


def test_killed_server_costs_nothing_that_it_had_acknowledged(tmp_path: Path) -> None:
    with Rig(tmp_path, seed=3, num_replicas=1, instants_per_s=50) as rig:
        rig.suffer(8, kinds=["kill server"])
        outcome = rig.settle()
    check(outcome, min_pairs=100)
    assert outcome.num_retries > 0


def _pair(number: int) -> Pair:
    at_ns = number * INSTANT_NS
    return Pair(
        radar_frame("north", FrameId(at_ns, number)),
        camera_frame("north", FrameId(at_ns + CAMERA_AFTER_NS, number)),
    )


def _ledger(*numbers: int) -> Sent:
    pairs = [_pair(number) for number in numbers]
    return {
        ("north", "radar"): {pair.radar.id for pair in pairs},
        ("north", "camera"): {pair.camera.id for pair in pairs},
    }


def test_accounting_sees_a_lost_a_foreign_and_a_mixed_up_pair(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, "north")
    writer.append([_pair(0), _pair(1), Pair(_pair(2).radar, _pair(3).camera)])
    writer.close()
    found = account(_ledger(0, 2, 4), tmp_path)
    assert [len(found.lost), len(found.foreign), len(found.torn)] == [1, 1, 1]
    assert not account(_ledger(0, 1, 2), tmp_path).lost


def test_accounting_sees_a_pair_that_two_segments_hold(tmp_path: Path) -> None:
    for site in ("north", "south"):
        writer = StoreWriter(tmp_path / site, "north")
        writer.append([_pair(0), *([_pair(1)] if site == "south" else [])])
        writer.close()
    for path in (tmp_path / "south" / "north").glob("writer-*/0*"):
        path.rename(tmp_path / "north" / "north" / path.parent.name / f"00009999{path.suffix}")
    found = account(_ledger(0, 1), tmp_path / "north")
    assert [len(found.lost), len(found.doubled), len(found.torn)] == [0, 1, 0]


def test_accounting_sees_a_byte_that_changed_on_disk(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, "north")
    writer.append([_pair(0)])
    writer.close()
    segment = next((tmp_path / "north").glob("writer-*/*.seg"))
    body = bytearray(segment.read_bytes())
    body[-100] ^= 1
    segment.write_bytes(body)
    torn = account(_ledger(0), tmp_path).torn
    assert ["bytes are damaged" in torn[0], "checksum" in torn[1], len(torn)] == [True, True, 2]
