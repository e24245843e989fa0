"""`echosight keys`: add, list, remove, and what goes wrong."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.cli import app
from services.commands.keys import add
from services.core.keys import Keys, read_keys


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "keys.json"
    monkeypatch.setenv("ECHOSIGHT_API_KEYS_FILE", str(path))
    monkeypatch.setenv("COLUMNS", "200")
    return path


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["keys", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_a_key_is_shown_once_and_listed_without_its_secret(path: Path) -> None:
    status, output, _ = run("add", "north", "--scope", "label", "--scope", "predict", "--rate", "20")
    key = output.splitlines()[0]
    assert status == 0
    found = Keys(read_keys(path)).find(key.encode())
    assert found is not None
    assert (found.name, found.scopes, found.requests_per_s) == ("north", ("predict", "label"), 20.0)
    assert path.stat().st_mode & 0o777 == 0o600
    status, output, _ = run("list")
    assert status == 0
    assert all(word in output for word in ("north", found.id, "predict, label", "20"))
    assert key.split("_", 2)[2] not in output
    assert found.sha256 not in run("list", "--json")[1]


def test_json_for_scripts(path: Path) -> None:
    added = json.loads(run("add", "ops", "--scope", "admin", "--json")[1])
    assert (added["name"], added["scopes"], added["file"]) == ("ops", ["admin"], str(path))
    assert Keys(read_keys(path)).find(added["key"].encode())
    [row] = json.loads(run("list", "--json")[1])["keys"]
    assert (row["name"], row["requests_per_s"]) == ("ops", None)
    assert json.loads(run("remove", "ops", "--json")[1])["removed"] == "ops"
    assert read_keys(path).keys == ()


def test_a_removed_key_is_none_any_more_and_the_others_stay(path: Path) -> None:
    first = run("add", "first", "--scope", "predict")[1].splitlines()[0]
    second = run("add", "second", "--scope", "predict")[1].splitlines()[0]
    assert run("remove", "first")[0] == 0
    keys = Keys(read_keys(path))
    assert keys.find(first.encode()) is None
    assert keys.find(second.encode()) is not None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("add", "north", "--scope", "everything"), "'everything'"),
        (("add", "../north", "--scope", "predict"), "name"),
        (("remove", "north"), "No such file"),
        (("list",), "No such file"),
        (("list", "--file", "/nowhere/keys.json"), "/nowhere/keys.json"),
        (("add", "north", "--scope", "predict", "--file", "/nowhere/keys.json"), "/nowhere"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(path: Path, arguments: tuple[str, ...], named: str) -> None:
    status, _, errors = run(*arguments)
    assert (status, named in errors, "Traceback" in errors) == (2, True, False)
    assert not path.exists()


def test_a_damaged_file_is_left_alone(path: Path) -> None:
    path.write_text("{")
    assert run("add", "north", "--scope", "predict")[0] == 2
    assert path.read_text() == "{"


def test_many_at_once_lose_no_key(path: Path) -> None:
    names = [f"key-{number}" for number in range(16)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: add(name, ["predict"], None, path, True), names))
    assert {key.name for key in read_keys(path).keys} == set(names)
