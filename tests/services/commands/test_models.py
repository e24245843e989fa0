"""`echosight models` on a registry of three versions: what it shows, and what it moves."""

from pathlib import Path
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner

from services.cli import app
from services.core.registry import CHECKPOINT_FILE, InputContract, Manifest, Registry

WORSE = "accuracy -4.0 [-6.1, -2.0] points on 412 frames of 31 blocks; worse for sure"


def publish(registry: Registry, *, accuracy: float, verdict: str, why: str) -> int:
    def describe(version: int) -> Manifest:
        recall = {"empty": accuracy, "car": 0.5}
        return Manifest(
            name="radar",
            version=version,
            created_at_s=1.0,
            classes=("empty", "car"),
            input=InputContract(shape=(2, 4, 3)),
            sites=("", "north"),
            architecture={"head": {"kind": "linear"}},
            preprocessing={},
            metrics={
                "probe": {
                    "accuracy": accuracy,
                    "recall": recall,
                    "balanced_accuracy": accuracy,
                    "split": "5-fold",
                },
                "names": {"people": 30, "detector": 70},
                "gate": {
                    "verdict": verdict,
                    "why": why,
                    "site_points": {"north": {"points": -4.0, "interval": [-6.1, -2.0], "frames": 412}},
                },
            },
            lineage={"step": 7},
            unknown_threshold=1.5,
        )

    return registry.publish(describe, lambda directory: (directory / CHECKPOINT_FILE).touch())


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("ECHOSIGHT_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "250")
    registry = Registry(tmp_path / "models", "radar")
    publish(registry, accuracy=0.8, verdict="promote", why="first version")
    registry.promote(1, by="api", why="answers well")
    publish(registry, accuracy=0.9, verdict="hold", why="accuracy -0.2 [-1.0, 0.6] points; no better")
    publish(registry, accuracy=0.7, verdict="refuse", why=WORSE)
    return registry


def run(*arguments: str, status: int = 0) -> str:
    done = CliRunner().invoke(app, ["models", *arguments])
    assert done.exit_code == status, done.output
    return done.output


def run_json(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads(run(*arguments, "--json"))
    return found


def test_list_shows_recall_of_each_class_and_the_gates_verdict(registry: Registry) -> None:
    shown = run("list").splitlines()
    assert [line.split()[0] for line in shown] == ["version", "v3", "v2", "v1"]
    assert "70.0 %" in shown[1]
    assert "50.0 %" in shown[1]
    assert WORSE in shown[1]
    assert "champion" in shown[3]
    rows = run_json("list")["versions"]
    assert [row["verdict"] for row in rows] == ["refuse", "hold", "promote"]
    assert rows[0]["num_names"] == 100


def test_show_says_how_a_version_was_judged_site_by_site(registry: Registry) -> None:
    shown = run("show", "3")
    assert f"refuse: {WORSE}" in shown
    assert "site north" in shown
    assert "-4.0 points [-6.1, -2.0] on 412 frames" in shown
    assert run_json("show", "3")["manifest"]["lineage"] == {"step": 7}


def test_a_held_version_is_promoted_by_hand_and_rolled_back_in_one_call(registry: Registry) -> None:
    assert "v2 is the champion now, before it v1" in run("promote", "2", "--why", "looked at 50 frames")
    assert registry.history()[-1] | {"at_s": 0} == {
        "at_s": 0,
        "moved": {"champion": 2, "previous": 1},
        "by": "operator",
        "why": "looked at 50 frames",
    }
    assert run_json("rollback") == {"champion": 1, "before": 2}
    assert registry.aliases()["champion"] == 1
    assert "rolled back by hand" in run("history")


def test_a_refused_version_is_promoted_only_by_force(registry: Registry) -> None:
    assert "was refused" in run("promote", "3", status=2).replace("\n", " ")
    assert registry.aliases()["champion"] == 1
    run("promote", "3", "--force")
    assert registry.aliases()["champion"] == 3
    assert registry.refused() == {}


def test_force_takes_the_refusal_of_the_champion_back(registry: Registry) -> None:
    run("promote", "2")
    registry.refuse(2, by="api", why="its export failed")
    assert "v2 is refused no longer" in run("promote", "2", "--force")
    assert (registry.refused(), registry.aliases()["previous"]) == ({3: WORSE}, 1)
    num_moves = len(registry.history())
    assert "v2 was the champion already" in run("promote", "2")
    assert len(registry.history()) == num_moves


def test_compare_sets_two_versions_side_by_side(registry: Registry) -> None:
    shown = run("compare", "1", "2")
    accuracy = next(line for line in shown.splitlines() if line.strip().startswith("accuracy"))
    assert accuracy.split() == ["accuracy", "80.0", "%", "90.0", "%", "+10.0"]


@pytest.mark.parametrize("arguments", [("show", "9"), ("promote", "9"), ("compare", "1", "9")])
def test_an_unknown_version_is_said_to_be_unknown(registry: Registry, arguments: tuple[str, ...]) -> None:
    assert "has no version 9" in run(*arguments, status=2).replace("\n", " ")


def test_a_damaged_manifest_is_shown_as_such(registry: Registry) -> None:
    (registry.path(2) / "manifest.json").write_bytes(b"{")
    assert "cannot read" in run_json("list")["versions"][1]["problem"]
    run("list")


def test_an_empty_registry_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHOSIGHT_DATA_DIR", str(tmp_path))
    assert "no version yet" in run("list")
    assert "no previous version" in run("rollback", status=2).replace("\n", " ")
