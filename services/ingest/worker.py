"""The ingest worker: read -> pair -> append -> acknowledge, for ever.

It owns the stores it writes and the frames it holds in memory; whatever it holds is still unacknowledged, so a
kill at any moment loses nothing. A site is read only by the process that holds its store's lock: both sensors'
frames must come to one matcher. It knows nothing of learning.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from services.core.errors import BadFrameError, StoreError
from services.core.frames import SITE_PATTERN, CameraFrame, Label, RadarFrame, window_ns
from services.core.logs import Log
from services.core.store import Pair, StoreWriter
from services.core.streams import Consumer, Delivery, EventLog, Kind, StreamsLost
from services.ingest.matcher import Decision, Matcher, Paired, Side
from services.ingest.settings import IngestSettings

_BLOCK_MS = 100
_DISCOVER_EVERY_S = 2.0
_REPORT_EVERY_S = 2.0
_EVICT_EVERY_S = 10.0
_BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0)
_MAX_DECIDED = 256  # entries decided but not yet committed; beyond, reading waits for the disk
_MAX_WAITING = 512  # frames of one sensor held in memory; beyond, only the other sensor is read


@dataclass(slots=True)
class _Batch:
    """What is decided but not yet stored, buried and acknowledged."""

    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    labels: dict[str, list[Label]] = field(default_factory=dict)
    dead: list[tuple[Delivery, str]] = field(default_factory=list)
    done: list[Delivery] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.done) + len(self.dead)


class IngestWorker:
    """Pairs all sites of one consumer into their stores."""

    def __init__(self, settings: IngestSettings, consumer: Consumer, *, log: Log, events: EventLog) -> None:
        self._settings = settings
        self._consumer = consumer
        self._log = log
        self._events = events
        self._matchers: dict[str, Matcher[Delivery]] = {}
        self._writers: dict[str, StoreWriter] = {}
        self._writing = asyncio.Lock()  # held by the one thread that changes stores: a commit or an eviction
        self._skipped: dict[str, str] = {}  # site or key: why it is left alone, as said in the log
        self._num_sites = 0  # ours or not: all share the disk
        self._held: set[tuple[str, bytes]] = set()
        self._decided = _Batch()  # grows while the one before it is on its way to the disk
        self._committing = _Batch()  # still full after a failure: tried again before anything else
        self._commit: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._next_discover_s = 0.0
        self._next_claim_s = 0.0
        self._next_evict_s = 0.0
        self._reported_s, self._reported_num = time.monotonic(), 0
        self.counts: Counter[str] = Counter()

    def stop(self) -> None:
        """Commit what is decided, then return from `run`."""
        self._is_stopping = True

    async def run(self, *, until_idle_s: float | None = None) -> None:
        """Work until stopped, or until nothing came for `until_idle_s`: then flush what waits and return."""
        last_frame_s = time.monotonic()
        failures = 0
        try:
            while not self._is_stopping:
                try:
                    await self._upkeep()
                    if len(self._decided) < _MAX_DECIDED:
                        deliveries = await self._consumer.read(
                            count=self._settings.read_count, block_ms=_BLOCK_MS, skip=self._full_streams()
                        )
                        if deliveries:
                            last_frame_s = time.monotonic()
                        self._take_in(deliveries)
                        self._decide()
                        if until_idle_s is not None and time.monotonic() - last_frame_s > until_idle_s:
                            self._flush()
                            self.stop()
                    if await self._commit_next():
                        failures = 0
                except (*StreamsLost, StoreError) as error:
                    await self._back_off(error, failures)
                    failures += 1
        finally:
            await self._close()

    def _take_in(self, deliveries: Sequence[Delivery]) -> None:
        """Sort deliveries into matchers, the labels of the batch, and the dead letters."""
        now_s = time.monotonic()
        for delivery in deliveries:
            if (delivery.key, delivery.entry_id) in self._held:
                continue
            self._held.add((delivery.key, delivery.entry_id))
            match delivery.frame:
                case BadFrameError() if not delivery.fields:  # trimmed away unread: nothing to bury
                    self._decided.done.append(delivery)
                case BadFrameError() as error:
                    self._decided.dead.append((delivery, str(error)))
                case Label() as label:
                    self._decided.labels.setdefault(delivery.site, []).append(label)
                    self._decided.done.append(delivery)
                case RadarFrame() | CameraFrame() as frame:
                    side: Side = "radar" if isinstance(frame, RadarFrame) else "camera"
                    self._sort(self._matcher(delivery.site).add(side, frame.id, delivery, now_s=now_s))

    def _decide(self) -> None:
        now_s = time.monotonic()
        for matcher in self._matchers.values():
            self._sort(matcher.decide(now_s=now_s))

    def _flush(self) -> None:
        for matcher in self._matchers.values():
            self._sort(matcher.flush())

    def _sort(self, decisions: Sequence[Decision[Delivery]]) -> None:
        for decision in decisions:
            if isinstance(decision, Paired):
                radar, camera = decision.radar.frame, decision.camera.frame
                assert isinstance(radar, RadarFrame)
                assert isinstance(camera, CameraFrame)
                self._decided.pairs.setdefault(decision.radar.site, []).append(Pair(radar, camera))
                self._decided.done += [decision.radar, decision.camera]
                self.counts["radar.paired"] += 1
                self.counts["camera.paired"] += 1
            else:
                self._decided.done.append(decision.payload)
                self.counts[f"{decision.side}.{decision.reason}"] += 1

    async def _commit_next(self) -> bool:
        """Commit what is decided, one batch at a time, while the caller goes on reading.

        Returns whether nothing is left in doubt: a commit has finished, or none was due. Raises what made the
        last commit fail; its batch stays, and is the next to be committed.
        """
        is_settled = self._commit is None and not self._committing
        if self._commit is not None and (self._commit.done() or len(self._decided) >= _MAX_DECIDED):
            finished, self._commit = self._commit, None
            await finished
            is_settled = True
        if self._commit is None:
            if not self._committing:
                self._committing, self._decided = self._decided, _Batch()
            if self._committing:
                self._commit = asyncio.create_task(self._commit_batch(self._committing))
        return is_settled

    async def _commit_batch(self, batch: _Batch) -> None:
        """1. append durably, 2. bury, 3. acknowledge, 4. forget. After a failure it goes on where it stopped."""
        if batch.pairs or batch.labels:
            async with self._writing:
                await asyncio.to_thread(self._store, batch)
        while batch.dead:
            await self._bury(*batch.dead[-1])
            batch.dead.pop()
        await self._consumer.acknowledge(batch.done)
        self._held.difference_update((delivery.key, delivery.entry_id) for delivery in batch.done)
        batch.done.clear()

    async def _bury(self, delivery: Delivery, reason: str) -> None:
        await self._consumer.bury(delivery, reason)
        self._held.discard((delivery.key, delivery.entry_id))
        self.counts[f"{delivery.kind}.undecodable"] += 1
        entry = delivery.entry_id.decode()
        self._log.warning("frame_buried", site=delivery.site, stream=delivery.kind, entry=entry, reason=reason)

    def _store(self, batch: _Batch) -> None:
        for site, pairs in batch.pairs.items():
            self.counts["stored"] += self._writers[site].append(pairs)
        batch.pairs.clear()
        for site, labels in batch.labels.items():
            self.counts["labels"] += self._writers[site].append_labels(labels)
        batch.labels.clear()

    async def _upkeep(self) -> None:
        """Look for new sites, take over what dead consumers left, evict, report: each when its time has come."""
        now_s = time.monotonic()
        if now_s >= self._next_discover_s:
            await self._discover()
            self._next_discover_s = now_s + _DISCOVER_EVERY_S
        if now_s >= self._next_claim_s:
            await self._take_over()
            self._next_claim_s = now_s + self._settings.claim_idle_ms / 2e3
        if now_s >= self._next_evict_s:
            self._next_evict_s = now_s + _EVICT_EVERY_S  # first: what fails now is not tried at every turn
            async with self._writing:
                await asyncio.to_thread(self._evict)
        if now_s >= self._reported_s + _REPORT_EVERY_S:
            await self._consumer.count_trimmed()
            await asyncio.to_thread(self._report)

    async def _discover(self) -> None:
        """1. find sites, 2. lock their stores, 3. read those that are ours. The others: again next time."""
        known = self._consumer.sites
        sites = await self._consumer.find_sites()
        stores = set(sites) | await asyncio.to_thread(self._stored_sites)
        self._num_sites = len(stores)
        skipped = {}
        for site in sorted(stores - self._writers.keys()):
            try:
                self._writers[site] = await asyncio.to_thread(self._open_writer, site)
            except StoreError as error:
                skipped[site] = str(error)
        for site in sites:
            if site in self._writers:
                await self._consumer.join(site)
        skipped |= self._consumer.refused
        for name, reason in skipped.items():
            if self._skipped.get(name) != reason:
                self._log.warning("site_skipped", name=name, reason=reason)
        self._skipped = skipped
        for writer in self._writers.values():
            writer.limits = self._settings.store_limits(num_sites=self._num_sites)
        if self._consumer.sites != known:
            self._log.info("sites_found", sites=self._consumer.sites)

    def _stored_sites(self) -> set[str]:
        """Sites without a stream that have a store to keep within its limits, if all sites are ours."""
        if self._settings.site_names or not self._settings.store_dir.is_dir():
            return set()
        names = (path.name for path in self._settings.store_dir.iterdir() if path.is_dir())
        return {name for name in names if SITE_PATTERN.fullmatch(name)}

    def _open_writer(self, site: str) -> StoreWriter:
        limits = self._settings.store_limits(num_sites=self._num_sites)
        return StoreWriter(self._settings.store_dir, site, limits=limits)

    def _evict(self) -> None:
        """Hold the limits of age and free disk also where nothing new comes."""
        for writer in self._writers.values():
            writer.evict()

    async def _take_over(self) -> None:
        """Pair the entries of dead consumers among themselves: the live matchers are past their time."""
        claimed = await self._consumer.claim_stale(
            min_idle_ms=self._settings.claim_idle_ms, count=1000, held=self._held
        )
        if not claimed:
            return
        self._log.info("entries_claimed", num=len(claimed))
        live, self._matchers = self._matchers, {}
        try:
            self._take_in(claimed)
            self._flush()
        finally:
            self._matchers = live

    async def _back_off(self, error: Exception, failures: int) -> None:
        delay_s = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)]
        if failures in (0, len(_BACKOFF_S)):  # once when it starts, once when it lasts
            self._log.warning("ingest_waits", reason=str(error), retry_in_s=delay_s)
        await asyncio.sleep(delay_s)

    def _matcher(self, site: str) -> Matcher[Delivery]:
        if site not in self._matchers:
            self._matchers[site] = Matcher(
                window_ns=window_ns(self._settings.window_ms),
                grace_ns=round(self._settings.grace_ms * 1e6),
                idle_timeout_s=self._settings.idle_timeout_s,
                now_s=time.monotonic(),
            )
        return self._matchers[site]

    def _full_streams(self) -> set[tuple[str, Kind]]:
        """Streams not to read now: their frames wait for the other sensor's, which lie deeper in its stream.

        Never both of a site: then the grace alone holds that many, and more to come sets them free.
        """
        full: set[tuple[str, Kind]] = set()
        for site, matcher in self._matchers.items():
            radar_is_full = matcher.num_waiting("radar") >= _MAX_WAITING
            if radar_is_full != (matcher.num_waiting("camera") >= _MAX_WAITING):
                side: Side = "radar" if radar_is_full else "camera"
                matcher.excuse(side, now_s=time.monotonic())
                full.add((site, side))
        return full

    def _report(self) -> None:
        """One event and one log line of counters."""
        now_s = time.monotonic()
        stored = self.counts["stored"]
        rate = (stored - self._reported_num) / max(now_s - self._reported_s, 1e-9)
        self._reported_s, self._reported_num = now_s, stored
        writers = self._writers.values()
        values: dict[str, Any] = {
            "pairs_per_s": round(rate, 1),
            "pairs": sum(len(writer) for writer in writers),
            "bytes": sum(writer.num_bytes for writer in writers),
            "evicted": sum(writer.num_evicted for writer in writers),
            "trimmed": self._consumer.num_trimmed,
            "sites": self._consumer.sites,
            "counts": dict(self.counts),
        }
        self._events.emit("ingest", **values)
        self._log.debug("ingest", **values)

    async def _close(self) -> None:
        """Commit what is decided, once; what fails now stays unacknowledged and comes again at the next start."""
        try:
            while self._commit or self._committing or self._decided:
                await self._commit_next()
                if self._commit:
                    await asyncio.wait([self._commit])
        except (*StreamsLost, StoreError) as error:
            self._log.warning("ingest_stopped_short", reason=str(error))
        await asyncio.to_thread(self._report)
        for writer in self._writers.values():
            writer.close()
