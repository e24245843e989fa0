"""What benchmarks/store.py compares: one small interface, our segments, and a file per pair.

Every engine promises the same: `append` returns when the group is on disk; a damaged payload is noticed when it
is read; the oldest pairs go when `max_bytes` are exceeded; readers may live in other processes.
store_databases.py has the engines that are libraries. Nothing here measures.
"""

import contextlib
import os
import struct
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from services.core.files import sync_directory
from services.core.frames import CameraFrame, FrameId, RadarFrame
from services.core.store import Pair, StoreLimits, StoreReader, StoreWriter

SITE = "bench"
FRAME_NS = 33_000_000
HEATMAP_SHAPE = (128, 128)
RADAR_BYTES = 4 * 128 * 128
IMAGE_BYTES = 60 * 1024
PAIR_BYTES = RADAR_BYTES + IMAGE_BYTES
_HEAD = struct.Struct("<qQQ")  # camera_at_ns, xxh3 of the radar, xxh3 of the image; then the meta JSON

Heatmap = npt.NDArray[np.float32]


class Reader(ABC):
    """A handle of its own onto what a writer stores, also from another process; ready to be asked."""

    @abstractmethod
    def seqs(self) -> list[int]:
        """Take in what was appended since; the numbers of all pairs, oldest first."""

    @abstractmethod
    def radar(self, seq: int) -> Heatmap | None:
        """(128, 128) float32; None if it is damaged. Ask within a `turn`; valid until that ends."""

    @abstractmethod
    def image(self, seq: int) -> bytes | None:
        """The compressed image; None if it is damaged. Ask within a `turn`."""

    @abstractmethod
    def close(self) -> None: ...

    def turn(self) -> contextlib.AbstractContextManager[object]:
        """Reads that belong together: one read transaction where there is such a thing."""
        return contextlib.nullcontext()

    def batch(self, seqs: Sequence[int]) -> Heatmap:
        """(N, 128, 128) float32, as a trainer wants them: one array of its own."""
        out = np.empty((len(seqs), *HEATMAP_SHAPE), np.float32)
        with self.turn():
            for row, seq in enumerate(seqs):
                heatmap = self.radar(seq)
                assert heatmap is not None, f"radar {seq} is damaged"
                out[row] = heatmap
        return out


class Engine(ABC):
    """The one writer of a directory.

    durable=False is the same without its syncs, to see what they cost. Engines in Python (`is_python`) need
    `syncs_off` around it.
    """

    name: ClassVar[str]
    is_python: ClassVar[bool] = False

    def __init__(self, directory: Path, *, max_bytes: int, durable: bool = True) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.max_bytes = max_bytes
        self.durable = durable
        self._open()

    @abstractmethod
    def _open(self) -> None: ...

    @abstractmethod
    def append(self, pairs: Sequence[Pair]) -> None:
        """Store `pairs`; the oldest go first where `max_bytes` asks for it."""

    @abstractmethod
    def shrink(self, max_bytes: int) -> None:
        """Let pairs go until `max_bytes` hold, and give back the disk as far as the engine can."""

    @abstractmethod
    def close(self) -> None: ...

    @classmethod
    @abstractmethod
    def read(cls, directory: Path) -> Reader: ...

    def _num_over(self, num_pairs: int) -> int:
        """How many of `num_pairs` are too many for `max_bytes`."""
        return max(0, num_pairs - self.max_bytes // PAIR_BYTES)


class Segments(Engine):
    """services.core.store: append-only segments, dropped whole."""

    name = "segments (ours)"
    is_python = True

    def _open(self) -> None:
        limits = StoreLimits(max_bytes=self.max_bytes, max_age_s=1e9, min_free_bytes=0)
        self._writer = StoreWriter(self.directory, SITE, limits=limits)

    def append(self, pairs: Sequence[Pair]) -> None:
        self._writer.append(pairs)

    def shrink(self, max_bytes: int) -> None:
        self._writer.limits = StoreLimits(max_bytes=max_bytes, max_age_s=1e9, min_free_bytes=0)
        self._writer.evict()

    def close(self) -> None:
        self._writer.close()

    @classmethod
    def read(cls, directory: Path) -> Reader:
        return _SegmentsReader(directory)


class _SegmentsReader(Reader):
    def __init__(self, directory: Path) -> None:
        self._store = StoreReader(directory)
        self._store.refresh()

    def seqs(self) -> list[int]:
        self._store.refresh()
        return [pair.id.seq for pair in self._store.pairs]

    def radar(self, seq: int) -> Heatmap | None:
        pair = self._store.find(SITE, frame_id(seq))
        frame = pair.radar() if pair else None
        return frame.heatmap if frame else None

    def image(self, seq: int) -> bytes | None:
        pair = self._store.find(SITE, frame_id(seq))
        frame = pair.camera() if pair else None
        return frame.image if frame else None

    def close(self) -> None:
        self._store.close()


class Files(Engine):
    """One file a pair: all written aside, then all synced, then all renamed, then the directory synced."""

    name = "file per pair"
    is_python = True

    def _open(self) -> None:
        for torn in self.directory.glob("*.aside"):
            torn.unlink()
        self._kept = deque(sorted(path.name for path in self.directory.glob("*.pair")))

    def append(self, pairs: Sequence[Pair]) -> None:
        for _ in range(self._num_over(len(self._kept) + len(pairs))):
            (self.directory / self._kept.popleft()).unlink()
        opened = [self._write_aside(pair) for pair in pairs]
        for fd, _, _ in opened:
            os.fdatasync(fd)
            os.close(fd)
        for _, aside, path in opened:
            aside.rename(path)
            self._kept.append(path.name)
        sync_directory(self.directory)

    def _write_aside(self, pair: Pair) -> tuple[int, Path, Path]:
        path = self.directory / f"{pair.id.captured_at_ns:020d}-{pair.id.seq:020d}.pair"
        aside = path.with_suffix(".aside")
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        head = head_of(pair)
        os.writev(fd, [len(head).to_bytes(4, "little"), head, radar_bytes(pair), pair.camera.image])
        return fd, aside, path

    def shrink(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        for _ in range(self._num_over(len(self._kept))):
            (self.directory / self._kept.popleft()).unlink()

    def close(self) -> None:
        self._kept.clear()

    @classmethod
    def read(cls, directory: Path) -> Reader:
        return _FilesReader(directory)


class _FilesReader(Reader):
    def __init__(self, directory: Path) -> None:
        self._dir = directory

    def seqs(self) -> list[int]:
        return sorted(int(name[21:41]) for name in os.listdir(self._dir) if name.endswith(".pair"))  # noqa: PTH208

    def _parts(self, seq: int, num_bytes: int) -> tuple[bytes, bytes]:
        at_ns, number = frame_id(seq)
        with (self._dir / f"{at_ns:020d}-{number:020d}.pair").open("rb", buffering=0) as file:
            data = file.read(num_bytes)
        start = 4 + int.from_bytes(data[:4], "little")
        return data[4:start], data[start:]

    def radar(self, seq: int) -> Heatmap | None:
        head, data = self._parts(seq, RADAR_BYTES + 4096)
        return heatmap_from(head, memoryview(data)[:RADAR_BYTES])

    def image(self, seq: int) -> bytes | None:
        head, data = self._parts(seq, -1)
        return image_from(head, data[RADAR_BYTES:])

    def close(self) -> None:
        pass


@contextlib.contextmanager
def syncs_off() -> Iterator[list[int]]:
    """os.fsync and os.fdatasync do nothing meanwhile but count: for engines that are written in Python."""
    calls: list[int] = []
    before = os.fsync, os.fdatasync
    os.fsync = os.fdatasync = calls.append  # type: ignore[assignment]
    try:
        yield calls
    finally:
        os.fsync, os.fdatasync = before


def frame_id(seq: int) -> FrameId:
    return FrameId(seq * FRAME_NS, seq)


def key_of(frame_id: FrameId) -> bytes:
    return struct.pack(">QQ", *frame_id)


def seq_of(key: bytes) -> int:
    return int.from_bytes(key[8:16], "big")


def radar_bytes(pair: Pair) -> Any:
    return pair.radar.heatmap.reshape(-1).view(np.uint8).data


def head_of(pair: Pair) -> bytes:
    radar, camera = pair.radar, pair.camera
    meta = {"dtype": radar.heatmap.dtype.name, "shape": radar.heatmap.shape, "axes": radar.axes,
            "unit": radar.unit, "image_shape": camera.shape, "encoding": camera.encoding}  # fmt: skip
    sums = xxhash.xxh3_64_intdigest(radar_bytes(pair)), xxhash.xxh3_64_intdigest(camera.image)
    return _HEAD.pack(camera.captured_at_ns, *sums) + orjson.dumps(meta)


def heatmap_from(head: bytes, data: Any) -> Heatmap | None:
    if len(head) < _HEAD.size or xxhash.xxh3_64_intdigest(data) != _HEAD.unpack_from(head)[1]:
        return None
    meta = orjson.loads(head[_HEAD.size :])
    return np.frombuffer(data, meta["dtype"]).reshape(meta["shape"])


def image_from(head: bytes, data: bytes) -> bytes | None:
    is_whole = len(head) >= _HEAD.size and xxhash.xxh3_64_intdigest(data) == _HEAD.unpack_from(head)[2]
    return data if is_whole else None


def make_pairs(first: int, num: int) -> list[Pair]:
    """`num` pairs whose payloads tell their number: what comes back can be compared byte for byte."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=HEATMAP_SHAPE).astype(np.float32)
    image = b"\xff\xd8\xff\xe0" + rng.bytes(IMAGE_BYTES - 14)
    pairs = []
    for seq in range(first, first + num):
        at_ns = seq * FRAME_NS
        heatmap = noise + np.float32(seq % 1000)
        jpeg = image + seq.to_bytes(8, "little") + b"\xff\xd9"
        radar = RadarFrame(SITE, seq, at_ns, heatmap=heatmap)
        pairs.append(Pair(radar, CameraFrame(SITE, seq, at_ns + 5_000_000, image=jpeg, shape=(480, 640, 3))))
    return pairs
