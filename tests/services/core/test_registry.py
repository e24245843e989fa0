"""Handoff 3: versions appear whole, pointers move atomically, history keeps what is of use."""

import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from services.core.errors import RegistryError
from services.core.registry import (
    CHECKPOINT_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    InputContract,
    Manifest,
    Parity,
    Registry,
)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "models", "radar")


def describe(version: int) -> Manifest:
    return Manifest(
        name="radar",
        version=version,
        created_at_s=1.0,
        classes=("empty", "car"),
        input=InputContract(shape=(2, 4, 3), channels=("integrated", "moving")),
        sites=("", "north"),
        architecture={"encoder": "small"},
        preprocessing={"scale_db": 30.0},
        metrics={"accuracy": 0.9, "split": "by track"},
        lineage={"step": 100},
    )


def fill(directory: Path) -> None:
    (directory / CHECKPOINT_FILE).write_bytes(b"weights")


PARITY = Parity(
    num_frames=8, batch_sizes=(1, 8), max_abs_probability_error=1e-6, max_allowed=1e-4, num_label_changes=0
)


def test_published_version_is_whole_and_the_candidate(registry) -> None:
    assert registry.versions() == []
    assert registry.aliases() == {}
    assert registry.publish(describe, fill) == 1
    assert registry.publish(describe, fill) == 2
    assert registry.versions() == [1, 2]
    assert registry.aliases() == {"candidate": 2}
    assert registry.manifest(2) == describe(2)
    assert (registry.path(2) / CHECKPOINT_FILE).read_bytes() == b"weights"


def test_failed_publish_leaves_no_version_and_its_number_is_used_again(registry) -> None:
    registry.publish(describe, fill)

    def fail(directory: Path) -> None:
        fill(directory)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        registry.publish(describe, fail)
    assert registry.versions() == [1]
    assert registry.aliases() == {"candidate": 1}
    assert registry.publish(describe, fill) == 2


def test_version_is_not_seen_before_it_is_whole(registry) -> None:
    seen = []

    def look(directory: Path) -> None:
        fill(directory)
        seen.append(registry.versions())

    registry.publish(describe, look)
    assert seen == [[]]


def test_publisher_killed_in_the_middle_is_tidied_up_by_the_next(registry, tmp_path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from services.core.registry import Registry\n"
        "def die(aside):\n"
        "    (aside / 'left').write_bytes(b'x'); os.kill(os.getpid(), signal.SIGKILL)\n"
        f"Registry(Path({str(tmp_path / 'models')!r}), 'radar').publish(None, die)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert registry.versions() == []
    assert registry.publish(describe, fill) == 1
    assert sorted(path.name for path in registry.path(1).iterdir()) == [CHECKPOINT_FILE, MANIFEST_FILE]
    assert not list(registry.dir.glob("*.aside"))


def test_promotion_moves_the_champion_and_remembers_the_previous(registry) -> None:
    for _ in range(3):
        registry.publish(describe, fill)
    registry.promote(1, by="gate", why="first")
    assert registry.aliases() == {"candidate": 3, "champion": 1}
    registry.promote(3, by="gate", why="better")
    assert registry.aliases() == {"candidate": 3, "champion": 3, "previous": 1}
    registry.promote(1, by="operator", why="rollback")
    assert registry.aliases() == {"candidate": 3, "champion": 1, "previous": 3}


def test_promoting_the_champion_again_changes_nothing(registry) -> None:
    registry.publish(describe, fill)
    registry.promote(1, by="gate", why="first")
    before = (registry.aliases(), registry.history())
    registry.promote(1, by="gate", why="again")
    assert (registry.aliases(), registry.history()) == before


def test_history_tells_who_moved_what_and_why_and_only_grows(registry) -> None:
    registry.publish(describe, fill)
    first = (registry.dir / "history.jsonl").read_bytes()
    registry.promote(1, by="gate", why="beats chance")
    assert (registry.dir / "history.jsonl").read_bytes().startswith(first)
    assert [(row["moved"], row["by"], row["why"]) for row in registry.history()] == [
        ({"candidate": 1}, "trainer", "published"),
        ({"champion": 1}, "gate", "beats chance"),
    ]


def test_torn_last_line_of_the_history_is_survived_and_costs_no_later_line(registry) -> None:
    registry.publish(describe, fill)
    with (registry.dir / "history.jsonl").open("ab") as file:
        file.write(b'{"at_s": 17')
    assert len(registry.history()) == 1
    registry.promote(1, by="gate", why="after the crash")
    assert [row["why"] for row in registry.history()] == ["published", "after the crash"]


def test_unknown_version_is_refused_with_the_known_ones(registry) -> None:
    registry.publish(describe, fill)
    for act in (registry.path, registry.manifest, lambda v: registry.promote(v, by="me", why="typo")):
        with pytest.raises(RegistryError, match=r"radar has no version 7; the newest are: 1"):
            act(7)
    assert "champion" not in registry.aliases()


def test_refused_versions_are_listed_with_their_reason(registry) -> None:
    registry.publish(describe, fill)
    registry.refuse(1, by="export", why="parity error 0.2")
    assert registry.refused() == {1: "parity error 0.2"}
    assert registry.versions() == [1]


def test_prune_removes_the_oldest_but_none_that_an_alias_names(registry) -> None:
    for _ in range(6):
        registry.publish(describe, fill)
    registry.promote(1, by="gate", why="first")
    registry.promote(2, by="gate", why="better")
    assert registry.prune(keep=2) == [3, 4]
    assert registry.versions() == [1, 2, 5, 6]
    assert registry.prune(keep=10) == []


def test_a_long_history_loses_old_moves_but_not_those_of_people_or_of_versions_that_are_here(
    registry, monkeypatch
) -> None:
    registry.publish(describe, fill)
    registry.promote(1, by="api", why="the champion stays")
    for version in range(2, 40):
        registry.publish(describe, fill)
        if version == 3:
            registry.refuse(3, by="operator", why="calls trees cyclists")
    assert registry.prune(keep=2)  # short enough: nothing is forgotten
    assert len(registry.history()) == 41
    monkeypatch.setattr("services.core.registry._MAX_HISTORY_BYTES", 1000)
    registry.prune(keep=2)
    rows = registry.history()
    assert [row["why"] for row in rows[:3]] == ["published", "the champion stays", "calls trees cyclists"]
    assert [row["moved"] for row in rows[3:]] == [{"candidate": version} for version in range(19, 40)]
    registry.promote(39, by="api", why="goes on")
    assert registry.history()[:-1] == rows


def test_exported_model_is_vouched_for_by_the_manifest(registry, tmp_path) -> None:
    registry.publish(describe, fill)
    assert registry.manifest(1).parity is None
    graph = tmp_path / "export.onnx"
    graph.write_bytes(b"graph")
    registry.attach_model(1, graph, PARITY)
    assert (registry.path(1) / MODEL_FILE).read_bytes() == b"graph"
    assert registry.manifest(1) == describe(1).model_copy(update={"parity": PARITY})


def test_failed_attachment_leaves_the_manifest_silent(registry, tmp_path) -> None:
    registry.publish(describe, fill)
    with pytest.raises(FileNotFoundError):
        registry.attach_model(1, tmp_path / "absent.onnx", PARITY)
    assert registry.manifest(1).parity is None


@pytest.mark.parametrize("content", [b"", b"{", b'{"format_version": 2}', b'{"format_version": 1, "name": 3}'])
def test_damaged_or_foreign_manifest_is_a_clear_error(registry, content) -> None:
    registry.publish(describe, fill)
    (registry.path(1) / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(RegistryError, match=r"cannot read .*manifest\.json: .*; roll back to another version"):
        registry.manifest(1)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"champion": "two"}'])
def test_damaged_aliases_are_a_clear_error(registry, content) -> None:
    registry.publish(describe, fill)
    (registry.dir / "aliases.json").write_bytes(content)
    with pytest.raises(RegistryError, match=r"aliases\.json is damaged: .*champion"):
        registry.aliases()


def test_manifest_of_the_same_version_with_news_is_read(registry) -> None:
    registry.publish(describe, fill)
    path = registry.path(1) / MANIFEST_FILE
    path.write_bytes(orjson.dumps(orjson.loads(path.read_bytes()) | {"news": 1}))
    assert registry.manifest(1) == describe(1)


@pytest.mark.parametrize("verdict", ["hold", "refuse"])
def test_a_version_that_the_gate_stops_is_noted_and_does_not_become_the_candidate(registry, verdict: str) -> None:
    registry.publish(describe, fill)
    gate = {"gate": {"verdict": verdict, "why": "-4.0 points [-6.1, -2.0]"}}
    version = registry.publish(lambda n: describe(n).model_copy(update={"metrics": gate}), fill)
    assert registry.aliases() == {"candidate": 1}
    said = registry.held() if verdict == "hold" else registry.refused()
    assert said == {version: "-4.0 points [-6.1, -2.0]"}
    registry.promote(version, by="operator", why="the labels were wrong")
    assert registry.held() == registry.refused() == {}


def test_a_refusal_after_a_promotion_stands(registry) -> None:
    version = registry.publish(describe, fill)
    registry.promote(version, by="operator", why="looks good")
    registry.refuse(version, by="api", why="answers NaN")
    assert registry.refused() == {version: "answers NaN"}


def test_rollback_makes_the_version_before_the_champion_again(registry) -> None:
    with pytest.raises(RegistryError, match="no previous"):
        registry.rollback(by="operator", why="test")
    for _ in range(2):
        registry.promote(registry.publish(describe, fill), by="test", why="test")
    assert registry.rollback(by="operator", why="2 sees cars in trees") == 1
    assert registry.aliases() == {"candidate": 2, "champion": 1, "previous": 2}
    assert registry.history()[-1]["why"] == "2 sees cars in trees"


def test_a_manifest_from_before_the_gate_may_be_promoted_and_knows_no_stranger(registry) -> None:
    registry.publish(describe, fill)
    path = registry.path(1) / MANIFEST_FILE
    row = orjson.loads(path.read_bytes())
    del row["unknown_threshold"], row["abstain_below"]
    path.write_bytes(orjson.dumps(row))
    manifest = registry.manifest(1)
    assert (manifest.verdict, manifest.unknown_threshold, manifest.abstain_below) == ("promote", None, None)
