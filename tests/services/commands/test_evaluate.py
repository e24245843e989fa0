"""Where the data of an evaluation comes from: made once, by our own processes, and handed on as a store."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from services.commands import evaluate
from services.core.errors import SettingsError
from services.core.store import StoreReader
from services.sensors.recordings import write_folder
from tests.trainer.conftest import label_of, scene


def num_pairs(store_dir: Path) -> int:
    reader = StoreReader(store_dir)
    found = reader.refresh()
    reader.close()
    return found


def test_simulation_is_made_once(tmp_path: Path) -> None:
    store_dir, words = evaluate.simulated(tmp_path, ["demo"], frames=16, interval_s=0.5, seed=0)
    assert num_pairs(store_dir) == 16
    assert "1 sites, 16 frames each" in words
    made = store_dir.parent / "made.json"
    before = made.stat().st_mtime_ns
    assert evaluate.simulated(tmp_path, ["demo"], frames=16, interval_s=0.5, seed=0)[0] == store_dir
    assert made.stat().st_mtime_ns == before


def test_simulation_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no site 'atlantis'"):
        evaluate.simulated(tmp_path, ["atlantis"], frames=16, interval_s=0.5, seed=0)


def test_recording_goes_through_a_server_and_ingest_of_its_own(tmp_path: Path) -> None:
    pairs = [scene(seq) for seq in range(6)]
    frames = [frame for pair in pairs for frame in (pair.radar, pair.camera, label_of(pair))]
    write_folder(iter(frames), tmp_path / "recording")
    store_dir, words = evaluate.imported(tmp_path / "data", [tmp_path / "recording"])
    assert words == "recordings recording"
    assert num_pairs(store_dir) == 6
    reader = StoreReader(store_dir)
    reader.refresh()
    assert len(reader.labelled()) == 6
    reader.close()
    assert not (store_dir.parent / "redis" / "server.json").exists()
    assert evaluate.imported(tmp_path / "data", [tmp_path / "recording"])[0] == store_dir


def test_recording_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="does not exist"):
        evaluate.imported(tmp_path, [tmp_path / "nothing"])


@pytest.mark.parametrize(
    ("arguments", "store"),
    [
        (["evaluate", "linear", "--seeds", "2", "--store", "DIR/elsewhere"], "DIR/elsewhere"),
        (["evaluate", "linear", "--set", "a=1", "--json"], "DIR/store"),
        (["reproduce", "fig5", "--scale", "0.1"], "DIR/made"),
    ],
)
def test_options_of_a_study_are_handed_on_with_the_store(
    arguments: list[str], store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setenv("ECHOSIGHT_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(os, "execv", lambda _, command: started.append(command))
    monkeypatch.setattr(evaluate, "simulated", lambda *_, **__: (tmp_path / "made", "a simulation"))
    app = typer.Typer()
    evaluate.register(app)
    done = CliRunner().invoke(app, [part.replace("DIR", str(tmp_path)) for part in arguments])
    assert done.exit_code == 0, done.output
    [command] = started
    assert command[:4] == [sys.executable, "-m", "trainer.evaluation", arguments[0]]
    assert command[command.index("--store") + 1] == store.replace("DIR", str(tmp_path))
    own = [part for part in arguments[1:4] if part not in ("--store", "DIR/elsewhere")]
    assert command[4 : 4 + len(own)] == own


def test_several_sources_are_too_many(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.cli", "evaluate", "linear", "--simulate", "--store", str(tmp_path)],
        env={**os.environ, "ECHOSIGHT_DATA_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert "give one of" in done.stderr
    assert not done.stdout
