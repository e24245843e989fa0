"""Replay: newest and stored pairs, no session dominates, near-duplicates count less; and the paper's two ways."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import StoreError
from services.core.frames import FrameId
from trainer.batches import Sample
from trainer.feed_settings import FeedSettings
from trainer.sampling import Pool, Sampler
from trainer.vectors import Vectors

S = 1_000_000_000


def settings(**changes) -> FeedSettings:
    return FeedSettings(**({"session_s": 10.0, "fresh_share": 0.0, "duplicate_cosine": 1.0} | changes))


class Samples:
    """Makes samples without a store."""

    def __init__(self) -> None:
        self.vectors = Vectors(4)
        self.rng = np.random.default_rng(0)

    def make(self, seq: int, *, at_s: float, site: str = "a", vector=None, mirrored: bool = False) -> Sample:
        pair = SimpleNamespace(site=site, id=FrameId(round(at_s * S), seq))
        slot = self.vectors.put(self.rng.normal(size=4) if vector is None else vector, digest=0)
        return Sample(hash((site, seq)), pair, 0, mirrored, self.vectors, slot)


def pool_of(samples, **changes) -> Pool:
    pool = Pool(settings(**changes))
    for sample in samples:
        pool.put(sample)
    return pool


def drawn(pool: Pool, num: int, size: int = 32, **changes) -> list[list[Sample]]:
    sampler = Sampler(pool, settings(**changes), seed=0)
    return [sampler.draw(size) for _ in range(num)]


def test_no_session_gives_more_than_its_share_of_a_batch() -> None:
    make = Samples().make
    busy = [make(i, at_s=i / 100) for i in range(900)]
    quiet = [make(i, at_s=10 + 2 * i, site="b") for i in range(100)]
    pool = pool_of(busy + quiet)
    for batch in drawn(pool, 20):
        assert Counter(sample.pair.site for sample in batch)["a"] <= 8
        assert len({sample.uid for sample in batch}) == 32


def test_session_with_many_pairs_is_drawn_no_more_often_than_its_cap() -> None:
    make = Samples().make
    samples = [make(i, at_s=i / 100, site="fast") for i in range(900)]
    samples += [make(i, at_s=i / 10, site="slow") for i in range(90)]
    changes = {"session_pairs": 90, "session_share": 1.0}
    sites = Counter(s.pair.site for batch in drawn(pool_of(samples, **changes), 50, 8, **changes) for s in batch)
    assert 0.4 < sites["fast"] / sites.total() < 0.6


def test_images_like_the_one_before_count_less() -> None:
    make = Samples().make
    still = [make(i, at_s=i / 10, vector=np.array([1, 2, 3, 4 + i % 2 / 100])) for i in range(90)]
    moving = [make(90 + i, at_s=10 + i / 10) for i in range(90)]
    changes = {"duplicate_cosine": 0.999, "duplicate_weight": 0.25, "session_share": 1.0}
    pool = pool_of(still + moving, **changes)
    seen = Counter(s.pair.id.seq < 90 for batch in drawn(pool, 100, 8, **changes) for s in batch)
    assert 0.15 < seen[True] / seen.total() < 0.25  # 23.25 of 113.25


def test_mirrored_images_are_compared_among_themselves() -> None:
    make = Samples().make
    one, other = np.array([1, 0, 0, 0]), np.array([0, 1, 0, 0])
    samples = [make(i, at_s=i / 10, vector=other if i % 2 else one, mirrored=i % 2 == 1) for i in range(40)]
    pool = pool_of(samples, duplicate_cosine=0.999)
    pool.pick(np.zeros((1, 2)))
    [session] = pool._sessions.values()
    assert session.weight == 2 + 38 * 0.25


def test_fresh_share_comes_from_the_newest_of_all_sites() -> None:
    make = Samples().make
    samples = [make(i, at_s=i, site=site) for site in "ab" for i in range(200)]
    changes = {"fresh_share": 0.5, "fresh_pairs": 20}
    for batch in drawn(pool_of(samples, **changes), 5, 16, **changes):
        assert sum(sample.pair.id.seq >= 190 for sample in batch[:8]) == 8
        assert len({sample.uid for sample in batch}) == 16


@given(st.permutations(range(60)), st.sets(st.integers(0, 59), max_size=30))
def test_draws_depend_on_what_is_there_not_on_how_it_came(order, gone) -> None:
    made = Samples()
    samples = [made.make(i, at_s=i * 0.7, site="ab"[i % 2]) for i in range(60)]
    plain, shuffled = Pool(settings()), Pool(settings())
    for i in range(60):
        if i not in gone:
            plain.put(samples[i])
    for i in order:
        shuffled.put(samples[i])
    shuffled.pick(np.zeros((1, 2)))
    for i in gone:
        shuffled.remove(samples[i])
    assert len(plain) == len(shuffled) == 60 - len(gone)
    assert drawn(plain, 3, 16) == drawn(shuffled, 3, 16)


@pytest.mark.parametrize("sampling", ["replay", "shuffled", "stream"])
def test_restored_sampler_draws_the_same(sampling) -> None:
    make = Samples().make
    changes = {"sampling": sampling, "fresh_share": 0.25}
    pool = pool_of([make(i, at_s=i / 2) for i in range(100)], **changes)
    sampler = Sampler(pool, settings(**changes), seed=3)
    sampler.draw(16)
    state = sampler.state()
    expected = [sampler.draw(16), sampler.draw(16)]
    other = Sampler(pool, settings(**changes), seed=4)
    other.restore(state)
    assert [other.draw(16), other.draw(16)] == expected


def test_stream_goes_through_all_in_order_of_time_and_again() -> None:
    make = Samples().make
    pool = pool_of([make(i, at_s=i) for i in range(100)], sampling="stream")
    batches = drawn(pool, 4, 30, sampling="stream")
    assert [s.pair.id.seq for batch in batches for s in batch] == [*range(100), *range(20)]


def test_stream_goes_on_after_its_place_was_evicted() -> None:
    make = Samples().make
    samples = [make(i, at_s=i) for i in range(100)]
    pool = pool_of(samples, sampling="stream")
    sampler = Sampler(pool, settings(sampling="stream"), seed=0)
    sampler.draw(15)
    for sample in samples[:40]:
        pool.remove(sample)
    assert [sample.pair.id.seq for sample in sampler.draw(3)] == [40, 41, 42]


def test_fewer_pairs_than_a_batch_are_each_drawn_before_any_twice() -> None:
    make = Samples().make
    pool = pool_of([make(i, at_s=i) for i in range(10)])
    for batch in drawn(pool, 3, 16):
        assert len({sample.uid for sample in batch}) == 10
        assert len(batch) == 16


def test_sample_that_moved_is_drawn_in_its_new_place() -> None:
    make = Samples().make
    old, new = make(0, at_s=1), make(0, at_s=1)
    pool = pool_of([old, new])
    assert len(pool) == 1
    assert drawn(pool, 1, 1)[0][0] is new


@pytest.mark.parametrize("sampling", ["replay", "shuffled", "stream"])
def test_empty_pool_is_a_clear_error(sampling) -> None:
    sample = Samples().make(0, at_s=1)
    pool = pool_of([sample], sampling=sampling)
    pool.remove(sample)
    pool.remove(sample)
    assert (len(pool), pool.num_sessions) == (0, 0)
    with pytest.raises(StoreError, match="no encoded pair is left"):
        drawn(pool, 1, 4, sampling=sampling)
