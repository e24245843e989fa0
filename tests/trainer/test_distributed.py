"""Several processes take the very steps that one takes."""

import io
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from torch import Tensor

from services.core.registry import InputContract, Registry
from tests.trainer.conftest import fill, scene
from tests.trainer.rank_steps import CPU, KEY_DIM, SHAPE, settings_of, take_steps
from trainer.distributed import follow
from trainer.learner import Learner
from trainer.ranks import Ranks

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


def test_rows_are_dealt_out_among_the_ranks_for_batch_norm_and_their_encodings_come_back() -> None:
    """Each of two ranks encodes rows of both, other ones each time, and gets the encodings of its own."""
    everybodys = torch.arange(16.0)[:, None]

    @dataclass(frozen=True)
    class Two(Ranks):
        """Whoever gathers sees what both have."""

        encoded: Tensor | None = None

        def gather(self, tensor: Tensor) -> Tensor:
            assert torch.equal(tensor, everybodys[8 * self.rank :][:8])
            return everybodys

        def gather_with_gradient(self, tensor: Tensor) -> Tensor:
            assert len(tensor) == 8
            return self.encoded

    dealt = []
    for round_num in (0, 1):
        ranks = [Two(rank, 2) for rank in (0, 1)]
        parts = [everybodys[:8], everybodys[8:]]
        mixed = [of.mixed(part, round_num=round_num) for of, part in zip(ranks, parts, strict=True)]
        rows = torch.cat([one.rows for one in mixed])
        assert sorted(rows.flatten().tolist()) == list(range(16))
        for one, own in zip(mixed, parts, strict=True):
            assert 0 < (one.rows < 8).sum() < 8
            assert torch.equal(replace(one, ranks=Two(encoded=10 * rows)).back(one.rows), 10 * own)
        dealt.append(rows)
    assert not torch.equal(*dealt)


def test_follower_takes_the_precision_that_the_leaders_checkpoint_has() -> None:
    """What is fastest is measured at each start; what a checkpoint was learnt with stays, at every rank."""
    contract, state = InputContract(shape=SHAPE), io.BytesIO()
    settings = settings_of(precision="auto")
    learner = Learner(settings_of(precision="bf16"), contract=contract, key_dim=KEY_DIM, device=CPU)
    torch.save(learner.state(), state)
    messages = iter(
        [
            {"what": "new", "contract": contract.model_dump(mode="json"), "key_dim": KEY_DIM, "precision": "fp32"},
            {"what": "restore"},
            {"what": "stop"},
        ]
    )
    followed: list[Learner] = []

    class Leader:
        """Says what a leader would."""

        rank, size = 1, 2

        def hear(self) -> dict[str, Any]:
            return next(messages)

        def share(self, _: Tensor) -> Tensor:
            return torch.frombuffer(bytearray(state.getvalue()), dtype=torch.uint8)

    def restore(self: Learner, given: dict[str, Any]) -> None:
        honest(self, given)
        followed.append(self)

    honest = Learner.restore
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "restore", restore)
        follow(settings, ranks=Leader(), device=CPU, log=structlog.get_logger())
    assert [one.precision.dtype for one in followed] == ["bf16"]


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
