"""Which sites are this replica's: found, leased, opened, shared fairly with other replicas, and let go.

A site is read by the replica that holds its lease: both sensors' frames must come to one matcher. The lease's
token fences the store, so that a replica that was paused while another took over does no harm when it wakes up.
"""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from services.core.errors import StoreError, StoreFencedError
from services.core.frames import SITE_PATTERN
from services.core.logs import Log
from services.core.sharing import divide
from services.core.store import StoreWriter, fair_shares, newest_token, site_sizes
from services.core.streams import Consumer, SiteLeases
from services.ingest.settings import IngestSettings
from services.ingest.site import Site, Tally

if TYPE_CHECKING:  # it brings image libraries along, which only curation needs
    from services.ingest.curation import Curator

_KEEP_UNWANTED_S = 60.0
_MAX_PUT_OFF_S = 60.0


class Sites:
    """The sites of this replica. `keep` often, `look` now and then, `share_disk` rarely.

    skipped: site or key to why it is not ingested here. num_replicas: how many live, this one included.
    num_foreign: sites with streams that are not ours now.
    """

    def __init__(
        self,
        settings: IngestSettings,
        consumer: Consumer,
        leases: SiteLeases,
        *,
        curator: "Curator | None",
        log: Log,
    ) -> None:
        self._settings = settings
        self._consumer = consumer
        self._leases = leases
        self.curator = curator
        self._log = log
        self._opening: dict[str, int] = {}  # site to the token under which its store is being opened
        self._retry_at_s: dict[str, float] = {}
        self._num_refusals: dict[str, int] = {}
        self._free_since_s: dict[str, float] = {}
        self._kept_until_s: dict[str, float] = {}  # sites that no other replica wanted
        self._shares: dict[str, int] = {}
        self.ours: dict[str, Site] = {}
        self.tallies: dict[str, Tally] = {}
        self.skipped: dict[str, str] = {}
        self.num_replicas = 1
        self.num_foreign = 0

    async def keep(self) -> None:
        """Show that we live and renew the leases; a site that went to another replica is dropped as it is."""
        await self._leases.register()
        sites = dict(self.ours)
        tokens = {name: site.writer.token for name, site in sites.items()}
        for name in await self._leases.renew(tokens | self._opening):
            if name in sites:
                await self.drop(sites[name], reason="its lease went to another replica")

    async def look(self) -> None:
        """1. find sites, 2. who lives and has what, 3. let go of what others should have, 4. take what is free."""
        found = await self._consumer.find_sites()
        skipped = dict(self._consumer.refused)
        names = {*found, *await asyncio.to_thread(self._stored_sites)}
        replicas = await self._leases.register()
        self.num_replicas = len(replicas)
        holders = await self._leases.holders(names)
        owners = divide(names, replicas, holders)
        self._let_go_of_what_others_should_have(owners)
        for name in sorted(name for name in names if self._may_hold(name)):
            try:
                if name not in self.ours:
                    is_due = owners.get(name) == self._leases.owner
                    is_free = (
                        holders.get(name, self._leases.owner) == self._leases.owner
                    )  # ours: an answer got lost
                    await self._take(name, is_due=is_due, is_free=is_free)
                site = self.ours.get(name)
                if site and not site.is_leaving and name in found and not await self._consumer.join(name):
                    skipped |= self._consumer.refused
            except StoreFencedError:  # taken between two looks: the next one sees who has it
                continue
            except StoreError as error:
                skipped[name] = str(error)
                self._put_off(name)
        skipped |= {name: self.skipped[name] for name in self._retry_at_s if name in self.skipped}
        foreign = {name for name in found if self._may_hold(name)} - self.ours.keys() - skipped.keys()
        self.num_foreign = len(foreign)
        self._say_skipped(skipped)

    async def drop(self, site: Site, *, reason: str) -> None:
        """Stop at once: what is not acknowledged stays with the streams, for the replica that has the site now."""
        if self.ours.get(site.name) is site:  # else somebody else has noticed it first
            await self._close(site.name)
            self._log.warning("site_dropped", site=site.name, reason=reason)

    async def release(self, name: str) -> None:
        """Give up a site whose last batch is committed. What waits for a partner stays unacknowledged."""
        if name not in self.ours:
            return
        site = await self._close(name)
        await self._leases.release(name, token=site.writer.token)
        self._log.info("site_released", site=name)

    async def share_disk(self) -> None:
        """Hold all limits, also where nothing new comes: what a quiet site does not need, others may use."""
        sizes = await asyncio.to_thread(site_sizes, self._settings.store_dir)
        sizes |= {name: site.writer.num_bytes for name, site in self.ours.items()}
        self._shares = fair_shares(sizes, max_bytes=self._settings.max_store_bytes)
        for name, site in self.ours.items():
            site.writer.limits = self._settings.store_limits(max_bytes=self._shares[name])

    def num_evicted(self, name: str) -> int:
        """Pairs of a site that the limits took, since this process started."""
        site = self.ours.get(name)
        return self.tallies[name].num_evicted + (site.writer.num_evicted if site else 0)

    async def _close(self, name: str) -> Site:
        site = self.ours.pop(name)
        self._consumer.leave(name)
        await asyncio.to_thread(site.writer.close)
        site.tally.num_evicted += site.writer.num_evicted
        if self.curator is not None:
            self.curator.forget(name)
        return site

    def _may_hold(self, name: str) -> bool:
        return not self._settings.site_names or name in self._settings.site_names

    def _let_go_of_what_others_should_have(self, owners: Mapping[str, str]) -> None:
        """Read no more of it; the worker releases it once its batch is committed."""
        now_s = time.monotonic()
        for name, site in self.ours.items():
            is_anothers = owners.get(name, self._leases.owner) != self._leases.owner
            if is_anothers and not site.is_leaving and self._kept_until_s.get(name, 0.0) < now_s:
                site.is_leaving = True
                self._consumer.leave(name)

    async def _take(self, name: str, *, is_due: bool, is_free: bool) -> None:
        """1. the lease, 2. the store's fence. What another should have only if it does not want it for a while."""
        now_s = time.monotonic()
        if not is_free:
            self._free_since_s.pop(name, None)
            return
        free_since_s = self._free_since_s.setdefault(name, now_s)
        if now_s < self._retry_at_s.get(name, 0.0):
            return
        is_unwanted = now_s - free_since_s > 3 * self._settings.lease_ms / 1e3
        if not is_due and not is_unwanted:
            return
        store_dir = self._settings.store_dir
        floor = await asyncio.to_thread(newest_token, store_dir, name)
        token = await self._leases.acquire(name, floor=floor)
        if token is None:
            self._free_since_s.pop(name, None)
            return
        self._opening[name] = token  # it may take longer than a lease lasts
        try:
            writer = await asyncio.to_thread(self._open, store_dir, name, token)
        except StoreError:
            await self._leases.release(name, token=token)
            raise
        finally:
            del self._opening[name]
        self._retry_at_s.pop(name, None)
        self._num_refusals.pop(name, None)
        self._free_since_s.pop(name, None)
        if not is_due:
            self._kept_until_s[name] = now_s + _KEEP_UNWANTED_S
        tally = self.tallies.setdefault(name, Tally())
        self.ours[name] = Site(writer, settings=self._settings, curator=self.curator, tally=tally)
        self._log.info("site_taken", site=name, token=token, num_pairs=len(writer))

    def _open(self, store_dir: Path, name: str, token: int) -> StoreWriter:
        share = self._shares.get(name, self._settings.max_store_bytes // (len(self._shares) + 1))
        limits = self._settings.store_limits(max_bytes=share)
        return StoreWriter(store_dir, name, limits=limits, token=token, owner=self._settings.consumer_name)

    def _put_off(self, name: str) -> None:
        """Try to open it ever more rarely: each time costs the reading of the whole store."""
        self._num_refusals[name] = self._num_refusals.get(name, 0) + 1
        self._retry_at_s[name] = time.monotonic() + min(2.0 ** self._num_refusals[name], _MAX_PUT_OFF_S)

    def _stored_sites(self) -> set[str]:
        """Sites that have a store to keep within its limits, with a stream or without."""
        if not self._settings.store_dir.is_dir():
            return set()
        names = (path.name for path in self._settings.store_dir.iterdir() if path.is_dir())
        return {name for name in names if SITE_PATTERN.fullmatch(name)}

    def _say_skipped(self, skipped: dict[str, str]) -> None:
        for name, reason in skipped.items():
            if self.skipped.get(name) != reason:
                self._log.warning("site_skipped", name=name, reason=reason)
        self.skipped = skipped
