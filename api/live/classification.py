"""Classifies what the radars stream, as it comes: read -> choose -> decode -> predict -> vote -> publish.

It never falls behind: what waited too long when it is read, or comes in greater numbers than the model can answer,
is counted and left out, newest frames first. One task; a lost server is waited for. The answer to a frame is that
of POST /v1/classify, and beside it the vote of its track window.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from api.answering.calls import Terms
from api.answering.serving import Serving
from api.bodies.frames import Heatmaps
from api.live.metrics import LiveMetrics
from api.live.sites import LiveSites
from api.live.smoothing import Smoother, Window, abstention
from api.models.classifier import Classifier
from api.problems import ProblemError
from api.routes.classify import DECODE_IN_LOOP_BYTES, on_decoder
from api.settings import ApiSettings
from services.core import codec
from services.core.errors import BadFrameError
from services.core.frames import RadarFrame
from services.core.logs import logger
from services.core.predictions import Latency, ModelName, Prediction, Smoothed, UnknownScore
from services.core.streams import Arrival, NewestReader, connect, disconnect

_BLOCK_MS = 100
_BACKOFF_S = (0.1, 0.2, 0.5, 1.0)
_READ_BYTES = 32 * 1024**2  # wanted of one read at most, over all sites
_MAX_READ_COUNT = 64
_MAX_READS = 100  # in one turn: whoever publishes faster than they are read is not waited for
_CLOSE_S = 2.0
_EVEN = 0.5
_CALLER = "live"  # whom the engine counts it as: its place in line is one client's


class _Frame(NamedTuple):
    """An arrival that the model can take."""

    arrival: Arrival
    frame: RadarFrame


class LiveClassification:
    """The task. `run` it until cancelled, then `close`."""

    def __init__(self, settings: ApiSettings, serving: Serving, metrics: LiveMetrics) -> None:
        """Raises StreamsError for a bad URL."""
        self._settings = settings
        self._serving = serving
        self._metrics = metrics
        self._log = logger("api")
        self._client = connect(settings.redis_url)
        self._reader = NewestReader(self._client, kind="radar")
        self.sites = LiveSites(settings, self._client, self._reader, log=self._log)
        self._window = Window(settings.live_window_frames, max_age_ns=settings.live_window_ms * 1_000_000)
        self._smoothers: dict[str, Smoother] = {}
        self._classes: tuple[str, ...] = ()
        self._turns: Counter[str] = Counter()  # site to the turn in which it was answered last
        self._num_turns = 0
        self._entry_bytes = 1
        self._next_look_s = 0.0
        self._said: set[tuple[str, int]] = set()

    async def run(self) -> None:
        """Until cancelled or the server stops. While there is no model, this replica takes no site."""
        keeping = asyncio.create_task(self.sites.keep())
        num_failures = 0
        try:
            while not self._serving.live.is_stopping:
                if self._serving.live.current is None:
                    await asyncio.sleep(_BLOCK_MS / 1e3)
                    continue
                try:
                    await self._turn()
                    num_failures = 0
                except Exception as error:  # a lost server, a refusal: answers over HTTP go on meanwhile
                    self._metrics.interruptions.inc()
                    if num_failures in (0, len(_BACKOFF_S)):  # once when it starts, once when it lasts
                        self._log.warning("live_waits", reason=str(error) or type(error).__name__)
                    await asyncio.sleep(_BACKOFF_S[min(num_failures, len(_BACKOFF_S) - 1)])
                    num_failures += 1
        finally:
            keeping.cancel()

    async def close(self) -> None:
        """Let other replicas go on at once."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_CLOSE_S):
                await self.sites.close()
        await disconnect(self._client)

    async def _turn(self) -> None:
        if time.monotonic() >= self._next_look_s:
            await self.sites.look()
            self._next_look_s = time.monotonic() + self._settings.live_lease_ms / 3e3
            self._metrics.sites.set(len(self.sites.ours))
            self._forget()
        arrivals = await self._read()
        if not arrivals:
            return
        read_s = time.monotonic()
        model = self._serving.model
        chosen = self._choose(arrivals, limit=self._limit(model))
        frames, heatmaps = await self._decode(chosen, model)
        if frames:
            await self._answer(frames, heatmaps, model, read_s=read_s)

    def _forget(self) -> None:
        """What was known of sites that are not ours any more."""
        for known in (self._smoothers, self._turns):
            for site in known.keys() - self.sites.ours.keys():
                del known[site]
        self._said = {(site, version) for site, version in self._said if site in self.sites.ours}

    async def _read(self) -> list[Arrival]:
        """What has come at our sites, to the last entry; of more than a batch each site's newest."""
        count = max(2, min(_MAX_READ_COUNT, _READ_BYTES // (self._entry_bytes * max(len(self.sites.ours), 1))))
        arrivals: list[Arrival] = []
        for number in range(_MAX_READS):
            page = await self._reader.read(count=count, block_ms=0 if number else _BLOCK_MS)
            self._entry_bytes = max([self._entry_bytes, *(len(one.fields.get(b"data", b"")) for one in page)])
            arrivals = self._newest(arrivals + page)
            if max(Counter(one.site for one in page).values(), default=0) < count:
                break
        return arrivals

    def _newest(self, arrivals: list[Arrival]) -> list[Arrival]:
        """Without what is too old, and of each site a batch at most: what was read is not kept for later."""
        left: Counter[str] = Counter()
        kept = []
        for arrival in reversed(arrivals):
            left[arrival.site] += 1
            if arrival.age_ms > self._settings.live_max_age_ms:
                self._metrics.skip(arrival.site, "stale")
            elif left[arrival.site] > self._settings.live_max_batch:
                self._metrics.skip(arrival.site, "overtaken")
            else:
                kept.append(arrival)
        return kept[::-1]

    def _limit(self, model: Classifier) -> int:
        """Frames that the model answers in half of the age that they may have, at most a batch."""
        in_time = 0.5 * self._settings.live_max_age_ms / max(model.frame_ms, 1e-3)
        return max(1, min(self._settings.live_max_batch, int(in_time)))

    def _choose(self, arrivals: Sequence[Arrival], *, limit: int) -> list[Arrival]:
        """At most `limit` frames, each site's newest first; then in their order."""
        self._num_turns += 1
        chosen = choose([arrival.site for arrival in arrivals], limit=limit, last_turns=self._turns)
        for i, arrival in enumerate(arrivals):
            if i in chosen:
                self._turns[arrival.site] = self._num_turns
            else:
                self._metrics.skip(arrival.site, "overtaken")
        return [arrival for i, arrival in enumerate(arrivals) if i in chosen]

    async def _decode(self, arrivals: Sequence[Arrival], model: Classifier) -> tuple[list[_Frame], Heatmaps]:
        """The frames that `model` takes, and their heatmaps, (B, C, R, A) float32."""

        def run() -> tuple[list[_Frame], Heatmaps, list[tuple[Arrival, str, str]]]:
            return decode(arrivals, model)

        num_bytes = sum(len(arrival.fields.get(b"data", b"")) for arrival in arrivals)
        frames, heatmaps, refused = run() if num_bytes < DECODE_IN_LOOP_BYTES else await on_decoder(run)
        for arrival, reason, why in refused:
            self._metrics.skip(arrival.site, reason)
            if (arrival.site, model.version) not in self._said:
                self._said.add((arrival.site, model.version))
                self._log.warning("live_frame_refused", site=arrival.site, id=arrival.entry_id, reason=why)
        return frames, heatmaps

    async def _answer(
        self, frames: Sequence[_Frame], heatmaps: Heatmaps, model: Classifier, *, read_s: float
    ) -> None:
        sites = np.array([model.site(one.arrival.site)[0] for one in frames], np.int64)
        terms = Terms(_CALLER, time.monotonic_ns() + self._settings.live_max_age_ms * 1_000_000)
        try:
            found = (await self._serving.infer(model, heatmaps, sites, model.answers, terms)).values
        except ProblemError:  # no place in line, or too late: the next turn is about newer frames
            for one in frames:
                self._metrics.skip(one.arrival.site, "busy")
            return
        scores = found[1].tolist() if len(found) > 1 else [None] * len(frames)
        are_good = np.all([np.isfinite(values.reshape(len(frames), -1)).all(axis=1) for values in found], axis=0)
        predictions: dict[str, list[Prediction]] = {}
        for one, probabilities, score, is_good in zip(frames, found[0], scores, are_good, strict=True):
            site = one.arrival.site
            if not is_good:
                self._metrics.skip(site, "not_finite")
            elif site in self.sites.ours:  # not lost meanwhile
                prediction = self._predict(one, probabilities, score, model, read_s=read_s)
                predictions.setdefault(site, []).append(prediction)
        await self._publish(predictions)

    def _predict(
        self, one: _Frame, probabilities: Any, score: float | None, model: Classifier, *, read_s: float
    ) -> Prediction:
        arrival, frame = one
        unknown = None
        if score is not None and model.unknown_threshold is not None:
            threshold = model.unknown_threshold
            unknown = UnknownScore(score=score, threshold=threshold, is_unknown=score >= threshold)
        is_unknown = unknown is not None and unknown.is_unknown
        vote = self._smoother(arrival.site, model).add(frame.captured_at_ns, probabilities, is_unknown=is_unknown)
        abstained = abstention(vote, is_unknown=is_unknown, below=self._abstain_below(model))
        read_ms = 1e3 * (time.monotonic() - read_s)
        label = model.classes[vote.index]
        return Prediction(
            seq=frame.seq,
            captured_at_ns=frame.captured_at_ns,
            radar_id=arrival.entry_id,
            answer=None if abstained else label,
            abstained=abstained,
            label=model.classes[int(probabilities.argmax())],
            probabilities=_by_name(model, probabilities),
            smoothed=Smoothed(
                label=label, probabilities=_by_name(model, vote.probabilities), num_frames=vote.num_frames
            ),
            unknown=unknown,
            model=ModelName(name=model.manifest.name, version=model.version),
            latency_ms=Latency(
                captured=round((time.time_ns() - frame.captured_at_ns) / 1e6, 3),
                arrived=round(arrival.age_ms + read_ms, 3),
                read=round(read_ms, 3),
            ),
        )

    def _abstain_below(self, model: Classifier) -> float:
        """What the setting says; else the release; else, of one that did not say, more likely wrong than right."""
        given = self._settings.live_abstain_below
        if given != "auto":
            return given
        released = model.manifest.abstain_below
        return _EVEN if released is None else released

    def _smoother(self, site: str, model: Classifier) -> Smoother:
        """The site's window; all begin anew when a model with other classes is live."""
        if model.classes != self._classes:
            self._classes = model.classes
            self._smoothers.clear()
        return self._smoothers.setdefault(site, Smoother(self._window))

    async def _publish(self, predictions: dict[str, list[Prediction]]) -> None:
        lost = await self.sites.predictions.publish(predictions, self.sites.ours)
        self.sites.drop(lost)
        for site, its in predictions.items():
            if site in lost:
                self._metrics.skip(site, "lost_site", len(its))
                continue
            for prediction in its:
                self._metrics.count(site, label=prediction.smoothed.label, abstained=prediction.abstained)
                self._metrics.observe(**prediction.latency_ms.model_dump())


def choose(sites: Sequence[str], *, limit: int, last_turns: Counter[str]) -> set[int]:
    """Which of the frames to answer. sites: of each, oldest first; last_turns: when a site had its last answer.

    The newest of each site before the second newest of any; where not all have one, who waited longest first.
    """
    ranks: Counter[str] = Counter()
    order = []
    for i in reversed(range(len(sites))):
        order.append((ranks[sites[i]], last_turns[sites[i]], -i))
        ranks[sites[i]] += 1
    return {-i for _, _, i in sorted(order)[:limit]}


def decode(
    arrivals: Sequence[Arrival], model: Classifier
) -> tuple[list[_Frame], Heatmaps, list[tuple[Arrival, str, str]]]:
    """The frames that the model takes, their heatmaps; and what it does not take, under which name, and why."""
    frames: list[_Frame] = []
    refused = []
    contract = model.contract
    for arrival in arrivals:
        try:
            frame = codec.decode(arrival.site, "radar", arrival.fields)
        except BadFrameError as error:
            refused.append((arrival, "undecodable", str(error)))
            continue
        assert isinstance(frame, RadarFrame)
        if frame.shape != contract.shape:
            why = f"heatmap shape is {frame.heatmap.shape}, model {model.version} takes {contract.shape}"
            refused.append((arrival, "wrong_shape", why))
        elif frame.heatmap.dtype.name not in contract.dtypes:
            why = f"heatmap dtype is {frame.heatmap.dtype.name}, model {model.version} takes {contract.dtypes}"
            refused.append((arrival, "wrong_dtype", why))
        else:
            frames.append(_Frame(arrival, frame))
    heatmaps = np.empty((len(frames), *contract.shape), np.float32)
    for i, one in enumerate(frames):
        heatmaps[i] = one.frame.heatmap  # (R, A) is one channel
    return frames, heatmaps, refused


def _by_name(model: Classifier, probabilities: Any) -> dict[str, float]:
    """As /v1/classify rounds them; what rounding in the graph has put beyond 1 is 1."""
    values = probabilities.tolist()
    return {name: min(max(round(p, 7), 0.0), 1.0) for name, p in zip(model.classes, values, strict=True)}
