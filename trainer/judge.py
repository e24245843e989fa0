"""Reads the gauges beside the learning: when, on what, at what cost, and whom to warn.

It looks at held-out pairs (`trainer.heldout`), which are never learnt from, and at each site's newest pairs. After
a reading that took t seconds none follows for t / gauges_max_share, so that judging never takes more than its
share. What is read is bounded: some hundred pairs, of a few sites at a time in turn. It changes neither the
learner nor a random generator that learning uses.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.core.errors import NoPairsError
from services.core.frames import CLASSES, Label
from services.core.logs import Log
from services.core.store import StoredPair
from trainer import gauges
from trainer.drift import Drift, Look
from trainer.feed import Batch, Feed, Sample
from trainer.gauges import Labelled
from trainer.gauges_settings import GaugesSettings
from trainer.learner import Learner
from trainer.names import block_of
from trainer.queue import is_negative
from trainer.sync_lag import Lag, SyncLag

_MAX_HELD_OUT = 256
_MIN_HELD_OUT = 32
_HELD_OUT_EVERY_S = 0.5
_MAX_SITES = 4
"""Whose newest pairs are looked at in one reading; the others' turn comes."""
_MIN_RECENT = 8
_MAX_RECENT = 192
_MAX_IMAGES = 2000
"""A site's newest images, of which so many have their radar frame encoded; images are encoded already."""
_STRETCH_NS = 20_000_000_000
_BATCH = 128
_PROBE_EVERY = 4
_MAX_LABELS = 256
_MIN_LABELS = 8
_MAX_LAGS = 8
"""Sites in a summary, the farthest off first; the readings have all."""
_MIN_RANK_SHARE = 0.35
_MIN_STD = 0.1
_NUM_RANKS = 20
_COLLAPSE = "lower ECHOSIGHT_LEARNING_RATE or raise ECHOSIGHT_TEMPERATURE; see docs/gauges.md"
_LAG = "set the clocks (PTP, NTP), or ECHOSIGHT_CLOCK_OFFSETS_MS if the offset is constant; see docs/pairing.md"
_NO_NUMBER = "the encodings are not finite; the learner goes back to its last checkpoint if the loss is not either"


class Judge:
    """Owns the gauges of one model. readings: the last ones, plain values; never changed, only replaced."""

    def __init__(
        self,
        settings: GaugesSettings,
        feed: Feed,
        *,
        log: Log,
        emit: Callable[..., None],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._feed = feed
        self._log = log
        self._emit = emit
        self._now_s = now_s
        self._began_s = self._due_s = now_s()
        self._spent_s = 0.0
        self._num_readings = 0
        self._num_not_finite = 0  # sets of encodings in this reading
        self._syncs: dict[str, SyncLag] = {}
        self._lags: dict[str, Lag] = {}
        self._seen_ns: dict[str, int] = {}
        self._ranks: deque[float] = deque(maxlen=_NUM_RANKS)
        self._alarms: set[str] = set()
        self._probe: dict[str, Any] | None = None
        self.drift = Drift()
        self.readings: dict[str, Any] = {}

    def look(self, learner: Learner, losses: dict[str, float]) -> bool:
        """Read all gauges if it is time; return whether it was. losses: `loss` and `chance` of the learning."""
        began_s = self._now_s()
        if began_s < self._due_s or not len(self._feed):
            return False
        learner.set_input(self._feed.clutter_table())  # one that was just resumed or rolled back has none yet
        with torch.random.fork_rng(devices=[]):  # a new head draws its weights
            found = self._read(learner, losses)
        took_s = self._now_s() - began_s
        self._spent_s += took_s
        self._num_readings += 1
        settings = self._settings
        self._due_s = began_s + max(settings.gauges_every_s, took_s / settings.gauges_max_share)
        found["took_s"] = round(took_s, 3)
        # The wait that this reading has yet to pay for counts: the first one would look like all of the time.
        found["cost_share"] = round(self._spent_s / max(self._due_s - self._began_s, 1e-9), 5)
        self.readings = found
        self._emit("gauges", **found)
        self._log.info("gauges", **self.summary())
        return True

    def summary(self) -> dict[str, Any]:
        """The few that a person wants to see at once."""
        names = ("mi_nats", "held_out_mi_nats", "r5", "r5_chance", "rank", "std", "cost_share")
        short = {name: self.readings[name] for name in names if name in self.readings}
        if self._probe:
            short["probe"] = self._probe["linear"]["accuracy"]
        lags = {
            site: [of[name] for name in ("lag_ms", "lag_low_ms", "lag_high_ms")]
            for site, of in self.readings.get("sites", {}).items()
            if "lag_ms" in of
        }
        if lags:
            farthest = sorted(lags, key=lambda site: -abs(lags[site][0]))[:_MAX_LAGS]
            short["lags"] = {site: lags[site] for site in farthest}
        if self._alarms:
            short["alarms"] = sorted(self._alarms)
        return short

    def _read(self, learner: Learner, losses: dict[str, float]) -> dict[str, Any]:
        found: dict[str, Any] = {"step": learner.step_num}
        self._num_not_finite = 0
        if "loss" in losses:
            found |= {name: round(losses[name], 4) for name in ("loss", "chance")}
            if learner.settings.loss == "info_nce" and not learner.settings.soft_share:  # no other is such a bound
                found["mi_nats"] = round(gauges.mi_bound(losses["loss"], losses["chance"]), 4)
        found |= self._read_held_out(learner)
        if self._num_readings % _PROBE_EVERY == 1:  # not the first: what is cheap is told soon
            self._probe = self._read_probe(learner) or self._probe
        if self._probe:
            found["probe"] = self._probe
        found["sites"] = self._read_sites(learner)
        self._alarm("not_finite", is_on=self._num_not_finite > 0, do=_NO_NUMBER)
        found["alarms"] = sorted(self._alarms)
        return found

    # -- what has never been learnt from

    def _read_held_out(self, learner: Learner) -> dict[str, Any]:
        samples = self._feed.heldout(every_s=_HELD_OUT_EVERY_S, newest=_MAX_HELD_OUT)
        samples = _evenly(samples, _MAX_HELD_OUT)
        found: dict[str, Any] = {"held_out_pairs": len(samples)}
        if len(samples) < _MIN_HELD_OUT:
            return found
        try:
            batch = self._feed.collate(samples)
        except NoPairsError:
            return found
        features = _features(learner, batch)
        q, k = learner.project(features), torch.nn.functional.normalize(batch.k, dim=1)
        if not self._is_finite(q):
            return found
        settings = learner.settings
        others = is_negative(batch.scenes, batch.scenes, exclude_within_ns=round(settings.exclude_within_s * 1e9))
        scale = float(learner.scale.detach())
        loss, chance = gauges.contrast_loss(q, k, is_candidate=others, scale=scale)
        rank, std = gauges.effective_rank(features), gauges.feature_std(features)
        values = asdict(gauges.retrieval(q, k, is_candidate=others)) | {
            "held_out_loss": loss,
            "held_out_chance": chance,
            "held_out_mi_nats": gauges.mi_bound(loss, chance),
            "alignment": gauges.alignment(q, k),
            "uniformity": gauges.uniformity(q),
            "rank": rank,
            "std": std,
        }
        self._watch_collapse(rank, std)
        return found | {"features": features.shape[1]} | {name: round(value, 4) for name, value in values.items()}

    def _watch_collapse(self, rank: float, std: float) -> None:
        usual = float(np.median(self._ranks)) if self._ranks else rank
        is_low = rank < _MIN_RANK_SHARE * usual or std < _MIN_STD
        values = {"rank": round(rank, 2), "usual_rank": round(usual, 2), "std": round(std, 4), "do": _COLLAPSE}
        self._alarm("collapse", is_on=is_low, **values)
        if not is_low:  # what is usual is not learnt from a collapse
            self._ranks.append(rank)

    def _read_probe(self, learner: Learner) -> dict[str, Any] | None:
        """None while there are too few labels on either side, or of one class only."""
        labelled = self._feed.labelled()
        held_out = [item for item in labelled if self._feed.is_held_out(item[0])]
        learnt = [item for item in labelled if self._feed.may_learn(item[0])]
        if min(len(held_out), len(learnt)) < _MIN_LABELS or len({label.label for _, label in learnt}) < 2:
            return None
        sides = [self._labelled(learner, _evenly(side, _MAX_LABELS)) for side in (learnt, held_out)]
        if not all(len(side) and self._is_finite(side.features) for side in sides):
            return None
        return gauges.probe(*sides, classes=CLASSES)

    def _labelled(self, learner: Learner, items: list[tuple[StoredPair, Label]]) -> Labelled:
        whole = [(pair, label, frame) for pair, label in items if (frame := pair.radar()) is not None]
        if not whole:
            return Labelled(torch.empty(0, 1), torch.empty(0, dtype=torch.int64), [])
        shape = learner.contract.shape
        heatmap = np.stack([frame.heatmap.reshape(shape) for _, _, frame in whole])
        sites = torch.tensor([1 + self._feed.sites.index(pair.site) for pair, _, _ in whole])
        return Labelled(
            _in_batches(learner, heatmap, sites),
            torch.tensor([CLASSES.index(label.label) for _, label, _ in whole]),
            [block_of(pair) for pair, _, _ in whole],
        )

    # -- what is new

    def _read_sites(self, learner: Learner) -> dict[str, Any]:
        live = set(self._feed.reader.sites)
        self.drift.keep_only(live)
        self._syncs = {site: sync for site, sync in self._syncs.items() if site in live}
        self._lags = {site: lag for site, lag in self._lags.items() if site in live}
        self._seen_ns = {site: at_ns for site, at_ns in self._seen_ns.items() if site in live}
        self._alarms = {name for name in self._alarms if name.partition(" ")[2] in live | {""}}
        known = sorted(live & set(self._feed.sites))
        first = self._num_readings * _MAX_SITES % max(len(known), 1)
        for site in (known[first:] + known[:first])[:_MAX_SITES]:
            self._look_at(site, learner)
        return {site: self._of_site(site) for site in known}

    def _look_at(self, site: str, learner: Learner) -> None:
        # A clock that was set back: what it calls now is older than what was seen, and looked at all the same.
        seen_ns = self._seen_ns[site] = min(self._seen_ns.get(site, 0), self._feed.came_ns(site))
        images = self._feed.recent(site, after_ns=seen_ns, newest=_MAX_IMAGES)
        if len(images) < _MIN_RECENT:
            return
        self._seen_ns[site] = images[-1].pair.id.captured_at_ns
        samples = _evenly(images, _MAX_RECENT)
        try:
            batch = self._feed.collate(samples)
        except NoPairsError:
            return
        q = learner.project(_features(learner, batch))
        residual_ms = np.array([(s.pair.camera_at_ns - s.pair.id.captured_at_ns) / 1e6 for s in samples])
        unit = learner.contract.unit
        look = Look(
            heatmaps=batch.heatmap.numpy(),
            clutter=self._feed.profiles[site].clutter,
            unit=unit,
            scale=float(learner.preprocess.scale),
            vectors=np.stack([sample.vector for sample in samples]).astype(np.float32),
            residual_ms=residual_ms,
        )
        for change in self.drift.observe(site, look):
            told = asdict(change) | {"was": round(change.was, 4), "now": round(change.now, 4)}
            self._log.warning("drift", **told)
            self._emit("drift", **told)
        if self._is_finite(q):
            self._watch_lag(site, images, q=q.numpy(), radar_at_ns=batch.scenes.at_ns.numpy())

    def _watch_lag(self, site: str, images: list[Sample], *, q: Any, radar_at_ns: Any) -> None:
        """images: all of them; q: (M, D) of some of their radar frames, captured at radar_at_ns (M,)."""
        sync = self._syncs.setdefault(site, SyncLag())
        stretches: dict[int, list[Sample]] = {}
        for image in images:
            stretches.setdefault(image.pair.id.captured_at_ns // _STRETCH_NS, []).append(image)
        for stretch, of_stretch in stretches.items():
            is_in = radar_at_ns // _STRETCH_NS == stretch
            sync.observe(
                q[is_in].astype(np.float64),
                np.stack([image.vector for image in of_stretch]).astype(np.float64),
                radar_at_ns=radar_at_ns[is_in],
                camera_at_ns=np.array([image.pair.camera_at_ns for image in of_stretch]),
            )
        lag = sync.estimate()
        if lag is not None:
            self._lags[site] = lag
            alarm_ms = self._settings.sync_lag_alarm_ms
            self._alarm(f"sync_lag {site}", is_on=lag.is_beyond(alarm_ms), site=site, **_told(lag), do=_LAG)

    def _of_site(self, site: str) -> dict[str, Any]:
        lag = self._lags.get(site)
        changes = {part: num for (at, part), num in self.drift.num_changes.items() if at == site}
        levels = {name: round(value, 4) for name, value in self.drift.levels(site).items()}
        return {"levels": levels, "changes": changes} | ({} if lag is None else _told(lag))

    # -- warnings

    def _is_finite(self, encodings: Tensor) -> bool:
        is_finite = bool(torch.isfinite(encodings).all())
        self._num_not_finite += not is_finite
        return is_finite

    def _alarm(self, name: str, *, is_on: bool, **values: Any) -> None:
        """Say once when it begins and once when it is over."""
        if is_on == (name in self._alarms):
            return
        (self._alarms.add if is_on else self._alarms.discard)(name)
        kind = name.partition(" ")[0]
        if is_on:
            self._log.warning(kind, **values)
        else:
            self._log.info(f"{kind}_is_over", **values)
        self._emit("alarm", alarm=name, is_on=is_on, **values)


def _told(lag: Lag) -> dict[str, Any]:
    return {
        "lag_ms": round(lag.lag_ms, 1),
        "lag_low_ms": round(lag.low_ms, 1),
        "lag_high_ms": round(lag.high_ms, 1),
        "lag_pairs": lag.num_pairs,
    }


def _features(learner: Learner, batch: Batch) -> Tensor:
    return _in_batches(learner, batch.heatmap.numpy(), batch.site)


def _in_batches(learner: Learner, heatmap: Any, site: Tensor) -> Tensor:
    """(N, feature_dim). heatmap: (N, C, R, A), any float dtype."""
    parts = [
        learner.features(torch.from_numpy(heatmap[at : at + _BATCH].astype(np.float32)), site[at : at + _BATCH])
        for at in range(0, len(heatmap), _BATCH)
    ]
    return torch.cat(parts)


def _evenly(items: list[Any], num: int) -> list[Any]:
    """At most `num`, spread over all of them, the last one among them."""
    return [items[-1 - i] for i in range(0, len(items), -(-len(items) // num))][::-1] if items else []
