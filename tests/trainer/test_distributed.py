"""Several processes take the very steps that one takes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.core.registry import InputContract, Registry
from tests.trainer.conftest import fill, scene
from tests.trainer.rank_steps import CPU, KEY_DIM, SHAPE, settings_of, take_steps
from trainer.learner import Learner

TOLERANCE = 2e-5  # the sums of gradients are added up in another order


def run_ranks(num: int, module: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num),
         "-m", module, *arguments],
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path), **environment},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_and_four_ranks_have_the_losses_and_the_queue_of_one() -> None:
    learner = Learner(settings_of(), contract=InputContract(shape=SHAPE), key_dim=KEY_DIM, device=CPU)
    alone = take_steps(learner, 8)
    for num in (2, 4):
        together: dict[str, Any] = json.loads(run_ranks(num, "tests.trainer.rank_steps", "{}").splitlines()[-1])
        assert together["losses"] == pytest.approx(alone, abs=TOLERANCE)
        assert together["queue"] == learner.queue.id.tolist()


def test_shuffled_batches_come_back_to_their_own_rows() -> None:
    """An encoder without batch norm must not notice."""
    learner = Learner(settings_of(), contract=InputContract(shape=SHAPE), key_dim=KEY_DIM, device=CPU)
    options = json.dumps({"shuffle_bn": True})
    together = json.loads(run_ranks(2, "tests.trainer.rank_steps", options).splitlines()[-1])
    assert together["losses"] == pytest.approx(take_steps(learner, 8), abs=TOLERANCE)


def test_trainer_on_two_ranks_learns_from_a_store_and_publishes(tmp_path: Path) -> None:
    fill(tmp_path / "store", [scene(i) for i in range(48)], num_labels=30)
    settings = {"DATA_DIR": str(tmp_path), "BATCH_SIZE": "16", "MIN_PAIRS": "16", "MIN_PUBLISH_STEPS": "4",
                "MIN_LABELS": "4", "DEVICE": "cpu", "THREADS": "1", "EXCLUDE_WITHIN_S": "0"}  # fmt: skip
    environment = {f"ECHOSIGHT_{name}": value for name, value in settings.items()}
    run_ranks(2, "trainer", "--max-steps", "8", **environment)
    registry = Registry(tmp_path / "models", "radar")
    assert registry.manifest(registry.aliases()["candidate"]).lineage["step"] == 8


def test_batch_that_cannot_be_shared_equally_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "trainer"],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "ECHOSIGHT_BATCH_SIZE": "33",
             "ECHOSIGHT_DATA_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "make ECHOSIGHT_BATCH_SIZE a multiple of 2" in done.stderr
