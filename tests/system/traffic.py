"""Frames whose content follows from their id, sent through kills and checked to the last byte.

`Schedule` says what is sent, `Producer` sends it and keeps the ledger of what the server took, `Watcher` reads the
store all the while, `account` compares the ledger with every row on disk. Nothing here knows the ingest worker: it
sees the streams on one side and the store on the other.
"""

import hashlib
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from services.core import codec
from services.core.frames import CameraFrame, FrameId, RadarFrame, window_ns
from services.core.inspection import verify
from services.core.segments import SegmentReader
from services.core.store import StoredPair, StoreReader
from services.core.streams import INGEST_GROUP, KINDS, kind_of, stream_key

MS = 1_000_000
INSTANT_NS = 100 * MS
CAMERA_AFTER_NS = 4 * MS
WINDOW_MS = 50
_LATE_BY = 20
_SEND_TIMEOUT_S = 60.0

SensorFrame = RadarFrame | CameraFrame
Sent = dict[tuple[str, str], set[FrameId]]
"""(site, "radar" or "camera") to the frames of which the server said that it has them."""


def radar_frame(site: str, frame_id: FrameId) -> RadarFrame:
    """A heatmap of 1 to 4 KiB: (R, 64) uint8, every byte follows from the site and the id."""
    num_rows = 16 + frame_id.seq % 48
    heatmap = np.frombuffer(_content(f"radar {site} {frame_id}", 64 * num_rows), np.uint8).reshape(num_rows, 64)
    return RadarFrame(site, frame_id.seq, frame_id.captured_at_ns, heatmap=heatmap, unit="counts")


def camera_frame(site: str, frame_id: FrameId) -> CameraFrame:
    """1 to 4 KiB between the markers of a JPEG, every byte of which follows from the site and the id."""
    image = b"\xff\xd8\xff" + _content(f"camera {site} {frame_id}", 1024 + 61 * (frame_id.seq % 50)) + b"\xff\xd9"
    return CameraFrame(site, frame_id.seq, frame_id.captured_at_ns, image=image, shape=(48, 64, 3))


def _content(of: str, num_bytes: int) -> bytes:
    return hashlib.shake_256(of.encode()).digest(num_bytes)


class Schedule:
    """What the sensors of some sites send: an instant every 100 ms of capture time, the camera 4 ms later.

    Of ten instants about eight have both frames, one has the radar's alone, one the camera's. Some frames are sent
    twice in a row, some once more up to two seconds of capture time later. Instants must be asked for in order.
    """

    def __init__(self, sites: Sequence[str], *, seed: int, start_ns: int) -> None:
        self._sites = sites
        self._rng = random.Random(seed)
        self._start_ns = start_ns
        self._recent: list[SensorFrame] = []

    def frames(self, number: int) -> list[SensorFrame]:
        """The frames of all sites at one instant, in the order in which they are sent."""
        at_ns = self._start_ns + number * INSTANT_NS
        frames: list[SensorFrame] = []
        for site in self._sites:
            have = self._rng.choices(("both", "radar", "camera"), weights=(8, 1, 1))[0]
            if have != "camera":
                frames.append(radar_frame(site, FrameId(at_ns, number)))
            if have != "radar":
                frames.append(camera_frame(site, FrameId(at_ns + CAMERA_AFTER_NS, number)))
        again = [frame for frame in frames if self._rng.random() < 0.05]
        late = [self._rng.choice(self._recent) for _ in self._sites if self._recent and self._rng.random() < 0.1]
        self._recent = (self._recent + frames)[-2 * len(self._sites) * _LATE_BY :]
        self._rng.shuffle(frames)
        return [*late, *frames, *again]


class Producer:
    """Sends a schedule from its own thread; what the server did not answer it sends again, before anything newer.

    sent: the ledger. num_entries: entries that the server took for sure, copies too. failure: why it gave up.
    """

    def __init__(self, url: str, schedule: Schedule, *, instants_per_s: float) -> None:
        self._client = redis.Redis.from_url(url, socket_timeout=10.0, retry=Retry(NoBackoff(), 0))
        self._schedule = schedule
        self._pause_s = 1.0 / instants_per_s
        self._stopping = threading.Event()
        self._never = threading.Event()
        self._thread = threading.Thread(target=self._run, name="producer")
        self.sent: Sent = {}
        self.num_entries = 0
        self.num_retries = 0
        self.failure: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Send the instant that is under way to its end, then no more. Raises what made the producer fail."""
        self._stopping.set()
        self._thread.join()
        self._client.close()
        if self.failure is not None:
            raise self.failure

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()
        self._client.close()

    def _run(self) -> None:
        number = 0
        try:
            while not self._stopping.wait(self._pause_s):
                self._send(self._schedule.frames(number))
                number += 1
        except Exception as error:  # handed to whoever stops this thread
            self.failure = error

    def _send(self, frames: list[SensorFrame]) -> None:
        deadline_s = time.monotonic() + _SEND_TIMEOUT_S
        while frames:
            frames = self._send_once(frames)
            if frames:
                assert time.monotonic() < deadline_s, f"the server took nothing for {_SEND_TIMEOUT_S:.0f} s"
                self.num_retries += 1
                self._never.wait(0.02)  # the server comes back when it comes back

    def _send_once(self, frames: list[SensorFrame]) -> list[SensorFrame]:
        """Those of `frames` that the server did not answer, or refused."""
        pipeline = self._client.pipeline(transaction=False)
        for frame in frames:
            entry: dict[Any, Any] = dict(codec.encode(frame))
            pipeline.xadd(stream_key(frame.site, kind_of(frame)), entry)
        try:
            replies = pipeline.execute(raise_on_error=False)
        except RedisError:
            return frames
        left = []
        for frame, reply in zip(frames, replies, strict=True):
            if isinstance(reply, Exception):
                left.append(frame)
            else:
                self.sent.setdefault((frame.site, kind_of(frame)), set()).add(frame.id)
                self.num_entries += 1
        return left


class Watcher:
    """Reads pairs at random from its own thread, as the trainer would, and notes each that is not as sent.

    torn: what was wrong, in words. num_reads: pairs looked at.
    """

    def __init__(self, store_dir: Path, *, seed: int) -> None:
        self._store_dir = store_dir
        self._rng = np.random.default_rng(seed)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher")
        self._by_site: Counter[str] = Counter()
        self.torn: list[str] = []
        self.num_reads = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def num_pairs(self, site: str) -> int:
        """Pairs of a site, as of the last look."""
        return self._by_site[site]

    def _run(self) -> None:
        with closing(StoreReader(self._store_dir)) as reader:
            while not self._stopping.wait(0.03):
                try:
                    reader.refresh()
                    for pair in reader.random_batch(16, rng=self._rng):
                        self.torn += faults_of(pair)
                        self.num_reads += 1
                    self._by_site = Counter(pair.site for pair in reader.pairs)
                except Exception as error:  # a reader must never fail because a writer died
                    self.torn.append(f"reading failed: {error!r}")


def faults_of(pair: StoredPair) -> list[str]:
    """What of a stored pair differs from what was sent under its id; nothing if all is as it should be."""
    name = f"pair {pair.id} of site {pair.site}"
    radar, camera = pair.radar(), pair.camera()
    if radar is None or camera is None:
        return [f"{name} in segment {pair.segment.name}, row {pair.row}: its bytes are damaged"]
    faults = []
    sent = radar_frame(pair.site, pair.id)
    if radar.heatmap.tobytes() != sent.heatmap.tobytes() or radar.unit != sent.unit or radar.axes != sent.axes:
        faults.append(f"{name}: the radar frame is not the one sent")
    partner = camera_frame(pair.site, camera.id)
    if camera.image != partner.image or camera.shape != partner.shape:
        faults.append(f"{name}: the camera frame {camera.id} is not the one sent")
    if camera.id != FrameId(pair.id.captured_at_ns + CAMERA_AFTER_NS, pair.id.seq):
        faults.append(f"{name}: its camera frame {camera.id} is another instant's")
    return faults


@dataclass(frozen=True, slots=True)
class Account:
    """Where every frame is in the end. All lists must be empty.

    lost: pairs that were sent and are not on disk. doubled: rows with an id that another row has. foreign: pairs
    on disk that were not sent, or do not belong together. torn: pairs that read differently from what was sent.
    """

    num_pairs: int
    num_alone: int
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)

    def faults(self) -> dict[str, list[str]]:
        """What is wrong, at most three examples a kind behind their number."""
        found = {name: getattr(self, name) for name in ("lost", "doubled", "foreign", "torn")}
        return {name: [f"{len(those)} in all", *those[:3]] for name, those in found.items() if those}


def account(sent: Sent, store_dir: Path) -> Account:
    """Compare the ledger with every row of every segment. Nobody may write meanwhile."""
    expected = pairs_by_brute_force(sent)
    rows = Counter(rows_on_disk(store_dir))
    stored = {(site, frame_id) for site, frame_id in rows}
    torn: list[str] = []
    with closing(StoreReader(store_dir)) as reader:
        reader.refresh()
        seen = {(pair.site, pair.id) for pair in reader}
        for pair in reader:
            torn += faults_of(pair)
    for site in sorted({site for site, _ in rows}):
        torn += [f"site {site}: {finding}" for finding in verify(store_dir, site)]
    return Account(
        num_pairs=len(expected),
        num_alone=sum(len(ids) for ids in sent.values()) - 2 * len(expected),
        lost=[str(pair) for pair in sorted(expected - (stored & seen))],
        doubled=[f"{pair}: {num} rows" for pair, num in sorted(rows.items()) if num > 1],
        foreign=[str(pair) for pair in sorted((stored | seen) - expected)],
        torn=torn,
    )


def pairs_by_brute_force(sent: Sent) -> set[tuple[str, FrameId]]:
    """(site, radar id) of all pairs, found by trying all. No frame may have two partners within the window."""
    pairs = set()
    for site in {site for site, _ in sent}:
        cameras = sorted(sent.get((site, "camera"), ()))
        times = np.array([frame.captured_at_ns for frame in cameras], np.int64)
        taken: Counter[int] = Counter()
        for radar in sent.get((site, "radar"), ()):
            near = np.flatnonzero(np.abs(times - radar.captured_at_ns) <= window_ns(WINDOW_MS))
            assert len(near) <= 1, f"{radar} of site {site} has {len(near)} partners: the schedule is ambiguous"
            taken.update(near.tolist())
            if len(near):
                pairs.add((site, radar))
        assert not taken or max(taken.values()) == 1, f"a camera frame of site {site} has two partners"
    return pairs


def rows_on_disk(store_dir: Path) -> list[tuple[str, FrameId]]:
    """(site, id) of every row that counts, also if a reader would hide it behind another."""
    rows = []
    for path in sorted(store_dir.glob("*/writer-*/*.idx")):
        with closing(SegmentReader(path.parent, path.stem)) as segment:
            segment.refresh()
            rows += [(path.parts[-3], frame_id) for _, frame_id in segment.ids()]
    return rows


def undone(client: "redis.Redis", sites: Iterable[str]) -> dict[str, Any]:
    """Streams of `sites` that the ingest group has not finished, and what is left: none once all is done."""
    left = {}
    for site in sites:
        for kind in KINDS:
            key = stream_key(site, kind)
            if not client.exists(key):
                continue
            newest: Any = client.xinfo_stream(key)
            groups: Any = client.xinfo_groups(key)
            mine = [group for group in groups if group["name"] == INGEST_GROUP.encode()]
            if not mine or mine[0]["pending"] or mine[0]["last-delivered-id"] != newest["last-generated-id"]:
                left[key] = mine[0] if mine else "no group"
    return left
