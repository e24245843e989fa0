"""Killed at any step and started again, the trainer takes the very steps that it would have taken."""

import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch

from tests.trainer.conftest import fill, make_vision, scene
from tests.trainer.endless import NUM_PAIRS, settings_of
from trainer.feed import Feed
from trainer.worker import TrainerWorker

NUM_STEPS = 40


@pytest.fixture(scope="module")
def encoded_dir(tmp_path_factory) -> Path:
    """Two sites, all encoded, and one step taken: from then on nothing depends on when something was."""
    store_dir: Path = tmp_path_factory.mktemp("encoded") / "store"
    for site in ("north", "south"):
        pairs = [scene(i, site=site) for i in range(NUM_PAIRS)]
        fill(store_dir, pairs, num_labels=30, site=site)
    settings = settings_of(store_dir.parent)
    feed = Feed(store_dir, vision=make_vision(), settings=settings, centre=True, seed=0, held_out_share=0.1)
    feed.refresh()
    while feed.num_pending:
        feed.encode(64)
    feed.save_profiles()
    run(store_dir.parent, 1)  # one checkpoint for all: the layout of tensors is chosen by timing, once
    return store_dir.parent


def copy_of(encoded_dir: Path, data_dir: Path) -> Path:
    return shutil.copytree(encoded_dir, data_dir)


def run(data_dir: Path, num_steps: int) -> dict[str, Any]:
    """Run in this process to step `num_steps`; return the last checkpoint."""
    worker = TrainerWorker(settings_of(data_dir), vision=make_vision(), log=structlog.get_logger(), events=None)
    worker.run(max_steps=num_steps)
    path = data_dir / "trainer" / "radar" / "checkpoint.pt"
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def run_and_kill(data_dir: Path, *, at_step: int) -> None:
    """Run as a process, and kill it as soon as it has taken a step."""
    command = [sys.executable, "-m", "tests.trainer.endless", str(data_dir), str(NUM_STEPS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip().isdigit() and int(line) >= at_step:
                process.send_signal(signal.SIGKILL)
                break
        process.wait()


def differences(ours: Any, theirs: Any, at: str = "") -> list[str]:
    """Where two states differ, bit for bit."""
    if isinstance(ours, torch.Tensor):
        same = ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        return [] if same else [at]
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), at
        return [found for key in ours for found in differences(ours[key], theirs[key], f"{at}/{key}")]
    if isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), at
        return [found for i in range(len(ours)) for found in differences(ours[i], theirs[i], f"{at}/{i}")]
    return [] if ours == theirs else [at]


def test_killed_at_any_step_the_trainer_goes_on_bit_for_bit(encoded_dir, tmp_path) -> None:
    expected = run(copy_of(encoded_dir, tmp_path / "whole"), NUM_STEPS)
    at_step = random.randrange(1, NUM_STEPS)
    killed_dir = copy_of(encoded_dir, tmp_path / "killed")
    run_and_kill(killed_dir, at_step=at_step)
    state = run(killed_dir, NUM_STEPS)
    assert expected["learner"]["step_num"] == state["learner"]["step_num"] == NUM_STEPS
    for part in ("learner", "sampler", "feed"):
        assert differences(expected[part], state[part]) == [], f"killed at step {at_step}"


def test_what_is_timed_enters_no_step(encoded_dir, tmp_path) -> None:
    """Stopped and resumed often, with nothing read ahead: the same."""
    expected = run(copy_of(encoded_dir, tmp_path / "whole"), 24)
    data_dir = copy_of(encoded_dir, tmp_path / "often")
    for num_steps in (3, 4, 11, 24):
        settings = settings_of(data_dir).model_copy(update={"prefetch": 0, "publish_every_s": 0.001})
        worker = TrainerWorker(settings, vision=make_vision(), log=structlog.get_logger(), events=None)
        worker.run(max_steps=num_steps)
    state = torch.load(data_dir / "trainer" / "radar" / "checkpoint.pt", weights_only=True)
    assert differences(expected["learner"], state["learner"]) == []


def test_frame_that_is_not_finite_stops_before_the_step_and_does_not_come_again(
    encoded_dir, tmp_path, monkeypatch
) -> None:
    data_dir = copy_of(encoded_dir, tmp_path / "data")
    run(data_dir, 8)
    honest, worker_calls = Feed.batch, iter([False, True])

    def batch(feed: Feed, size: int, **options: Any) -> Any:
        drawn = honest(feed, size, **options)
        if next(worker_calls, False):
            drawn.heatmap[0] = torch.nan  # one cell could be shifted out of the map
        return drawn

    monkeypatch.setattr(Feed, "batch", batch)
    worker = TrainerWorker(settings_of(data_dir), vision=make_vision(), log=structlog.get_logger(), events=None)
    worker.run(max_steps=20)
    assert worker._diverged_at > 0
    assert worker.learner is not None
    assert worker.learner.step_num == 20
    assert all(value.isfinite().all() for value in worker.learner.encoder.state_dict().values())


def test_weights_that_are_not_finite_are_rolled_back_to_the_checkpoint(encoded_dir, tmp_path) -> None:
    data_dir = copy_of(encoded_dir, tmp_path / "data")
    state = run(data_dir, 8)
    worker = TrainerWorker(settings_of(data_dir), vision=make_vision(), log=structlog.get_logger(), events=None)
    worker._resume()
    assert worker.learner is not None
    with torch.no_grad():
        next(worker.learner.encoder.parameters()).fill_(torch.nan)
    worker.feed.refresh()
    worker._learn(max_steps=None)
    assert worker._diverged_at > 0
    assert differences(worker.learner.state()["encoder"], state["learner"]["encoder"]) == []
    worker._batches.close()
