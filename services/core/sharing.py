"""Which replica should have which site: as even as it can be, with as few hand-overs as that takes.

Every replica works this out from the same facts and comes to the same answer, so nobody has to be asked. It knows
neither leases nor stores.
"""

from collections import deque
from collections.abc import Iterable, Mapping

from services.core.streams import Replica


def divide(sites: Iterable[str], replicas: Iterable[Replica], holders: Mapping[str, str]) -> dict[str, str]:
    """Site to the owner that should have it; a site that no replica may hold is left out.

    holders: site to who has it now, living or not. What somebody holds stays there unless two replicas that could
    share would differ by two sites or more. That leaves the most even division there is: a semi-matching without
    a path that makes it more even is optimal (Harvey et al., Semi-matchings for bipartite graphs, 2006).
    """
    living = {replica.owner: replica for replica in sorted(replicas, key=lambda one: one.owner)}
    takers = {site: [owner for owner, one in living.items() if one.may_hold(site)] for site in sorted(sites)}
    held: dict[str, list[str]] = {owner: [] for owner in living}
    for site, owner in sorted(holders.items()):
        if owner in takers.get(site, ()):
            held[owner].append(site)
    has_holder = {site for its in held.values() for site in its}
    for site, owners in takers.items():
        if site not in has_holder and owners:
            held[min(owners, key=lambda owner: len(held[owner]))].append(site)
    while path := _path_that_evens(held, takers):
        for giver, site, taker in path:
            held[giver].remove(site)
            held[taker].append(site)
    return {site: owner for owner, its in held.items() for site in its}


def _path_that_evens(held: Mapping[str, list[str]], takers: Mapping[str, list[str]]) -> list[tuple[str, str, str]]:
    """(giver, site, taker) from a replica with many sites, perhaps by way of others, to one with two fewer."""
    fewest = min(map(len, held.values()), default=0)
    for start in sorted(held, key=lambda owner: -len(held[owner])):
        if len(held[start]) < fewest + 2:
            break
        reached: dict[str, tuple[str, str] | None] = {start: None}
        waiting = deque([start])
        while waiting:
            giver = waiting.popleft()
            for site in held[giver]:
                for taker in takers[site]:
                    if taker in reached:
                        continue
                    reached[taker] = (giver, site)
                    waiting.append(taker)
                    if len(held[taker]) <= len(held[start]) - 2:
                        return _back(reached, taker)
    return []


def _back(reached: Mapping[str, tuple[str, str] | None], last: str) -> list[tuple[str, str, str]]:
    path = []
    while step := reached[last]:
        giver, site = step
        path.append((giver, site, last))
        last = giver
    return path
