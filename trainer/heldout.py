"""Which stretches of a site's time are never learnt from. Pure: decided by site and time alone.

Time is cut into periods; in each, one stretch of `STRETCH_S` is held out, at a place drawn from a hash of the site
and the period: every process agrees, also after a restart, and no rhythm of the traffic can hide in it. Around it
lies a guard that is neither learnt nor held out, for what is seen seconds apart is nearly the same scene.

    |---- learnt ----| guard | held out | guard |------- learnt -------|        one period of STRETCH_S / share
"""

import hashlib
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

STRETCH_S = 20.0
GUARD_S = 4.0
MAX_SHARE = 0.5
"""Beyond it guards would leave next to nothing to learn."""
_STRETCH_NS, _GUARD_NS = round(STRETCH_S * 1e9), round(GUARD_S * 1e9)


_T = TypeVar("_T")


def is_held_out(site: str, at_ns: int, *, share: float) -> bool:
    """Whether what `site` saw at `at_ns` (capture time) is for judging only. share: of all time, 0 for nothing."""
    return share > 0 and _outside_ns(site, at_ns, share) == 0


def may_learn(site: str, at_ns: int, *, share: float) -> bool:
    """Whether it is neither held out nor in a guard."""
    return share <= 0 or _outside_ns(site, at_ns, share) > _GUARD_NS


def stretch_of(at_ns: int, *, share: float) -> int:
    """The number of the period, and so of the one held-out stretch in it: what a bootstrap draws as a whole."""
    return at_ns // _period_ns(share)


def thinned(
    newest_first: Iterable[_T], *, where: Callable[[_T], tuple[Hashable, int]], every_s: float, newest: int
) -> list[_T]:
    """One item for each `every_s` of a site's time, at most the `newest` of each site, oldest first.

    newest_first: in falling order of time. where: an item's site and time in ns. Time is cut into cells that count
    from 1970, so that a later look finds the same items again.
    """
    cell_ns = max(1, round(every_s * 1e9))
    kept: dict[Hashable, dict[int, _T]] = {}
    for item in newest_first:
        site, at_ns = where(item)
        of_site = kept.setdefault(site, {})
        if at_ns // cell_ns in of_site or len(of_site) < newest:
            of_site[at_ns // cell_ns] = item  # the first of its cell stays
    return [item for of_site in kept.values() for item in reversed(of_site.values())]


def _outside_ns(site: str, at_ns: int, share: float) -> int:
    """How far from the held-out stretch of its period; 0 within."""
    period_ns = _period_ns(share)
    period, at_ns = divmod(at_ns, period_ns)
    digest = hashlib.blake2b(f"{site}/{period}".encode(), digest_size=8).digest()
    start_ns = _GUARD_NS + int.from_bytes(digest, "big") % (period_ns - _STRETCH_NS - 2 * _GUARD_NS)
    return max(start_ns - at_ns, at_ns - (start_ns + _STRETCH_NS - 1), 0)


def _period_ns(share: float) -> int:
    return round(_STRETCH_NS / share)
