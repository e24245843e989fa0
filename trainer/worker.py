"""The endless trainer: look -> encode or step -> save -> publish -> report, until told to stop.

It reads the store, writes encodings, profiles, checkpoints and registry versions, and waits when there is nothing
to learn from. A kill at any moment costs at most the steps since the last checkpoint.

A checkpoint has everything that enters a step and is not in the store: on the same store, steps after a resume are
the very ones that would have been taken. What is timed (looks, saves, publishing, batches read ahead) enters
none: batches are drawn in order, the sampler's state is saved as of the last batch that was learnt, and a step's
random numbers follow from its number.
"""

import contextlib
import hashlib
import os
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from services.core.errors import NoPairsError
from services.core.logs import Log
from services.core.registry import InputContract, Registry
from services.core.streams import EventLog
from trainer.checkpoints import Checkpoints
from trainer.contrast import Contrast
from trainer.cooldown import cool_down
from trainer.distributed import LeadingLearner
from trainer.feed import Batch, Feed
from trainer.judge import Judge
from trainer.learner import DivergedError, Learner
from trainer.memory import give_back_freed_memory
from trainer.metrics import TrainerMetrics
from trainer.prefetch import Prefetch
from trainer.ranks import ALONE, Ranks
from trainer.release import Releases
from trainer.sampling import Sampler
from trainer.settings import TrainerSettings
from trainer.time_share import TimeShare
from trainer.vision import VisionEncoder

_LOOK_EVERY_S = 2.0
_REPORT_EVERY_S = 2.0
_ROUND_S = 1.0
_WAIT_SAID_AFTER_S = 30.0
"""Beside live sensors a trainer that has caught up waits a second and learns a second, for ever."""
_STEPS_A_ROUND = 8
_NUM_SCALE_PAIRS = 256
_MAX_DIVERGED = 3


class TrainerWorker:
    """Owns the feed and the learner of one model."""

    def __init__(
        self,
        settings: TrainerSettings,
        *,
        vision: VisionEncoder,
        log: Log,
        events: EventLog | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.settings = settings
        self._ranks = ranks
        self._log = log
        self._events = events
        self._device = device_of(settings)
        self._vision = vision.to(self._device)
        self.feed = Feed(
            settings.store_dir,
            vision=vision,
            settings=settings,
            centre=settings.centre_vision,
            seed=settings.seed,
            held_out_share=settings.held_out_share,
            log=log,
        )
        self.judge = Judge(settings, self.feed, log=log, emit=self._emit)
        self.metrics = TrainerMetrics(self.counters, lambda: self.judge.readings)
        self._batches = Prefetch(self._draw, depth=settings.prefetch)
        self._sampler_state = self.feed.sampler.state()  # as of the last batch that was learnt
        self._share = TimeShare(settings.encode_share)
        self.registry = Registry(settings.registry_dir, settings.model_name)
        self._releases = Releases(settings, registry=self.registry, feed=self.feed, log=log)
        self._checkpoints = Checkpoints(settings.data_dir, name=settings.model_name, log=log)
        self._table: npt.NDArray[np.float32] | None = None  # that the learner has
        self.learner: Learner | None = None
        self._losses: dict[str, float] = {}
        self._num_diverged = self._diverged_at = self._num_rollbacks = 0
        self._published = (0, "")  # step, and a digest of the names, of the last version
        self._is_said_to_wait = False
        self._misfits: set[str] = set()
        self._accuracy: float | None = None
        self._newest: dict[str, int] = {}  # the last version, and how many labels its accuracy is from
        self._is_stopping = False
        now_s = time.monotonic()
        self._looked_s = self._reported_s = now_s - 1e9
        self._saved_s = self._published_s = self._had_news_s = now_s
        self._steps_reported = 0

    def stop(self) -> None:
        """Finish the round, save, return from `run`."""
        self._is_stopping = True

    def run(self, *, max_steps: int | None = None) -> None:
        """Work until stopped, or until `max_steps` steps were taken in all."""
        self._resume()
        with contextlib.closing(self._batches), contextlib.closing(self._checkpoints):
            while not self._is_stopping and self.turn(max_steps=max_steps):
                pass
            if max_steps is not None:
                self.publish()
            self._save()

    def turn(self, *, max_steps: int | None = None) -> bool:
        """Look, do what is due for about a second, keep, tell; return False once there is nothing left to do."""
        self._look()
        is_ready = self._is_ready()
        if max_steps is not None and self.learner is not None and self.learner.step_num >= max_steps:
            return False
        self._work(can_learn=is_ready and self._has_news(), max_steps=max_steps)
        if self.learner is not None:
            self.judge.look(self.learner, self._losses)
        self._save_and_publish()
        self._report()
        return True

    def _work(self, *, can_learn: bool, max_steps: int | None) -> None:
        """A turn of what is due: some images to encode, or a round of steps."""
        can_encode = self.feed.num_pending > 0
        began_s = time.monotonic()
        is_encoding = can_encode and (not can_learn or self._share.is_encoding_due())
        if is_encoding:
            self.feed.encode(self.settings.encode_batch)
        elif can_learn:
            self._learn(max_steps=max_steps)
        else:
            time.sleep(0.2)  # nothing to do until ingest stores more; the store has no bell
        if can_encode and can_learn:
            self._share.note(since_s=began_s, encoded=is_encoding)

    def _look(self) -> None:
        if time.monotonic() - self._looked_s >= _LOOK_EVERY_S:
            self.feed.refresh()
            self._looked_s = time.monotonic()

    def _is_ready(self) -> bool:
        if len(self.feed) < self.settings.min_pairs:
            return False
        if self.learner is None:
            assert self.feed.contract is not None
            self.learner = self._new_learner(self.feed.contract)
            self._set_input(scale=self._measure_scale())
            self._log.info("learning_starts", pairs=len(self.feed), shape=self.feed.contract.shape)
        return True

    def _has_news(self) -> bool:
        """Learning the same pairs ever again only learns them by heart: what helps is new scenes."""
        assert self.learner is not None
        has_news = self.learner.num_learnt < self.settings.max_replays * self.feed.num_seen
        now_s = time.monotonic()
        if has_news:
            if self._is_said_to_wait:
                self._log.info("learning", pairs=self.feed.num_seen)
            self._had_news_s, self._is_said_to_wait = now_s, False
        elif not self._is_said_to_wait and now_s - self._had_news_s > _WAIT_SAID_AFTER_S:
            self._log.info("waiting_for_new_pairs", pairs=self.feed.num_seen)
            self._is_said_to_wait = True
        return has_news

    def _learn(self, *, max_steps: int | None) -> None:
        """A few steps; a loss that is not finite undoes everything since the last checkpoint."""
        assert self.learner is not None
        self._set_input()
        began_s = time.monotonic()
        for _ in range(_STEPS_A_ROUND):
            is_done = max_steps is not None and self.learner.step_num >= max_steps
            if self._is_stopping or is_done or time.monotonic() - began_s > _ROUND_S:
                return
            try:
                batch, sampler_state = self._batches.next()
            except NoPairsError as error:  # drawn ahead, while the store was empty
                self._log.warning("no_batch", reason=str(error))
                return
            if self._device.type == "cuda" and self._ranks.size == 1:  # else each rank takes its part
                batch = batch.to(self._device)
            try:
                self._note(self.learner.step(batch))
            except DivergedError as error:
                self._undo(str(error))
                return
            finally:
                self._sampler_state = sampler_state  # a batch that diverged is not drawn again

    def _draw(self) -> tuple[Batch, dict[str, Any]]:
        """A batch, and the sampler's state after it. Runs on the thread that reads ahead."""
        with self.feed.lock:
            batch = self.feed.batch(self.settings.batch_size)
            state = self.feed.sampler.state()
        return (batch.pinned() if self._device.type == "cuda" else batch.float()), state

    def _set_input(self, *, scale: float | None = None) -> None:
        """Give the learner the clutter maps of now, if they changed."""
        assert self.learner is not None
        table = self.feed.clutter_table()
        if table is not self._table or scale is not None:
            self.learner.set_input(table, scale=scale)
            self._table = table

    def _undo(self, reason: str) -> None:
        """The learner as it was at the last checkpoint; what is known of the store stays.

        Raises DivergedError if that did not help.
        """
        assert self.learner is not None
        self._num_diverged += 1
        self._num_rollbacks += 1
        self._diverged_at = self.learner.step_num
        self._log.error("diverged", reason=reason, times=self._num_diverged)
        self._emit("diverged", step=self._diverged_at, reason=reason, times=self._num_diverged)
        if self._num_diverged > _MAX_DIVERGED:
            raise DivergedError(reason, remedy="lower ECHOSIGHT_LEARNING_RATE or set ECHOSIGHT_PRECISION=fp32")
        self.learner, self._table = self._new_learner(self.learner.contract), None
        state = self._checkpoints.load()
        if state is None:
            self._set_input(scale=self._measure_scale())
        else:
            self.learner.restore(state["learner"])

    def _note(self, contrast: Contrast) -> None:
        values = {
            "loss": float(contrast.loss.detach()),
            "chance": float(contrast.chance),
            "top1": float(contrast.top1),
        }
        for name, value in values.items():
            old = self._losses.get(name, value)
            self._losses[name] = old + 0.05 * (value - old)

    def _save_and_publish(self) -> None:
        now_s = time.monotonic()
        if now_s - self._saved_s >= self.settings.checkpoint_every_s and not self._checkpoints.is_busy:
            self._save()
        every_s = self.settings.publish_every_s if self._published[0] else _LOOK_EVERY_S
        if now_s - self._published_s >= every_s:
            self.publish()
            self._published_s = time.monotonic()  # after it: one that takes long leaves as long for learning

    def publish(self) -> None:
        """A new version, if the encoder has learnt and enough frames have a name."""
        settings, learner = self.settings, self.learner
        if learner is None or learner.step_num < settings.min_publish_steps:
            return
        num_names = self._releases.num_names()
        if num_names < settings.min_labels:
            return
        news = (learner.step_num, self._names_digest(num_names))
        if self._published == news:
            return
        self._save_profiles()
        self._set_input()
        losses = {name: round(value, 4) for name, value in self._losses.items()}
        release = self._releases.make(self._to_release(learner), losses=losses)
        give_back_freed_memory()
        if release is None:
            return
        self._published = news
        self._accuracy = release.metrics["probe"].get("accuracy")
        self._newest = {"version": release.version, "tested": release.metrics["probe"]["num_tested"]}
        gone = self.registry.prune(keep=settings.keep_versions)
        self._log.info(
            "published",
            version=release.version,
            step=learner.step_num,
            accuracy=self._accuracy,
            verdict=release.judgement.verdict,
            why=release.judgement.why,
            pruned=gone,
        )
        self._emit("published", version=release.version, metrics=release.metrics)

    def _names_digest(self, num_names: int) -> str:
        """Changes with every label that comes, goes or is corrected, and with the number of named frames."""
        said = sorted((pair.site, pair.id, label.label) for pair, label in self.feed.reader.labelled())
        return hashlib.blake2b(repr((num_names, said)).encode(), digest_size=8).hexdigest()

    def _to_release(self, learner: Learner) -> Learner:
        """The learner, whose average is released; or a cooled copy of it, if asked for and done in time."""
        settings = self.settings
        if settings.release_from != "cooldown":
            return learner
        draws = Sampler(self.feed.pool, settings, seed=learner.step_num)  # learning's own stay those of a resume
        fork = cool_down(
            learner,
            lambda: self.feed.batch(settings.batch_size, sampler=draws),
            num_steps=settings.cooldown_steps,
            max_s=settings.cooldown_max_s,
            is_stopping=lambda: self._is_stopping,
        )
        if fork is None:
            self._log.warning("cooldown_given_up", step=learner.step_num, max_s=settings.cooldown_max_s)
        return fork or learner

    def _save(self) -> None:
        self._saved_s = time.monotonic()
        if self.learner is None:
            return
        if not all(bool(weights.isfinite().all()) for weights in self.learner.encoder.parameters()):
            self._undo("weights are not finite")  # a step took them beyond; this must not be kept
            return
        if self.learner.step_num > self._diverged_at:  # what was undone has been overcome
            self._num_diverged = 0
        self._save_profiles()
        assert self.feed.contract is not None
        self._checkpoints.save(
            {
                "learner": self.learner.state(),
                "contract": self.feed.contract.model_dump(mode="json"),
                "feed": self.feed.state(),
                "losses": dict(self._losses),
                "vision_id": self._vision.id,
                "sampler": self._sampler_state,
                "accuracy": self._accuracy,
                "published": list(self._published),
                "newest": dict(self._newest),
            }
        )

    def _save_profiles(self) -> None:
        """A full disk is said, and survived: profiles are made again."""
        try:
            self.feed.save_profiles()
        except OSError as error:
            self._log.error("profiles_not_saved", reason=str(error), do="free some disk")

    def _resume(self) -> None:
        """Go on where the last checkpoint left off, if there is one of this recipe."""
        state = self._checkpoints.load()
        if state is None:
            return
        if state["vision_id"] != self._vision.id:
            was, aside = state["vision_id"], str(self._checkpoints.set_aside())
            self._log.warning(
                "vision_encoder_changed", was=was, now=self._vision.id, do=f"its state is in {aside}"
            )
            return
        contract = InputContract.model_validate(state["contract"])
        learner = self._new_learner(contract)
        try:
            learner.restore(state["learner"])
        except (RuntimeError, ValueError, KeyError) as error:
            aside = str(self._checkpoints.set_aside())
            self._log.warning(
                "checkpoint_does_not_fit", reason=str(error)[:200], do=f"learning starts anew; it is in {aside}"
            )
            return
        self.feed.contract = contract
        self.feed.restore(state["feed"])
        self.feed.sampler.restore(state["sampler"])
        self._sampler_state = state["sampler"]
        self._losses = dict(state["losses"])
        self._accuracy = state["accuracy"]
        self._published = (state["published"][0], state["published"][1])
        self._newest = dict(state["newest"])
        self.learner = learner
        self._log.info("resumed", step=learner.step_num)

    def _new_learner(self, contract: InputContract) -> Learner:
        if self._ranks.size == 1:
            return Learner(self.settings, contract=contract, key_dim=self._vision.dim, device=self._device)
        return LeadingLearner(
            self.settings, contract=contract, key_dim=self._vision.dim, device=self._device, ranks=self._ranks
        )

    def _measure_scale(self) -> float:
        """Standard deviation of clutter-corrected cells, once: from then on it is part of the model."""
        draws = Sampler(self.feed.pool, self.settings, seed=self.settings.seed)
        batch = self.feed.batch(min(_NUM_SCALE_PAIRS, len(self.feed)), sampler=draws)
        table = torch.from_numpy(self.feed.clutter_table())
        if not self.settings.subtract_clutter:
            table = torch.zeros_like(table)
        return max(float((batch.heatmap - table[batch.site]).std()), 1e-3)

    def _report(self) -> None:
        now_s = time.monotonic()
        if now_s - self._reported_s < _REPORT_EVERY_S:
            return
        step = self.learner.step_num if self.learner else 0
        values: dict[str, Any] = {
            "step": step,
            "steps_per_s": round((step - self._steps_reported) / (now_s - self._reported_s), 2),
            "pairs": len(self.feed),
            "pending": self.feed.num_pending,
            "skipped": self.feed.num_skipped,
            "misfits": sorted(self.feed.misfits),
            "needed": self.settings.min_pairs,
            "labels": self.feed.num_labels,
            "rollbacks": self._num_rollbacks,
            "accuracy": self._accuracy,
            **self._newest,
            **{name: round(value, 4) for name, value in self._losses.items()},
            "gauges": self.judge.summary(),
        }
        for misfit in sorted(self.feed.misfits - self._misfits):
            assert self.feed.contract is not None
            expected = self.feed.contract.model_dump(mode="json", include={"shape", "unit", "channels"})
            self._log.warning(
                "pairs_do_not_fit", site_and_radar=misfit, model=self.settings.model_name, **expected
            )
            self._misfits.add(misfit)
        self._reported_s, self._steps_reported = now_s, step
        self._emit("trainer", **values)
        self._log.debug("trainer", **values)

    def counters(self) -> dict[str, float]:
        """What is counted rather than judged, for whoever asks, from any thread."""
        learner = self.learner
        counted = {
            "steps": learner.step_num if learner else 0,
            "learnt_pairs": learner.num_learnt if learner else 0,
            "encoded_images": self.feed.num_encoded,
            "rollbacks": self._num_rollbacks,
            "pairs": len(self.feed),
            "pending_pairs": self.feed.num_pending,
            "skipped_pairs": self.feed.num_skipped,
            "checkpoint_age_seconds": self._checkpoints.age_s,
        }
        if self._device.type == "cuda":
            counted["device_memory_bytes"] = torch.cuda.memory_allocated(self._device)
        return counted

    def _emit(self, kind: str, **values: Any) -> None:
        if self._events is not None:
            self._events.emit(kind, **values)


def device_of(settings: TrainerSettings) -> torch.device:
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(settings.device)


def num_threads(settings: TrainerSettings) -> int:
    """One core is left to the others: threads that wait for a busy core cost more than they give."""
    return settings.threads or max(1, len(os.sched_getaffinity(0)) - 1)
