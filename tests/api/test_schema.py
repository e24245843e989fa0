"""The OpenAPI schema is kept: whatever it allows, no answer is a failure or one that it does not describe."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import redis
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from api.app import create_app
from api.problems import KINDS
from api.routes.openapi import PROBLEM_EXAMPLES
from api.settings import ApiSettings
from services.core.embedded import start_embedded_server
from services.core.streams import stream_key
from tests.api.test_access import bearer, make_keys
from tests.api.test_process import api_process
from tests.api.tiny import SHAPE, heatmap, npy, publish_champion, registry_of

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
MAX_EXAMPLES = 10

_good = [npy(heatmap()), npy(heatmap(2, *SHAPE)), heatmap().tobytes()]
_bodies = (
    st.sampled_from(_good)
    | st.binary(max_size=200)
    | st.binary(max_size=99).map(lambda tail: _good[0][:128] + tail)
)
schemathesis.openapi.media_type("application/x-npy", _bodies)
schemathesis.openapi.media_type("application/octet-stream", _bodies)


_HEATMAP = {"name": "heatmap", "shape": list(SHAPE), "datatype": "FP32", "data": [1.0] * 24}
_KNOWN: dict[str, Any] = {
    "/v1/labels": {"site": "north", "captured_at_ns": 1, "seq": 2, "label": "car"},
    "/v1/classify": {"heatmap": heatmap().tolist()},
    "/v1/embed": {"heatmaps": [heatmap().tolist()]},
    "/v2/models/{name}/infer": {"inputs": [_HEATMAP], "outputs": [{"name": "probabilities"}]},
    "/v2/models/{name}/versions/{version}/infer": {"inputs": [_HEATMAP], "id": "7"},
}


@schemathesis.hook
def map_case(context: Any, case: Any) -> Any:
    """Every second case is one that the server likes: by the schema alone hardly any would be."""
    if crc32(repr((case.path_parameters, case.body, case.query)).encode()) % 2:
        known = {"name": "radar", "version": 2}
        case.path_parameters = {name: known[name] for name in case.path_parameters or {}}
        if case.operation.path in _KNOWN:
            case.body, case.media_type = _KNOWN[case.operation.path], "application/json"
            case.query, case.headers = {}, {}
    return case


@pytest.fixture(scope="module", params=["open", "with keys"])
def api_schema(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, dict[str, str]]]:
    """The schema of a server with two versions and streams, in a process of its own; what to ask it with."""
    data_dir = tmp_path_factory.mktemp("data")
    publish_champion(registry_of(data_dir))
    publish_champion(registry_of(data_dir))
    with ExitStack() as stack:
        server = start_embedded_server(tmp_path_factory.mktemp("redis"))
        stack.callback(server.stop)
        with redis.Redis.from_url(server.url) as client:
            client.xadd(stream_key("north", "radar"), {"header": "", "data": ""})  # the site exists
        headers: dict[str, str] = {}
        # What is asked moves the champion: on a slow machine the server would follow in the middle.
        settings = {"REDIS_URL": server.url, "ECHOSIGHT_POLL_INTERVAL_S": "3600"}
        if request.param == "with keys":
            headers = bearer(make_keys(data_dir / "keys.json")["admin"])
            settings["ECHOSIGHT_API_KEYS_FILE"] = str(data_dir / "keys.json")
        process, port = stack.enter_context(api_process(data_dir, **settings))
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json", headers=dict(headers))
        yield schema.exclude(path="/v1/events"), headers  # which has no end
        assert process.poll() is None


def test_every_answer_is_described(api_schema: tuple[Any, dict[str, str]]) -> None:
    schema, headers = api_schema
    good: set[tuple[str, str]] = set()
    asked: set[tuple[str, str]] = set()
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=MAX_EXAMPLES,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
            database=None,
        )
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            response = case.call_and_validate(checks=CHECKS, headers=headers, timeout=30.0)
            asked.add((case.method, case.path))
            if response.status_code < 300:
                good.add((case.method, case.path))

        ask()
    assert asked - good == {("GET", "/v1/stream")}  # which is no plain HTTP
    assert len(asked) > 25


def test_every_operation_says_which_scope_it_needs_and_how_it_refuses(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys.json")
    with_keys = create_app(ApiSettings.read(redis_url="", api_keys_file=str(tmp_path / "keys.json"))).openapi()
    without = create_app(ApiSettings.read(redis_url="")).openapi()
    assert set(with_keys["components"]["securitySchemes"]) == {"bearer", "api_key"}
    needs: dict[str, set[str]] = {}
    for path, methods in with_keys["paths"].items():
        for method, operation in methods.items():
            security = operation.get("security")
            answers = set(operation["responses"])
            if security is None:
                needs.setdefault("nothing", set()).add(path)
                assert not {"401", "429"} & answers, path
            else:
                [[scope], [same]] = [row for way in security for row in way.values()]
                assert scope == same
                needs.setdefault(scope, set()).add(f"{method.upper()} {path}")
                assert {"401", "403", "429"} <= answers, path
                assert without["paths"][path][method]["security"] == [{}, *security]
    assert needs["label"] == {"POST /v1/labels"}
    assert needs["admin"] == {
        "POST /v1/models/rollback",
        "POST /v1/models/{version}/promote",
        "POST /v2/repository/models/{name}/load",
        "POST /v2/repository/models/{name}/unload",
    }
    assert needs["nothing"] == {
        "/livez",
        "/startupz",
        "/readyz",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/{name}/ready",
        "/v2/models/{name}/versions/{version}/ready",
    }


def test_every_kind_of_problem_has_an_example() -> None:
    assert set(PROBLEM_EXAMPLES) == {kind.name for kind in KINDS}


def test_every_body_and_answer_has_an_example(tmp_path: Path) -> None:
    app = create_app(ApiSettings.read(data_dir=tmp_path, redis_url=""))
    for path, methods in app.openapi()["paths"].items():
        for method, operation in methods.items():
            described = {"body": operation.get("requestBody", {}), **operation["responses"]}
            for where, part in described.items():
                for media_type, content in part.get("content", {}).items():
                    is_binary = content.get("schema", {}).get("format") == "binary"
                    assert is_binary or content.get("examples"), f"{method} {path}, {where}, {media_type}"
            assert operation["summary"]


def test_every_parameter_is_explained_and_every_problem_is_one_of_its_path() -> None:
    schema = create_app(ApiSettings.read(redis_url="")).openapi()
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            for parameter in operation.get("parameters", []):
                assert parameter.get("description"), (path, parameter["name"])
                assert "example" in parameter or parameter["in"] != "path", (path, parameter["name"])
            for answer in operation["responses"].values():
                for one in (
                    answer.get("content", {}).get("application/problem+json", {}).get("examples", {}).values()
                ):
                    assert one["value"]["instance"] == path.format(name="radar", version=7)
                    assert ("error" in one["value"]) == path.startswith("/v2")
