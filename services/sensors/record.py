"""The streams of one or more sites into an MCAP file, until told to stop: what came, when it came.

Each site is read by a task of its own; what one read brings is written in a thread before the next read, so that
memory holds a page a site, and a chunk. It reads from a position of its own: ingest does not notice. It does not
know how a message looks (recordings) nor how a stream is read (core.streams).
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, TypeVar

from services.core import codec
from services.core.errors import BadFrameError, RecordingError, StreamsError
from services.core.files import sync_directory
from services.core.logs import logger
from services.core.streams import StreamsLost
from services.core.streams.follower import FollowedEntry, Follower
from services.sensors.recordings.mcap_writer import MAX_LOG_TIME_NS, McapWriter, Topic

PAGE_ENTRIES = 16
"""Read at once of each stream: 2 MB a site where frames have 60 KiB."""

_BLOCK_MS = 200
_HOUSEKEEPING_S = 2.0
_LOG_EVERY_S = 10.0
_FIRST_ANSWER_S = 5.0
_MIN_BACK_OFF_S, _MAX_BACK_OFF_S = 0.1, 5.0

_Result = TypeVar("_Result")


@dataclass(slots=True)
class TopicCounts:
    """num_bytes: of the messages written, before compression. num_trimmed: gone before it was read."""

    num_frames: int = 0
    num_bytes: int = 0
    num_undecodable: int = 0
    num_trimmed: int = 0
    first_undecodable: str = ""


@dataclass(slots=True)
class Recorded:
    """What was recorded so far. topics: by name, /SITE/KIND."""

    path: Path
    topics: dict[str, TopicCounts] = field(default_factory=dict)
    seconds: float = 0.0
    file_bytes: int = 0
    num_lost: int = 0
    """How often the server was away."""
    ended: Literal["running", "done", "stopped"] = "running"

    @property
    def num_frames(self) -> int:
        return sum(counts.num_frames for counts in self.topics.values())


class SessionFile:
    """An MCAP file that has its name only once it is whole; until then it is PATH.part, and readable."""

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        """Raises RecordingError where a file would be lost, or cannot be made."""
        self.path = path
        self.part = path.with_name(f"{path.name}.part")
        self._overwrite = overwrite
        self._check_free(path)
        try:
            self._file: IO[bytes] = self.part.open("wb" if overwrite else "xb")
            self.writer = McapWriter(self._file)
        except FileExistsError:
            raise RecordingError(
                f"{self.part} is there: another recorder writes it, or was killed",
                remedy="`echosight replay` reads it as it is: move it away, or give --force",
            ) from None
        except OSError as error:
            raise RecordingError(
                f"{self.part} cannot be made: {error.strerror}", remedy="name another place"
            ) from None

    @property
    def num_bytes(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        """Write the end and give the file its name. Raises OSError or RecordingError; the part stays then."""
        try:
            self.writer.finish()
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self.abandon()
        self._check_free(self.path)
        self.part.rename(self.path)
        sync_directory(self.path.parent)

    def discard(self) -> None:
        """Leave nothing behind."""
        self.abandon()
        self.part.unlink(missing_ok=True)

    def abandon(self) -> None:
        """Leave the part as it is."""
        with suppress(OSError):  # a full disk, that was said before
            self._file.close()

    def _check_free(self, path: Path) -> None:
        if path.exists() and not self._overwrite:
            raise RecordingError(f"{path} is there already", remedy="name another file, or give --force")


class Recorder:
    """One recording, from `run` to the end of it."""

    def __init__(
        self,
        follower: Follower,
        path: Path,
        *,
        overwrite: bool = False,
        wait: bool = True,
        page_entries: int = PAGE_ENTRIES,
    ) -> None:
        """Makes the file. wait: also for sites that were named and have no stream yet.

        Raises RecordingError where that would overwrite another one.
        """
        self._follower = follower
        self._wait = wait
        self._page_entries = page_entries
        self._file = SessionFile(path, overwrite=overwrite)
        self.recorded = Recorded(path)
        self._writing = asyncio.Lock()
        self._stop = asyncio.Event()
        self._is_lost = False
        self._log = logger("sensors")
        self._clock = asyncio.get_running_loop().time

    async def run(self, stop: asyncio.Event, *, seconds: float | None = None) -> Recorded:
        """Record until `stop`, or for `seconds`; however long the server is away in between.

        Where no frame came no file is left. Raises RecordingError then, or if the file cannot be written, or a
        site has no stream and is not to be waited for; StreamsError if no server answers at the start.
        """
        self._stop = stop
        began_at = self._clock()
        timer = asyncio.get_running_loop().call_later(seconds, self._end) if seconds is not None else None
        try:
            await self._record()
            self.recorded.seconds = self._clock() - began_at
            if not self.recorded.num_frames:
                raise self._nothing_came()
            self.recorded.file_bytes = await asyncio.to_thread(self._close)
        except OSError as error:
            raise RecordingError(
                f"{self._file.part} cannot be written: {error.strerror or error}",
                remedy="free some disk; `echosight replay` reads what was written until then",
            ) from None
        finally:
            if timer is not None:
                timer.cancel()
            if self.recorded.num_frames:
                self._file.abandon()
            else:
                self._file.discard()
        return self.recorded

    def _nothing_came(self) -> RecordingError:
        refused = [
            counts.first_undecodable for counts in self.recorded.topics.values() if counts.first_undecodable
        ]
        said = (
            f"{len(refused)} streams had only entries that no one can decode: {refused[0]}"
            if refused
            else "none came"
        )
        return RecordingError(
            f"no frame in {self.recorded.seconds:.1f} s, so there is no file: {said}",
            remedy="see `echosight status` for what publishes; --from-start takes what the streams still hold",
        )

    def _end(self) -> None:
        self.recorded.ended = "done"
        self._stop.set()

    async def _record(self) -> None:
        """Look for sites, start a task for each, keep house; until stopped, or until one of them fails."""
        tasks: dict[str, asyncio.Task[None]] = {}
        stopped = asyncio.create_task(self._stop.wait())
        give_up_s, log_at = _FIRST_ANSWER_S, self._clock() + _LOG_EVERY_S
        try:
            if not self._wait:
                self._refuse_absent(await self._insist(self._follower.absent, give_up_s=give_up_s))
            while not self._stop.is_set():
                for site in await self._insist(self._follower.find, give_up_s=give_up_s) or ():
                    if site not in tasks:
                        tasks[site] = asyncio.create_task(self._record_site(site))
                give_up_s = float("inf")
                await asyncio.wait(
                    {stopped, *tasks.values()}, timeout=_HOUSEKEEPING_S, return_when=asyncio.FIRST_COMPLETED
                )
                for site in [site for site, task in tasks.items() if task.done()]:
                    await tasks.pop(site)  # raises what went wrong there
                async with self._writing:
                    await asyncio.to_thread(self._flush_now)
                if self._clock() >= log_at:
                    log_at = self._clock() + _LOG_EVERY_S
                    self._log_counters()
            if self.recorded.ended == "running":
                self.recorded.ended = "stopped"
            await asyncio.gather(*tasks.values())
        finally:
            self._stop.set()
            await asyncio.gather(stopped, *tasks.values(), return_exceptions=True)

    def _refuse_absent(self, found: tuple[list[str], list[str]] | None) -> None:
        absent, there = found or ([], [])
        if absent:
            known = f"there are {', '.join(there)}" if there else "nothing publishes"
            raise RecordingError(
                f"no stream of site {', '.join(absent)}; {known}",
                remedy="start its sensors, name another one, or give --wait",
            )

    async def _record_site(self, site: str) -> None:
        """Read and write until stopped, or until the site's keys are no streams any more."""
        count_at = self._clock() + _HOUSEKEEPING_S

        async def read() -> list[FollowedEntry]:
            return await self._follower.read(site, count=self._page_entries, block_ms=_BLOCK_MS)

        async def count() -> bool:
            await self._follower.count_trimmed(site)
            return True

        while not self._stop.is_set() and self._follower.follows(site):
            if entries := await self._insist(read):
                async with self._writing:
                    await asyncio.to_thread(self._write_now, entries)
            if self._clock() >= count_at:
                count_at = self._clock() + _HOUSEKEEPING_S
                await self._insist(count)
        if not self._is_lost:
            with suppress(*StreamsLost):
                await count()

    def _write_now(self, entries: Iterable[FollowedEntry]) -> None:
        for entry in entries:
            counts = self._counts(Topic(entry.site, entry.kind))
            try:
                frame = codec.decode(entry.site, entry.kind, entry.fields)
            except BadFrameError as error:
                counts.num_undecodable += 1
                counts.first_undecodable = counts.first_undecodable or str(error)
                continue
            arrived_ms, place = entry.order
            arrived_ns = min(arrived_ms * 1_000_000 + min(place, 999_999), MAX_LOG_TIME_NS)
            counts.num_bytes += self._file.writer.add(frame, header=entry.fields[b"header"], arrived_ns=arrived_ns)
            counts.num_frames += 1

    def _flush_now(self) -> None:
        """Hand what is in memory to the operating system: a killed recorder loses no more than came since."""
        self._file.writer.flush()
        self.recorded.file_bytes = self._file.num_bytes
        for (site, kind), num_trimmed in list(self._follower.num_trimmed.items()):
            self._counts(Topic(site, kind)).num_trimmed = num_trimmed

    def _counts(self, topic: Topic) -> TopicCounts:
        return self.recorded.topics.setdefault(str(topic), TopicCounts())

    def _close(self) -> int:
        self._flush_now()
        self._file.close()
        return self._file.path.stat().st_size

    async def _insist(
        self, call: Callable[[], Awaitable[_Result]], *, give_up_s: float = float("inf")
    ) -> _Result | None:
        """The call's answer, asked for with growing pauses while the server is away; None when stopped before."""
        back_off_s, since = _MIN_BACK_OFF_S, time.monotonic()
        while True:
            try:
                answer = await call()
            except StreamsLost as error:
                if time.monotonic() - since > give_up_s:
                    raise StreamsError(
                        f"no server answered within {give_up_s:.0f} s: {error}",
                        remedy="start it, or check REDIS_URL",
                    ) from None
                if not self._is_lost:  # all sites lose it together: say it once
                    self._is_lost = True
                    self.recorded.num_lost += 1
                    self._log.warning("server_lost", error=str(error))
            else:
                if self._is_lost:
                    self._is_lost = False
                    self._log.info("server_back")
                return answer
            try:
                await asyncio.wait_for(self._stop.wait(), back_off_s)
            except TimeoutError:
                back_off_s = min(2 * back_off_s, _MAX_BACK_OFF_S)
            else:
                return None

    def _log_counters(self) -> None:
        recorded = self.recorded
        self._log.info(
            "recording",
            frames=recorded.num_frames,
            undecodable=sum(counts.num_undecodable for counts in recorded.topics.values()),
            trimmed=sum(counts.num_trimmed for counts in recorded.topics.values()),
            file_bytes=recorded.file_bytes,
        )
