"""The command line: help that teaches, one-line errors, JSON for scripts, files where they were asked for."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner

from services.core.errors import SettingsError
from services.core.streams import KINDS, stream_key
from services.sensors.__main__ import app, main, parse_speed
from tests.services.sensors.recordings.conftest import radiate  # noqa: F401 - a fixture

runner = CliRunner()


@pytest.fixture(autouse=True)
def _logs_of_the_next_test_go_elsewhere() -> Iterator[None]:
    yield
    structlog.reset_defaults()


@pytest.mark.parametrize("command", ["simulate", "replay", "import", "doctor", "record", "export"])
def test_help_of_each_command_teaches_by_example(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Examples" in result.output
    assert f"echosight {'store ' * (command == 'export')}{command}" in result.output


@pytest.mark.parametrize(("text", "speed"), [("1", 1.0), ("x4", 4.0), ("2.5x", 2.5), ("max", float("inf"))])
def test_understands_speeds(text: str, speed: float) -> None:
    assert parse_speed(text) == speed


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "fast"])
def test_refuses_what_is_no_speed(text: str) -> None:
    with pytest.raises(SettingsError, match="a number above 0, or max"):
        parse_speed(text)


def test_doctor_prints_json_and_draws(radiate: Path, tmp_path: Path) -> None:  # noqa: F811
    picture = tmp_path / "look.png"
    result = runner.invoke(app, ["doctor", str(radiate), "--picture", str(picture), "--json"])
    found = json.loads(result.stdout)
    assert found["format"] == "radiate"
    assert found["pairing"]["num_pairs"] == 2
    assert found["report"]["missing"] == ["zed_left/000003.png"]
    assert picture.stat().st_size > 10_000


def test_replay_publishes_and_names_what_is_missing(radiate: Path, redis_url: str, redis_client) -> None:  # noqa: F811
    result = runner.invoke(
        app, ["replay", "radiate", str(radiate), "--speed", "max", "--site", "yard", "--redis-url", redis_url]
    )
    assert result.exit_code == 0, result.output
    assert "zed_left/000003.png" in result.stdout
    assert "8 frames published" in result.stdout
    assert [redis_client.xlen(stream_key("yard", kind)) for kind in KINDS] == [3, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "error", "remedy"),
    [
        (["doctor", "/nowhere"], "/nowhere is not a directory", "give the folder"),
        (["replay", "tape", "."], "format is 'tape'", "radiate, cruw, folder"),
        (["replay", "folder", "."], "has no manifest.csv", "docs/recordings.md"),
        (["simulate", "--seconds", "1"], "nothing or too much to do", "--publish, --out DIR, --preview FILE"),
        (["simulate", "--out", "x"], "a recording without an end", "--seconds"),
    ],
)
def test_errors_are_one_line_and_a_remedy_not_a_traceback(
    arguments: list[str],
    error: str,
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sensors", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert error in printed
    assert remedy in printed
    assert "Traceback" not in printed
