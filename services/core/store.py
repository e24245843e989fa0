"""Handoff 2: the rolling store. One writer per site, many readers in other processes.

    store/SITE/00000001.seg .idx   segments of pairs, sealed when full, dropped whole, oldest first
    store/SITE/labels.jsonl        what people said about frames
    store/SITE/writer.lock         held by the one process that may write

Bounded by bytes, age and a floor of free disk, whenever `evict` is called. A labelled pair is pinned: when its
segment is dropped it moves to the newest one, up to `pinned_share` of the bytes. The store does not know what a
pair is good for.
"""

import contextlib
import fcntl
import os
import resource
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from services.core.errors import StoreError
from services.core.files import sync_directory
from services.core.frames import SITE_PATTERN, CameraFrame, FrameId, Label, RadarFrame, check_site
from services.core.labels import LabelLog
from services.core.segments import Pair, SegmentReader, SegmentWriter

__all__ = ["Pair", "StoreLimits", "StoreReader", "StoreWriter", "StoredPair"]

_MAX_SEGMENTS = 128
"""Segments of a large store grow so that a site has about this many: readers hold two descriptors for each."""
_MAX_DESCRIPTORS = 65536
_SEALS_PER_AGE = 8
"""A slow site's segment is sealed after this part of the greatest age: pairs go at most that much too late."""


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """What bounds one site's share of the store."""

    max_bytes: int = 8 * 1024**3
    max_age_s: float = 7 * 86400.0
    min_free_bytes: int = 1024**3
    segment_bytes: int = 64 * 1024**2
    pinned_share: float = 0.25


class StoreWriter:
    """The one writer of a site. Raises StoreError if another process writes already, or the disk refuses.

    Threads may share it: each call waits for the one before.
    """

    def __init__(self, store_dir: Path, site: str, *, limits: StoreLimits = StoreLimits()) -> None:
        self.site = check_site(site)
        self.limits = limits
        self._dir = store_dir / site
        self._turn = threading.RLock()
        self.labels = LabelLog(self._dir, site=site)
        self._sealed: dict[str, int] = {}
        self._ids: dict[FrameId, str] = {}
        self.num_evicted = 0
        with _store_errors(self._dir), contextlib.ExitStack() as opened:
            self._dir.mkdir(parents=True, exist_ok=True)
            self._lock = opened.enter_context(_lock(self._dir / "writer.lock", site))
            self._load()
            opened.pop_all()

    def _load(self) -> None:
        self.labels.refresh()
        names = _segment_names(self._dir)
        for path in self._dir.glob("*.seg"):
            if path.stem not in names:  # a crash came between the two unlinks, or before its index was made
                path.unlink()
        for name in names[:-1]:
            self._sealed[name] = _size(self._dir, name)
            with contextlib.closing(SegmentReader(self._dir, name)) as reader:
                reader.refresh()
                self._ids.update((frame_id, name) for _, frame_id in reader.ids())
        self._open = SegmentWriter(self._dir, names[-1] if names else f"{1:08d}")
        self._opened_at_s = time.time() - self._age_s(self._open.name)
        self._ids.update(dict.fromkeys(self._open.ids, self._open.name))

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def num_bytes(self) -> int:
        return sum(self._sealed.values()) + self._open.num_bytes

    def append(self, pairs: Sequence[Pair]) -> int:
        """Store `pairs` durably, each id once; return how many were new. Evicts first what has to go.

        Raises StoreError when the disk is full; nothing of the group is stored then, and a later call may work.
        """
        with self._turn, _store_errors(self._dir):
            news = list({pair.id: pair for pair in pairs if pair.id not in self._ids}.values())
            if not news:
                return 0
            self.evict()
            self._require_free_disk()
            self._write(news)
            return len(news)

    def append_labels(self, labels: Sequence[Label]) -> int:
        """Keep `labels` durably; return how many were news."""
        with self._turn:
            return self.labels.append(labels)

    def evict(self) -> int:
        """Drop whole segments, oldest first, until all limits hold; return how many pairs fell out.

        May be called at any time; age counts from a segment's last append. Raises StoreError if the disk refuses:
        what was not dropped then is dropped by a later call.
        """
        with self._turn, _store_errors(self._dir):
            before = self.num_evicted
            if self._open.num_rows and self._is_open_too_long():
                self._seal()
            for name in list(self._sealed):  # each at most once: moved pinned pairs may fill new ones
                if not self._must_go(name):
                    break
                self._drop(name)
            return self.num_evicted - before

    def _must_go(self, name: str) -> bool:
        return (
            self.num_bytes > self.limits.max_bytes
            or self._age_s(name) > self.limits.max_age_s
            or self._free_bytes() < self.limits.min_free_bytes
        )

    def _is_open_too_long(self) -> bool:
        open_s = time.time() - self._opened_at_s
        return max(open_s * _SEALS_PER_AGE, self._age_s(self._open.name)) > self.limits.max_age_s

    def _write(self, pairs: list[Pair]) -> None:
        segment_bytes = max(self.limits.segment_bytes, self.limits.max_bytes // _MAX_SEGMENTS)
        segment_bytes = min(segment_bytes, max(self.limits.max_bytes // 8, 1))
        if self._open.num_rows and self._open.num_bytes >= segment_bytes:
            self._seal()
        self._open.append(pairs)
        self._ids.update(dict.fromkeys((pair.id for pair in pairs), self._open.name))

    def _seal(self) -> None:
        full = self._open
        self._open = SegmentWriter(self._dir, f"{int(full.name) + 1:08d}")  # first: a full disk refuses it
        self._opened_at_s = time.time()
        self._sealed[full.name] = full.num_bytes
        full.close()

    def _drop(self, name: str) -> None:
        """1. move the pinned pairs to the newest segment, 2. unlink the index, 3. forget, 4. unlink the data.

        If 1 or 2 fails it is all still there for the next time; what 4 leaves behind goes at the next start.
        """
        pinned = self._pinned_pairs(name)
        if pinned and self._free_bytes() > self._sealed[name] // 4:
            self._write(pinned)
        (self._dir / f"{name}.idx").unlink()
        del self._sealed[name]
        gone = [frame_id for frame_id, owner in self._ids.items() if owner == name]
        for frame_id in gone:
            del self._ids[frame_id]
        self.num_evicted += len(gone)
        (self._dir / f"{name}.seg").unlink()
        sync_directory(self._dir)

    def _pinned_pairs(self, name: str) -> list[Pair]:
        """Labelled pairs of a segment, newest first, as many as the pinned share has room for."""
        labelled = sum(1 for frame_id in self._ids if frame_id in self.labels.labels)
        mean_bytes = self.num_bytes / max(len(self._ids), 1)
        room = int(self.limits.pinned_share * self.limits.max_bytes / max(mean_bytes, 1.0))
        num_over = max(0, labelled - room)
        pairs = []
        with contextlib.closing(SegmentReader(self._dir, name)) as reader:
            reader.refresh()
            keep = [
                row for row, frame_id in reader.ids() if frame_id in self.labels.labels
                and self._ids.get(frame_id) == name
            ]  # fmt: skip
            for row in keep[num_over:]:
                radar, camera = reader.read_radar(row, site=self.site), reader.read_camera(row, site=self.site)
                if radar is not None and camera is not None:
                    pairs.append(Pair(radar, camera))
        return pairs

    def _age_s(self, name: str) -> float:
        return time.time() - (self._dir / f"{name}.idx").stat().st_mtime

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self._dir).free

    def _require_free_disk(self) -> None:
        free = self._free_bytes()
        if free < self.limits.min_free_bytes:
            raise StoreError(
                f"{self._dir} has {free} bytes free, the floor is {self.limits.min_free_bytes}",
                remedy="free some disk or lower ECHOSIGHT_MIN_FREE_BYTES; ingest waits",
            )

    def close(self) -> None:
        with self._turn:
            self._open.close()
            self._lock.close()


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
        """The camera frame; None if its bytes were damaged."""
        return self.segment.read_camera(self.row, site=self.site)


class StoreReader:
    """All sites' pairs, as of the last `refresh`, in order of arrival within a site."""

    def __init__(self, store_dir: Path) -> None:
        self._dir = store_dir
        self._segments: dict[tuple[str, str], SegmentReader] = {}
        self._num_taken: dict[tuple[str, str], int] = {}
        self._labels: dict[str, LabelLog] = {}
        self._pairs: dict[tuple[str, FrameId], StoredPair] = {}
        self._order: list[StoredPair] | None = None
        _allow_descriptors()

    def refresh(self) -> int:
        """Take in what was appended, let go of what was evicted; return how many pairs there are."""
        sites = sorted(p.name for p in self._dir.glob("*") if p.is_dir() and SITE_PATTERN.fullmatch(p.name))
        live = {(site, name) for site in sites for name in _segment_names(self._dir / site)}
        for key in [key for key in self._segments if key not in live]:
            self._forget(key)
        for site, name in live - self._segments.keys():
            with contextlib.suppress(FileNotFoundError):  # evicted between the listing and the opening
                self._segments[site, name] = SegmentReader(self._dir / site, name)
        for segment in self._segments.values():
            segment.refresh()
        if any(segment.is_reloaded for segment in self._segments.values()):
            # The writer took a failed append back. Those rows may have hidden pairs of other segments: all anew.
            self._pairs.clear()
            self._num_taken.clear()
        for key in sorted(self._segments):
            self._take_in(key)
        for site in sites:
            self._labels.setdefault(site, LabelLog(self._dir / site, site=site)).refresh()
        return len(self._pairs)

    def _take_in(self, key: tuple[str, str]) -> None:
        site, segment = key[0], self._segments[key]
        first = self._num_taken.get(key, 0)
        for row, frame_id in segment.ids(first=first):
            camera_at_ns = int(segment.rows[row]["camera_at_ns"])
            self._pairs[site, frame_id] = StoredPair(site, frame_id, camera_at_ns, segment, row)
        if len(segment.rows) > first:
            self._order = None
        self._num_taken[key] = len(segment.rows)

    def _forget(self, key: tuple[str, str]) -> None:
        segment = self._segments.pop(key)
        self._num_taken.pop(key, None)
        self._pairs = {at: pair for at, pair in self._pairs.items() if pair.segment is not segment}
        self._order = None
        segment.close()

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[StoredPair]:
        return iter(self.pairs)

    @property
    def pairs(self) -> list[StoredPair]:
        """All pairs, oldest capture first within a site."""
        if self._order is None:
            self._order = sorted(self._pairs.values(), key=lambda pair: (pair.site, pair.id))
        return self._order

    @property
    def sites(self) -> list[str]:
        return sorted({site for site, _ in self._pairs})

    @property
    def num_bytes(self) -> int:
        return sum(segment.num_bytes for segment in self._segments.values())

    def find(self, site: str, frame_id: FrameId) -> StoredPair | None:
        return self._pairs.get((site, frame_id))

    def label(self, pair: StoredPair) -> Label | None:
        """What was last said about this pair's radar frame."""
        log = self._labels.get(pair.site)
        return log.labels.get(pair.id) if log else None

    def labelled(self) -> list[tuple[StoredPair, Label]]:
        """All pairs that have a label."""
        found = []
        for site, log in self._labels.items():
            for frame_id, label in log.labels.items():
                pair = self._pairs.get((site, frame_id))
                if pair is not None:
                    found.append((pair, label))
        return found

    def random_batch(self, size: int, *, rng: np.random.Generator) -> list[StoredPair]:
        """`size` different pairs, uniformly, or all if there are fewer."""
        pairs = self.pairs
        return [pairs[i] for i in rng.choice(len(pairs), size=min(size, len(pairs)), replace=False)]

    def close(self) -> None:
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()
        self._pairs.clear()
        self._order = None


def _segment_names(site_dir: Path) -> list[str]:
    try:
        return sorted(entry.name[:-4] for entry in os.scandir(site_dir) if entry.name.endswith(".idx"))
    except FileNotFoundError:
        return []


def _size(directory: Path, name: str) -> int:
    return sum((directory / f"{name}{suffix}").stat().st_size for suffix in (".idx", ".seg"))


@contextlib.contextmanager
def _store_errors(directory: Path) -> Iterator[None]:
    """Say what the disk refused as what callers wait on."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write to {directory}: {error.strerror}",
            remedy="free some disk or repair its permissions; nothing was lost",
        ) from error


def _allow_descriptors() -> None:
    """Raise this process's soft limit of open files: many sites have many segments."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _lock(path: Path, site: str) -> IO[str]:
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise StoreError(
            f"another process writes site {site} ({path} is locked)",
            remedy="stop it, or give this one other sites",
        ) from None
    try:
        file.truncate(0)
        os.write(file.fileno(), b"%d\n" % os.getpid())
    except OSError:
        file.close()
        raise
    return file
