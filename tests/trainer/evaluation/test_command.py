"""The studies as commands: options reach the study, errors are one line, --json is one object."""

from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner

from tests.trainer.evaluation.conftest import SESSION_S
from trainer.evaluation import session
from trainer.evaluation.__main__ import app

RUN = [
    *("--session-s", str(SESSION_S), "--guard-s", "0", "--label-block-s", "8", "--seeds", "1", "--steps", "2"),
    *("--split", "sessions", "--set", "batch_size=16", "--set", "queue_size=20", "--set", "device=cpu"),
    *("--set", "precision=fp32"),
]


@pytest.fixture
def invoke(filled: Path, vision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session, "load_vision_encoder", lambda *_, **__: vision)
    monkeypatch.setenv("ECHOSIGHT_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str):
        return CliRunner().invoke(app, [*arguments, "--store", str(filled), *RUN])

    return invoke


def test_json_has_the_table_and_where_the_files_are(invoke, tmp_path: Path) -> None:
    done = invoke("evaluate", "linear", "--json")
    assert done.exit_code == 0, done.output
    found = orjson.loads(done.stdout)
    assert found["protocol"]["steps"] == 2
    assert found["protocol"]["settings"]["mode"] == "edge"
    assert found["protocol"]["settings"]["queue_size"] == 20
    for path in found["files"]:
        assert (tmp_path / path).is_file()
    assert "evaluation/linear/linear.csv" in found["files"]


def test_table_is_for_people_and_out_is_where_files_go(invoke, tmp_path: Path) -> None:
    done = invoke("evaluate", "retrieval", "--every-s", "1", "--out", str(tmp_path / "here"))
    assert done.exit_code == 0, done.output
    assert "recall at 5" in done.stdout
    assert (tmp_path / "here" / "retrieval_examples.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("evaluate", "linear", "--set", "queue=3"), "--set 'queue=3'"),
        (("evaluate", "linear", "--set", "temperature=none"), "ECHOSIGHT_TEMPERATURE"),
        (("evaluate", "linear", "--unseen", "nowhere"), "the sites are"),
        (("evaluate", "ksweep", "--sweep", "64"), "BATCH:K"),
        (("evaluate", "ksweep", "--sweep", "64:16,4000:16"), "a batch of 4,000 is more than the 80 pairs"),
        (("evaluate", "linear", "--split-seed", "9" * 20), "--split-seed"),
        (("evaluate", "efficiency", "--labels", "1,200"), "'200'"),
        (("evaluate", "linear", "--simulate"), "echosight evaluate"),
        (("reproduce", "fig6", "--epochs", "warmup=3"), "contrast, linear, finetune, supervised, supervised_long"),
        (("reproduce", "fig6", "--epochs", "finetune"), "STAGE=NUMBER"),
        (("reproduce", "fig4", "--set", "radar_encoder=vgg16"), "ECHOSIGHT_RADAR_WEIGHTS"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    invoke, arguments: tuple[str, ...], named: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert named in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    "study", ["linear", "finetune", "supervised", "efficiency", "ksweep", "tsne", "retrieval", "temporal"]
)
def test_help_teaches(study: str) -> None:
    done = CliRunner().invoke(app, ["evaluate", study, "--help"])
    assert done.exit_code == 0
    assert "Look at" in " ".join(done.stdout.split())
    assert f"echosight evaluate {study}" in done.stdout
