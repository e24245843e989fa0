"""One ingest process, good pairs, and bad input between them; in the end every entry is where it belongs.

What is bad, and what should become of it, is in `bad_input`.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import orjson
import redis

from services.core import codec
from services.core.embedded import start_embedded_server
from services.core.frames import FrameId
from services.core.streams import DEAD_MAX_ENTRIES, EVENTS, kind_of, stream_key
from tests.system.bad_input import Bad, bad_entries, far_frames, huge_entries
from tests.system.chaos import Ingest
from tests.system.traffic import CAMERA_AFTER_NS, INSTANT_NS, Sent, account, camera_frame, radar_frame, undone

SITES = ("north", "south")
FLOODED = "flooded"
MAX_BUFFER_BYTES = 16 * 2**20
_INSTANTS_A_ROUND = 4
_TIMEOUT_S = 60.0
_ODD_SITES = (b"a/b", b"{x}", b"", b"..", b"x" * 65, b"\xff\xfe", b"a\nb", b"*", b"north ")


class Soak:
    """num_good, num_bad: entries sent so far, to sites that can be read. num_bytes: of all of them."""

    def __init__(self, directory: Path, *, seed: int) -> None:
        self._directory = directory
        self._rng = np.random.default_rng(seed)
        self._start_ns = time.time_ns() // 10**9 * 10**9
        self._num_instants = self._num_rounds = 0
        self._never = threading.Event()
        self._stack = ExitStack()
        self._sent: Sent = {}
        self._fates: dict[str, dict[tuple[str, bytes], Bad]] = {site: {} for site in SITES}  # not checked yet
        self._entries: Counter[str] = Counter()
        self._num_flood = self._num_buried = 0
        self._faults: list[str] = []
        self.num_good = self.num_bad = self.num_bytes = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            server = start_embedded_server(self._directory / "redis")
            stack.callback(server.stop)
            self._client = redis.Redis.from_url(server.url)
            stack.callback(self._client.close)
            self._ingest = Ingest(
                "soaked", url=server.url, data_dir=self._directory, log_path=self._directory / "ingest.log",
                settings={
                    "ECHOSIGHT_MAX_DEAD_BYTES": str(512 * 2**20), "ECHOSIGHT_LEASE_MS": "5000",
                    "ECHOSIGHT_MAX_BUFFER_BYTES": str(MAX_BUFFER_BYTES),
                },
            )  # fmt: skip
            stack.callback(self._ingest.kill)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def send_odd_keys(self) -> None:
        """Keys that look like a site's and are none: nothing to read, and nothing to stumble over."""
        pair = radar_frame("odd", FrameId(self._start_ns, 0)), camera_frame("odd", FrameId(self._start_ns, 0))
        for site in _ODD_SITES:
            for frame in pair:
                fields: dict[Any, Any] = dict(codec.encode(frame))
                self._client.xadd(b"echosight:{%s}:%s" % (site, kind_of(frame).encode()), fields)
        self._client.set(stream_key("text", "radar"), "not a stream")
        self._client.xadd(stream_key("mixed", "radar"), {"header": "{}"})
        self._client.rpush(stream_key("mixed", "camera"), "not a stream")
        self._client.xadd(stream_key("unburied", "radar"), {"header": "{}"})
        self._client.set(stream_key("unburied", "dead"), "not a stream")

    def send_round(self, *, with_huge: bool) -> None:
        """To every site one bad entry of each kind and a few good pairs, mixed; two frames far off in time."""
        for site in SITES:
            at_ns = self._start_ns + self._num_instants * INSTANT_NS
            bad = bad_entries(self._rng, at_ns=at_ns)
            if with_huge:
                bad += huge_entries(at_ns)
            parts = np.array_split(np.arange(len(bad)), _INSTANTS_A_ROUND)
            far = far_frames(self._num_rounds)
            for number, part in enumerate(parts):
                pipeline = self._client.pipeline(transaction=False)
                batch = [bad[at] for at in part]
                if number == 0:
                    batch += far  # first in its stream, in the first round: event time starts there
                for one in batch:
                    self._add(pipeline, site, one)
                for entry_id, one in zip(pipeline.execute(), batch, strict=True):
                    self._fates[site][one.kind, entry_id] = one
                self._send_pair(site, self._num_instants + number)
        self._num_instants += _INSTANTS_A_ROUND
        self._num_rounds += 1

    def send_flood(self, num: int, *, num_bytes: int = 1024) -> None:
        """Far more bad entries to one site than its dead letters keep, and a good pair behind them."""
        for start in range(0, num, 100):
            pipeline = self._client.pipeline(transaction=False)
            for _ in range(min(100, num - start)):
                fields = {b"header": self._rng.bytes(40), b"data": self._rng.bytes(num_bytes)}
                self._add(pipeline, FLOODED, Bad("flood", "radar", fields))
            pipeline.execute()
        self._num_flood += num
        self._send_pair(FLOODED, self._num_instants)
        self._num_instants += 1

    def _add(self, pipeline: Any, site: str, one: Bad) -> None:
        pipeline.xadd(stream_key(site, one.kind), dict(one.fields))
        self._entries[one.kind] += 1
        self._num_buried += one.fate == "buried"
        self.num_bad += 1
        self.num_bytes += sum(len(value) for value in one.fields.values())

    def _send_pair(self, site: str, number: int) -> None:
        at_ns = self._start_ns + number * INSTANT_NS
        for frame in (
            radar_frame(site, FrameId(at_ns, number)),
            camera_frame(site, FrameId(at_ns + CAMERA_AFTER_NS, number)),
        ):
            kind = "radar" if frame.id.captured_at_ns == at_ns else "camera"
            fields: dict[Any, Any] = dict(codec.encode(frame))
            self._client.xadd(stream_key(site, kind), fields)
            self._sent.setdefault((site, kind), set()).add(frame.id)
            self._entries[kind] += 1
            self.num_good += 1

    def drain(self) -> None:
        """Wait until the worker has acknowledged all there is, and said so."""
        sites = [*SITES, FLOODED]
        self._until(lambda: not undone(self._client, sites), lambda: f"unfinished: {undone(self._client, sites)}")
        self._until(
            lambda: self._num_counted() == self._entries,
            lambda: f"counted {self._num_counted()} of {self._entries}",
        )

    def resident_bytes(self, *, peak: bool = False) -> int:
        """Memory of the worker that is in RAM now, or was at most."""
        status = Path(f"/proc/{self._ingest.pid}/status").read_text()
        return 1024 * int(status.partition("VmHWM:" if peak else "VmRSS:")[2].split()[0])

    def reasons(self) -> Counter[str]:
        """What has left the worker, by its own newest count, of the sites we read: "radar.paired" and so on."""
        found: Any = self._client.xrevrange(EVENTS, count=20)
        events = [orjson.loads(fields[b"event"]) for _, fields in found]
        reports = [event["sites"] for event in events if event["kind"] == "ingest"]
        counted: Counter[str] = Counter()
        for site in (*SITES, FLOODED):
            counted.update(reports[0].get(site, {}).get("frames", {}) if reports else {})
        return counted

    def _num_counted(self) -> Counter[str]:
        counted: Counter[str] = Counter()
        for name, num in self.reasons().items():
            counted[name.partition(".")[0]] += num
        return counted

    def check_letters(self) -> None:
        """After `drain`: compare the dead letters with what was sent, and remove them: their number is capped."""
        for site in SITES:
            self._faults += self._misplaced(site)
            self._fates[site].clear()
            self._client.delete(stream_key(site, "dead"))
        num_kept = self._client.xlen(stream_key(FLOODED, "dead"))
        if not min(self._num_flood, DEAD_MAX_ENTRIES) <= num_kept <= DEAD_MAX_ENTRIES + 200:
            self._faults.append(
                f"{num_kept} dead letters of {self._num_flood} are kept, not about {DEAD_MAX_ENTRIES}"
            )
        num_undecodable = sum(num for name, num in self.reasons().items() if name.endswith(".undecodable"))
        if num_undecodable != self._num_buried:
            self._faults.append(f"{num_undecodable} entries were counted as undecodable, {self._num_buried} were")

    def finish(self) -> list[str]:
        """End the worker, which must leave in order, look at every stored pair, and return all that is wrong."""
        if (status := self._ingest.leave()) != 0:
            self._faults.append(f"the worker answered SIGTERM with status {status}: {self._log_tail()}")
        stored = account(self._sent, self._directory / "store")
        return self._faults + [f"{name}: {what}" for name, what in stored.faults().items()]

    def _misplaced(self, site: str) -> list[str]:
        """Every buried entry is in the dead letters exactly once, as it came, with a reason; no other entry is."""
        letters: Any = self._client.xrange(stream_key(site, "dead"))
        found: dict[tuple[str, bytes], dict[bytes, bytes]] = {}
        faults = []
        for _, letter in letters:
            at = (letter[b"stream"].decode(), letter[b"entry_id"])
            if at in found:
                faults.append(f"{site}: {at} was buried twice")
            found[at] = letter
        for at, one in self._fates[site].items():
            letter = found.pop(at, {})
            if (one.fate == "buried") != bool(letter):
                faults.append(f"{site}: {one.name} ({one.kind}) is {'not ' * (not letter)}among the dead letters")
            elif letter:
                fields = {
                    name.removeprefix(b"field:"): value
                    for name, value in letter.items()
                    if name.startswith(b"field:")
                }
                if fields != one.fields:
                    faults.append(f"{site}: the dead letter of {one.name} does not have the entry's fields")
                if len(letter[b"reason"]) < 20:
                    faults.append(f"{site}: the dead letter of {one.name} says only {letter[b'reason']!r}")
        return faults + [
            f"{site}: a good frame is among the dead letters: {letter[b'reason']!r}" for letter in found.values()
        ]

    def _until(self, is_so: Callable[[], bool], tell: Callable[[], str]) -> None:
        deadline_s = time.monotonic() + _TIMEOUT_S
        while not is_so():
            assert self._ingest.is_running, f"the worker exited: {self._log_tail()}"
            assert time.monotonic() < deadline_s, f"after {_TIMEOUT_S:.0f} s {tell()}\n{self._log_tail()}"
            self._never.wait(0.1)  # the condition lies in other processes: there is nothing to wait on

    def _log_tail(self) -> str:
        return (self._directory / "ingest.log").read_text(errors="replace")[-3000:]
