"""A save copies the state and returns; what is on disk is whole, and the one before it is kept."""

import threading

import pytest
import structlog
import torch

from trainer import checkpoints as module
from trainer.checkpoints import Checkpoints


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path, name="radar", log=structlog.get_logger())
    yield made
    made.close()


def test_save_is_of_the_moment_though_it_is_written_later(checkpoints, monkeypatch) -> None:
    may_write = threading.Event()
    honest = module.write_atomically

    def write(path, data) -> None:
        assert may_write.wait(10)
        honest(path, data)

    monkeypatch.setattr(module, "write_atomically", write)
    weights = torch.ones(3)
    checkpoints.save({"weights": weights, "sites": ["north"], "rng": {"state": 2**100}})
    weights.fill_(7)
    assert checkpoints.is_busy
    may_write.set()
    state = checkpoints.load()
    assert not checkpoints.is_busy
    assert state is not None
    assert state["weights"].tolist() == [1, 1, 1]
    assert (state["sites"], state["rng"]) == (["north"], {"state": 2**100})


def test_full_disk_is_said_and_the_checkpoint_before_stays(checkpoints, monkeypatch) -> None:
    checkpoints.save({"step": 1})
    checkpoints.wait()

    def refuse(*_) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, structlog.testing.capture_logs() as logs:
        patch.setattr(module, "write_atomically", refuse)
        checkpoints.save({"step": 2})
        checkpoints.wait()
    assert logs[0]["event"] == "checkpoint_not_saved"
    assert (checkpoints.load() or {})["step"] == 1
    checkpoints.save({"step": 3})
    assert (checkpoints.load() or {})["step"] == 3


def test_checkpoint_of_another_version_is_passed_over_aloud(checkpoints, tmp_path) -> None:
    path = tmp_path / "trainer" / "radar" / "checkpoint.pt"
    path.parent.mkdir(parents=True)
    torch.save({"format_version": 2}, path)
    with structlog.testing.capture_logs() as logs:
        assert checkpoints.load() is None
    assert logs[0]["event"] == "checkpoint_of_another_version"


def test_what_a_killed_save_left_aside_is_removed(tmp_path) -> None:
    left = tmp_path / "trainer" / "radar" / ".checkpoint.pt.77.aside"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    Checkpoints(tmp_path, name="radar", log=structlog.get_logger()).close()
    assert not left.exists()
