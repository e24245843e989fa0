"""Whom an open server answers, by the name that it is asked under; and that one with keys does not look at it."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from api.access.hosts import is_private, name_in
from api.settings import ApiSettings
from services.core.errors import SettingsError
from tests.api.test_access import bearer, make_keys
from tests.api.tiny import heatmap, listening, npy, publish_champion, registry_of, serving, until

EVIL = {"host": "evil.example:8000", "origin": "http://evil.example:8000"}
"""What a browser sends for a page whose name has come to mean 127.0.0.1."""
NPY = {"content-type": "application/x-npy"}


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    publish_champion(registry_of(tmp_path))
    async with serving(tmp_path, allowed_hosts="radar.example, Other.Example") as (app, client):
        await until(lambda: app.state.live.is_ready)
        yield client


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/v2"),
        ("POST", "/v1/classify"),
        ("POST", "/v2/models/radar/infer"),
        ("POST", "/v1/models/rollback"),
        ("GET", "/nothing"),
    ],
)
async def test_a_rebound_page_gets_nothing_and_the_problem_names_the_setting(
    client: httpx.AsyncClient, method: str, path: str
) -> None:
    answer = await client.request(method, path, headers=EVIL)
    assert answer.status_code == 421
    problem = answer.json()
    assert problem["type"] == "urn:echosight:problem:unknown-host"
    assert "'evil.example'" in problem["detail"]
    assert "ECHOSIGHT_ALLOWED_HOSTS" in problem["remedy"]


@pytest.mark.parametrize(
    "host",
    [
        "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "192.168.7.9", "api:8000", "API", "sight.localhost:1",
        "api.default.svc.cluster.local", "host.docker.internal:8000", "radar.example", "RADAR.example.:443",
        "other.example:9",
    ],
)  # fmt: skip
async def test_addresses_local_names_and_those_that_are_listed_are_answered(
    client: httpx.AsyncClient, host: str
) -> None:
    for _ in range(2):
        answer = await client.post("/v1/classify", content=npy(heatmap()), headers={"host": host, **NPY})
        assert answer.status_code == 200


async def test_probes_are_open_under_any_name(client: httpx.AsyncClient) -> None:
    for path in ("/livez", "/startupz", "/readyz", "/v2/health/live", "/v2/models/radar/ready"):
        assert (await client.get(path, headers=EVIL)).status_code == 200


async def test_a_websocket_of_a_rebound_page_is_not_opened(tmp_path: Path) -> None:
    publish_champion(registry_of(tmp_path))
    async with listening(tmp_path, allowed_origins="http://evil.example") as (app, address):
        await until(lambda: app.state.live.is_ready)
        _, _, port = address.rpartition(":")
        with pytest.raises(InvalidStatus, match="421"):
            async with connect(
                "ws://evil.example/v1/stream", host="127.0.0.1", port=int(port), origin="http://evil.example"
            ):  # type: ignore[arg-type]
                pass


@pytest.mark.parametrize("settings", [{"allowed_hosts": "*"}, {"api_keys_file": "keys.json"}])
async def test_any_name_will_do_where_it_is_said_or_there_are_keys(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    keys = make_keys(tmp_path / "keys.json")
    given = {name: str(tmp_path / value) if name == "api_keys_file" else value for name, value in settings.items()}
    async with serving(tmp_path, **given) as (_, client):
        answer = await client.get("/v1/models", headers=bearer(keys["predict"]) | {"host": "radar.example"})
        assert answer.status_code == 200


async def test_an_open_server_for_others_is_asked_by_name_as_well(tmp_path: Path) -> None:
    async with serving(tmp_path, api_host="0.0.0.0", api_open=True) as (_, client):  # noqa: S104 - nobody listens
        assert (await client.get("/v1/models", headers={"host": "api:8000"})).status_code == 200
        assert (await client.get("/v1/models", headers={"host": "evil.example"})).status_code == 421


@pytest.mark.parametrize(
    "name", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "1.2.3", "a:b"]
)
def test_names_that_a_page_can_have_are_not_private(name: str) -> None:
    assert not is_private(name)


def test_a_host_header_is_read_as_a_browser_writes_it() -> None:
    found = [name_in(host) for host in (b"A.example:80", b"[::1]:80", b"a.", b"", b"a:", b"\xff.example")]
    assert found == ["a.example", "::1", "a", "", "a:", "\xff.example"]


@pytest.mark.parametrize("hosts", ["http://radar.example", "radar.example:443", "*.example", "a b"])
def test_what_is_no_name_ends_the_process_with_what_to_write(hosts: str) -> None:
    with pytest.raises(SettingsError, match="is no name of a host"):
        ApiSettings.read(allowed_hosts=hosts)
