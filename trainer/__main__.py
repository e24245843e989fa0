"""`python -m trainer`: the trainer worker as a process."""

import contextlib
import os
import signal
import sys
from typing import Annotated

import torch
import typer

from services.core.command import run_command
from services.core.embedded import resolve_redis_url
from services.core.errors import EchosightError, SettingsError, StreamsError
from services.core.logs import Log, configure_logs
from services.core.streams import EventLog
from trainer.distributed import follow
from trainer.memory import keep_freed_memory
from trainer.ranks import Ranks
from trainer.settings import TrainerSettings
from trainer.vision import load_vision_encoder
from trainer.worker import TrainerWorker, device_of, num_threads


def main(
    max_steps: Annotated[
        int | None, typer.Option(help="Stop and publish after so many steps in all; default: run for ever.")
    ] = None,
) -> None:
    """Learn from the pairs in the rolling store, without labels and without end; publish models.

    SIGTERM: save and end; the next start goes on from there.
    Settings are environment variables (ECHOSIGHT_*); see docs/settings.md.

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
    keep_freed_memory()
    torch.set_num_threads(num_threads(settings))
    ranks = Ranks.join(wants_cuda=device_of(settings).type == "cuda")
    if settings.batch_size % ranks.size:
        raise SettingsError(
            f"batch_size is {settings.batch_size} on {ranks.size} ranks",
            remedy=f"make ECHOSIGHT_BATCH_SIZE a multiple of {ranks.size}",
        )
    os.nice(5)  # answers come before learning
    try:
        if ranks.leads:
            _lead(settings, max_steps, ranks=ranks, log=log)
        else:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # the leader says when it is over
            follow(settings, ranks=ranks, device=device_of(settings), log=log)
    finally:
        ranks.leave()


def _lead(settings: TrainerSettings, max_steps: int | None, *, ranks: Ranks, log: Log) -> None:
    """The worker, alone or before its followers."""
    vision = load_vision_encoder(settings.vision_encoder, weights=settings.vision_weights)
    events: EventLog | None = None
    with contextlib.suppress(StreamsError):  # the trainer learns from the store; without streams it is only silent
        events = EventLog(resolve_redis_url(settings), source="trainer")
    worker = TrainerWorker(settings, vision=vision, log=log, events=events, ranks=ranks)
    stop_metrics = worker.metrics.serve(host=settings.trainer_metrics_host, port=settings.trainer_metrics_port)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    log.info("trainer_started", vision=vision.id, radar=settings.radar_encoder, ranks=ranks.size)
    try:
        worker.run(max_steps=max_steps)
    finally:
        stop_metrics()
    if ranks.size > 1:
        ranks.tell("stop")
    log.info("trainer_stopped", step=worker.learner.step_num if worker.learner else 0)


if __name__ == "__main__":
    run_command(main, name="train")
