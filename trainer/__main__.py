"""`python -m trainer`: the trainer worker as a process."""

import contextlib
import ctypes
import os
import signal
import sys
from typing import Annotated

import torch
import typer

from services.core.command import run_command
from services.core.embedded import resolve_redis_url
from services.core.errors import EchosightError, StreamsError
from services.core.logs import configure_logs
from services.core.streams import EventLog
from trainer.settings import TrainerSettings
from trainer.vision import load_vision_encoder
from trainer.worker import TrainerWorker, num_threads

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def main(
    max_steps: Annotated[
        int | None, typer.Option(help="Stop and publish after so many steps in all; default: run for ever.")
    ] = None,
) -> None:
    """Learn from the pairs in the rolling store, without labels and without end; publish models.

    SIGTERM: save and end; the next start goes on from there.
    Settings are environment variables (ECHOSIGHT_*); see README.md.

    [bold]Examples[/bold]

      echosight train                           for ever

      ECHOSIGHT_DEVICE=cuda echosight train     on a GPU

      echosight train --max-steps 500           up to that step

    [bold]Next[/bold]: `echosight serve` answers with what was published, `echosight status` shows the progress.
    """
    try:
        _run(TrainerSettings.read(), max_steps)
    except EchosightError as error:
        print(f"echosight trainer: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def _run(settings: TrainerSettings, max_steps: int | None) -> None:
    log = configure_logs("trainer", level=settings.log_level, log_format=settings.log_format)
    _keep_freed_memory()
    torch.set_num_threads(num_threads(settings))
    vision = load_vision_encoder(settings.vision_encoder, weights=settings.vision_weights)
    events: EventLog | None = None
    with contextlib.suppress(StreamsError):  # the trainer learns from the store; without streams it is only silent
        events = EventLog(resolve_redis_url(settings), source="trainer")
    worker = TrainerWorker(settings, vision=vision, log=log, events=events)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    os.nice(5)  # answers come before learning
    log.info("trainer_started", vision=vision.id, radar=settings.radar_encoder, store=str(settings.store_dir))
    worker.run(max_steps=max_steps)
    log.info("trainer_stopped", step=worker.learner.step_num if worker.learner else 0)


def _keep_freed_memory() -> None:
    """Keep glibc from handing pages back between layers: page faults were half of the vision encoder's time."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_TOP_PAD):
            libc.mallopt(parameter, 256 * 1024 * 1024)


if __name__ == "__main__":
    run_command(main, name="train")
