"""From decided to durable and acknowledged, one group of batches at a time, while others are being read.

The order is the correctness: nothing is acknowledged before it is durable, so a kill at any moment loses nothing.
It decides nothing.
"""

import asyncio
import contextlib
import time
from collections import Counter

from services.core.errors import StoreError, StoreFencedError, StreamsError
from services.core.logs import Log
from services.core.streams import Consumer, StreamsLost
from services.ingest.metrics import IngestMetrics
from services.ingest.site import Site
from services.ingest.sites import Sites

BACKOFF_S = (0.2, 0.5, 1.0, 2.0)
_WAIT_S = 0.1
_SMALL_BYTES = 4 * 1024**2
_SMALL_EVERY_S = 0.05  # between small groups: each site's part of a group costs a sync of its own
_BURY_AT_ONCE = 64
_MAX_SAID = 5  # burials of a site that the log tells one by one, between two reports; the counters have all


class Committer:
    """Commits the batches of all sites. writing: held by whoever changes stores."""

    def __init__(self, sites: Sites, consumer: Consumer, *, metrics: IngestMetrics, log: Log) -> None:
        self._sites = sites
        self._consumer = consumer
        self._metrics = metrics
        self._log = log
        self._commit: asyncio.Task[None] | None = None
        self._is_finishing = False
        self._is_in_doubt = False  # since a failure, until the next success
        self._has_committed = asyncio.Event()
        self._num_said: Counter[str] = Counter()  # burials of a site in the log since the last report
        self.writing = asyncio.Lock()

    async def next(self) -> bool:
        """See to it that what is decided is committed, while the caller goes on reading; whether all is well.

        Raises what made the last acknowledgement fail; its batches stay, and are the next to be committed.
        """
        if self._commit is not None and self._commit.done():
            finished, self._commit = self._commit, None
            self._is_in_doubt = True
            await finished
            self._is_in_doubt = False
        if self._commit is None and (due := self._due()):
            self._commit = asyncio.create_task(self._commit_all(due))
        return not self._is_in_doubt

    def forget_failure(self) -> None:
        """The server was waited for: a commit that failed meanwhile is tried again without another wait."""
        if self._commit is not None and self._commit.done() and isinstance(self._commit.exception(), StreamsLost):
            self._commit = None
            self._is_in_doubt = True

    def _due(self) -> list[Site]:
        now_s = time.monotonic()
        return [site for site in self._sites.ours.values() if site.retry_at_s <= now_s and site.begin_commit()]

    async def _commit_all(self, due: list[Site]) -> None:
        """One group of batches after the other, until nothing is decided."""
        while due:
            started_s = time.monotonic()
            num_bytes = sum(site.num_decided_bytes for site in due)
            await self._commit_batches(due)
            self._has_committed.set()
            if self._is_finishing:
                return
            if num_bytes < _SMALL_BYTES:
                await asyncio.sleep(started_s + _SMALL_EVERY_S - time.monotonic())
            due = self._due()

    async def wait(self) -> None:
        """Until a group of batches is committed, for a moment at most."""
        self._has_committed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._has_committed.wait(), _WAIT_S)

    async def _commit_batches(self, sites: list[Site]) -> None:
        """1. make durable, 2. acknowledge, 3. bury, 4. forget. After a failure it goes on where it stopped.

        Burying comes last: a server that is full refuses it, and only what is acknowledged can be trimmed.
        """
        async with self.writing:
            stored = await asyncio.gather(*(self._store(site) for site in sites))
        durable = [site for site, is_stored in zip(sites, stored, strict=True) if is_stored]
        await self._consumer.acknowledge([one for site in durable for one, _ in site.committing.done])
        durable = [site for site in durable if await self._bury(site)]
        now_ms = time.time() * 1e3
        for site in durable:
            latency = self._metrics.latency.labels(site.name)
            for latency_s in site.finish_commit(now_ms=now_ms):
                latency.observe(latency_s)

    async def _store(self, site: Site) -> bool:
        """Whether the site's batch is durable. Its failures are its own: other sites go on."""
        try:
            await asyncio.to_thread(site.store)
        except StoreFencedError as error:
            if self._sites.ours.get(site.name) is site:
                await self._sites.drop(site, reason=str(error))
            return False
        except StoreError as error:
            self._put_off(site, error)
            return False
        return self._sites.ours.get(site.name) is site

    async def _bury(self, site: Site) -> bool:
        """Whether all that the batch refuses lies in the dead letters. It fails for its site alone."""
        while site.committing.dead:
            some = site.committing.dead[-_BURY_AT_ONCE:]
            try:
                if not all(await self._consumer.bury(some)):
                    # Not pending any more: buried by us, and the answer got lost, or by who has the site now. If
                    # nobody has taken it by now, it was us.
                    await asyncio.to_thread(site.writer.check_token)
            except StoreFencedError as error:
                await self._sites.drop(site, reason=str(error))
                return False
            except (StoreError, StreamsError, *StreamsLost) as error:
                self._put_off(site, error)
                return False
            site.finish_burial(some)
            for delivery, reason in some[: max(0, _MAX_SAID - self._num_said[site.name])]:
                self._num_said[site.name] += 1
                entry = delivery.entry_id.decode()
                self._log.warning(
                    "frame_buried", site=site.name, stream=delivery.kind, entry=entry, reason=reason[:500]
                )
        return True

    def _put_off(self, site: Site, error: Exception) -> None:
        """Try the site's batch again later, ever more rarely; said once when it starts, once when it lasts."""
        delay_s = BACKOFF_S[min(site.num_failures, len(BACKOFF_S) - 1)]
        if site.num_failures in (0, len(BACKOFF_S)):
            self._log.warning("ingest_waits", site=site.name, reason=str(error), retry_in_s=delay_s)
        site.num_failures += 1
        site.retry_at_s = time.monotonic() + delay_s

    async def finish(self) -> None:
        """Commit what is decided, once. Raises StreamsLost errors."""
        self._is_finishing = True
        if self._commit is not None:
            await asyncio.wait([self._commit])
        await self.next()
        if self._commit is not None:
            await self._commit

    def say_again(self) -> None:
        """From now on the log tells burials one by one again, up to a few."""
        self._num_said.clear()
