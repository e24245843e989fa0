"""API keys at the server: who may do what, on every sort of route, and what happens when the file changes."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from structlog.testing import capture_logs
from tritonclient.utils import InferenceServerException
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from api.access.keys import MAX_KNOWN, Access, caller_of, needed_scope
from api.app import create_app
from api.asked import Asked, put_asked
from api.settings import ApiSettings
from services.core.errors import SettingsError
from services.core.keys import KeyFile, Scope, write_keys
from tests.api.test_process import api_process
from tests.api.tiny import heatmap, listening, npy, publish_champion, registry_of, serving, until

NPY = {"content-type": "application/x-npy"}


def make_keys(path: Path, *, scopes: tuple[Scope, ...] = ("predict", "label", "admin")) -> dict[str, str]:
    """A file with a key for each scope, named after it; the keys by name."""
    file, keys = KeyFile(), {}
    for scope in scopes:
        file, keys[scope] = file.added(scope, (scope,), requests_per_s=None)
    write_keys(path, file)
    return keys


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    return make_keys(tmp_path / "keys.json")


@pytest.fixture
async def client(tmp_path: Path, keys: dict[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    publish_champion(registry_of(tmp_path))
    async with serving(tmp_path, api_keys_file=str(tmp_path / "keys.json")) as (app, client):
        await until(lambda: app.state.live.is_ready)
        yield client


async def test_without_a_key_only_the_probes_answer(client: httpx.AsyncClient) -> None:
    schema = create_app(ApiSettings.read(redis_url="")).openapi()
    for path, methods in schema["paths"].items():
        url = path.replace("{name}", "radar").replace("{version}", "1")
        for method, operation in methods.items():
            answer = await client.request(method, url)
            if "security" in operation:
                assert (answer.status_code, answer.json()["type"]) == (401, "urn:echosight:problem:no-key"), url
                assert answer.headers["www-authenticate"] == 'Bearer realm="echosight"'
            else:
                assert answer.status_code == 200, url
    for hidden in ("/docs", "/swagger", "/openapi.json", "/nothing/here"):
        assert (await client.get(hidden)).status_code == 401


async def test_each_scope_opens_its_routes_and_no_other(client: httpx.AsyncClient, keys: dict[str, str]) -> None:
    """404 and 422 and the like are answers of the route itself."""
    closed = {
        ("POST", "/v1/classify"): {"label"},
        ("POST", "/v2/models/radar/infer"): {"label"},
        ("GET", "/v1/models"): {"label"},
        ("GET", "/metrics"): {"label"},
        ("GET", "/v1/events"): {"label"},
        ("GET", "/docs"): {"label"},
        ("POST", "/v2/repository/index"): {"label"},
        ("POST", "/v1/labels"): {"predict"},
        ("POST", "/v1/models/1/promote"): {"predict", "label"},
        ("POST", "/v1/models/rollback"): {"predict", "label"},
        ("POST", "/v2/repository/models/radar/load"): {"predict", "label"},
        ("POST", "/v2/repository/models/radar/unload"): {"predict", "label"},
    }
    for (method, path), refused in closed.items():
        for name, key in keys.items():
            answer = await client.request(method, path, headers=bearer(key))
            assert (answer.status_code == 403) == (name in refused), (path, name)


async def test_a_refusal_names_the_key_and_the_scope_that_it_lacks(
    client: httpx.AsyncClient, keys: dict[str, str]
) -> None:
    answer = await client.post("/v1/models/1/promote", headers=bearer(keys["predict"]))
    assert answer.status_code == 403
    assert answer.json()["type"] == "urn:echosight:problem:missing-scope"
    assert answer.json()["detail"] == "key 'predict' has predict, POST /v1/models/1/promote needs admin"
    assert "--scope admin" in answer.json()["remedy"]
    assert answer.headers["www-authenticate"].endswith('error="insufficient_scope", scope="admin"')


@pytest.mark.parametrize(
    "path", ["/v1/models/1/promote\n", "/v1/models/rollback\n", "/v1/models//promote", "/v1/LABELS"]
)
def test_what_is_not_listed_needs_admin(path: str) -> None:
    """A route's pattern lets a line's end through, for instance."""
    assert needed_scope("POST", path) == "admin"
    assert needed_scope("DELETE", "/livez") == "admin"


async def test_a_key_may_come_in_either_header_beside_what_a_proxy_says(
    client: httpx.AsyncClient, keys: dict[str, str]
) -> None:
    key = keys["predict"]
    good: list[dict[str, str]] = [
        {"authorization": f"bearer  {key} "},
        {"x-api-key": key},
        {"authorization": "Basic cHJveHk6c2VjcmV0", "x-api-key": key},
    ]
    for headers in [*good, *good]:  # the second time from memory
        answer = await client.post("/v1/classify", content=npy(heatmap()), headers=NPY | headers)
        assert answer.status_code == 200, headers
    wrong = [key[:-1], key[:-1] + chr(ord(key[-1]) ^ 1), key.upper(), "", "es_", f"es_{key[3:15]}_"]
    for sent in wrong:
        answer = await client.post("/v1/classify", content=npy(heatmap()), headers=bearer(sent))
        assert answer.status_code == 401, sent
        assert not sent or sent not in answer.text


async def test_nothing_of_a_body_is_read_for_who_may_not_ask(client: httpx.AsyncClient) -> None:
    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""  # type: ignore[unreachable]

    assert (await client.post("/v1/classify", content=never())).status_code == 401
    assert (await client.post("/v1/labels", content=never())).status_code == 401


async def test_keys_come_and_go_with_the_file_and_a_broken_one_changes_nothing(
    tmp_path: Path, client: httpx.AsyncClient, keys: dict[str, str]
) -> None:
    async def status(key: str) -> int:
        return (await client.get("/v1/models", headers=bearer(key))).status_code

    async def settle(key: str, expected: int) -> None:
        for _ in range(1000):
            if await status(key) == expected:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"still not {expected}")

    path = tmp_path / "keys.json"
    assert await status(keys["predict"]) == 200
    new = make_keys(path)
    await settle(new["predict"], 200)
    assert await status(keys["predict"]) == 401
    with capture_logs() as logs:
        path.write_text("{")
        await until(lambda: any("keys stay" in log["event"] for log in logs))
        path.unlink()
        await until(lambda: sum("keys stay" in log["event"] for log in logs) == 2)
    assert await status(new["predict"]) == 200
    assert "damaged" in logs[0]["error"]
    newest = make_keys(path)
    await settle(newest["predict"], 200)
    assert await status(new["predict"]) == 401


def test_verified_headers_are_remembered_within_bounds(tmp_path: Path, keys: dict[str, str]) -> None:
    access = Access(ApiSettings.read(api_keys_file=str(tmp_path / "keys.json")))
    for number in range(MAX_KNOWN + 10):
        sent = b"Bearer" + b" " * (number + 1) + keys["label"].encode()
        found = access.key_of({b"authorization": sent})
        assert found is not None
        assert found.name == "label"
        assert access.key_of({b"authorization": sent + b"x"}) is None
    assert len(access._known) <= MAX_KNOWN


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "echosight.example", ""])  # noqa: S104
def test_listening_for_others_needs_keys_or_an_explicit_word(host: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="ECHOSIGHT_API_OPEN=true"):
        Access(ApiSettings.read(api_host=host))
    assert not Access(ApiSettings.read(api_host=host, api_open=True)).is_on
    make_keys(tmp_path / "keys.json")
    assert Access(ApiSettings.read(api_host=host, api_open=True, api_keys_file=str(tmp_path / "keys.json"))).is_on


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_on_loopback_everybody_may_ask(host: str) -> None:
    assert not Access(ApiSettings.read(api_host=host)).is_on


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "No such file"),
        ("{", "damaged"),
        ('{"version": 2}', "version"),
        ('{"keys": [{"name": "a"}]}', "keys.0.id"),
    ],
)
def test_a_server_does_not_start_with_keys_that_it_cannot_read(
    tmp_path: Path, content: str | None, named: str
) -> None:
    path = tmp_path / "keys.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError, match=named) as caught:
        create_app(ApiSettings.read(api_keys_file=str(path)))
    assert "keys.json" in caught.value.what


async def test_a_stream_needs_a_key_and_ends_when_the_key_is_taken_away(
    tmp_path: Path, keys: dict[str, str]
) -> None:
    publish_champion(registry_of(tmp_path))
    path = tmp_path / "keys.json"
    async with listening(tmp_path, api_keys_file=str(path)) as (app, address):
        await until(lambda: app.state.live.is_ready)
        for key, status in (("", 401), (keys["label"], 403)):
            with pytest.raises(InvalidStatus) as refused:
                async with connect(f"ws://{address}/v1/stream", additional_headers=bearer(key) if key else {}):
                    pass
            assert refused.value.response.status_code == status
        async with connect(f"ws://{address}/v1/stream", additional_headers=bearer(keys["predict"])) as stream:
            await stream.send(npy(heatmap()))
            assert "label" in json.loads(await stream.recv())
            make_keys(path, scopes=("label",))
            with contextlib.suppress(ConnectionClosed):
                for _ in range(10_000):
                    await stream.send(npy(heatmap()))
                    await stream.recv()
        assert (stream.close_code, stream.close_reason) == (1008, "the API key is no longer valid")


async def test_events_end_when_the_key_is_taken_away(tmp_path: Path, redis_url: str, keys: dict[str, str]) -> None:
    path = tmp_path / "keys.json"
    settings: dict[str, Any] = {"redis_url": redis_url, "heartbeat_s": 0.05, "api_keys_file": str(path)}
    async with (
        listening(tmp_path, **settings) as (_, address),
        httpx.AsyncClient(base_url=f"http://{address}", timeout=10.0) as client,
        client.stream("GET", "/v1/events", headers=bearer(keys["predict"])) as response,
    ):
        assert response.status_code == 200
        make_keys(path)
        async with asyncio.timeout(10.0):
            async for _ in response.aiter_lines():  # it has an end
                pass


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, dict[str, str]]]:
    """The port of a server of its own process, and its keys."""
    data_dir = tmp_path_factory.mktemp("data")
    publish_champion(registry_of(data_dir))
    keys = make_keys(data_dir / "keys.json")
    with api_process(data_dir, ECHOSIGHT_API_KEYS_FILE=str(data_dir / "keys.json")) as (_, port):
        yield port, keys


def test_tritonclient_asks_with_a_key(guarded: tuple[int, dict[str, str]]) -> None:
    port, keys = guarded
    tensor = triton.InferInput("heatmap", [1, *heatmap().shape], "FP32")
    tensor.set_data_from_numpy(heatmap()[np.newaxis])
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        assert client.is_server_ready()
        assert client.is_model_ready("radar")
        with pytest.raises(InferenceServerException, match="no API key was sent"):
            client.infer("radar", [tensor])
        answer = client.infer("radar", [tensor], headers=bearer(keys["predict"]))
        assert answer.as_numpy("probabilities").shape == (1, 4)
        with pytest.raises(InferenceServerException, match="needs admin"):
            client.load_model("radar", headers=bearer(keys["predict"]))
        client.load_model("radar", headers=bearer(keys["admin"]))


def test_a_connection_lives_through_a_refused_body(guarded: tuple[int, dict[str, str]]) -> None:
    port, keys = guarded
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20.0) as client:
        for _ in range(3):
            assert client.post("/v1/classify", content=bytes(3_000_000)).status_code == 401
            assert client.post("/v1/labels", content=bytes(3_000_000)).status_code == 401
            answer = client.post("/v1/classify", content=npy(heatmap()), headers=bearer(keys["predict"]))
            assert answer.status_code == 200


async def test_a_caller_is_named_by_its_key_or_its_address(tmp_path: Path, keys: dict[str, str]) -> None:
    scope: dict[str, Any] = {"client": ("192.0.2.7", 4711)}
    assert caller_of(scope) == "192.0.2.7"
    put_asked(scope, Asked("1", "north-radar"))
    assert caller_of(scope) == "north-radar"
    assert caller_of({}) == ""
