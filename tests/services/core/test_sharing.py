"""How sites are divided among replicas: even, stable, and never to one that may not hold them."""

import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from services.core.sharing import divide
from services.core.streams import Replica

SITES = ("a", "b", "c", "d", "e")


def replicas(*names: str) -> list[Replica]:
    return [Replica(name) for name in names]


def loads(owners: dict[str, str]) -> list[int]:
    return sorted(Counter(owners.values()).values(), reverse=True)


def test_four_sites_of_three_replicas_are_two_one_one() -> None:
    assert loads(divide("abcd", replicas("x", "y", "z"), {})) == [2, 1, 1]
    assert loads(divide("abcd", replicas("x", "y", "z"), {"a": "x", "b": "x", "c": "y", "d": "y"})) == [2, 1, 1]


def test_nothing_moves_that_would_not_make_it_more_even() -> None:
    held = {"a": "y", "b": "x", "c": "z", "d": "x"}
    assert divide("abcd", replicas("x", "y", "z"), held) == held


def test_replica_that_joins_gets_its_part_and_no_other_site_moves() -> None:
    held = {"a": "x", "b": "x", "c": "y", "d": "y"}
    moved = {
        site: owner for site, owner in divide("abcd", replicas("x", "y", "z"), held).items() if held[site] != owner
    }
    assert set(moved.values()) == {"z"}
    assert len(moved) == 1


def test_sites_of_a_dead_replica_go_to_those_that_have_least() -> None:
    owners = divide("abcde", replicas("x", "y"), {"a": "dead", "b": "x", "c": "x", "d": "dead", "e": "y"})
    assert owners["b"] == owners["c"] == "x"
    assert loads(owners) == [3, 2]


def test_replicas_keep_to_the_sites_that_they_may_hold() -> None:
    limited = [Replica("x", frozenset({"a", "b"})), Replica("y", frozenset({"b", "c"})), Replica("z")]
    assert divide("ab", limited[:2], {"a": "x", "b": "y"}) == {"a": "x", "b": "y"}
    assert loads(divide("abcd", limited, {"a": "z", "b": "z", "c": "z", "d": "z"})) == [2, 1, 1]
    assert divide("abcd", limited[:2], {}).keys() == set("abc")


def test_site_moves_by_way_of_a_third_replica_where_that_evens_it() -> None:
    limited = [Replica("x", frozenset("ab")), Replica("y", frozenset("abc")), Replica("z", frozenset("c"))]
    assert loads(divide("abc", limited, {"a": "x", "b": "x", "c": "y"})) == [1, 1, 1]


subsets = st.frozensets(st.sampled_from(SITES))


@given(
    st.lists(subsets, min_size=1, max_size=4), st.dictionaries(st.sampled_from(SITES), st.sampled_from("0123x"))
)
def test_division_is_as_even_as_any_and_its_own_answer_is_kept(may_hold, holders) -> None:
    living = [Replica(str(i), sites) for i, sites in enumerate(may_hold)]
    owners = divide(SITES, living, holders)
    assert divide(SITES, reversed(living), owners) == owners
    takers = {site: [one.owner for one in living if one.may_hold(site)] for site in SITES}
    takers = {site: found for site, found in takers.items() if found}
    assert owners.keys() == takers.keys()
    assert all(owner in takers[site] for site, owner in owners.items())
    evenest = min(loads(dict(zip(takers, chosen, strict=True))) for chosen in itertools.product(*takers.values()))
    assert loads(owners) == evenest
