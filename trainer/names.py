"""Which stored frames have a name, from whom, and how much it weighs: people's labels and a detector's guesses.

A person wins over the detector. The detector abstains where it was not sure, saw nothing it knows, or found the
image dark or blurred. Frames of held-out stretches (`trainer.heldout`) are for the gate, those of guards for
nobody.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.core.frames import CLASSES, Seen
from services.core.store import StoredPair
from trainer.feed import Feed
from trainer.head import Block
from trainer.heldout import is_held_out, may_learn
from trainer.settings import TrainerSettings

BLOCK_NS = 10_000_000_000
_LOOKS_A_FRAME = 4
"""So many stored frames are asked for the detector's word for each one that is wanted."""
_MORE_HELD_OUT = 8
"""As often as that many more are looked at for the gate: most stored frames are not held out."""


@dataclass(frozen=True, slots=True)
class Named:
    """target: index into CLASSES. weight: 1 for a person's word. source: who said so."""

    pair: StoredPair
    target: int
    weight: float
    is_human: bool
    source: str

    @property
    def block(self) -> Block:
        return block_of(self.pair)


def block_of(pair: StoredPair) -> Block:
    """The stretch of time that a pair is from: neighbours show the same object."""
    return pair.site, pair.id.captured_at_ns // BLOCK_NS


class Names:
    """Finds named frames; remembers what the detector said, for it never changes."""

    def __init__(self, settings: TrainerSettings, feed: Feed) -> None:
        self._settings = settings
        self._feed = feed
        self._seen: dict[tuple[str, Any], Seen | None] = {}

    def learnable(self) -> list[Named]:
        """For heads: at most `max_head_frames`, spread over sites and times, a person's before the detector's."""
        return self._find(held_out=False, most=self._settings.max_head_frames)

    def held_out(self) -> list[Named]:
        """For the gate: at most `max_gate_frames`, none of which any model has learnt from."""
        return self._find(held_out=True, most=self._settings.max_gate_frames)

    def _find(self, *, held_out: bool, most: int) -> list[Named]:
        wanted = self._settings.names_from
        found: list[Named] = []
        labelled: set[tuple[str, Any]] = set()
        if wanted != "detector":
            for pair, label in self._feed.labelled():
                labelled.add((pair.site, pair.id))
                if self._is_of(pair, held_out=held_out):
                    found.append(Named(pair, CLASSES.index(label.label), 1.0, True, label.source))
            found = fair(found, most)
        if wanted != "people" and len(found) < most:
            found += self._guessed(labelled, held_out=held_out, most=most - len(found))
        return sorted(found, key=lambda named: (named.pair.site, named.pair.id))

    def _guessed(self, labelled: set[tuple[str, Any]], *, held_out: bool, most: int) -> list[Named]:
        looks = _LOOKS_A_FRAME * most * (_MORE_HELD_OUT if held_out else 1)
        looked_at = [
            pair
            for pair in fair(self._feed.admitted(), looks)
            if (pair.site, pair.id) not in labelled and self._is_of(pair, held_out=held_out)
        ]
        found = [named for pair in looked_at if (named := self._guess(pair)) is not None]
        if len(self._seen) > 8 * _LOOKS_A_FRAME * self._settings.max_head_frames:
            self._seen.clear()  # the store has moved on
        return fair(found, most)

    def _guess(self, pair: StoredPair) -> Named | None:
        at = (pair.site, pair.id)
        if at not in self._seen:
            self._seen[at] = pair.seen()
        seen = self._seen[at]
        if seen is None or seen.label not in CLASSES or seen.flags:
            return None
        if seen.confidence < self._settings.pseudo_label_confidence:
            return None
        weight = self._settings.pseudo_label_weight
        return Named(pair, CLASSES.index(seen.label), weight, False, seen.detector or "detector")

    def _is_of(self, pair: StoredPair, *, held_out: bool) -> bool:
        ours = is_held_out if held_out else may_learn
        return ours(pair.site, pair.id.captured_at_ns, share=self._settings.held_out_share)


def fair(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of `items` (pairs or named ones, in order of time within a site), sites alike, spread evenly.

    A site with fewer leaves its part to the others: an old, small one is not crowded out.
    """
    by_site: dict[str, list[Any]] = {}
    for item in items:
        by_site.setdefault((item.pair if isinstance(item, Named) else item).site, []).append(item)
    left = most
    kept: list[Any] = []
    for num_done, of_site in enumerate(sorted(by_site.values(), key=len)):
        quota = min(len(of_site), left // (len(by_site) - num_done))
        kept += [of_site[i * len(of_site) // quota] for i in range(quota)]
        left -= quota
    return kept


def describe(named: Sequence[Named]) -> dict[str, Any]:
    """How many names from people and from the detector, by source; said in the manifest."""
    return {
        "people": sum(name.is_human for name in named),
        "detector": sum(not name.is_human for name in named),
        "sources": dict(Counter(name.source for name in named)),
    }
