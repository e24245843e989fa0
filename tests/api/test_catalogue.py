"""The registry over HTTP: one version, promotion, rollback, history."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from tests.api.tiny import attach, heatmap, npy, publish, publish_champion, registry_of, serving, tiny_model, until


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[tuple[FastAPI, httpx.AsyncClient]]:
    """Versions 1 and 2 have been champions, 2 is; 3 has not been exported; 4 was refused."""
    registry = registry_of(tmp_path)
    publish_champion(registry)
    publish_champion(registry)
    publish(registry)
    publish(registry)
    attach(registry, 4, tiny_model(4))
    for version in (3, 4):
        registry.refuse(version, by="test", why="sees ghosts")
    async with serving(tmp_path) as (app, client):
        await until(lambda: app.state.live.version == 2)
        yield app, client


@pytest.fixture
def client(api: tuple[FastAPI, httpx.AsyncClient]) -> httpx.AsyncClient:
    return api[1]


async def live_version(client: httpx.AsyncClient) -> int:
    answer = await client.post("/v1/classify", content=npy(heatmap()))
    return int(answer.json()["model"]["version"])


async def test_one_version_is_shown_as_in_the_list(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()["versions"]
    shown = (await client.get("/v1/models/2")).json()
    assert shown == listed[2]
    assert (shown["is_live"], shown["aliases"]) == (True, ["champion"])
    missing = await client.get("/v1/models/99")
    assert (missing.status_code, "no version 99" in missing.json()["detail"]) == (404, True)
    assert (await client.get("/v1/models/two")).status_code == 422


async def test_rollback_serves_the_one_before_and_writes_who_and_why(
    api: tuple[FastAPI, httpx.AsyncClient],
) -> None:
    app, client = api
    answer = await client.post("/v1/models/rollback", json={"by": "ada", "why": "sees ghosts"})
    assert answer.status_code == 200
    assert (answer.json()["aliases"]["champion"], answer.json()["aliases"]["previous"]) == (1, 2)
    await until(lambda: app.state.live.version == 1)
    assert await live_version(client) == 1
    last = (await client.get("/v1/models/history")).json()["history"][-1]
    assert (last["by"], last["why"], last["moved"]) == ("ada", "sees ghosts", {"champion": 1, "previous": 2})


async def test_promotion_by_number(client: httpx.AsyncClient) -> None:
    assert (await client.post("/v1/models/1/promote")).json()["aliases"]["champion"] == 1
    again = await client.post("/v1/models/1/promote")
    assert (again.status_code, again.json()["aliases"]["champion"]) == (200, 1)


@pytest.mark.parametrize("origin", ["https://example.org", "http://api:81", "null", ""])
async def test_a_page_of_another_site_moves_nothing(client: httpx.AsyncClient, origin: str) -> None:
    headers = {"origin": origin, "content-type": "text/plain"}
    answer = await client.post("/v1/models/rollback", content=b"{}", headers=headers)
    assert (answer.status_code, repr(origin) in answer.json()["detail"]) == (403, True)
    assert (await client.get("/v1/models")).json()["aliases"]["champion"] == 2
    own = await client.post("/v1/models/rollback", headers={"origin": "http://API"})
    assert own.status_code == 200


@pytest.mark.parametrize(
    ("version", "status", "named"), [(99, 404, "no version"), (4, 409, "sees ghosts"), (0, 422, "version")]
)
async def test_what_cannot_be_served_is_not_promoted(
    client: httpx.AsyncClient, version: int, status: int, named: str
) -> None:
    answer = await client.post(f"/v1/models/{version}/promote")
    assert (answer.status_code, named in answer.json()["detail"]) == (status, True)
    assert (await client.get("/v1/models")).json()["aliases"]["champion"] == 2


async def test_a_held_version_that_was_not_exported_is_promoted_exported_and_served(tmp_path: Path) -> None:
    registry = registry_of(tmp_path)
    publish(registry, verdict="hold")
    async with serving(tmp_path) as (app, client):
        (tmp_path / "prepared" / "1.onnx").write_bytes(tiny_model(1))
        answer = await client.post("/v1/models/1/promote")
        assert (answer.status_code, answer.json()["aliases"]) == (200, {"champion": 1})
        await until(lambda: app.state.live.version == 1)
        nothing = await client.post("/v1/models/rollback")
        assert (nothing.status_code, "no champion before" in nothing.json()["detail"]) == (409, True)
