"""Whose streams are classified by this replica: found, leased, shared fairly with other replicas, and let go.

Each site is one replica's at a time, so that no frame is predicted twice and one process has the whole window that
votes. The leases are not those of ingest, and a replica that cannot answer yet holds none.
"""

import asyncio
import contextlib
import socket

from api.settings import ApiSettings
from services.core.errors import StreamsError
from services.core.logs import Log
from services.core.sharing import divide
from services.core.streams import Client, NewestReader, PredictionLog, SiteLeases


class LiveSites:
    """The sites of this replica. `keep` often, `look` now and then. Methods raise StreamsLost errors."""

    def __init__(self, settings: ApiSettings, client: Client, reader: NewestReader, *, log: Log) -> None:
        self._reader = reader
        self._max_age_ms = settings.live_max_age_ms
        self._lease_s = settings.live_lease_ms / 1e3
        self._leases = SiteLeases(client, owner=socket.gethostname(), ttl_ms=settings.live_lease_ms, task="live")
        self.predictions = PredictionLog(client, self._leases)
        self._log = log
        self._has_registered = False
        self._refused: dict[str, str] = {}
        self.ours: dict[str, int] = {}
        """Site to the token of its lease."""

    async def keep(self) -> None:
        """Show that we live and renew the leases, until cancelled; nothing before the first `look`."""
        while True:
            await asyncio.sleep(self._lease_s / 3)
            if self._has_registered:
                with contextlib.suppress(Exception):  # a lost server is lost to the others, too; `look` says why
                    await self._leases.register()
                    self.drop(await self._leases.renew(dict(self.ours)))

    async def look(self) -> None:
        """1. find sites, 2. who lives and has what, 3. let go of what others should have, 4. take what is free."""
        found = await self._reader.find_sites()
        refused = dict(self._reader.refused)
        replicas = await self._leases.register()
        self._has_registered = True
        holders = await self._leases.holders(found)
        owners = divide(found, replicas, holders)
        for site in [site for site in self.ours if owners.get(site) != self._leases.owner]:
            await self._release(site)
        for site in sorted(found - self.ours.keys()):
            if (
                owners.get(site) == self._leases.owner
                and holders.get(site, self._leases.owner) == self._leases.owner
            ):
                try:
                    await self._take(site)
                except StreamsError as error:  # one of its keys is in the way: tried again at every look
                    refused[site] = str(error)
        self._say_refused(refused)
        await self._reader.look()

    def drop(self, sites: set[str]) -> None:
        """Stop at once: another replica has them by now."""
        for site in sites & self.ours.keys():
            del self.ours[site]
            self._reader.leave(site)
            self._log.warning(
                "live_site_dropped",
                site=site,
                reason="its lease is not ours any more, or predictions cannot be written",
            )

    async def close(self) -> None:
        """Let others have all of it at once."""
        for site in list(self.ours):
            await self._release(site)
        if self._has_registered:
            await self._leases.resign()

    async def _release(self, site: str) -> None:
        token = self.ours.pop(site)
        self._reader.leave(site)
        await self._leases.release(site, token=token)
        self._log.info("live_site_released", site=site)

    def _say_refused(self, refused: dict[str, str]) -> None:
        """Once each, until it is put right."""
        for name in sorted(name for name, reason in refused.items() if self._refused.get(name) != reason):
            self._log.warning("live_site_refused", site=name, reason=refused[name])
        self._refused = refused

    async def _take(self, site: str) -> None:
        """1. the lease, 2. what was predicted last: it goes on from there, as far as that is not too old."""
        token = await self._leases.acquire(site, floor=0)
        if token is None:
            return
        try:
            after = await self.predictions.last_frame(site)
        except StreamsError:
            await self._leases.release(site, token=token)
            raise
        if await self._reader.join(site, max_age_ms=self._max_age_ms, after=after):
            self.ours[site] = token
            self._log.info("live_site_taken", site=site, token=token)
        else:
            await self._leases.release(site, token=token)
