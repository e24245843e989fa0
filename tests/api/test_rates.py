"""Rate limits: the bucket by value, and the answers of a server that has one."""

import json
from pathlib import Path

import httpx
import pytest
from websockets.asyncio.client import connect

from api.access.rates import MAX_CALLERS, Rates
from api.problems import ProblemError
from api.settings import ApiSettings
from services.core.keys import KeyFile, write_keys
from tests.api.test_access import bearer
from tests.api.tiny import heatmap, listening, npy, publish_champion, registry_of, serving, until


class Clock:
    """Seconds that pass when they are told to."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def taken(rates: Rates, caller: str, *, limit: float | None = None, tries: int = 100) -> int:
    """How many of so many tries are let through."""
    count = 0
    for _ in range(tries):
        try:
            rates.take(caller, limit)
        except ProblemError:
            continue
        count += 1
    return count


def make(clock: Clock, **settings: float) -> Rates:
    return Rates(ApiSettings.read(**settings), clock=clock)


def test_a_burst_goes_through_and_then_as_many_as_the_rate() -> None:
    clock = Clock()
    rates = make(clock, rate_limit=10.0, rate_burst_s=2.0)
    assert taken(rates, "a") == 20
    clock.now_s += 0.5
    assert taken(rates, "a") == 5
    clock.now_s += 3600.0
    assert taken(rates, "a") == 20


def test_callers_do_not_pay_for_one_another_and_a_key_may_have_its_own_limit() -> None:
    clock = Clock()
    rates = make(clock, rate_limit=1.0, rate_burst_s=3.0)
    assert taken(rates, "a") == 3
    assert taken(rates, "b") == 3
    assert taken(rates, "c", limit=5.0) == 15
    assert taken(rates, "d", limit=0.0) == 100
    assert taken(make(clock), "a") == 100
    assert taken(rates, "e", limit=5e-324) == 1


def test_a_slow_rate_lets_one_at_a_time_through_and_says_when_the_next() -> None:
    clock = Clock()
    rates = make(clock, rate_limit=0.25, rate_burst_s=1.0)
    rates.take("a", None)
    clock.now_s += 1.0
    with pytest.raises(ProblemError) as caught:
        rates.take("a", None)
    assert caught.value.headers == {"retry-after": "3"}
    clock.now_s += 3.0
    rates.take("a", None)


def test_callers_are_forgotten_rather_than_piled_up() -> None:
    clock = Clock()
    rates = make(clock, rate_limit=1.0)
    for number in range(2 * MAX_CALLERS):
        rates.take(str(number), None)
        clock.now_s += 0.001
    assert len(rates._full_at_s) <= MAX_CALLERS


async def test_who_asks_too_often_is_told_when_to_come_back_and_probes_always_answer(tmp_path: Path) -> None:
    file, north = KeyFile().added("north", ("predict",), requests_per_s=0.01)
    file, south = file.added("south", ("predict",), requests_per_s=None)
    write_keys(tmp_path / "keys.json", file)
    publish_champion(registry_of(tmp_path))
    async with serving(tmp_path, api_keys_file=str(tmp_path / "keys.json")) as (app, client):
        await until(lambda: app.state.live.is_ready)

        async def ask(key: str) -> httpx.Response:
            return await client.post("/v1/classify", content=npy(heatmap()), headers=bearer(key))

        assert (await ask(north)).status_code == 200
        for path in ("/v1/classify", "/v1/models"):
            method = "POST" if path.endswith("classify") else "GET"
            refused = await client.request(method, path, headers=bearer(north))
            assert (refused.status_code, refused.json()["type"]) == (429, "urn:echosight:problem:rate-limited")
            assert 90 <= int(refused.headers["retry-after"]) <= 100
            assert "north may ask 0.01 times a second" in refused.json()["detail"]
        assert [(await ask(south)).status_code for _ in range(5)] == [200] * 5
        assert [(await client.get("/livez", headers=bearer(north))).status_code for _ in range(5)] == [200] * 5


async def test_messages_of_a_stream_count_and_without_keys_an_address_is_the_caller(tmp_path: Path) -> None:
    publish_champion(registry_of(tmp_path))
    async with listening(tmp_path, rate_limit=0.01, rate_burst_s=300.0) as (app, address):
        await until(lambda: app.state.live.is_ready)
        async with connect(f"ws://{address}/v1/stream") as stream:
            answers = []
            for _ in range(4):
                await stream.send(npy(heatmap()))
                answers.append(json.loads(await stream.recv()))
    assert [answer.get("status", 200) for answer in answers] == [200, 200, 429, 429]  # the handshake was the first
    assert "127.0.0.1 may ask" in answers[-1]["detail"]
