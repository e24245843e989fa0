"""Which pairs a step learns from: a replay of the whole store in which nothing dominates.

Pairs lie in sessions, stretches of `session_s` of one site, in order of time. `replay` takes a share of a batch
from the newest pairs; for the rest it draws sessions, by what is in them up to `session_pairs`, then pairs in
them. A pair whose image is nearly the one before, as in an empty static scene, counts `duplicate_weight`.
`shuffled` draws any pair alike; `stream` goes through all in order of time, and from the end to the start again:
the paper's two ways.

What is drawn depends on the pairs that are there and on `Sampler.state`, not on the order in which they came. A
draw costs the same however many pairs there are. After a change only the sessions that changed are weighed anew.
"""

import bisect
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from services.core.errors import NoPairsError
from services.core.frames import FrameId
from trainer.batches import Sample
from trainer.feed_settings import FeedSettings

_MAX_ROUNDS = 8
"""So often a draw that would break a rule is made again before the rule gives way."""
SessionKey = tuple[int, str]


class Session:
    """A stretch of time of one site. samples: oldest first."""

    def __init__(self, key: SessionKey) -> None:
        self.key = key
        self.samples: list[Sample] = []
        self.weight = 0.0
        self._cumulative: npt.NDArray[np.float64] = np.zeros(0)

    def weigh(self, settings: FeedSettings) -> None:
        weights = np.ones(len(self.samples))
        self.weight = float(len(self.samples))
        if settings.sampling == "replay":
            weights[_duplicates(self.samples, settings.duplicate_cosine)] = settings.duplicate_weight
            self.weight = min(float(weights.sum()), settings.session_pairs)
        self._cumulative = weights.cumsum()

    def pick(self, u: float) -> Sample:
        """u: uniform in [0, 1)."""
        at = int(np.searchsorted(self._cumulative, u * self._cumulative[-1], side="right"))
        return self.samples[min(at, len(self.samples) - 1)]


class Pool:
    """All samples that may be learnt from, by session."""

    def __init__(self, settings: FeedSettings) -> None:
        self._settings = settings
        self._session_ns = round(settings.session_s * 1e9)
        self._sessions: dict[SessionKey, Session] = {}
        self._keys: list[SessionKey] = []
        self._unweighed: set[SessionKey] = set()
        self._is_changed = False
        self._cumulative: npt.NDArray[np.float64] = np.zeros(0)
        self._newest: list[Sample] = []
        self._num_samples = 0

    def __len__(self) -> int:
        return self._num_samples

    @property
    def num_sessions(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Sample]:
        """In order of time."""
        return (sample for key in self._keys for sample in self._sessions[key].samples)

    def put(self, sample: Sample) -> None:
        """Take in a sample, or another version of the one with its id."""
        key = self._key(sample)
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = Session(key)
            bisect.insort(self._keys, key)
        at = bisect.bisect_left(session.samples, sample.pair.id, key=_id)
        if at < len(session.samples) and session.samples[at].pair.id == sample.pair.id:
            session.samples[at] = sample
        else:
            session.samples.insert(at, sample)
            self._num_samples += 1
        self._touch(key)

    def remove(self, sample: Sample) -> None:
        """Let a sample go, if it is here."""
        key = self._key(sample)
        session = self._sessions.get(key)
        if session is None:
            return
        at = bisect.bisect_left(session.samples, sample.pair.id, key=_id)
        if at == len(session.samples) or session.samples[at].pair.id != sample.pair.id:
            return
        del session.samples[at]
        self._num_samples -= 1
        self._touch(key)
        if not session.samples:
            del self._sessions[key]
            del self._keys[bisect.bisect_left(self._keys, key)]
            self._unweighed.discard(key)

    def pick(self, u: npt.NDArray[np.float64]) -> list[tuple[SessionKey, Sample]]:
        """Draws by weight. u: (N, 2) uniform in [0, 1). Raises NoPairsError if there is nothing to draw."""
        self._settle()
        if not self._num_samples:
            raise NoPairsError("no encoded pair is left to learn from", remedy="wait for new ones")
        at = np.searchsorted(self._cumulative, u[:, 0] * self._cumulative[-1], side="right")
        keys = [self._keys[i] for i in np.minimum(at, len(self._keys) - 1).tolist()]
        return [(key, self._sessions[key].pick(v)) for key, v in zip(keys, u[:, 1].tolist(), strict=True)]

    def newest(self) -> list[Sample]:
        """The newest `fresh_pairs` over all sites, oldest first."""
        self._settle()
        return self._newest

    def after(self, cursor: tuple[int, str, int, int] | None, size: int) -> list[Sample]:
        """The `size` samples that follow `cursor` (`position` of one) in time, then again from the oldest on."""
        if not self._num_samples:
            raise NoPairsError("no encoded pair is left to learn from", remedy="wait for new ones")
        at_key, at = 0, 0
        if cursor is not None:
            key, frame_id = (cursor[0], cursor[1]), FrameId(cursor[2], cursor[3])
            at_key = bisect.bisect_left(self._keys, key)
            if at_key < len(self._keys) and self._keys[at_key] == key:
                at = bisect.bisect_right(self._sessions[key].samples, frame_id, key=_id)
        found: list[Sample] = []
        while len(found) < size:
            at_key %= len(self._keys)
            found += self._sessions[self._keys[at_key]].samples[at : at + size - len(found)]
            at_key, at = at_key + 1, 0
        return found

    def position(self, sample: Sample) -> tuple[int, str, int, int]:
        """Where a sample stands in the order of time: session, capture time, number."""
        return (*self._key(sample), *sample.pair.id)

    def _key(self, sample: Sample) -> SessionKey:
        return sample.pair.id.captured_at_ns // self._session_ns, sample.pair.site

    def _touch(self, key: SessionKey) -> None:
        self._unweighed.add(key)
        self._is_changed = True

    def _settle(self) -> None:
        """Weigh the sessions that changed."""
        if not self._is_changed:
            return
        for key in self._unweighed:
            self._sessions[key].weigh(self._settings)
        self._unweighed.clear()
        self._cumulative = np.cumsum([self._sessions[key].weight for key in self._keys])
        self._newest = self._find_newest()
        self._is_changed = False

    def _find_newest(self) -> list[Sample]:
        num = self._settings.fresh_pairs
        found: list[Sample] = []
        block = None
        for key in reversed(self._keys):
            if key[0] != block and len(found) >= num:
                break
            block = key[0]
            found += self._sessions[key].samples[-num:]
        return sorted(found, key=lambda sample: (sample.pair.id, sample.pair.site))[-num:]


class Sampler:
    """Draws batches from a pool."""

    def __init__(self, pool: Pool, settings: FeedSettings, *, seed: int) -> None:
        self._pool = pool
        self._settings = settings
        self._rng = np.random.default_rng(seed)
        self._cursor: tuple[int, str, int, int] | None = None

    def draw(self, size: int) -> list[Sample]:
        """`size` samples, different ones if possible. Raises NoPairsError if the pool is empty."""
        match self._settings.sampling:
            case "stream":
                samples = self._pool.after(self._cursor, size)
                self._cursor = self._pool.position(samples[-1])
                return samples
            case "shuffled":
                return self._draw_stored(size, [], max_a_session=size)
            case "replay":
                fresh = self._draw_fresh(round(self._settings.fresh_share * size))
                num_stored = size - len(fresh)
                fair = num_stored / max(1, self._pool.num_sessions)
                most = math.ceil(max(self._settings.session_share * num_stored, fair))
                return self._draw_stored(size, fresh, max_a_session=most)

    def state(self) -> dict[str, Any]:
        """Plain values, with which the next draws are the same."""
        return {"rng": self._rng.bit_generator.state, "cursor": self._cursor}

    def restore(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state["rng"]
        self._cursor = None if state["cursor"] is None else tuple(state["cursor"])

    def _draw_fresh(self, num: int) -> list[Sample]:
        newest = self._pool.newest()
        at = self._rng.choice(len(newest), min(num, len(newest)), replace=False, shuffle=False) if newest else ()
        return [newest[i] for i in at]

    def _draw_stored(self, size: int, chosen: list[Sample], *, max_a_session: int) -> list[Sample]:
        """Fill `chosen` up: no sample twice, no session more than so often, where that can be."""
        taken = {sample.uid for sample in chosen}
        a_session: Counter[SessionKey] = Counter()
        for most in (max_a_session, size):
            for _ in range(_MAX_ROUNDS):
                for key, sample in self._pool.pick(self._rng.random((size, 2))):
                    if len(chosen) == size:
                        return chosen
                    if a_session[key] < most and sample.uid not in taken:
                        a_session[key] += 1
                        taken.add(sample.uid)
                        chosen.append(sample)
        rest = [sample for sample in self._pool if sample.uid not in taken]  # so many misses: there are few
        chosen += [rest[i] for i in self._rng.permutation(len(rest))[: size - len(chosen)]]
        return chosen + [sample for _, sample in self._pool.pick(self._rng.random((size - len(chosen), 2)))]


def _duplicates(samples: list[Sample], min_cosine: float) -> list[int]:
    """Which samples show nearly what the one before them of the same orientation shows."""
    found: list[int] = []
    if min_cosine >= 1:
        return found
    for mirrored in (False, True):
        at = [i for i, sample in enumerate(samples) if sample.mirrored == mirrored]
        if len(at) > 1:
            x = np.stack([samples[i].vector for i in at]).astype(np.float32)  # (N, D)
            norm = np.sqrt(np.einsum("nd,nd->n", x, x)) + 1e-12
            cosine = np.einsum("nd,nd->n", x[1:], x[:-1]) / (norm[1:] * norm[:-1])
            found += [at[i + 1] for i in np.flatnonzero(cosine > min_cosine)]
    return found


def _id(sample: Sample) -> FrameId:
    return sample.pair.id
