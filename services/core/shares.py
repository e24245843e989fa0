"""How the disk is shared out among sites: each takes what it needs, the largest give way first."""

from collections.abc import Mapping
from pathlib import Path

from services.core.disks import tree_bytes
from services.core.frames import SITE_PATTERN

_HEADROOM = 8
"""A site may always grow by this part of an equal share, until it has an equal share."""


def site_sizes(store_dir: Path) -> dict[str, int]:
    """Bytes of every site on disk, whoever writes it."""
    return {site: tree_bytes(store_dir / site) for site in stored_sites(store_dir)}


def stored_sites(store_dir: Path) -> list[str]:
    """Names of all sites that have something on disk."""
    return sorted(path.name for path in store_dir.glob("*") if SITE_PATTERN.fullmatch(path.name) and path.is_dir())


def fair_shares(sizes: Mapping[str, int], *, max_bytes: int) -> dict[str, int]:
    """How many bytes each site may take: max-min fair, together at most `max_bytes`.

    A site needs what it has and some headroom. Where that fits, all get it and an equal part of what is left over.
    Else the sites that need least get what they need, and the others the same, which is more than an equal share.
    """
    if not sizes:
        return {}
    headroom = max_bytes // len(sizes) // _HEADROOM
    shares: dict[str, int] = {}
    left = max_bytes
    in_order = sorted(sizes, key=lambda site: (sizes[site], site))
    for num_done, site in enumerate(in_order):
        shares[site] = min(sizes[site] + headroom, left // (len(sizes) - num_done))
        left -= shares[site]
    return {site: share + left // len(sizes) for site, share in shares.items()}
