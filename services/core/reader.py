"""What is stored, as its readers see it: all sites' pairs and labels, in any process, while they are written.

A reader opens nothing for writing and locks nothing. What it holds open stays readable after it was evicted,
until the next refresh.
"""

import bisect
import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from services.core.disks import allow_descriptors
from services.core.errors import StoreError
from services.core.fence import data_dir, is_held
from services.core.frames import CameraFrame, FrameId, Label, RadarFrame, Seen
from services.core.labels import LabelLog
from services.core.segments import SegmentReader
from services.core.shares import stored_sites

_MAX_LOOKS = 5
_MANY = 256
"""So many new pairs are sorted in at once."""


@dataclass(frozen=True, slots=True)
class StoredPair:
    """Where one pair lies; cheap to hold by the million."""

    site: str
    id: FrameId
    camera_at_ns: int
    segment: SegmentReader
    row: int

    def radar(self) -> RadarFrame | None:
        """The radar frame; None if its bytes were damaged."""
        return self.segment.read_radar(self.row, site=self.site)

    def camera(self) -> CameraFrame | None:
        """The camera frame; None if its bytes were damaged, or its image was dropped."""
        return self.segment.read_camera(self.row, site=self.site)

    def seen(self) -> Seen | None:
        """What a detector saw in the image; None if none looked."""
        return self.segment.read_seen(self.row)

    @property
    def has_image(self) -> bool:
        """Whether the image is still there, as of now."""
        return self.segment.has_image(self.row)

    @property
    def clock_offset_ns(self) -> int:
        """What ingest subtracted from the camera's clock before pairing."""
        return int(self.segment.rows[self.row]["clock_offset_ns"])


class StoreReader:
    """All sites' pairs, as of the last `refresh`, in order of arrival within a site."""

    def __init__(self, store_dir: Path, *, tracks_changes: bool = False) -> None:
        """tracks_changes: remember what came and went until `changes` is asked for it."""
        self._dir = store_dir
        self._tracks_changes = tracks_changes
        self._vanished: dict[str, set[FrameId]] = {}
        self._sites: dict[str, _Site] = {}
        self._order: list[StoredPair] | None = None
        allow_descriptors()

    def refresh(self) -> int:
        """Take in what was appended, let go of what was evicted; return how many pairs there are.

        Raises StoreError if a file cannot be read, or is of an unknown version.
        """
        try:
            names = stored_sites(self._dir)
            for name in [name for name in self._sites if name not in names]:
                site = self._sites.pop(name)
                if self._tracks_changes:
                    self._vanished.setdefault(name, set()).update(site.touched, site.pairs)
                site.close()
                self._order = None
            for name in names:
                site = self._sites.setdefault(name, _Site(self._dir / name))
                is_changed = site.refresh()
                if not self._tracks_changes:
                    site.touched.clear()
                if is_changed:
                    self._order = None
        except OSError as error:
            raise StoreError(
                f"cannot read the store {self._dir}: {error.strerror}",
                remedy="allow more open files (ulimit -n), or repair its permissions; then try again",
            ) from error
        return len(self)

    def changes(self) -> dict[str, dict[FrameId, StoredPair | None]]:
        """By site, the pairs that came, moved or went (None) since this was last asked; oldest capture first."""
        touched, self._vanished = self._vanished, {}
        for name, site in self._sites.items():
            if site.touched:
                touched.setdefault(name, set()).update(site.touched)
                site.touched.clear()
        return {name: {at: self.find(name, at) for at in sorted(ids)} for name, ids in sorted(touched.items())}

    def __len__(self) -> int:
        return sum(len(site.pairs) for site in self._sites.values())

    def __iter__(self) -> Iterator[StoredPair]:
        return iter(self.pairs)

    @property
    def pairs(self) -> list[StoredPair]:
        """All pairs, oldest capture first within a site."""
        if self._order is None:
            self._order = list(
                itertools.chain.from_iterable(self._sites[name].order for name in sorted(self._sites))
            )
        return self._order

    @property
    def sites(self) -> list[str]:
        return sorted(name for name, site in self._sites.items() if site.pairs)

    @property
    def num_bytes(self) -> int:
        """What the pairs take of the disk."""
        return sum(segment.num_bytes for site in self._sites.values() for segment in site.segments.values())

    def segments(self, site: str) -> list[SegmentReader]:
        """A site's segments, oldest first."""
        known = self._sites[site].segments if site in self._sites else {}
        return [known[name] for name in sorted(known)]

    def find(self, site: str, frame_id: FrameId) -> StoredPair | None:
        return self._sites[site].pairs.get(frame_id) if site in self._sites else None

    def label(self, pair: StoredPair) -> Label | None:
        """What was last said about this pair's radar frame."""
        site = self._sites.get(pair.site)
        return site.labels.labels.get(pair.id) if site else None

    def labelled(self) -> list[tuple[StoredPair, Label]]:
        """All pairs that have a label."""
        return [
            (pair, label)
            for site in self._sites.values()
            for frame_id, label in site.labels.labels.items()
            if (pair := site.pairs.get(frame_id)) is not None
        ]

    def random_batch(self, size: int, *, rng: np.random.Generator) -> list[StoredPair]:
        """`size` different pairs, uniformly, or all if there are fewer."""
        pairs = self.pairs
        return [pairs[i] for i in rng.choice(len(pairs), size=min(size, len(pairs)), replace=False)]

    def close(self) -> None:
        for site in self._sites.values():
            site.close()
        self._sites.clear()
        self._order = None


class _Site:
    """One site's segments. pairs: by frame; order: the same, oldest capture first. touched: what changed."""

    def __init__(self, site_dir: Path) -> None:
        self._dir = site_dir
        self.segments: dict[str, SegmentReader] = {}
        self._num_taken: dict[str, int] = {}
        self.pairs: dict[FrameId, StoredPair] = {}
        self.order: list[StoredPair] = []
        self.touched: set[FrameId] = set()
        self.labels = LabelLog(site_dir, site=site_dir.name)

    def refresh(self) -> bool:
        """Return whether anything changed."""
        directory, vanished = self._open_new()
        is_changed = False
        for segment in self.segments.values():
            segment.directory = directory
            if not segment.is_sealed:
                segment.refresh()
                is_changed |= segment.is_reloaded
        if is_changed:
            # The seal left out a failed append. Those rows may have hidden pairs of other segments: all anew.
            self.touched.update(self.pairs)
            self.pairs.clear()
            self.order.clear()
            self._num_taken.clear()
        fresh = [pair for name in sorted(self.segments) for pair in self._take_in(name)]
        self._sort_in(fresh)  # before what has vanished is let go: some of these may lie there
        # While the site changes hands the new rows of its open segment wait for its seal. Until then nothing is
        # let go: a pair may have moved there.
        if vanished and self._is_settled(directory, but=vanished):
            is_changed |= self._forget(vanished)
        self.labels.directory = directory
        self.labels.refresh()
        return bool(fresh) or is_changed

    def _open_new(self) -> tuple[Path, set[str]]:
        """Open segments that are not open yet; return where they all are, and which known ones are gone.

        Looks again while anything moves: what went may have moved into a segment that was made since, or the
        whole directory to a new writer.
        """
        before: set[str] = set()
        for _ in range(_MAX_LOOKS):
            directory = data_dir(self._dir)
            with contextlib.suppress(FileNotFoundError):
                names = {path.name[:-4] for path in directory.iterdir() if path.suffix == ".idx"}
                missing = 0
                for name in sorted(names - self.segments.keys()):
                    try:
                        self.segments[name] = SegmentReader(directory, name)
                    except FileNotFoundError:  # evicted between the listing and the opening
                        missing += 1
                vanished = self.segments.keys() - names
                if not missing and vanished <= before:
                    return directory, vanished
                before = vanished
        return directory, set()

    def _is_settled(self, directory: Path, *, but: set[str]) -> bool:
        there = (segment for name, segment in self.segments.items() if name not in but)
        unsealed = (segment for segment in there if not segment.is_sealed)
        return all(is_held(self._dir, token=segment.token) for segment in unsealed) and directory.exists()

    def _take_in(self, name: str) -> list[StoredPair]:
        segment = self.segments[name]
        first = self._num_taken.get(name, 0)
        if first == len(segment.rows):
            return []
        site = self._dir.name
        cameras = segment.rows["camera_at_ns"][first:].tolist()
        fresh = [StoredPair(site, at, cameras[row - first], segment, row) for row, at in segment.ids(first=first)]
        self._num_taken[name] = len(segment.rows)
        return fresh

    def _sort_in(self, fresh: list[StoredPair]) -> None:
        """A pair that is in two segments, because it moves, is the later one's."""
        self.touched.update(pair.id for pair in fresh)
        if len(fresh) > _MANY:
            self.pairs.update((pair.id, pair) for pair in fresh)
            self.order = sorted(self.pairs.values(), key=_id)
            return
        for pair in fresh:
            known = self.pairs.get(pair.id)
            self.pairs[pair.id] = pair
            at = bisect.bisect_left(self.order, pair.id, key=_id)
            if known is not None:
                self.order[at] = pair
            else:
                self.order.insert(at, pair)

    def _forget(self, names: set[str]) -> bool:
        gone = 0
        for name in names:
            segment = self.segments.pop(name)
            self._num_taken.pop(name, None)
            for _, frame_id in segment.ids():
                known = self.pairs.get(frame_id)
                if known is not None and known.segment is segment:
                    del self.pairs[frame_id]
                    self.touched.add(frame_id)
                    gone += 1
            segment.close()
        if gone:
            self.order = [pair for pair in self.order if pair.id in self.pairs]
        return gone > 0

    def close(self) -> None:
        for segment in self.segments.values():
            segment.close()
        self.labels.close()


def _id(pair: StoredPair) -> FrameId:
    return pair.id
