"""`echosight store`: what is in it, is it whole, repair it, take data out."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from typer.testing import CliRunner

from services.commands.store import app
from services.core import fence
from services.core.store import Pair, StoreLimits, StoreReader, StoreWriter
from services.sensors.recordings import open_recording
from tests.conftest import label, pair, radar_frame

IMAGE = simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("ECHOSIGHT_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "240")
    return CliRunner()


def pairs(site: str, num: int) -> list[Pair]:
    return [pair(i * 100, seq=i, site=site) for i in range(num)]


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A store of two sites, closed: the folder of the one that has labels."""
    for site, num in (("north", 10), ("south", 3)):
        writer = StoreWriter(tmp_path / "store", site, limits=StoreLimits(min_free_bytes=0), owner="test")
        writer.append([Pair(one.radar, replace(one.camera, image=IMAGE)) for one in pairs(site, num)])
        if site == "north":
            writer.append_labels([label(0, "car"), label(100, "empty", seq=1)])
        writer.close()
    return tmp_path / "store" / "north"


def test_info_shows_each_site(run, filled) -> None:
    found = json.loads(run.invoke(app, ["info", "--json"]).output)
    assert {site["site"]: site["num_pairs"] for site in found["sites"]} == {"north": 10, "south": 3}
    lines = [" ".join(line.split()) for line in run.invoke(app, ["info"]).output.splitlines()]
    [row] = [line for line in lines if line.startswith("north ")]
    assert row.startswith("north 10 ")
    assert row.endswith(" 1 2 1970-01-01 00:00:00 1970-01-01 00:00:00")
    assert "north: written by test (token 1), format 2" in lines


def test_info_fits_a_narrow_terminal(run, filled, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = run.invoke(app, ["info"]).output.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "…" not in "".join(lines)
    assert len([line for line in lines if line.strip().startswith(("north", "south"))]) == 4


def test_info_of_nothing_says_so(run) -> None:
    assert "no site has a store" in run.invoke(app, ["info"]).output


def damage(site_dir: Path) -> None:
    """Flip a byte of the last radar frame."""
    [segment] = fence.data_dir(site_dir).glob("*.seg")
    data = bytearray(segment.read_bytes())
    radar = radar_frame(900, seq=9).heatmap.tobytes()
    data[data.rindex(radar)] ^= 0xFF
    segment.write_bytes(data)


def test_verify_finds_what_does_not_hold_and_repair_voids_it(run, filled) -> None:
    assert run.invoke(app, ["verify"]).exit_code == 0
    damage(filled)
    result = run.invoke(app, ["verify"])
    assert result.exit_code == 1
    assert "south: whole" in result.output
    found = json.loads(run.invoke(app, ["verify", "north", "--json"]).output)
    assert [finding["row"] for finding in found["north"]] == [9]
    assert "damaged" in run.invoke(app, ["repair", "north"]).output
    assert run.invoke(app, ["verify"]).exit_code == 0
    reader = StoreReader(filled.parent)
    reader.refresh()
    assert [one.id.seq for one in reader if one.site == "north"] == list(range(9))
    reader.close()


def test_unknown_site_is_said(run, filled) -> None:
    for command in ("verify", "repair"):
        result = run.invoke(app, [command, "west"])
        assert result.exit_code == 2
        assert "west" in result.output


@pytest.mark.parametrize("name", ["out.mcap", "out"])
def test_export_makes_a_recording_of_the_same_frames(filled, tmp_path, name) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.cli", "store", "export", "north", str(tmp_path / name), "--json"],
        env=os.environ | {"ECHOSIGHT_DATA_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["pairs"], told["frames"], told["damaged"]) == (10, 22, 0)
    frames = {(type(frame).__name__, frame.seq): frame for frame in open_recording(tmp_path / name).frames()}
    assert len(frames) == 22
    assert frames["CameraFrame", 3].image == IMAGE
    assert (frames["RadarFrame", 3].heatmap == radar_frame(300, seq=3).heatmap).all()
    assert frames["Label", 1].label == "empty"
