"""`echosight classify` against a server in a process of its own."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from services.cli import app
from services.core.keys import KeyFile, write_keys
from tests.api.test_process import api_process
from tests.api.tiny import SHAPE, attach, heatmap, publish, publish_champion, registry_of, tiny_model


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    data_dir = tmp_path_factory.mktemp("data")
    version = publish(registry_of(data_dir), unknown_threshold=100.0)
    attach(registry_of(data_dir), version, tiny_model(version, has_unknown=True))
    registry_of(data_dir).promote(version, by="test", why="test")
    with api_process(data_dir) as (_, port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deeper").mkdir()
    np.save(tmp_path / "a.npy", heatmap())
    np.save(tmp_path / "deeper" / "b.npy", heatmap(2, *SHAPE))
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["classify", *arguments])
    return result.exit_code, result.output


def test_a_folder_a_file_and_a_pattern(url: str, folder: Path) -> None:
    for what, num_frames in ((folder, 3), (folder / "a.npy", 1), (folder / "*.npy", 1), (folder / "**" / "b*", 2)):
        status, output = run(str(what), "--url", url, "--json", "--site", "north")
        frames = json.loads(output)["frames"]
        assert (status, len(frames)) == (0, num_frames)
        assert {frame["label"] for frame in frames} == {"pedestrian"}
    assert [frame.get("index") for frame in json.loads(run(str(folder), "--url", url, "--json")[1])["frames"]] == [
        None,
        0,
        1,
    ]


def test_a_table_for_people(url: str, folder: Path) -> None:
    np.save(folder / "strange.npy", heatmap() + 1000.0)
    status, output = run(str(folder / "*.npy"), "--url", url)
    assert status == 0
    assert output.count("pedestrian") == 2  # the name of a column, and of one frame
    assert output.count("unknown") == 1
    assert "v1" in output
    frames = json.loads(run(str(folder / "*.npy"), "--url", url, "--json")[1])["frames"]
    assert [frame["is_unknown"] for frame in frames] == [False, True]


def test_bad_files_are_reported_and_the_others_go_on(url: str, folder: Path) -> None:
    (folder / "c.npy").write_bytes(b"rubbish")
    np.save(folder / "d.npy", heatmap(3, 3))
    np.save(folder / "e.npy", np.full(SHAPE, np.nan, np.float32))
    np.save(folder / "f.npy", heatmap())
    (folder / "g.npy").touch()
    (folder / "m.npy").write_bytes(b"PK\x03\x04 and no more")
    np.save(folder / "h.npy", np.full((2, 2), "car"))
    np.save(folder / "i.npy", heatmap(1, 1, *SHAPE))
    np.save(folder / "j.npy", heatmap(dtype=np.complex64))
    np.save(folder / "k.npy", heatmap(0, *SHAPE))
    np.savez(folder / "l", heatmap())
    (folder / "l.npz").rename(folder / "l.npy")
    status, output = run(str(folder), "--url", url, "--json")
    frames = {Path(frame["file"]).name: frame for frame in json.loads(output)["frames"]}
    assert status == 1
    assert "cannot be read" in frames["c.npy"]["problem"]
    assert "(3, 3)" in frames["d.npy"]["problem"]
    assert "NaN" in frames["e.npy"]["problem"]
    assert "cannot be read" in frames["g.npy"]["problem"]
    assert "cannot be read" in frames["m.npy"]["problem"]
    assert "<U3" in frames["h.npy"]["problem"]
    assert "no heatmap" in frames["i.npy"]["problem"]
    assert "complex64" in frames["j.npy"]["problem"]
    assert "no heatmap" in frames["k.npy"]["problem"]
    assert "cannot be read" in frames["l.npy"]["problem"]
    assert frames["a.npy"]["label"] == frames["f.npy"]["label"] == "pedestrian"


def test_nothing_to_classify_and_nobody_to_ask_are_said(folder: Path) -> None:
    assert run(str(folder / "*.png"))[0] == 2
    status, _ = run(str(folder), "--url", "nonsense://")
    assert status == 2


def test_a_server_with_keys_is_asked_with_the_key_of_the_option_or_the_environment(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = tmp_path_factory.mktemp("data")
    publish_champion(registry_of(data_dir))
    file, key = KeyFile().added("north", ("predict",), requests_per_s=None)
    write_keys(data_dir / "keys.json", file)
    with api_process(data_dir, ECHOSIGHT_API_KEYS_FILE=str(data_dir / "keys.json")) as (_, port):
        arguments = [str(folder), "--url", f"http://127.0.0.1:{port}"]
        status, output = run(*arguments)
        assert (status, "no API key was sent" in " ".join(output.split())) == (2, True)
        assert run(*arguments, "--api-key", key)[0] == 0
        monkeypatch.setenv("ECHOSIGHT_API_KEY", key)
        assert run(*arguments)[0] == 0
