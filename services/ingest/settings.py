"""What an operator can set about ingest."""

import socket

from pydantic import Field, field_validator

from services.core.errors import BadFrameError
from services.core.frames import DEFAULT_WINDOW_MS, check_site
from services.core.settings import CoreSettings
from services.core.store import StoreLimits


class IngestSettings(CoreSettings):
    """Pairing, the store's limits, and how streams are read."""

    sites: str = Field(
        default="", description="comma-separated sites to ingest; empty: all that have a radar stream"
    )
    window_ms: int = Field(
        default=DEFAULT_WINDOW_MS,
        ge=1,
        le=10_000,
        description="farthest apart that a pair may be, whole ms: 31 takes 31.9",
    )
    grace_ms: float = Field(
        default=100.0, ge=0, le=60_000, description="how far out of order a sensor may deliver, ms"
    )
    idle_timeout_s: float = Field(
        default=2.0, gt=0, le=3600, description="a sensor silent for so long is not waited for, seconds"
    )
    max_store_bytes: int = Field(
        default=8 * 1024**3, ge=1024**2, description="size of the store over all sites; the oldest goes first"
    )
    max_age_s: float = Field(default=7 * 86400.0, gt=0, description="age at which a segment goes, seconds")
    min_free_bytes: int = Field(
        default=1024**3, ge=0, description="free disk that the store never eats into; ingest waits instead"
    )
    pinned_share: float = Field(
        default=0.25, ge=0, le=0.9, description="share of the store that labelled pairs may keep for good"
    )
    consumer_name: str = Field(
        default_factory=socket.gethostname,
        description="name in the consumer group; a restart under the same name resumes its own entries",
    )
    claim_idle_ms: int = Field(
        default=15_000, ge=100, description="entries that a dead consumer left for so long are taken over, ms"
    )
    read_count: int = Field(default=128, ge=1, le=10_000, description="entries a stream and round trip")

    @field_validator("sites")
    @classmethod
    def _check_sites(cls, sites: str) -> str:
        for site in _split(sites):
            try:
                check_site(site)
            except BadFrameError as error:
                raise ValueError(str(error)) from None
        return sites

    @property
    def site_names(self) -> tuple[str, ...]:
        return _split(self.sites)

    def store_limits(self, *, num_sites: int) -> StoreLimits:
        """One site's equal share."""
        return StoreLimits(
            max_bytes=self.max_store_bytes // max(num_sites, 1),
            max_age_s=self.max_age_s,
            min_free_bytes=self.min_free_bytes,
            pinned_share=self.pinned_share,
        )


def _split(sites: str) -> tuple[str, ...]:
    return tuple(site.strip() for site in sites.split(",") if site.strip())
