"""What ingest tells people about its sites, in events and logs. It only reads."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from services.ingest.site import Site
from services.ingest.sites import Sites


def describe(sites: Sites, *, rates: Mapping[str, float]) -> dict[str, Any]:
    """All that `echosight status` shows of one replica, but for what the streams know.

    rates: site to new pairs a second.
    """
    ours = sites.ours.values()
    return {
        "pairs": sum(len(site.writer) for site in ours),
        "bytes": sum(site.writer.num_bytes for site in ours),
        "evicted": sum(sites.num_evicted(name) for name in sites.tallies),
        "lost": sum(tally.num_lost for tally in sites.tallies.values()),
        "sites": {site.name: _describe(site, sites, rate=rates.get(site.name, 0.0)) for site in ours},
        "skipped": sites.skipped,
    }


def describe_clock(site: Site) -> dict[str, float]:
    """What is known of a site's clocks: milliseconds, camera minus radar."""
    if site.clock is None:
        return {}
    return {
        "clock_offset_ms": round(site.clock.offset_ns / 1e6, 2),
        "clock_uncertainty_ms": round(site.clock.uncertainty_ns / 1e6, 2),
        "clock_drift_ppm": round(site.clock.drift_ppm, 1),
        "clock_applied_ms": round(site.applied_offset_ns / 1e6, 2),
    }


def _describe(site: Site, sites: Sites, *, rate: float) -> dict[str, Any]:
    described: dict[str, Any] = {
        "token": site.writer.token,  # of two replicas that tell of the site, the one with the higher token has it
        "pairs_per_s": round(rate, 1),
        "pairs": len(site.writer),
        "bytes": site.writer.num_bytes,
        "held": site.num_held,
        "frames": {f"{kind}.{reason}": num for (kind, reason), num in sorted(site.tally.frames.items())},
        **describe_clock(site),
        **_latency(site),
    }
    if sites.curator is not None:
        counts = sorted(sites.curator.counts.items())
        described["curation"] = {what: num for (name, what), num in counts if name == site.name}
    return described


def _latency(site: Site) -> dict[str, float]:
    """From a radar frame's arrival in its stream to its pair being durable, milliseconds, of the newest pairs."""
    if not site.latencies_s:
        return {}
    p50, p99 = np.percentile(list(site.latencies_s), [50, 99]) * 1e3
    return {"p50_ms": round(float(p50), 1), "p99_ms": round(float(p99), 1)}
