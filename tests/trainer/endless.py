"""`python -m tests.trainer.endless DATA_DIR MAX_STEPS`: the trainer on one thread with a tiny frozen encoder.

It says each step that it took, so that a test can kill it at one.
"""

import sys
from pathlib import Path

import structlog

from tests.trainer.conftest import make_settings, make_vision
from trainer.contrast import Contrast
from trainer.settings import TrainerSettings
from trainer.worker import TrainerWorker

NUM_PAIRS = 60


def settings_of(data_dir: Path) -> TrainerSettings:
    """Saves and publishes every few steps; a step may draw from nearly all there is."""
    return make_settings(
        data_dir,
        checkpoint_every_s=0.05,
        publish_every_s=0.5,
        max_replays=1000.0,
        held_out_share=0.1,
        session_s=20.0,
        fresh_pairs=40,
    )


class TalkingWorker(TrainerWorker):
    def _note(self, contrast: Contrast) -> None:
        super()._note(contrast)
        assert self.learner is not None
        print(self.learner.step_num, flush=True)


if __name__ == "__main__":
    settings = settings_of(Path(sys.argv[1]))
    worker = TalkingWorker(settings, vision=make_vision(), log=structlog.get_logger(), events=None)
    worker.run(max_steps=int(sys.argv[2]))
