"""`echosight bench serve` against a real server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner

from services.cli import app
from services.client.load.requests import BODIES
from services.commands.bench_serve import find_target
from tests.api.test_process import api_process
from tests.api.tiny import SHAPE, publish_champion, registry_of

QUICK = ("--seconds", "0.2", "--no-ceiling")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    data_dir = tmp_path_factory.mktemp("data")
    publish_champion(registry_of(data_dir))
    with api_process(data_dir) as (_, port):
        yield f"http://127.0.0.1:{port}"


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "serve", *arguments])


def test_finds_what_the_live_model_takes(url: str) -> None:
    target = find_target(url)
    assert (target.model, target.version, target.shape, target.unit) == ("radar", 1, SHAPE, "dB")


@pytest.mark.parametrize("body", BODIES)
def test_every_body_is_answered(url: str, body: str) -> None:
    done = bench(url, *QUICK, "--clients", "2", "--batch", "2", "--body", body, "--json")
    assert done.exit_code == 0, done.output
    found = orjson.loads(done.stdout)
    [row] = found["results"]
    assert row["by_status"].keys() == {"200"}
    assert row["frames_per_s"] == 2 * row["requests_per_s"] > 0
    assert row["p50_ms"] <= row["p99.9_ms"] <= row["max_ms"]
    assert set(row["server_ms"]) == (set() if body.startswith("v2") else {"decode", "queue", "inference"})


def test_prints_a_row_for_each_number_of_clients_and_draws_them(url: str, tmp_path: Path) -> None:
    picture = tmp_path / "latency.png"
    done = bench(url, "--seconds", "0.2", "--clients", "3,1", "--plot", str(picture))
    assert done.exit_code == 0, done.output
    assert [line.split()[0] for line in done.stdout.splitlines()[:3]] == ["clients", "1", "3"]
    assert "the load generator alone reaches" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--clients", "0"), "--clients is '0'; give numbers"),
        (("--body", "xml"), "--body is 'xml'; use one of npy"),
        (("--plot", "latency.doc"), "--plot is 'latency.doc'"),
        (("--store", "/nowhere"), "none of 0 pairs"),
    ],
)
def test_what_cannot_be_is_said_before_any_load(url: str, arguments: tuple[str, ...], message: str) -> None:
    done = bench(url, *QUICK, *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_refused_requests_end_it_with_status_1(url: str) -> None:
    done = bench(url, *QUICK, "--clients", "1", "--batch", "65", "--json")
    assert done.exit_code == 1
    assert orjson.loads(done.stdout)["results"][0]["by_status"].keys() == {"422"}
