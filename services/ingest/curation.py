"""Which pairs of a site are worth keeping, by what its camera sees.

Plain state for each site, small and bounded, nothing on disk: after a restart the first looks find it again.
It does not know streams or stores: a pair that it drops is the caller's to acknowledge. Whatever it cannot judge
(a dark image, a scene in doubt, no time to look) it keeps. Light to import: what unpacks images, and the network,
are imported when a curator is made.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from services.core.frames import CameraFrame, Seen
from services.core.segments import Pair
from services.ingest.curation_settings import CurationSettings

if TYPE_CHECKING:
    from services.ingest.quality import Cells, Glance

DropReason = Literal["unreadable", "near_duplicate", "thinned_empty", "thinned_class"]

WINDOW = 1000
"""Shares are of a site's last so many kept pairs."""
KNOWN_FROM = 10
"""Pairs in the window from which a class counts as one that the site sees; fewer may be a detector's mistake."""
AT_LEAST_EVERY_S = 60.0
"""A pair of a thinned class is kept so often all the same: a quiet night must not look like a dead site."""
_STALE_LOOKS = 4  # look intervals after which the last look says nothing about now
_BURST_S = 2.0  # working time that may be saved up


class Sees(Protocol):
    """A detector, as this module needs one."""

    def see(self, camera: CameraFrame, *, flags: tuple[str, ...] = ()) -> Seen | None:
        """What is in the image; None where it does not unpack."""


def make_curator(settings: CurationSettings) -> "Curator | None":
    """A curator with its detector loaded; None where curation is off. Raises SettingsError for a bad detector."""
    if settings.curation == "off":
        return None
    if not settings.detector_path:
        return Curator(settings, None)
    from services.ingest.detector import Detector  # onnxruntime, only where there is a detector

    return Curator(settings, Detector(Path(settings.detector_path), min_score=settings.detector_min_score))


class Curator:
    """Keeps or drops pairs. In any threads, but for each site one call at a time.

    counts: by (site, what), where what is one of
        kept, and a DropReason             pairs, by where they went: these add up to the pairs given
        saw_LABEL, saw_unsure              images that the detector looked at, by what it said
        dark, blurred                      images so flagged
        not_checked, not_looked            pairs passed unseen for want of time; those while a look was due
    Read it through dict(counts) from other threads.
    """

    def __init__(
        self,
        settings: CurationSettings,
        detector: Sees | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from services.ingest.quality import glance  # cv2 and simplejpeg, only where there is a curator

        self._glance = glance
        self._settings = settings
        self._detector = detector
        self._clock = clock
        self._is_thinning = settings.curation in ("thin", "balance")
        self._sites: dict[str, _SiteState] = {}
        self.counts: Counter[tuple[str, str]] = Counter()

    def curate(self, site: str, pairs: Sequence[Pair]) -> tuple[list[Pair], list[tuple[Pair, DropReason]]]:
        """The pairs to keep, `seen` filled in where it was looked, and those to drop with the reason.

        All of one site, in the order of time as far as known. Takes at most its share of a core, but for one look.
        """
        if site not in self._sites:
            self._sites[site] = _SiteState(credit_until_s=self._clock() - _BURST_S)
        state = self._sites[site]
        kept: list[Pair] = []
        dropped: list[tuple[Pair, DropReason]] = []
        for pair in pairs:
            seen, reason = self._judge(site, state, pair)
            self.counts[site, reason or "kept"] += 1
            if reason:
                dropped.append((pair, reason))
            else:
                kept.append(replace(pair, seen=seen) if seen else pair)
        return kept, dropped

    def forget(self, site: str) -> None:
        """Drop what is known of a site that others read now; its time goes to those that stay."""
        self._sites.pop(site, None)

    def _judge(self, site: str, state: "_SiteState", pair: Pair) -> tuple[Seen | None, DropReason | None]:
        at_ns = pair.radar.captured_at_ns
        is_look_due = self._detector is not None and state.is_look_due(at_ns, self._settings.look_interval_s)
        start_s = self._clock()
        if not state.has_credit(start_s, num_sites=len(self._sites), share=self._settings.curation_share):
            self.counts[site, "not_checked"] += 1
            self.counts[site, "not_looked"] += is_look_due
            return None, self._keep_or_thin(state, at_ns, None)
        try:
            glanced = self._glance(pair.camera)
            if glanced is None:
                return None, "unreadable"
            self.counts.update((site, flag) for flag in glanced.flags)
            if self._is_near_duplicate(state, at_ns, glanced):
                return None, "near_duplicate"
            seen = Seen("", 0.0, flags=glanced.flags) if glanced.flags else None
            if is_look_due and self._detector is not None:
                seen = self._detector.see(pair.camera, flags=glanced.flags)
                if seen is None:
                    return None, "unreadable"
                self.counts[site, f"saw_{seen.label or 'unsure'}"] += 1
                state.note_look(seen.label, at_ns, agreeing_looks=self._settings.agreeing_looks)
        finally:
            state.spend(self._clock() - start_s)
        return seen, self._keep_or_thin(state, at_ns, glanced)

    def _is_near_duplicate(self, state: "_SiteState", at_ns: int, glanced: "Glance") -> bool:
        """Whether the last kept scene still stands. In a flagged image things move unseen: then never."""
        interval_s = self._settings.duplicate_interval_s
        if not self._is_thinning or not interval_s or state.cells is None or glanced.flags:
            return False
        is_soon = 0 <= at_ns - state.cells_at_ns < interval_s * 1e9
        return is_soon and not glanced.has_changed(since=state.cells)

    def _keep_or_thin(self, state: "_SiteState", at_ns: int, glanced: "Glance | None") -> DropReason | None:
        """Decide by the shares of what was kept; note a kept pair in them."""
        scene = state.settled_scene(at_ns, stale_after_s=_STALE_LOOKS * self._settings.look_interval_s)
        reason = self._thins(state, scene, at_ns)
        if reason is None:
            state.note_kept(scene, at_ns, glanced)
        return reason

    def _thins(self, state: "_SiteState", scene: str, at_ns: int) -> DropReason | None:
        if not self._is_thinning or not scene or state.is_long_since_kept(scene, at_ns):
            return None
        num, num_all = state.shares_with(scene)
        if scene == "empty" and num > self._settings.max_empty_share * num_all:
            return "thinned_empty"
        if self._settings.curation == "balance":
            others = [n for label, n in state.num_kept.items() if label not in ("", scene) and n >= KNOWN_FROM]
            if others and num > self._settings.balance_ratio * min(others):
                return "thinned_class"
        return None


@dataclass(slots=True)
class _SiteState:
    """What is known of one site. Times in ns are capture times of the radar; credit is time to work."""

    credit_until_s: float
    """Working time is earned as time goes by, and saved up for at most _BURST_S: the time from here to now."""
    share: float = 1.0
    scene: str = ""
    latest: str = ""
    num_agreeing: int = 0
    looked_at_ns: int | None = None
    recent: deque[str] = field(default_factory=lambda: deque(maxlen=WINDOW))
    num_kept: Counter[str] = field(default_factory=Counter)
    kept_at_ns: dict[str, int] = field(default_factory=dict)
    cells: "Cells | None" = None
    cells_at_ns: int = 0

    def has_credit(self, now_s: float, *, num_sites: int, share: float) -> bool:
        """Whether the site may work now. All sites earn alike, together `share` of one core."""
        self.share = share / num_sites
        self.credit_until_s = max(self.credit_until_s, now_s - _BURST_S)
        return self.credit_until_s < now_s

    def spend(self, seconds: float) -> None:
        self.credit_until_s += seconds / self.share

    def is_look_due(self, at_ns: int, interval_s: float) -> bool:
        return self.looked_at_ns is None or abs(at_ns - self.looked_at_ns) >= interval_s * 1e9

    def note_look(self, label: str, at_ns: int, *, agreeing_looks: int) -> None:
        """No opinion is a scene as well: of a site gone dark, the last scene must not stand all night."""
        self.num_agreeing = self.num_agreeing + 1 if label == self.latest else 1
        self.latest, self.looked_at_ns = label, at_ns
        if self.num_agreeing >= agreeing_looks:
            self.scene = label

    def settled_scene(self, at_ns: int, *, stale_after_s: float) -> str:
        """The scene's class; "" while the last look contradicts it, says nothing, or is too long ago."""
        is_fresh = self.looked_at_ns is not None and abs(at_ns - self.looked_at_ns) <= stale_after_s * 1e9
        return self.scene if is_fresh and self.latest == self.scene else ""

    def is_long_since_kept(self, scene: str, at_ns: int) -> bool:
        kept_at_ns = self.kept_at_ns.get(scene)
        return kept_at_ns is None or abs(at_ns - kept_at_ns) >= AT_LEAST_EVERY_S * 1e9

    def shares_with(self, scene: str) -> tuple[int, int]:
        """Pairs of `scene`, and pairs of all scenes, in the window and the one more that might be kept."""
        return self.num_kept[scene] + 1, len(self.recent) + 1

    def note_kept(self, scene: str, at_ns: int, glanced: "Glance | None") -> None:
        if len(self.recent) == WINDOW:
            self.num_kept[self.recent[0]] -= 1
        self.recent.append(scene)
        self.num_kept[scene] += 1
        self.kept_at_ns[scene] = at_ns
        if glanced is not None:
            self.cells, self.cells_at_ns = glanced.cells, at_ns
