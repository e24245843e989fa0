"""Handoff 2: the rolling store. One writer per site, many readers in other processes.

    store/SITE/writer-TOKEN/             what its one writer keeps (`services.core.fence` says who that is)
        00000001-TOKEN.seg .idx .end     segments of pairs, sealed when full, dropped whole, oldest first
        labels.jsonl                     what people said about frames
    store/SITE/profile.npz encodings/    what the trainer keeps beside them

Bounded by bytes, age and a floor of free disk, whenever `evict` is called. A pair whose class is known is pinned:
when its segment is dropped it moves to the newest one, up to a quota for each class. The store does not know what
a pair is good for.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from services.core.disks import free_bytes, require_local_disk, tree_bytes
from services.core.encodings import EncodedIds
from services.core.errors import StoreError, StoreFencedError
from services.core.fence import Fence, newest_token
from services.core.frames import FrameId, Label, check_site
from services.core.labels import LabelLog
from services.core.merging import Small, merge, worth_merging
from services.core.pins import Candidate, Pins, room_per_class
from services.core.reader import StoredPair, StoreReader
from services.core.records import Pair, Record, record_of, seen_class
from services.core.recovery import recover_all, remove
from services.core.segments import SegmentReader, SegmentWriter
from services.core.shares import fair_shares, site_sizes
from services.core.upgrade import move_version_1

__all__ = [
    "Pair", "StoreLimits", "StoreReader", "StoreWriter", "StoredPair", "fair_shares", "newest_token", "site_sizes",
]  # fmt: skip

_MAX_SEGMENTS = 128
"""Segments of a large store grow so that a site has about this many: readers hold a descriptor for each."""
_SEALS_PER_AGE = 8
"""A slow site's segment is sealed after this part of the greatest age: pairs go at most that much too late."""
_MOVED_AT_ONCE = 128


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """What bounds one site's share of the store."""

    max_bytes: int = 8 * 1024**3
    max_age_s: float = 7 * 86400.0
    min_free_bytes: int = 1024**3
    segment_bytes: int = 64 * 1024**2
    pinned_share: float = 0.25


class _Place(NamedTuple):
    """Where a pair lies, and the class a sure detector saw; one object for all pairs that share both."""

    segment: str
    seen: str


class StoreWriter:
    """The one writer of a site. It seals what the writer before left open, and puts right what a crash left.

    token: of the site's lease; None: one more than the newest that the store has seen. owner: for status.
    Raises StoreFencedError if the store has seen this token or a higher one, StoreError if the disk refuses or is
    on a network. Threads may share it: each call waits for the one before.
    """

    def __init__(
        self,
        store_dir: Path,
        site: str,
        *,
        limits: StoreLimits = StoreLimits(),
        token: int | None = None,
        owner: str = "",
    ) -> None:
        self.site = check_site(site)
        self.limits = limits
        self._site_dir = store_dir / site
        self._turn = threading.RLock()
        self._sealed: dict[str, int] = {}  # name to bytes, oldest first
        self._sealed_bytes = self._beside_bytes = 0
        self._open_bytes = 0  # a number of its own: others ask while it is being sealed
        self._is_closed = False
        self.newest_clock_offset_ns: int | None = None  # of the newest pair, as it was opened
        self._ids: dict[FrameId, _Place] = {}
        self._pins = Pins()
        self._open: SegmentWriter | None = None
        self._encoded = EncodedIds(self._site_dir)
        self._to_drop: set[FrameId] = set()
        self.num_evicted = 0
        require_local_disk(store_dir)
        with _store_errors(self._site_dir, None):
            self._fence = Fence.take(self._site_dir, token=token, owner=owner)
        self._dir = self._fence.directory
        self.labels = LabelLog(self._dir, site=site)
        with _store_errors(self._site_dir, self._fence), contextlib.ExitStack() as opened:
            opened.callback(self.close)
            move_version_1(self._site_dir, self._dir)
            self.labels.rewrite()
            self._load()
            self._fence.check()
            opened.pop_all()

    def _load(self) -> None:
        """Take stock of the segments, and make one of those that are small."""
        smalls: list[Small] = []
        for name in recover_all(self._dir):
            with contextlib.closing(SegmentReader(self._dir, name)) as reader:
                if reader.refresh():
                    self.newest_clock_offset_ns = int(reader.rows[-1]["clock_offset_ns"])
                places = {flags: _Place(name, seen_class(flags)) for flags in set(reader.rows["flags"].tolist())}
                flags = reader.rows["flags"].tolist()
                self._ids.update((frame_id, places[flags[row]]) for row, frame_id in reader.ids())
                self._set_sealed(name, reader.num_bytes)
                opened_at_s, mtime_s = reader.opened_at_ns / 1e9, time.time() - self._age_s(name)
                smalls.append(Small(name, reader.num_bytes, opened_at_s, mtime_s))
        self._next_number = int(max(self._sealed, default="0").partition("-")[0]) + 1
        owned = Counter(place.segment for place in self._ids.values())
        for name in [name for name in self._sealed if not owned[name]]:
            self._remove(name)  # a crash came after all its pairs had moved
        for frame_id, place in self._ids.items():
            self._pins.add(said=self._said(frame_id), seen=place.seen)
        self._merge([small for small in smalls if small.name in self._sealed])
        self._look_beside()

    def _merge(self, smalls: list[Small]) -> None:
        max_span_s = self.limits.max_age_s / _SEALS_PER_AGE
        merged = worth_merging(smalls, max_bytes=self._segment_bytes() // 4, max_span_s=max_span_s)
        if not merged:
            return
        name = self._new_name()
        records = merge(
            self._dir,
            merged,
            into=name,
            token=self.token,
            is_current=lambda segment, record: self._ids[record.id].segment == segment,
        )
        self._remember(name, records)
        self._set_sealed(name, sum(small.num_bytes for small in merged))
        for small in merged:
            self._remove(small.name)
        for frame_id, place in list(self._ids.items()):
            if place.segment not in self._sealed:  # damaged, and not copied
                del self._ids[frame_id]
                self._pins.remove(said=self._said(frame_id), seen=place.seen)

    @property
    def token(self) -> int:
        return self._fence.token

    def check_token(self) -> None:
        """Raise StoreFencedError if the site has another writer: nothing may be acknowledged any more."""
        with self._turn, _store_errors(self._dir, self._fence):
            self._fence.check()

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, frame_id: FrameId) -> bool:
        """Whether the pair of this radar frame is stored."""
        return frame_id in self._ids

    @property
    def num_bytes(self) -> int:
        """What the site takes of the disk: pairs, labels, encodings and profile."""
        return self._sealed_bytes + self._open_bytes + self._beside_bytes + self.labels.num_bytes

    def append(self, pairs: Sequence[Pair]) -> int:
        """Store `pairs` durably, each id once; return how many were new. Evicts first what has to go.

        Raises StoreError when the disk is full: nothing of the group counts then, and a later call may work.
        Raises StoreFencedError once the site has another writer: nothing of the group may be acknowledged.
        """
        with self._turn, _store_errors(self._dir, self._fence):
            self._fence.check()
            news = list({pair.id: pair for pair in pairs if pair.id not in self._ids}.values())
            if news:
                self.evict()
                self._require_free_disk()
                self._write([record_of(pair) for pair in news])
            return len(news)

    def append_labels(self, labels: Sequence[Label]) -> int:
        """Keep `labels` durably; return how many were news. Raises as `append` does."""
        with self._turn, _store_errors(self._dir, self._fence):
            self._fence.check()
            before = {label.id: self._said(label.id) for label in labels}
            try:
                num = self.labels.append(labels)
            except StoreError:
                self._fence.check()
                raise
            finally:
                for frame_id in [frame_id for frame_id in before if frame_id in self._ids]:
                    seen = self._ids[frame_id].seen
                    self._pins.remove(said=before[frame_id], seen=seen)
                    self._pins.add(said=self._said(frame_id), seen=seen)
            self._fence.check()
            return num

    def evict(self) -> int:
        """Drop whole segments, oldest first, until all limits hold; return how many pairs fell out.

        May be called at any time; age counts from a segment's last append. Where only the disk is short, one
        segment goes a call, so that sites give in turn. One call moves pinned pairs of about
        one segment at most, and leaves a segment alone that has nothing else. Raises StoreError if the disk
        refuses: what was not dropped then is dropped by a later call; StoreFencedError.
        """
        with self._turn, _store_errors(self._dir, self._fence):
            self._fence.check()
            before = self.num_evicted
            self._look_beside()
            if self._open and self._open.num_rows and self._is_open_too_long(self._open):
                self._seal(self._open)
            to_move = self._segment_bytes()
            for name in list(self._sealed):  # each at most once: moved pinned pairs may fill new ones
                if to_move <= 0 or not self._must_go(name):
                    break
                is_in_excess = self._is_in_excess(name)
                to_move -= self._drop(name)
                if not is_in_excess:
                    break  # the disk is short for all sites: each gives a segment in its turn
            self.labels.compact(is_stored=self.__contains__, max_age_s=self.limits.max_age_s)
            self._fence.check()
            return self.num_evicted - before

    def drop_encoded_images(self) -> int:
        """Privacy: remove images from disk that the trainer has encoded; return how many went.

        Each call does a bounded part of what is new. Raises as `evict` does.
        """
        with self._turn, _store_errors(self._dir, self._fence):
            self._fence.check()
            self._to_drop = {at for at in self._to_drop | self._encoded.take() if at in self._ids}
            num = 0
            for name in {self._ids[frame_id].segment for frame_id in self._to_drop}:
                with contextlib.closing(SegmentReader(self._dir, name)) as reader:
                    reader.refresh()
                    found = [(row, at) for row, at in reader.ids() if at in self._to_drop]
                    num += reader.drop_images([row for row, _ in found])
                    if name in self._sealed:
                        self._set_sealed(name, reader.num_bytes)
                self._to_drop.difference_update(frame_id for _, frame_id in found)
            self._open_bytes = self._open.num_bytes if self._open else 0
            self._fence.check()
            return num

    def _must_go(self, name: str) -> bool:
        return self._is_in_excess(name) or free_bytes(self._dir) < self.limits.min_free_bytes

    def _is_in_excess(self, name: str) -> bool:
        return self.num_bytes > self.limits.max_bytes or self._age_s(name) > self.limits.max_age_s

    def _is_open_too_long(self, segment: SegmentWriter) -> bool:
        open_s = time.time() - segment.opened_at_s
        return max(open_s * _SEALS_PER_AGE, self._age_s(segment.name)) > self.limits.max_age_s

    def _segment_bytes(self) -> int:
        segment_bytes = max(self.limits.segment_bytes, self.limits.max_bytes // _MAX_SEGMENTS)
        return min(segment_bytes, max(self.limits.max_bytes // 8, 1))

    def _write(self, records: list[Record]) -> None:
        """1. to disk, 2. the site is still ours: so whoever takes it over finds them, 3. remember."""
        if self._is_closed:
            raise StoreFencedError(f"the writer of site {self.site} is closed", remedy="open the store again")
        if self._open and (self._open.is_broken or self._open.end >= self._segment_bytes()):
            self._seal(self._open)
        if self._open is None:
            self._open = SegmentWriter(self._dir, self._new_name(), token=self.token)
        self._open.append(records)
        self._open_bytes = self._open.num_bytes
        self._fence.check()
        self._remember(self._open.name, records)

    def _remember(self, name: str, records: Sequence[Record]) -> None:
        places = {seen: _Place(name, seen) for seen in {record.seen for record in records}}
        for record in records:
            if record.id not in self._ids:
                self._pins.add(said=self._said(record.id), seen=record.seen)
            self._ids[record.id] = places[record.seen]

    def _seal(self, segment: SegmentWriter) -> None:
        segment.seal()
        self._fence.check()  # else another writer may have said what counts
        self._open = None
        self._open_bytes = 0
        self._set_sealed(segment.name, segment.num_bytes)
        segment.close()
        if not segment.num_rows:
            self._remove(segment.name)

    def _drop(self, name: str) -> int:
        """1. move the pinned pairs to the newest segment, 2. unlink the data, 3. forget, 4. unlink the rest.

        Returns the bytes that moved. If 1 or 2 fails it is all still there for the next time; what 4 leaves
        behind goes at the next start. A crash after 1 leaves pairs twice, which readers show once.
        """
        moved = 0
        with contextlib.closing(SegmentReader(self._dir, name)) as reader:
            reader.refresh()
            found = [
                Candidate(row, at, self._said(at), self._ids[at].seen)
                for row, at in reader.ids() if at in self._ids and self._ids[at].segment == name
            ]  # fmt: skip
            pair_bytes = self.num_bytes / max(len(self._ids), 1)
            share, max_bytes = self.limits.pinned_share, self.limits.max_bytes
            room = room_per_class(max_bytes=max_bytes, share=share, pair_bytes=pair_bytes)
            pinned = self._pins.choose(found, room=room)
            if found and len(pinned) == len(found):
                return 0
            if free_bytes(self._dir) > 2 * len(pinned) * pair_bytes:  # else room comes before what is pinned
                for start in range(0, len(pinned), _MOVED_AT_ONCE):
                    rows = (candidate.row for candidate in pinned[start : start + _MOVED_AT_ONCE])
                    records = [record for row in rows if (record := reader.read_record(row))]
                    self._write(records)
                    moved += sum(record.num_bytes for record in records)
        self._fence.check()
        self._remove(name)
        for candidate in found:
            if self._ids[candidate.id].segment == name:
                del self._ids[candidate.id]
                self._pins.remove(said=candidate.said, seen=candidate.seen)
                self.num_evicted += 1
        return moved

    def _remove(self, name: str) -> None:
        (self._dir / f"{name}.seg").unlink()
        self._sealed_bytes -= self._sealed.pop(name)
        remove(self._dir, name)

    def _set_sealed(self, name: str, num_bytes: int) -> None:
        self._sealed_bytes += num_bytes - self._sealed.get(name, 0)
        self._sealed[name] = num_bytes

    def _new_name(self) -> str:
        """Never one that was used: readers know segments by name, and a failed attempt may have left something."""
        self._next_number += 1
        return f"{self._next_number - 1:08d}-{self.token}"

    def _look_beside(self) -> None:
        """What others keep of this site."""
        beside = (path for path in self._site_dir.iterdir() if path != self._dir)
        self._beside_bytes = sum(tree_bytes(path) for path in beside)

    def _said(self, frame_id: FrameId) -> str:
        label = self.labels.labels.get(frame_id)
        return label.label if label else ""

    def _age_s(self, name: str) -> float:
        return time.time() - (self._dir / f"{name}.idx").stat().st_mtime

    def _require_free_disk(self) -> None:
        free = free_bytes(self._dir)
        if free < self.limits.min_free_bytes:
            raise StoreError(
                f"{self._dir} has {free} bytes free, the floor is {self.limits.min_free_bytes}",
                remedy="free some disk or lower ECHOSIGHT_MIN_FREE_BYTES; ingest waits",
            )

    def close(self) -> None:
        """Let go of all files. What is open is sealed by whoever takes the site next."""
        with self._turn:
            self._is_closed = True
            if self._open:
                self._open.close()
                self._open = None
                self._open_bytes = 0
            self.labels.close()
            self._encoded.close()


@contextlib.contextmanager
def _store_errors(directory: Path, fence: Fence | None) -> Iterator[None]:
    """Say what the disk refused as what callers wait on. What a new writer moved away is not the disk's fault."""
    try:
        yield
    except OSError as error:
        if fence is not None:
            with contextlib.suppress(OSError):
                fence.check()
        raise StoreError(
            f"cannot write to {directory}: {error.strerror}",
            remedy="free some disk or repair its permissions; nothing was lost",
        ) from error
