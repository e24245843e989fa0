"""What is never learnt from: whole stretches, the same in every process, with a guard around them."""

import subprocess
import sys

import numpy as np
import pytest

from tests.trainer.conftest import fill, scene
from tests.trainer.test_feed import encode_all, feed_of
from trainer.heldout import GUARD_S, STRETCH_S, is_held_out, may_learn, stretch_of, thinned

NS = 1_000_000_000


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_held_out_time_is_whole_stretches_of_the_asked_share_with_a_guard_around_each(share) -> None:
    seconds = np.arange(0, 20_000)
    held = np.array([is_held_out("north", int(s) * NS, share=share) for s in seconds])
    learnt = np.array([may_learn("north", int(s) * NS, share=share) for s in seconds])
    assert held.mean() == pytest.approx(share, rel=0.02)
    starts, ends = (np.flatnonzero(np.diff(held.astype(int)) == step) for step in (1, -1))
    if share < 0.5:
        lengths = ends - starts[: len(ends)] if starts[0] < ends[0] else ends[1:] - starts
        assert abs(lengths - STRETCH_S).max() <= 1
    gaps = [np.abs(np.flatnonzero(learnt) - at).min() for at in (*starts + 1, *ends)]
    assert min(gaps) > GUARD_S
    assert (~held & ~learnt).mean() == pytest.approx(share * 2 * GUARD_S / STRETCH_S, rel=0.1)


def test_each_period_holds_out_one_stretch_at_a_place_of_its_own() -> None:
    held = [s for s in range(20_000) if is_held_out("north", s * NS, share=0.1)]
    first = {stretch_of(s * NS, share=0.1): s for s in reversed(held)}
    assert sorted(first) == list(range(100))
    assert len({s % 200 for s in first.values()}) > 50
    elsewhere = [s for s in range(20_000) if is_held_out("south", s * NS, share=0.1)]
    assert held != elsewhere


def test_another_process_holds_out_the_same() -> None:
    code = (
        "from trainer.heldout import is_held_out;"
        "print(''.join('01'[is_held_out('north', s * 10**9, share=0.1)] for s in range(2000)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == "".join("01"[is_held_out("north", s * NS, share=0.1)] for s in range(2000))


def test_share_of_nothing_holds_nothing_out() -> None:
    assert not any(is_held_out("north", s * NS, share=0.0) for s in range(1000))
    assert all(may_learn("north", s * NS, share=0.0) for s in range(1000))


def test_thinning_keeps_one_a_cell_and_the_newest_of_each_site_in_order() -> None:
    times = [("a", s * NS // 10) for s in range(100)] + [("b", s * NS // 10) for s in range(15)]
    newest_first = sorted(times, key=lambda item: item[1], reverse=True)
    kept = thinned(newest_first, where=lambda item: item, every_s=1.0, newest=4)
    assert [at // NS for site, at in kept if site == "a"] == [6, 7, 8, 9]
    assert [at for site, at in kept if site == "b"] == [0, NS]


def test_held_out_pairs_are_encoded_but_never_in_a_batch(store_dir, vision) -> None:
    fill(store_dir, [scene(i) for i in range(400)])  # 800 s
    feed = feed_of(store_dir, vision, mirror_share=0.5, held_out_share=0.1)
    encode_all(feed)
    held = {sample.uid for sample in feed.heldout(every_s=1.0, newest=1000)}
    assert 36 <= len(held) <= 44
    assert len(feed) == feed.num_seen
    assert 400 * 0.9 > len(feed) > 400 * 0.84  # guards are not learnt either
    batch = feed.batch(len(feed))
    drawn = set(batch.scenes.id.tolist())
    assert len(drawn) == len(feed)
    assert not drawn & held
    again = feed_of(store_dir, vision, mirror_share=0.5, held_out_share=0.1)
    assert again.num_pending == 0
    assert {sample.uid for sample in again.heldout(every_s=1.0, newest=1000)} == held


def test_held_out_pairs_are_never_mirrored_and_bounded(store_dir, vision) -> None:
    fill(store_dir, [scene(i) for i in range(400)])
    feed = feed_of(store_dir, vision, mirror_share=1.0, held_out_share=0.1)
    encode_all(feed)
    samples = feed.heldout(every_s=4.0, newest=12)
    assert len(samples) == 12
    assert not any(sample.mirrored for sample in samples)
    assert feed.collate(samples).k.shape == (12, vision.dim)
    seqs = [sample.pair.id.seq for sample in samples]
    assert seqs == sorted(seqs)
