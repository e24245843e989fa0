"""Which pairs outlive the rest: those whose class is known, up to a quota for each class.

A person's label comes before a detector's, a newer pair before an older one. So a class that comes often cannot
crowd out one that is rare, and a rare one keeps all it has. Counts pairs; knows no files.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.core.frames import CLASSES, FrameId


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pair that is about to go. said, seen: its class by a person and by a sure detector, or ""."""

    row: int
    id: FrameId
    said: str
    seen: str


class Pins:
    """How many stored pairs of each class are known by a person's word, and how many only by a detector's."""

    def __init__(self) -> None:
        self.num_said: Counter[str] = Counter()
        self.num_seen: Counter[str] = Counter()

    def add(self, *, said: str, seen: str) -> None:
        self._count(said, seen, 1)

    def remove(self, *, said: str, seen: str) -> None:
        self._count(said, seen, -1)

    def _count(self, said: str, seen: str, num: int) -> None:
        if said:
            self.num_said[said] += num
        elif seen:
            self.num_seen[seen] += num

    def choose(self, candidates: Sequence[Candidate], *, room: int) -> list[Candidate]:
        """The candidates to keep, oldest first. They are counted here, and older than all others that are.

        room: pairs that each class may keep.
        """
        said, seen = _by_class(candidates, by_person=True), _by_class(candidates, by_person=False)
        kept: list[Candidate] = []
        for name in {*said, *seen}:
            for_said = max(0, room - (self.num_said[name] - len(said[name])))
            by_person = said[name][:for_said]
            others = self.num_said[name] - len(said[name]) + self.num_seen[name] - len(seen[name])
            kept += by_person + seen[name][: max(0, room - others - len(by_person))]
        return sorted(kept, key=lambda candidate: candidate.id)


def room_per_class(*, max_bytes: int, share: float, pair_bytes: float) -> int:
    """How many pairs each class may keep."""
    return int(share * max_bytes / len(CLASSES) / max(pair_bytes, 1.0))


def _by_class(candidates: Iterable[Candidate], *, by_person: bool) -> dict[str, list[Candidate]]:
    """Candidates known by a person, or only by a detector; newest first."""
    found: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in sorted(candidates, key=lambda candidate: candidate.id, reverse=True):
        name = candidate.said if by_person else "" if candidate.said else candidate.seen
        if name:
            found[name].append(candidate)
    return found
