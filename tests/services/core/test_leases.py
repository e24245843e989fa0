"""Leases and the register of replicas, on one server and on a cluster."""

import pytest

from services.core.streams import REPLICAS, Replica, SiteLeases, connect, stream_key
from tests.clusters import eventually

LONG_MS = 60_000
SHORT_MS = 60


@pytest.fixture
def first(client) -> SiteLeases:
    return SiteLeases(client, owner="first", ttl_ms=LONG_MS)


@pytest.fixture
def second(client) -> SiteLeases:
    return SiteLeases(client, owner="second", ttl_ms=LONG_MS)


async def test_site_has_one_holder_until_it_is_released(first, second) -> None:
    token = await first.acquire("north", floor=0)
    assert await second.acquire("north", floor=0) is None
    assert await first.holders(["north", "south"]) == {"north": first.owner}
    await second.release("north", token=token)  # not its own: nothing happens
    assert await second.acquire("north", floor=0) is None
    await first.release("north", token=token)
    assert await second.acquire("north", floor=0) == token + 1


async def test_lease_that_ran_out_goes_to_another_with_a_higher_token(client, second, server) -> None:
    short = SiteLeases(client, owner="first", ttl_ms=SHORT_MS)
    old = await short.acquire("north", floor=0)
    token = await eventually(lambda: second.acquire("north", floor=0))
    assert token > old
    assert await short.renew({"north": old}) == {"north"}
    await short.release("north", token=old)
    assert await second.renew({"north": token}) == set()
    assert await second.holders(["north"]) == {"north": second.owner}


async def test_renewal_extends_what_is_ours_and_names_what_is_not(client, first, server) -> None:
    short = SiteLeases(client, owner="short", ttl_ms=SHORT_MS)
    tokens = {site: await short.acquire(site, floor=0) for site in ("a", "b", "c")}
    long = SiteLeases(client, owner="x", ttl_ms=LONG_MS)
    long.owner = short.owner  # the same process with a longer breath
    server.delete(stream_key("b", "lease"))
    await first.acquire("b", floor=0)
    assert await long.renew(tokens) == {"b"}
    assert server.pttl(stream_key("a", "lease")) > LONG_MS / 2
    assert await long.renew({}) == set()


async def test_token_is_above_the_floor_after_the_counter_was_lost(first, second, server) -> None:
    token = await first.acquire("north", floor=41)
    assert token == 42
    server.flushall()
    assert await first.renew({"north": token}) == {"north"}
    assert await second.acquire("north", floor=token) == 43


async def test_owner_that_lost_the_answer_gets_the_site_again_under_a_new_token(first, second) -> None:
    old = await first.acquire("north", floor=0)
    token = await first.acquire("north", floor=0)
    assert token == old + 1
    assert await first.renew({"north": old}) == {"north"}
    assert await second.acquire("north", floor=0) is None


async def test_two_processes_of_one_name_do_not_share_a_lease(client, first) -> None:
    token = await first.acquire("north", floor=0)
    twin = SiteLeases(client, owner="first", ttl_ms=LONG_MS)
    assert await twin.acquire("north", floor=0) is None
    assert await twin.renew({"north": token}) == {"north"}


async def test_many_leases_are_renewed_in_one_round_trip(redis_url, redis_client) -> None:
    client = connect(redis_url)
    leases = SiteLeases(client, owner="first", ttl_ms=LONG_MS)
    tokens = {f"site-{i}": await leases.acquire(f"site-{i}", floor=0) for i in range(20)}
    await leases.renew(tokens)  # the script is known now
    before = redis_client.info("stats")["total_reads_processed"]
    assert await leases.renew(tokens) == set()
    assert redis_client.info("stats")["total_reads_processed"] - before <= 4
    await client.aclose()


async def test_replicas_that_live_are_known_with_their_sites_and_dead_ones_drop_out(
    client, first, second, server
) -> None:
    dying = SiteLeases(client, owner="dying", ttl_ms=SHORT_MS)
    assert await dying.register() == [Replica(dying.owner)]
    limited = SiteLeases(client, owner="a name, with a comma", ttl_ms=LONG_MS, sites=("south", "north"))
    assert Replica(limited.owner, frozenset({"north", "south"})) in await limited.register()

    async def are_two() -> bool:
        return {one.owner for one in await first.register()} == {first.owner, limited.owner}

    await eventually(are_two)
    assert len(await second.register()) == 3
    assert len(await second.register()) == 3
    assert server.zcard(REPLICAS) == 3
    await second.resign()
    await limited.resign()
    assert await first.register() == [Replica(first.owner)]


async def test_member_of_the_register_that_another_version_wrote_counts_as_one_that_takes_all(
    first, server
) -> None:
    server.zadd(REPLICAS, {"host#1-ab": 10**15, "7": 10**15, "[]": 10**15})
    found = {one.owner: one.sites for one in await first.register()}
    assert found == dict.fromkeys(("host#1-ab", "7", "[]", first.owner), frozenset())


async def test_scripts_survive_a_server_that_forgot_them(first, server) -> None:
    token = await first.acquire("north", floor=0)
    server.script_flush()
    assert await first.renew({"north": token}) == set()
