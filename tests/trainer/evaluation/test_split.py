"""Sessions stay whole, guards hold, labels come by blocks: for any stream of frames."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.errors import SettingsError
from trainer.evaluation.dataset import sessions_of
from trainer.evaluation.split import (
    blocks_of,
    draw_balanced,
    draw_share,
    hold_out,
    split_at_random,
    split_by_session,
    unseen_sites,
)

S = 1_000_000_000
GUARD_S = 3.0


class Frames(SimpleNamespace):
    """What a split looks at of a dataset."""

    def __len__(self) -> int:
        return len(self.site)


def frames(counts: list[int], *, seed: int, num_unlabelled: int = 0) -> Any:
    """counts: frames of each site, one a second; the first site is an unseen one."""
    site = np.repeat(np.arange(len(counts)), counts)
    at_ns = np.concatenate([np.arange(count) for count in counts]) * S
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, len(site))
    label[rng.permutation(len(site))[:num_unlabelled]] = -1
    sites = tuple(f"site{i}" if i else "eval_0" for i in range(len(counts)))
    session = sessions_of(site, at_ns, session_s=10.0)
    return Frames(site=site, at_ns=at_ns, label=label, session=session, sites=sites)


COUNTS = st.lists(st.integers(25, 90), min_size=2, max_size=4)


@settings(max_examples=40, deadline=None)
@given(counts=COUNTS, seed=st.integers(0, 99))
def test_no_session_is_on_both_sides_and_nothing_near_the_test_is_learnt(counts: list[int], seed: int) -> None:
    data = frames(counts, seed=seed)
    split = split_by_session(data, is_unseen=unseen_sites(data), seed=seed, guard_s=GUARD_S)
    assert not set(data.session[split.train]) & set(data.session[split.test])
    assert set(split.unseen) == set(np.flatnonzero(data.site == 0))
    assert not set(data.site[split.train]) & {0}
    for row in split.train:
        near = split.test[data.site[split.test] == data.site[row]]
        assert (np.abs(data.at_ns[near] - data.at_ns[row]) > GUARD_S * S).all()
    for site in range(1, len(counts)):
        assert (data.site[split.test] == site).any()


@settings(max_examples=40, deadline=None)
@given(counts=COUNTS, seed=st.integers(0, 99), share=st.sampled_from([0.01, 0.1, 0.5]))
def test_labels_are_drawn_by_whole_blocks_until_the_share_is_reached(
    counts: list[int], seed: int, share: float
) -> None:
    data = frames(counts, seed=seed, num_unlabelled=10)
    rows = np.flatnonzero(data.site > 0)
    labelled = rows[data.label[rows] >= 0]
    drawn = draw_share(data, rows, share=share, seed=seed, block_s=5.0)
    assert (data.label[drawn] >= 0).all()
    blocks = blocks_of(data, labelled, block_s=5.0)
    touched = np.isin(labelled, drawn)
    for block in np.unique(blocks[touched]):
        assert touched[blocks == block].all()
    assert len(drawn) >= share * len(labelled)
    assert set(data.label[drawn]) == set(data.label[labelled])


def test_all_labels_are_all_labels() -> None:
    data = frames([30, 60], seed=0, num_unlabelled=20)
    rows = np.arange(len(data))
    np.testing.assert_array_equal(
        draw_share(data, rows, share=1, seed=0, block_s=5.0), np.flatnonzero(data.label >= 0)
    )


def test_balanced_labels_are_as_many_of_each_class_from_many_sessions() -> None:
    data = frames([200, 200], seed=1)
    drawn = draw_balanced(data, np.arange(len(data)), count=40, seed=0)
    assert np.bincount(data.label[drawn]).tolist() == [10, 10, 10, 10]
    assert len(np.unique(data.session[drawn])) > 20


def test_random_split_takes_frames_of_every_session_apart() -> None:
    data = frames([50, 100], seed=0)
    split = split_at_random(data, is_unseen=unseen_sites(data), seed=0)
    assert (len(split.train), len(split.test), len(split.unseen)) == (80, 20, 50)
    assert set(data.session[split.train]) & set(data.session[split.test])


def test_validation_part_is_made_of_whole_blocks() -> None:
    data = frames([50, 100], seed=0)
    rows = np.flatnonzero(data.site == 1)
    train, validation = hold_out(data, rows, share=0.25, seed=0, block_s=5.0)
    assert not set(blocks_of(data, rows, block_s=5.0)[np.isin(rows, train)]) & set(
        blocks_of(data, rows, block_s=5.0)[np.isin(rows, validation)]
    )
    assert len(train) + len(validation) == len(rows)


def test_what_cannot_be_split_is_said_with_a_remedy() -> None:
    data = frames([9, 9], seed=0)
    with pytest.raises(SettingsError, match="--session-s"):
        split_by_session(data, is_unseen=unseen_sites(data))
    with pytest.raises(SettingsError, match="the sites are"):
        unseen_sites(data, ["nowhere"])
    with pytest.raises(SettingsError, match="leave one"):
        unseen_sites(data, data.sites)


@pytest.mark.parametrize(
    ("num_frames", "session_s", "guard_s", "says"),
    [
        (3, 60.0, 3.0, r"lasts 2 s.*give a longer recording$"),
        (41, 60.0, 3.0, r"lasts 40 s.*--session-s 8"),
        (20, 10.0, 50.0, r"within 50 s.*--guard-s 5\b"),
    ],
)
def test_what_cannot_be_split_is_refused_with_what_would_help(
    num_frames: int, session_s: float, guard_s: float, says: str
) -> None:
    data = frames([1, num_frames], seed=0)
    data.session = sessions_of(data.site, data.at_ns, session_s=session_s)
    with pytest.raises(SettingsError, match=says):
        split_by_session(data, is_unseen=unseen_sites(data), guard_s=guard_s)
