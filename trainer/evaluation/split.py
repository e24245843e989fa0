"""Who learns and who is asked: sessions apart, sites apart, and, beside them, the paper's random split.

Neighbouring frames show the same object: a random split asks for what was learnt by heart, and flatters. Labels
are drawn by blocks of time for the same reason. Everything follows from a seed.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from services.core.errors import SettingsError
from services.core.frames import CLASSES
from trainer.evaluation.dataset import Bools, Dataset, Rows

TEST_SHARE = 0.2
UNSEEN_PREFIX = "eval_"
_MIN_SESSIONS, _MIN_SESSION_S = 5, 1.0
"""What is worth advising."""


@dataclass(frozen=True, slots=True)
class Split:
    """Rows of a dataset. name: sessions or random. unseen: of sites that are never learnt from."""

    name: str
    train: Rows
    test: Rows
    unseen: Rows

    @property
    def parts(self) -> dict[str, Rows]:
        """What is asked, by name; only what there is."""
        return {name: rows for name, rows in (("test", self.test), ("unseen", self.unseen)) if len(rows)}


def unseen_sites(dataset: Dataset, names: Collection[str] | None = None) -> Bools:
    """(S,) bool. names: of sites; None: those called eval_*. Raises SettingsError for a site that is not there."""
    if names is None:
        names = [name for name in dataset.sites if name.startswith(UNSEEN_PREFIX)]
    for name in names:
        if name not in dataset.sites:
            raise SettingsError(f"unseen site {name!r}", remedy=f"the sites are {', '.join(dataset.sites)}")
    is_unseen = np.array([name in names for name in dataset.sites])
    if is_unseen.all():
        raise SettingsError("every site is an unseen one", remedy="leave one to learn from")
    return is_unseen


def split_by_session(
    dataset: Dataset, *, is_unseen: Bools, seed: int = 0, test_share: float = TEST_SHARE, guard_s: float = 5.0
) -> Split:
    """Whole sessions for the test, the same share of each site; nothing is learnt within `guard_s` of them.

    Raises SettingsError where too few sessions are there to learn and to test.
    """
    rng = np.random.default_rng((seed, 1))
    unseen = is_unseen[dataset.site]
    is_test = np.zeros(len(dataset), bool)
    for site in np.flatnonzero(~is_unseen):
        sessions = np.unique(dataset.session[dataset.site == site])
        if len(sessions) < 2:
            continue
        num = min(len(sessions) - 1, max(1, round(test_share * len(sessions))))
        is_test |= np.isin(dataset.session, rng.permutation(sessions)[:num])
    is_guard = _is_near(dataset, is_test, within_s=guard_s)
    train, test = np.flatnonzero(~unseen & ~is_test & ~is_guard), np.flatnonzero(is_test)
    if not len(test):
        longest_s = max(_length_s(dataset, int(site)) for site in np.flatnonzero(~is_unseen))
        raise SettingsError(
            f"no site has a second session to keep for the test: the longest lasts {longest_s:.3g} s",
            remedy="give a longer recording"
            if longest_s < _MIN_SESSIONS * _MIN_SESSION_S
            else f"cut shorter sessions (--session-s {longest_s // _MIN_SESSIONS:g}), or give a longer recording",
        )
    if not len(train):
        raise SettingsError(
            f"all that is not held out lies within {guard_s:g} s of it: nothing is left to learn from",
            remedy=f"keep less away from it (--guard-s {guard_s / 10:g}), or give a longer recording",
        )
    return Split("sessions", train, test, np.flatnonzero(unseen))


def _length_s(dataset: Dataset, site: int) -> float:
    at_ns = dataset.at_ns[dataset.site == site]
    return float(at_ns.max() - at_ns.min()) / 1e9


def split_at_random(dataset: Dataset, *, is_unseen: Bools, seed: int = 0, test_share: float = TEST_SHARE) -> Split:
    """The paper's 80/20 by frame, on the sites that are learnt from."""
    unseen = is_unseen[dataset.site]
    seen = np.random.default_rng((seed, 2)).permutation(np.flatnonzero(~unseen))
    num = max(1, round(test_share * len(seen)))
    return Split("random", np.sort(seen[num:]), np.sort(seen[:num]), np.flatnonzero(unseen))


def hold_out(dataset: Dataset, rows: Rows, *, share: float, seed: int, block_s: float) -> tuple[Rows, Rows]:
    """Rows to learn from and rows to validate on, by whole blocks of time; both get at least one block."""
    blocks = blocks_of(dataset, rows, block_s=block_s)
    order = np.random.default_rng((seed, 3)).permutation(np.unique(blocks))
    if len(order) < 2:  # a single block: cut it in half
        return rows[: len(rows) // 2], rows[len(rows) // 2 :]
    chosen = np.isin(blocks, order[: min(len(order) - 1, max(1, round(share * len(order))))])
    return rows[~chosen], rows[chosen]


def draw_share(dataset: Dataset, rows: Rows, *, share: float, seed: int, block_s: float) -> Rows:
    """Labelled rows: whole blocks of time, in random order, until `share` of the labelled ones is reached.

    First come blocks that hold a class which no block before holds, so that every class that there is has a label.
    """
    labelled = rows[dataset.label[rows] >= 0]
    if not len(labelled):
        raise SettingsError(
            "no frame to learn from has a label", remedy="label more, or hold out others: --split-seed 1"
        )
    if share >= 1:
        return labelled
    blocks = blocks_of(dataset, labelled, block_s=block_s)
    order = [
        labelled[blocks == block] for block in np.random.default_rng((seed, 4)).permutation(np.unique(blocks))
    ]
    first: list[Rows] = []
    missing = set(np.unique(dataset.label[labelled]).tolist())
    for block in order:
        if missing & set(dataset.label[block].tolist()):
            first.append(block)
            missing -= set(dataset.label[block].tolist())
    taken = {id(block) for block in first}
    chosen: list[Rows] = []
    for block in [*first, *(block for block in order if id(block) not in taken)]:
        if len(chosen) >= len(first) and sum(map(len, chosen)) >= share * len(labelled):
            break
        chosen.append(block)
    return np.sort(np.concatenate(chosen))


def draw_balanced(dataset: Dataset, rows: Rows, *, count: int, seed: int) -> Rows:
    """`count` labelled rows in all, the same number of each class, from as many sessions as possible."""
    rng = np.random.default_rng((seed, 5))
    chosen: list[int] = []
    for number in range(len(CLASSES)):
        of_class = rng.permutation(rows[dataset.label[rows] == number])
        seen: dict[int, int] = {}
        turn = np.zeros(len(of_class), np.int64)  # the n-th of its session
        for at, session in enumerate(dataset.session[of_class].tolist()):
            turn[at] = seen[session] = seen.get(session, -1) + 1
        chosen += of_class[np.argsort(turn, kind="stable")][: count // len(CLASSES)].tolist()
    return np.sort(np.array(chosen, np.int64))


def blocks_of(dataset: Dataset, rows: Rows, *, block_s: float) -> Rows:
    """(n,) int64: which block of time of its session each row is from; unique over sessions."""
    within = dataset.at_ns[rows] // round(block_s * 1e9)
    _, blocks = np.unique(np.stack([dataset.session[rows], within]), axis=1, return_inverse=True)
    return np.asarray(blocks.reshape(-1), np.int64)


def _is_near(dataset: Dataset, mask: Bools, *, within_s: float) -> Bools:
    """Frames of the same site within so many seconds of a frame of `mask`."""
    near = mask.copy()
    for site in range(len(dataset.sites)):
        rows = np.flatnonzero(dataset.site == site)
        marked = dataset.at_ns[rows[mask[rows]]]
        if not len(marked):
            continue
        at = np.searchsorted(marked, dataset.at_ns[rows])
        before = dataset.at_ns[rows] - marked[np.maximum(at - 1, 0)]
        after = marked[np.minimum(at, len(marked) - 1)] - dataset.at_ns[rows]
        near[rows] |= np.minimum(np.abs(before), np.abs(after)) <= within_s * 1e9
    return near
