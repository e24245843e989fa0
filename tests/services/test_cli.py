"""`echosight status` on what lies on disk, and errors that tell the next step."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from services import cli
from services.core.store import StoreLimits, StoreWriter
from tests.conftest import label, pair
from tests.system.conftest import free_port, processes_of, wait_for


def echosight(*arguments: str, data_dir: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments],
        env={**os.environ, "ECHOSIGHT_DATA_DIR": str(data_dir), "REDIS_URL": "", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_status_tells_what_is_stored_without_a_server(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "store", "north", limits=StoreLimits(min_free_bytes=0))
    writer.append([pair(0), pair(100, seq=1)])
    writer.append_labels([label(0, "car")])
    writer.close()
    done = echosight("status", "--json", data_dir=tmp_path)
    assert done.returncode == 0, done.stderr
    found = orjson.loads(done.stdout)
    assert found["store"] | {"bytes": 0} == {"pairs": 2, "bytes": 0, "sites": ["north"], "labels": 1}
    assert "echosight up" in found["streams"]
    assert "2 pairs" in echosight("status", data_dir=tmp_path).stdout


@pytest.mark.parametrize("as_json", [False, True])
def test_status_of_a_server_that_does_not_answer_says_so_and_shows_no_zeros(tmp_path: Path, as_json: bool) -> None:
    writer = StoreWriter(tmp_path / "store", "north", limits=StoreLimits(min_free_bytes=0))
    writer.append([pair(0)])
    writer.close()
    arguments = ("status", "--json") if as_json else ("status",)
    done = echosight(*arguments, data_dir=tmp_path, REDIS_URL="redis://:secret@127.0.0.1:1/0")
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert "redis://***@127.0.0.1:1/0 does not answer" in said
    assert "put REDIS_URL right" in said
    assert "secret" not in done.stdout + done.stderr
    assert "pairs/s" not in done.stdout
    if as_json:
        found = orjson.loads(done.stdout)
        assert (found["store"]["pairs"], found["ingest"], found["trainer"]) == (1, None, None)
    else:
        assert "1 pairs" in done.stdout


def test_status_of_an_address_that_is_none_says_what_to_write(tmp_path: Path) -> None:
    done = echosight("status", data_dir=tmp_path, REDIS_URL="http://somewhere")
    assert done.returncode == 2
    assert "use redis://host:port/db" in " ".join(done.stderr.split())


def test_bad_setting_is_one_line_with_the_variable_its_value_and_the_remedy(tmp_path: Path) -> None:
    done = echosight("ingest", data_dir=tmp_path, ECHOSIGHT_WINDOW_MS="-3")
    assert done.returncode == 2
    assert "ECHOSIGHT_WINDOW_MS is '-3'" in done.stderr
    assert "settings.md" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["", "up", "status", "ingest", "serve", "record", "store export"])
def test_help_names_the_command_that_people_type_and_what_to_do_with_it(tmp_path: Path, command: str) -> None:
    done = echosight(*command.split(), "--help", data_dir=tmp_path, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert f"Usage: echosight {command}".rstrip() in done.stdout
    assert "python -m" not in done.stdout
    assert "`echosight " in done.stdout or "Example" in done.stdout


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ECHOSIGHT_API_PORT", "abc"),
        ("ECHOSIGHT_API_PORT", "99999"),
        ("ECHOSIGHT_DATA_DIR", "/proc/nope"),
        ("ECHOSIGHT_API_HOST", "x" * 70),
    ],
)
def test_up_says_in_one_line_which_setting_cannot_work(tmp_path: Path, name: str, value: str) -> None:
    port = {"ECHOSIGHT_API_PORT": str(free_port())}
    done = echosight("up", "--no-simulate", data_dir=tmp_path, **(port | {name: value}))
    assert done.returncode == 2
    line = done.stderr.replace("\n", " ")
    assert name in line
    assert value in done.stderr.replace("\n", "")
    assert ";" in line
    assert "Traceback" not in done.stderr + done.stdout


def test_up_is_stopped_by_a_hangup_and_leaves_no_process(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "services.cli", "up", "--no-simulate", "--port", str(free_port())],
        env={**os.environ, "ECHOSIGHT_DATA_DIR": str(tmp_path), "REDIS_URL": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for((tmp_path / "redis" / "server.json").exists, timeout_s=30, what="embedded server")
        process.send_signal(signal.SIGHUP)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "stopped" in output
    assert processes_of(tmp_path) == []


def test_up_gives_the_api_more_time_than_its_grace_and_stops_it_last(tmp_path: Path, monkeypatch) -> None:
    given: list[Any] = []

    class Listening:
        def __init__(self, _: Any, workers: Any, **__: Any) -> None:
            given.extend(workers)

        def run(self) -> None:
            pass

    monkeypatch.setattr(cli, "Supervisor", Listening)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setenv("ECHOSIGHT_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("ECHOSIGHT_CONSUMER_NAME", "test")
    monkeypatch.setenv("ECHOSIGHT_STOP_GRACE_S", "70")
    cli.up(site=["north", "south"])
    workers = {worker.name: worker for worker in given}
    assert workers["api"].stop_timeout_s > 70
    assert [worker.stage for worker in given] == [0, 0, 1, 2, 2]
    assert [worker.name for worker in given if worker.may_finish] == ["sensors-north", "sensors-south"]


def test_worker_without_a_server_says_how_to_get_one(tmp_path: Path) -> None:
    done = echosight("ingest", data_dir=tmp_path)
    assert done.returncode == 2
    assert "echosight up" in done.stderr
