"""One site on its way through ingest: deliveries in, decisions out, and the batch that must become durable.

It belongs to whoever holds the site's lease, under the token that its store's writer has. It knows the matcher,
the clocks and the store; reading and acknowledging are the worker's.
"""

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.core.errors import BadFrameError
from services.core.frames import CameraFrame, FrameId, Label, RadarFrame, window_ns
from services.core.store import Pair, StoreWriter
from services.core.streams import Delivery, Kind
from services.ingest.clock import ClockEstimate, ClockOffset
from services.ingest.matcher import Decision, Matcher, Paired, Side
from services.ingest.settings import IngestSettings

if TYPE_CHECKING:  # it brings image libraries along, which only curation needs
    from services.ingest.curation import Curator

_CLOCK_STEP_NS = 500_000
"""An estimate of the clock offset that moved by less is noise: what is applied stays."""
_NUM_LATENCIES = 512
_ENTRY_BYTES = 512  # of Python's objects around it


@dataclass(frozen=True, slots=True)
class Matched:
    """A pair, and the two entries that it came from."""

    pair: Pair
    radar: Delivery
    camera: Delivery


@dataclass(slots=True)
class Batch:
    """What is decided and not yet durable and acknowledged. Each delivery is in exactly one of the lists.

    matched: pairs not looked at by curation yet. pairs: to be stored. done: nothing more to do but acknowledge,
    under this reason.
    """

    matched: list[Matched] = field(default_factory=list)
    pairs: list[Matched] = field(default_factory=list)
    labels: list[Delivery] = field(default_factory=list)
    dead: list[tuple[Delivery, str]] = field(default_factory=list)
    done: list[tuple[Delivery, str]] = field(default_factory=list)
    num_bytes: int = 0

    def __bool__(self) -> bool:
        return bool(self.matched or self.pairs or self.labels or self.dead or self.done)


@dataclass(slots=True)
class Tally:
    """What this process did for a site since it started, also if it had to give the site up in between.

    frames: by (kind, reason), every one that has left, counted once it is acknowledged. num_stored: new pairs on
    disk. num_evicted: by the limits of the store. num_lost: unread entries that the janitor had to trim.
    """

    frames: Counter[tuple[Kind, str]] = field(default_factory=Counter)
    num_stored: int = 0
    num_evicted: int = 0
    num_lost: int = 0


class Site:
    """The state of one site while this process ingests it. retry_at_s: when a refused batch is tried again."""

    def __init__(
        self, writer: StoreWriter, *, settings: IngestSettings, curator: "Curator | None", tally: Tally
    ) -> None:
        self.name = writer.site
        self.tally = tally
        self.writer = writer
        self._settings = settings
        self._curator = curator
        self._held: set[tuple[str, bytes]] = set()
        self._just_done: set[tuple[str, bytes]] = set()  # acknowledged since the read under way began
        self._decided = Batch()
        self._clock = ClockOffset()
        self._applied_ns = settings.clock_offset_ns(self.name)
        if settings.clock_correction == "apply" and writer.newest_clock_offset_ns is not None:
            self._applied_ns = writer.newest_clock_offset_ns  # as before the restart, or the hand-over
        self._matcher: Matcher[Delivery] = Matcher(
            window_ns=window_ns(settings.window_ms),
            grace_ns=round(settings.grace_ms * 1e6),
            idle_timeout_s=settings.idle_timeout_s,
            max_bytes=settings.max_waiting_bytes,
            now_s=time.monotonic(),
        )
        self._matcher.set_clock_offset(self._applied_ns)
        self.committing = Batch()
        self.clock: ClockEstimate | None = None
        self.latencies_s: deque[float] = deque(maxlen=_NUM_LATENCIES)  # of the newest pairs
        self.num_failures = 0
        self.retry_at_s = 0.0
        self.is_leaving = False
        self.clock_is_off = False

    @property
    def num_waiting_bytes(self) -> int:
        return self._matcher.num_bytes

    @property
    def num_decided_bytes(self) -> int:
        return self._decided.num_bytes + self.committing.num_bytes

    @property
    def is_settled(self) -> bool:
        """Whether nothing is decided that is not committed yet."""
        return not self._decided and not self.committing

    @property
    def num_held(self) -> int:
        """Entries read and not yet acknowledged."""
        return len(self._held)

    def take_in(self, deliveries: Sequence[Delivery], *, now_s: float) -> None:
        """Sort deliveries into the matcher, and what needs no partner into the batch."""
        for delivery in deliveries:
            at = (delivery.key, delivery.entry_id)
            if at in self._held or at in self._just_done:  # read again after a lost answer
                continue
            self._held.add(at)
            match delivery.frame:
                case BadFrameError() if not delivery.fields:  # trimmed away unread: nothing to bury
                    self._decided.done.append((delivery, "trimmed"))
                    self._decided.num_bytes += entry_bytes(delivery)
                case BadFrameError() as error:
                    self._decided.dead.append((delivery, str(error)))
                    self._decided.num_bytes += entry_bytes(delivery)
                case Label():
                    self._decided.labels.append(delivery)
                    self._decided.num_bytes += entry_bytes(delivery)
                case RadarFrame() | CameraFrame() as frame:
                    side: Side = "radar" if isinstance(frame, RadarFrame) else "camera"
                    self._clock.observe(side, frame.captured_at_ns, delivery.arrived_ms)
                    size = entry_bytes(delivery)
                    self._sort(self._matcher.add(side, frame.id, delivery, now_s=now_s, num_bytes=size))

    def forget_done(self) -> None:
        """A read begins: what was acknowledged before it cannot be in its answer."""
        self._just_done.clear()

    def decide(self, *, now_s: float) -> None:
        self._sort(self._matcher.decide(now_s=now_s))

    def flush(self) -> None:
        """Decide about everything that waits, as if both sensors had ended."""
        self._sort(self._matcher.flush())

    def excuse(self, *sides: Side, now_s: float) -> None:
        """Not count the silence so far against these sensors: this process did not read all that they sent."""
        for side in sides:
            self._matcher.excuse(side, now_s=now_s)

    def full_side(self, *, limit_bytes: int) -> Side | None:
        """The sensor not to read now: its frames wait for the other one's, which lie deeper in its stream.

        Never both: then the grace alone holds that many, and more to come sets them free.
        """
        if self._matcher.num_bytes <= limit_bytes:
            return None
        num_radar, num_camera = self._matcher.num_waiting("radar"), self._matcher.num_waiting("camera")
        return "radar" if num_radar > num_camera else "camera"

    def begin_commit(self) -> bool:
        """Make what is decided the batch to commit, unless one is still to be finished; whether there is one."""
        if not self.committing:
            self.committing, self._decided = self._decided, Batch()
        return bool(self.committing)

    def store(self) -> None:
        """Make the batch durable, in a worker thread. After a failure it goes on where it stopped.

        Raises StoreError, and StoreFencedError if the site has another owner: then nothing may be acknowledged.
        """
        batch = self.committing
        if batch.matched:
            self._curate(batch)
        news = {one.pair.id: one for one in batch.pairs if one.pair.id not in self.writer}
        if news:
            self.tally.num_stored += self.writer.append([one.pair for one in news.values()])
        for one in batch.pairs:
            reason = "paired" if news.get(one.pair.id) is one else "duplicate"
            batch.done += [(one.radar, reason), (one.camera, reason)]
        batch.pairs.clear()
        if batch.labels:
            self.writer.append_labels([one.frame for one in batch.labels if isinstance(one.frame, Label)])
            batch.done += [(one, "stored") for one in batch.labels]
            batch.labels.clear()
        self.writer.check_token()  # also for what leaves without a trace in the store

    def finish_commit(self, *, now_ms: float) -> list[float]:
        """The batch is durable, buried and acknowledged: count it and forget it.

        now_ms: of the clock that the streams' server uses. Returns each new pair's seconds since its radar frame
        arrived.
        """
        latencies_s = [
            max(now_ms - delivery.arrived_ms, 0.0) / 1e3
            for delivery, reason in self.committing.done
            if reason == "paired" and delivery.kind == "radar"
        ]
        self.latencies_s.extend(latencies_s)
        for delivery, reason in self.committing.done:
            self.tally.frames[delivery.kind, reason] += 1
            self._let_go(delivery)
        self.committing = Batch()
        self.num_failures = 0
        return latencies_s

    def finish_burial(self, buried: Sequence[tuple[Delivery, str]]) -> None:
        """The newest `buried` of the batch lie in the dead letters, and no other replica has put them there."""
        for delivery, _ in buried:
            self.tally.frames[delivery.kind, "undecodable"] += 1
            self._let_go(delivery)
        del self.committing.dead[-len(buried) :]

    def _let_go(self, delivery: Delivery) -> None:
        at = (delivery.key, delivery.entry_id)
        self._held.discard(at)
        self._just_done.add(at)

    def keep_time(self) -> None:
        """Look at the sensors' clocks, and follow them if asked to. Call it now and then."""
        self.clock = self._clock.estimate()
        if self.clock is None or self._settings.clock_correction == "off":
            return
        moved_ns = abs(self.clock.offset_ns - self._applied_ns)
        is_sure = self.clock.uncertainty_ns < window_ns(self._settings.window_ms) // 2
        if is_sure and moved_ns > max(_CLOCK_STEP_NS, self.clock.uncertainty_ns):
            self._applied_ns = self.clock.offset_ns
            self._matcher.set_clock_offset(self._applied_ns)

    def clock_has_changed_sides(self) -> bool:
        """Whether what is left of the clock error has crossed the alarm's threshold since the last call."""
        if self.clock is None:
            return False
        error_ns = abs(self.clock.offset_ns - self._applied_ns) - self.clock.uncertainty_ns
        was_off, self.clock_is_off = self.clock_is_off, error_ns > self._settings.clock_alarm_ms * 1e6
        return was_off != self.clock_is_off

    @property
    def applied_offset_ns(self) -> int:
        """What is subtracted from the camera's times before they are compared."""
        return self._applied_ns

    def take_leaps(self) -> list[tuple[Side, int]]:
        """Leaps of a sensor's clock since the last call: side, and by how many ns."""
        return self._matcher.take_leaps()

    def _sort(self, decisions: Sequence[Decision[Delivery]]) -> None:
        batch = self._decided
        for decision in decisions:
            if isinstance(decision, Paired):
                radar, camera = decision.radar.frame, decision.camera.frame
                assert isinstance(radar, RadarFrame)
                assert isinstance(camera, CameraFrame)
                pair = Pair(radar, camera, clock_offset_ns=self._applied_ns)
                batch.matched.append(Matched(pair, decision.radar, decision.camera))
                batch.num_bytes += entry_bytes(decision.radar) + entry_bytes(decision.camera)
            else:
                batch.done.append((decision.payload, decision.reason))
                batch.num_bytes += entry_bytes(decision.payload)

    def _curate(self, batch: Batch) -> None:
        """Let the curator look at the new pairs; a labelled one stays whatever it says."""
        if self._curator is None:
            batch.pairs += batch.matched
            batch.matched.clear()
            return
        by_id: dict[FrameId, Matched] = {}
        for one in batch.matched:
            by_id.setdefault(one.pair.id, one)
        for one in batch.matched:
            if by_id[one.pair.id] is not one:  # sent again so late that the matcher had forgotten it
                batch.done += [(one.radar, "duplicate"), (one.camera, "duplicate")]
        kept, dropped = self._curator.curate(self.name, [one.pair for one in by_id.values()])
        for pair in kept:
            one = by_id[pair.id]
            batch.pairs.append(Matched(pair, one.radar, one.camera))
        for pair, reason in dropped:
            one = by_id[pair.id]
            if pair.id in self.writer.labels.labels and reason != "unreadable":
                batch.pairs.append(one)
            else:
                batch.done += [(one.radar, reason), (one.camera, reason)]
        batch.matched.clear()


def entry_bytes(delivery: Delivery) -> int:
    """What an entry takes in memory, about."""
    return _ENTRY_BYTES + sum(len(name) + len(value) for name, value in delivery.fields.items())
