"""The ingest worker: reads the streams, pairs, appends to the store, acknowledges.

The order is the correctness: a stream entry is acknowledged only after its pair is durable, so a kill at any
moment loses nothing. Which sites are its own is decided in `sites`; one site's state is in `site`.
It knows nothing of learning.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from services.core.errors import StoreError, StoreFencedError
from services.core.logs import Log
from services.core.streams import Consumer, Delivery, EventLog, Janitor, Kind, SiteLeases, StreamsLost
from services.ingest.curation import make_curator
from services.ingest.metrics import IngestMetrics
from services.ingest.settings import IngestSettings
from services.ingest.site import Site, entry_bytes
from services.ingest.sites import Sites

_BLOCK_MS = 100
_LOOK_EVERY_S = 1.0
_REPORT_EVERY_S = 2.0
_TIDY_EVERY_S = 10.0
_BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0)
_READ_BYTES = 32 * 1024**2  # wanted of one read at most, over all streams
_MAX_READ_COUNT = 128
_FIRST_ENTRY_BYTES = 1024**2  # an entry is thought to be that large until some were seen
_STALLED_S = 0.5  # a loop that took so long did not listen: silence is not the sensors'


class IngestWorker:
    """Pairs the sites that it holds the leases of into their stores."""

    def __init__(
        self,
        settings: IngestSettings,
        consumer: Consumer,
        *,
        leases: SiteLeases,
        janitor: Janitor,
        log: Log,
        events: EventLog,
    ) -> None:
        self._settings = settings
        self._consumer = consumer
        self._leases = leases
        self._janitor = janitor
        self._log = log
        self._events = events
        self.sites = Sites(settings, consumer, leases, curator=make_curator(settings), log=log)
        self.metrics = IngestMetrics(self.sites, num_trimmed=lambda: dict(consumer.num_trimmed))
        self._writing = asyncio.Lock()  # held by the one task that changes stores: a commit or the upkeep
        self._commit: asyncio.Task[None] | None = None
        self._entry_bytes: dict[Kind, float] = {}
        self._is_stopping = False
        self._next_renew_s = self._next_look_s = self._next_tidy_s = 0.0
        self._reported_s, self._reported_num = time.monotonic(), 0

    @property
    def counts(self) -> Counter[str]:
        """Over all sites, "radar.paired" and so on; "stored" are new pairs on disk, "labels" all labels."""
        total: Counter[str] = Counter()
        for tally in self.sites.tallies.values():
            total.update({f"{kind}.{reason}": num for (kind, reason), num in tally.frames.items()})
            total["stored"] += tally.num_stored
        return total

    def stop(self) -> None:
        """Commit what is decided, then return from `run`."""
        self._is_stopping = True

    async def run(self, *, until_idle_s: float | None = None) -> None:
        """Work until stopped, or until nothing came for `until_idle_s`: then flush what waits and return."""
        turned_s = time.monotonic()
        started_s = last_frame_s = turned_s
        failures = 0
        try:
            while not self._is_stopping:
                try:
                    await self._upkeep(stalled_s=time.monotonic() - turned_s)
                    turned_s = time.monotonic()
                    deliveries = await self._read()
                    if deliveries:
                        last_frame_s = time.monotonic()
                    self._take_in(deliveries)
                    if until_idle_s is not None and self._is_idle(until_idle_s, last_frame_s, started_s):
                        self._flush()
                        self.stop()
                    await self._commit_next()
                    failures = 0
                except StreamsLost as error:
                    await self._back_off(error, failures)
                    failures += 1
        finally:
            await self._close()

    def _is_idle(self, until_idle_s: float, last_frame_s: float, started_s: float) -> bool:
        """Whether nothing came for long enough; those of a dead replica are waited for until its leases end."""
        now_s = time.monotonic()
        is_complete = not self.sites.num_foreign or now_s > started_s + 2 * self._settings.lease_ms / 1e3
        return is_complete and now_s - last_frame_s > until_idle_s

    async def _read(self) -> list[Delivery]:
        """New entries of the sites that have room for them."""
        now_s = time.monotonic()
        sites = self.sites.ours.values()
        num_held = sum(site.num_waiting_bytes + site.num_decided_bytes for site in sites)
        if num_held > self._settings.max_buffer_bytes:  # the disk is behind: it frees memory, not the streams
            await self._wait_for_commit()
            return []
        full: set[tuple[str, Kind]] = set()
        for site in sites:
            side = site.full_side(now_s=now_s)
            if side is not None:
                full.add((site.name, side))
            if site.num_decided_bytes > self._settings.max_waiting_bytes:
                full |= {(site.name, "radar"), (site.name, "camera")}
        num_streams = 2 * max(len(self.sites.ours), 1)
        largest = max(self._entry_bytes.values(), default=_FIRST_ENTRY_BYTES)
        read_bytes = min(_READ_BYTES, self._settings.max_waiting_bytes // 2)
        count = max(2, min(_MAX_READ_COUNT, int(read_bytes / num_streams / largest)))
        return await self._consumer.read(count=count, block_ms=_BLOCK_MS, skip=full)

    def _take_in(self, deliveries: Sequence[Delivery]) -> None:
        """Hand the deliveries to their sites, and let every site decide what can be decided."""
        now_s = time.monotonic()
        by_site: dict[str, list[Delivery]] = {}
        for delivery in deliveries:
            by_site.setdefault(delivery.site, []).append(delivery)
        for name, its in by_site.items():
            if name in self.sites.ours:
                self.sites.ours[name].take_in(its, now_s=now_s)
        for site in self.sites.ours.values():
            if not site.is_leaving:
                site.decide(now_s=now_s)
        if deliveries:
            self._note_sizes(deliveries)

    def _note_sizes(self, deliveries: Sequence[Delivery]) -> None:
        """How large entries of each kind are: larger at once, smaller in time."""
        sizes: dict[Kind, int] = {}
        for delivery in deliveries:
            sizes[delivery.kind] = max(sizes.get(delivery.kind, 0), entry_bytes(delivery))
        for kind, size in sizes.items():
            self._entry_bytes[kind] = max(size, 0.9 * self._entry_bytes.get(kind, _FIRST_ENTRY_BYTES))

    def _flush(self) -> None:
        for site in self.sites.ours.values():
            site.flush()

    async def _commit_next(self) -> None:
        """Commit what is decided, one group of batches at a time, while the caller goes on reading.

        Raises what made the last acknowledgement fail; its batches stay, and are the next to be committed.
        """
        if self._commit is not None:
            if not self._commit.done():
                return
            finished, self._commit = self._commit, None
            await finished
        now_s = time.monotonic()
        due = [site for site in self.sites.ours.values() if site.retry_at_s <= now_s and site.begin_commit()]
        if due:
            self._commit = asyncio.create_task(self._commit_batches(due))

    async def _wait_for_commit(self) -> None:
        if self._commit is not None:
            await asyncio.wait([self._commit])
        else:
            await asyncio.sleep(_BLOCK_MS / 1e3)

    async def _commit_batches(self, sites: list[Site]) -> None:
        """1. make durable, 2. bury, 3. acknowledge, 4. forget. After a failure it goes on where it stopped."""
        async with self._writing:
            stored = await asyncio.gather(*(self._store(site) for site in sites))
        durable = [site for site, is_stored in zip(sites, stored, strict=True) if is_stored]
        for site in durable:
            dead = site.committing.dead
            while dead:
                await self._bury(site, *dead[-1])
                dead.pop()
        await self._consumer.acknowledge([one for site in durable for one, _ in site.committing.done])
        now_ms = time.time() * 1e3
        for site in durable:
            latency = self.metrics.latency.labels(site.name)
            for latency_s in site.finish_commit(now_ms=now_ms):
                latency.observe(latency_s)

    async def _store(self, site: Site) -> bool:
        """Whether the site's batch is durable. Its failures are its own: other sites go on."""
        try:
            await asyncio.to_thread(site.store)
        except StoreFencedError as error:
            if self.sites.ours.get(site.name) is site:
                await self.sites.drop(site.name, reason=str(error))
            return False
        except StoreError as error:
            delay_s = _BACKOFF_S[min(site.num_failures, len(_BACKOFF_S) - 1)]
            if site.num_failures in (0, len(_BACKOFF_S)):  # once when it starts, once when it lasts
                self._log.warning("ingest_waits", site=site.name, reason=str(error), retry_in_s=delay_s)
            site.num_failures += 1
            site.retry_at_s = time.monotonic() + delay_s
            return False
        return self.sites.ours.get(site.name) is site

    async def _bury(self, site: Site, delivery: Delivery, reason: str) -> None:
        await self._consumer.bury(delivery, reason)
        site.count_buried(delivery)
        entry = delivery.entry_id.decode()
        self._log.warning("frame_buried", site=site.name, stream=delivery.kind, entry=entry, reason=reason)

    async def _upkeep(self, *, stalled_s: float) -> None:
        """Leases, sites, limits, trimming, a report: each when its time has come."""
        now_s = time.monotonic()
        if stalled_s > _STALLED_S:
            for site in self.sites.ours.values():
                site.excuse(now_s=now_s)
        if now_s >= self._next_renew_s or stalled_s > _STALLED_S:
            self._next_renew_s = now_s + self._settings.lease_ms / 3e3
            await self.sites.keep()
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + _LOOK_EVERY_S
            await self.sites.look()
        await self._release_leaving()
        if now_s >= self._next_tidy_s:
            self._next_tidy_s = now_s + _TIDY_EVERY_S  # first: what fails now is not tried at every turn
            await self._tidy()
        if now_s >= self._reported_s + _REPORT_EVERY_S:
            await self._consumer.count_trimmed()
            self._keep_time()
            await self._report()

    async def _release_leaving(self) -> None:
        for name, site in list(self.sites.ours.items()):
            if site.is_leaving and site.is_settled:
                await self.sites.release(name)

    async def _tidy(self) -> None:
        """Hold the store's limits, remove encoded images if asked to, and trim what the streams need no more."""
        async with self._writing:
            await self.sites.share_disk()
            for site in list(self.sites.ours.values()):
                try:
                    await asyncio.to_thread(self._tidy_store, site)
                except StoreFencedError as error:
                    await self.sites.drop(site.name, reason=str(error))
                except StoreError as error:
                    self._log.warning("store_not_tidied", site=site.name, reason=str(error))
        for name, site in self.sites.ours.items():
            tidied = await self._janitor.tidy(name)
            for kind, num in tidied.num_lost.items():
                site.tally.num_lost += num
                if num:
                    self._log.warning(
                        "entries_lost", site=name, stream=kind, num=num, reason="streams beyond their limit"
                    )

    def _tidy_store(self, site: Site) -> None:
        site.writer.evict()
        if self._settings.drop_images:
            site.writer.drop_encoded_images()

    def _keep_time(self) -> None:
        for site in self.sites.ours.values():
            site.keep_time()
            if site.clock is not None and site.clock_has_changed_sides():
                say = self._log.warning if site.clock_is_off else self._log.info
                say("clocks_apart" if site.clock_is_off else "clocks_together", site=site.name, **_clock(site))
            for side, size_ns in site.take_leaps():
                self._log.warning("clock_leapt", site=site.name, sensor=side, by_s=round(size_ns / 1e9, 3))

    async def _back_off(self, error: Exception, failures: int) -> None:
        delay_s = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)]
        if failures in (0, len(_BACKOFF_S)):  # once when it starts, once when it lasts
            self._log.warning("ingest_waits", reason=str(error), retry_in_s=delay_s)
        await asyncio.sleep(delay_s)

    async def _report(self) -> None:
        """One event and one log line of counters."""
        now_s = time.monotonic()
        counts = self.counts
        rate = (counts["stored"] - self._reported_num) / max(now_s - self._reported_s, 1e-9)
        self._reported_s, self._reported_num = now_s, counts["stored"]
        values: dict[str, Any] = {
            "replica": self._settings.consumer_name,
            "pairs_per_s": round(rate, 1),
            "pairs": sum(len(site.writer) for site in self.sites.ours.values()),
            "bytes": sum(site.writer.num_bytes for site in self.sites.ours.values()),
            "evicted": sum(self.sites.num_evicted(name) for name in self.sites.tallies),
            "trimmed": sum(self._consumer.num_trimmed.values()),
            "lost": sum(tally.num_lost for tally in self.sites.tallies.values()),
            "sites": {name: self._describe(site) for name, site in self.sites.ours.items()},
            "skipped": self.sites.skipped,
            "counts": dict(counts),
        }
        await asyncio.to_thread(self._events.emit, "ingest", **values)
        self._log.debug("ingest", **values)

    def _describe(self, site: Site) -> dict[str, Any]:
        return {
            "pairs": len(site.writer),
            "bytes": site.writer.num_bytes,
            "held": site.num_held,
            "frames": {f"{kind}.{reason}": num for (kind, reason), num in sorted(site.tally.frames.items())},
            **_clock(site),
            **_latency(site),
            **self._curation(site),
        }

    def _curation(self, site: Site) -> dict[str, Any]:
        curator = self.sites.curator
        if curator is None:
            return {}
        counts = sorted(curator.counts.items())
        return {"curation": {what: num for (name, what), num in counts if name == site.name}}

    async def _close(self) -> None:
        """Commit what is decided, once; what fails now stays unacknowledged and comes again at the next start."""
        try:
            async with asyncio.timeout(_BACKOFF_S[-1] + 20.0):
                for _ in range(2):  # what was on its way, and what was decided since
                    await self._commit_next()
                    if self._commit is not None:
                        await asyncio.wait([self._commit])
                await self._commit_next()
            await self._report()
            for name in list(self.sites.ours):
                await self.sites.release(name)
            await self._leases.resign()
        except (*StreamsLost, TimeoutError) as error:
            self._log.warning("ingest_stopped_short", reason=str(error) or "the disk did not answer")
        for site in self.sites.ours.values():
            site.writer.close()


def _clock(site: Site) -> dict[str, float]:
    """What is known of a site's clocks, for people: milliseconds, camera minus radar."""
    if site.clock is None:
        return {}
    return {
        "clock_offset_ms": round(site.clock.offset_ns / 1e6, 2),
        "clock_uncertainty_ms": round(site.clock.uncertainty_ns / 1e6, 2),
        "clock_drift_ppm": round(site.clock.drift_ppm, 1),
        "clock_applied_ms": round(site.applied_offset_ns / 1e6, 2),
    }


def _latency(site: Site) -> dict[str, float]:
    """From a radar frame's arrival in its stream to its pair being durable, milliseconds, of the newest pairs."""
    if not site.latencies_s:
        return {}
    p50, p99 = np.percentile(list(site.latencies_s), [50, 99]) * 1e3
    return {"p50_ms": round(float(p50), 1), "p99_ms": round(float(p99), 1)}
