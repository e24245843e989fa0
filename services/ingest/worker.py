"""The ingest worker: reads the streams, pairs, appends to the store, acknowledges.

The order is the correctness: a stream entry is acknowledged only after its pair is durable, so a kill at any
moment loses nothing. Which sites are its own is decided in `sites`; one site's state is in `site`.
It knows nothing of learning.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Sequence

from services.core.errors import StoreError, StoreFencedError
from services.core.logs import Log
from services.core.streams import KINDS, Consumer, Delivery, EventLog, Janitor, Kind, SiteLeases, StreamsLost
from services.ingest.commit import BACKOFF_S, Committer
from services.ingest.curation import make_curator
from services.ingest.matcher import Side
from services.ingest.metrics import IngestMetrics
from services.ingest.report import describe, describe_clock
from services.ingest.settings import IngestSettings
from services.ingest.site import Site, entry_bytes
from services.ingest.sites import Sites

_BLOCK_MS = 100
_LOOK_EVERY_S = 1.0
_REPORT_EVERY_S = 2.0
_TRIM_EVERY_S = 2.0
_TIDY_EVERY_S = 10.0
_READ_BYTES = 32 * 1024**2  # wanted of one read at most, over all streams
_MAX_READ_COUNT = 128
_FIRST_ENTRY_BYTES = 1024**2  # an entry is thought to be that large until some were seen
_FEW = 64  # entries of a read; below, the next one waits a moment for more: reading costs by the call
_PAUSE_S = 0.02
_SIDES: tuple[Side, ...] = ("radar", "camera")
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
        self._committer = Committer(self.sites, consumer, metrics=self.metrics, log=log)
        self._entry_bytes: dict[Kind, float] = {}
        self._said: set[tuple[str, str]] = set()
        self._is_stopping = False
        self._next_look_s = self._next_trim_s = self._next_tidy_s = 0.0
        self._reported_s, self._reported_num = time.monotonic(), Counter[str]()

    @property
    def counts(self) -> Counter[str]:
        """Over all sites: "radar.paired", "labels.stored" and so on; "stored" are new pairs on disk."""
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
        keeping = asyncio.create_task(self._keep_leases())
        try:
            while not self._is_stopping:
                try:
                    if keeping.done():
                        await keeping  # what ended it ends us: nobody works without leases
                    await self._upkeep(stalled_s=time.monotonic() - turned_s)
                    turned_s = time.monotonic()
                    deliveries = await self._read()
                    if deliveries:
                        last_frame_s = time.monotonic()
                    self._take_in(deliveries)
                    if 0 < len(deliveries) < _FEW:
                        await asyncio.sleep(_PAUSE_S)
                    if until_idle_s is not None and self._is_idle(until_idle_s, last_frame_s, started_s):
                        self._flush()
                        self.stop()
                    if await self._committer.next():
                        failures = 0
                except StreamsLost as error:
                    await self._back_off(error, failures)
                    failures += 1
        finally:
            await self._close()
            keeping.cancel()

    def _is_idle(self, until_idle_s: float, last_frame_s: float, started_s: float) -> bool:
        """Whether nothing came for long enough; those of a dead replica are waited for until its leases end."""
        now_s = time.monotonic()
        is_complete = not self.sites.num_foreign or now_s > started_s + 2 * self._settings.lease_ms / 1e3
        return is_complete and now_s - last_frame_s > until_idle_s

    async def _read(self) -> list[Delivery]:
        """New entries of the sites that have room for them."""
        sites = list(self.sites.ours.values())
        num_held = sum(site.num_waiting_bytes + site.num_decided_bytes for site in sites)
        room = self._settings.max_waiting_bytes
        if num_held > self._settings.max_buffer_bytes:  # each site keeps to its part: no one stops the others
            room = min(room, self._settings.max_buffer_bytes // len(sites))
        full: set[tuple[str, Kind]] = set()
        for site in sites:
            site.forget_done()
            if site.num_decided_bytes > room:
                full |= {(site.name, kind) for kind in KINDS}
            elif side := site.full_side(limit_bytes=room // 2):
                full.add((site.name, side))
        largest = max(self._entry_bytes.values(), default=_FIRST_ENTRY_BYTES)
        read_bytes = min(_READ_BYTES, self._settings.max_waiting_bytes // 2)
        count = max(2, min(_MAX_READ_COUNT, int(read_bytes / max(2 * len(sites), 1) / largest)))
        if sites and len(full) == len(KINDS) * len(sites):
            await self._committer.wait()
            deliveries = []
        else:
            deliveries = await self._consumer.read(count=count, block_ms=_BLOCK_MS, skip=full)
        # A sensor whose stream may hold more than was read is not silent, whatever lies in between.
        pages = Counter((one.site, one.kind) for one in deliveries)
        for site in sites:
            is_behind = self._consumer.is_behind(site.name)
            unread = [s for s in _SIDES if is_behind or (site.name, s) in full or pages[site.name, s] >= count]
            self._excuse([site], unread)
        return deliveries

    def _excuse(self, sites: Sequence[Site], sides: Sequence[Side]) -> None:
        for site in sites:
            site.excuse(*sides, now_s=time.monotonic())

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

    async def _keep_leases(self) -> None:
        """Renew them whatever the rest is busy with; while the server is away nobody else gets them either."""
        while True:
            with contextlib.suppress(*StreamsLost):
                await self.sites.keep()
            await asyncio.sleep(self._settings.lease_ms / 3e3)

    async def _upkeep(self, *, stalled_s: float) -> None:
        """Leases, sites, limits, trimming, a report: each when its time has come."""
        now_s = time.monotonic()
        if stalled_s > _STALLED_S:
            self._excuse(list(self.sites.ours.values()), _SIDES)
            await self.sites.keep()  # a paused process may have lost them: before anything is decided
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + _LOOK_EVERY_S
            await self.sites.look()
        await self._release_leaving()
        if now_s >= self._next_tidy_s:
            self._next_tidy_s = now_s + _TIDY_EVERY_S  # first: what fails now is not tried at every turn
            await self._tidy()
        if now_s >= self._next_trim_s:
            self._next_trim_s = now_s + _TRIM_EVERY_S
            await self._trim()
        if now_s >= self._reported_s + _REPORT_EVERY_S:
            await self._consumer.count_trimmed()
            self._committer.say_again()
            self._keep_time()
            await self._report()

    async def _release_leaving(self) -> None:
        for name, site in list(self.sites.ours.items()):
            if site.is_leaving and site.is_settled:
                await self.sites.release(name)

    async def _tidy(self) -> None:
        """Hold the store's limits, and remove encoded images if asked to."""
        async with self._committer.writing:
            try:
                await self.sites.share_disk()
            except OSError as error:  # a folder that cannot be looked into: the shares stay as they are
                self._say_once("disk_not_shared", site="", reason=str(error))
            for site in list(self.sites.ours.values()):
                try:
                    await asyncio.to_thread(self._tidy_store, site)
                    self._said.discard(("store_not_tidied", site.name))
                except StoreFencedError as error:
                    await self.sites.drop(site, reason=str(error))
                except StoreError as error:
                    self._say_once("store_not_tidied", site=site.name, reason=str(error))

    def _say_once(self, event: str, *, site: str, reason: str) -> None:
        """Until it has been well again in between."""
        if (event, site) not in self._said:
            self._said.add((event, site))
            self._log.warning(event, site=site, reason=reason)

    async def _trim(self) -> None:
        """Free the server's memory of what every reader has finished."""
        for name, site in list(self.sites.ours.items()):
            num_lost = sum((await self._janitor.tidy(name)).num_lost.values())
            site.tally.num_lost += num_lost
            if num_lost:
                self._say_once(
                    "entries_lost", site=name, reason=f"streams beyond their limit: {num_lost}, and more"
                )
            else:
                self._said.discard(("entries_lost", name))

    def _tidy_store(self, site: Site) -> None:
        site.writer.evict()
        if self._settings.drop_images:
            site.writer.drop_encoded_images()

    def _keep_time(self) -> None:
        for site in self.sites.ours.values():
            site.keep_time()
            if site.clock is not None and site.clock_has_changed_sides():
                say = self._log.warning if site.clock_is_off else self._log.info
                say(
                    "clocks_apart" if site.clock_is_off else "clocks_together",
                    site=site.name,
                    **describe_clock(site),
                )
            for side, size_ns in site.take_leaps():
                self._log.warning("clock_leapt", site=site.name, sensor=side, by_s=round(size_ns / 1e9, 3))

    async def _back_off(self, error: Exception, failures: int) -> None:
        delay_s = BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]
        if failures in (0, len(BACKOFF_S)):  # once when it starts, once when it lasts
            self._log.warning("ingest_waits", reason=str(error), retry_in_s=delay_s)
        await asyncio.sleep(delay_s)
        self._committer.forget_failure()

    async def _report(self) -> None:
        """One event and one log line of counters."""
        now_s = time.monotonic()
        num_stored = Counter({name: tally.num_stored for name, tally in self.sites.tallies.items()})
        news, seconds = num_stored - self._reported_num, max(now_s - self._reported_s, 1e-9)
        self._reported_s, self._reported_num = now_s, num_stored
        values = {
            "replica": self._settings.consumer_name,
            "pairs_per_s": round(news.total() / seconds, 1),
            "trimmed": sum(self._consumer.num_trimmed.values()),
            "counts": dict(self.counts),
            **describe(self.sites, rates={name: num / seconds for name, num in news.items()}),
        }
        await asyncio.to_thread(self._events.emit, "ingest", **values)
        self._log.debug("ingest", **values)

    async def _close(self) -> None:
        """Commit what is decided, once; what fails now stays unacknowledged and comes again at the next start."""
        try:
            async with asyncio.timeout(BACKOFF_S[-1] + 20.0):
                await self._committer.finish()
            await self._report()
            for name in list(self.sites.ours):
                await self.sites.release(name)
            await self._leases.resign()
        except TimeoutError:
            self._log.warning("ingest_stopped_short", reason="the disk did not answer")
            return  # a thread still holds the stores; who takes them next seals them
        except StreamsLost as error:
            self._log.warning("ingest_stopped_short", reason=str(error))
        for site in self.sites.ours.values():
            site.writer.close()
