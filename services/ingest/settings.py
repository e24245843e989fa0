"""What an operator can set about ingest."""

import socket
from typing import Literal

from pydantic import Field, field_validator

from services.core.errors import BadFrameError
from services.core.frames import DEFAULT_WINDOW_MS, check_site
from services.core.store import StoreLimits
from services.ingest.curation_settings import CurationSettings


class IngestSettings(CurationSettings):
    """Pairing, clocks, the store's limits, leases, and how much memory frames may take here and on the server."""

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
    clock_offsets_ms: str = Field(
        default="", description="camera clock minus radar clock where it is known, ms: north=120,south=-4.5"
    )
    clock_correction: Literal["off", "apply"] = Field(
        default="off", description="apply: subtract the estimated clock offset of a site before pairing"
    )
    clock_alarm_ms: float = Field(
        default=100.0, gt=0, description="warn when the clocks of a site are estimated farther apart than that, ms"
    )
    max_store_bytes: int = Field(
        default=8 * 1024**3, ge=1024**2, description="size of the store over all sites; the oldest goes first"
    )
    max_age_s: float = Field(default=7 * 86400.0, gt=0, description="age at which a segment goes, seconds")
    min_free_bytes: int = Field(
        default=1024**3, ge=0, description="free disk that the store never eats into; ingest waits instead"
    )
    pinned_share: float = Field(
        default=0.25,
        ge=0,
        le=0.9,
        description="share of the store that pairs with a known class may keep for good, equal for each class",
    )
    drop_images: bool = Field(
        default=False, description="privacy: remove each camera image from disk once the trainer has encoded it"
    )
    consumer_name: str = Field(
        default_factory=socket.gethostname, description="name of this replica in the consumer group and in status"
    )
    lease_ms: int = Field(
        default=5000, ge=200, le=600_000, description="a replica silent for so long loses its sites to others, ms"
    )
    max_buffer_bytes: int = Field(
        default=256 * 1024**2,
        ge=1024**2,
        description="frames that ingest may hold in memory; beyond, it stops reading",
    )
    max_stream_bytes: int = Field(
        default=512 * 1024**2,
        ge=1024**2,
        description="memory that a site's streams may take on the server; beyond, the oldest entries go, counted",
    )
    max_dead_bytes: int = Field(
        default=64 * 1024**2, ge=1024, description="memory that a site's dead letters may take on the server"
    )
    ingest_metrics_port: int = Field(
        default=0, ge=0, le=65535, description="port on which ingest answers Prometheus at /metrics; 0: none"
    )
    ingest_metrics_host: str = Field(default="127.0.0.1", description="address of ingest_metrics_port")

    @field_validator("sites")
    @classmethod
    def _check_sites(cls, sites: str) -> str:
        for site in _split(sites):
            _check_site(site)
        return sites

    @field_validator("clock_offsets_ms")
    @classmethod
    def _check_offsets(cls, offsets: str) -> str:
        for item in _split(offsets):
            site, equals, value = item.partition("=")
            _check_site(site.strip())
            try:
                offset_ms = float(value)
            except ValueError:
                offset_ms = float("nan")
            if not equals or not abs(offset_ms) < 86_400_000:
                raise ValueError(f"{item!r} is no offset; write site=milliseconds, north=120 for instance")
        return offsets

    @property
    def site_names(self) -> tuple[str, ...]:
        return _split(self.sites)

    def clock_offset_ns(self, site: str) -> int:
        """The known offset of a site's camera clock; 0 if none is set."""
        offsets = dict(item.split("=", 1) for item in _split(self.clock_offsets_ms))
        known = {name.strip(): float(value) for name, value in offsets.items()}
        return round(known.get(site, 0.0) * 1e6)

    @property
    def max_waiting_bytes(self) -> int:
        """Of one site, in its matcher."""
        return self.max_buffer_bytes // 4

    def store_limits(self, *, max_bytes: int) -> StoreLimits:
        """The limits of one site whose share of the store is `max_bytes`."""
        return StoreLimits(
            max_bytes=max_bytes,
            max_age_s=self.max_age_s,
            min_free_bytes=self.min_free_bytes,
            pinned_share=self.pinned_share,
        )


def _split(items: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in items.split(",") if item.strip())


def _check_site(site: str) -> None:
    try:
        check_site(site)
    except BadFrameError as error:
        raise ValueError(str(error)) from None
