"""What benchmarks/store.py measures of one engine: appends, random reads, eviction, recovery.

Each function takes an engine and an empty directory and returns one row of numbers. Nothing here compares.
"""

import multiprocessing
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

import numpy as np
from store_engines import PAIR_BYTES, Engine, Reader, make_pairs, syncs_off

from services.core.store import Pair

GROUPS = (1, 16, 64)
BATCH = 64
NUM_WARM, NUM_COLD = 30, 6
AMPLE_BYTES = 8 * 1024**3
MIB = 2**20
SETTLE_MIB = 128
COUNTS = {"num_durable", "num_lost", "num_damaged"}
"""Columns to add up over rounds; of all others the median says more."""
SPAWN = multiprocessing.get_context("spawn")

Row = dict[str, float]


@dataclass(frozen=True, slots=True)
class Load:
    """num_pairs: in each measurement. write_rate: pairs/s that are appended while others read."""

    num_pairs: int
    write_rate: int


Measure = Callable[[type[Engine], Path, Load], Row]


@contextmanager
def empty_directory(path: Path) -> Iterator[Path]:
    """An empty directory, on a disk and in a memory that owe nothing to whoever had the turn before."""
    path.mkdir()
    _settle(path / "scratch")
    yield path
    shutil.rmtree(path)


def _settle(scratch: Path) -> None:
    """1. Have all written back. 2. Take pages and free them: a virtual machine's first use of a page is slow."""
    os.sync()
    with scratch.open("wb") as file:
        for _ in range(SETTLE_MIB):
            file.write(bytes(MIB))
    scratch.unlink()


# Appending.


def append(engine: type[Engine], directory: Path, load: Load) -> Row:
    row: Row = {}
    for group in GROUPS:
        pairs = make_pairs(0, _num_pairs(group, load))
        before = os.times()
        with empty_directory(directory / "synced") as synced:
            row[f"pairs_per_s_{group}"] = _append_rate(engine, synced, pairs, group=group)
        cpu_s = sum(os.times()[:2]) - sum(before[:2])
        with empty_directory(directory / "unsynced") as unsynced, syncs_off() as calls:
            rate = _append_rate(engine, unsynced, pairs, group=group, durable=False)
        assert calls or not engine.is_python, f"{engine.name} never synced"
        row[f"sync_share_{group}"] = max(0.0, 1 - row[f"pairs_per_s_{group}"] / rate)
        row[f"cpu_ms_{group}"] = 1e3 * cpu_s / len(pairs)
    return row


def _num_pairs(group: int, load: Load) -> int:
    num = load.num_pairs // 6 if group == 1 else load.num_pairs
    return max(1, num // group) * group


def _append_rate(
    engine: type[Engine], directory: Path, pairs: list[Pair], *, group: int, durable: bool = True
) -> float:
    """Pairs a second, from the first append until the last one has returned."""
    writer = engine(directory, max_bytes=AMPLE_BYTES, durable=durable)
    started_s = time.perf_counter()
    for first in range(0, len(pairs), group):
        writer.append(pairs[first : first + group])
    elapsed_s = time.perf_counter() - started_s
    writer.close()
    return len(pairs) / elapsed_s


def append_floor(path: Path, load: Load) -> Row:
    row: Row = {}
    for group in GROUPS:
        num = _num_pairs(group, load)
        parts = [bytes(pair.radar.heatmap.data) + pair.camera.image for pair in make_pairs(0, num)]
        rates = []
        for is_synced in (True, False):
            _settle(path)
            before = os.times()
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            started_s = time.perf_counter()
            for first in range(0, num, group):
                os.writev(fd, parts[first : first + group])
                if is_synced:
                    os.fdatasync(fd)
            rates.append(num / (time.perf_counter() - started_s))
            os.close(fd)
            path.unlink()
            if is_synced:
                row[f"cpu_ms_{group}"] = 1e3 * (sum(os.times()[:2]) - sum(before[:2])) / num
        row[f"pairs_per_s_{group}"] = rates[0]
        row[f"sync_share_{group}"] = max(0.0, 1 - rates[0] / rates[1])
    return row


# A writer in a process of its own.


@dataclass(frozen=True, slots=True)
class Plan:
    """What the writing process must know. group_s: seconds from one group of 16 to the next, 0 for no pause."""

    engine: type[Engine]
    directory: Path
    first: int
    group_s: float


def write(end: Connection, plan: Plan) -> None:
    """Append groups of 16 until told to stop or killed; say after each how many pairs are durable."""
    writer = plan.engine(plan.directory, max_bytes=AMPLE_BYTES)
    num = plan.first
    end.send(num)
    while not end.poll(plan.group_s):
        writer.append(make_pairs(num, 16))
        num += 16
        end.send(num)
    end.recv()
    writer.close()


@contextmanager
def _writer(
    engine: type[Engine], directory: Path, *, first: int, group_s: float
) -> Iterator[tuple[SpawnProcess, Connection]]:
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=write, args=(theirs, Plan(engine, directory, first, group_s)), daemon=True)
    process.start()
    theirs.close()  # so that reading ends when the process does
    try:
        assert ours.recv() == first
        yield process, ours
    finally:
        process.kill()
        process.join()


def _last_report(writing: Connection, num_durable: int) -> int:
    """What the writer has said until it ended, however it ended."""
    while True:
        try:
            num_durable = writing.recv()
        except (EOFError, ConnectionResetError):
            return num_durable


def _fill(engine: type[Engine], directory: Path, num_pairs: int) -> None:
    writer = engine(directory, max_bytes=AMPLE_BYTES)
    for first in range(0, num_pairs, 64):
        writer.append(make_pairs(first, min(64, num_pairs - first)))
    writer.close()


# Reading at random.


def read_random(engine: type[Engine], directory: Path, load: Load) -> Row:
    _fill(engine, directory, load.num_pairs)
    rng = np.random.default_rng(0)
    group_s = 16 / load.write_rate
    with _writer(engine, directory, first=load.num_pairs, group_s=group_s) as (process, writing):
        reader = engine.read(directory)
        _read_batches(reader, rng, num=3)
        warm_s = _read_batches(reader, rng, num=NUM_WARM)
        reader.close()
        cold_s, cold_mib = [], []
        for _ in range(NUM_COLD):
            reader = engine.read(directory)
            seqs = _choose(reader, rng)
            reader.close()
            _drop_cached(directory)
            reader = engine.read(directory)
            before = _disk_reads()
            started_s = time.perf_counter()
            reader.batch(seqs)
            cold_s.append(time.perf_counter() - started_s)
            cold_mib.append((_disk_reads() - before) / MIB)
            reader.close()
        writing.send("stop")
        num = _last_report(writing, load.num_pairs)
        process.join(30)
        assert process.exitcode == 0
    assert num > load.num_pairs, "nothing was written meanwhile"
    return {
        "warm_ms": 1e3 * statistics.median(warm_s),
        "warm_max_ms": 1e3 * max(warm_s),
        "cold_ms": 1e3 * statistics.median(cold_s),
        "cold_mib": statistics.median(cold_mib),
    }


def _choose(reader: Reader, rng: np.random.Generator) -> list[int]:
    return [int(seq) for seq in rng.choice(reader.seqs(), BATCH, replace=False)]


def _read_batches(reader: Reader, rng: np.random.Generator, *, num: int) -> list[float]:
    """Seconds for each of `num` batches out of all pairs of that moment."""
    elapsed_s = []
    for _ in range(num):
        seqs = _choose(reader, rng)
        started_s = time.perf_counter()
        batch = reader.batch(seqs)
        elapsed_s.append(time.perf_counter() - started_s)
        expected = make_pairs(seqs[-1], 1)[0].radar.heatmap
        assert np.array_equal(batch[-1], expected)
    return elapsed_s


def _drop_cached(directory: Path) -> None:
    os.sync()  # pages that are not yet written cannot be dropped
    for path in _files(directory):
        with suppress(FileNotFoundError), path.open("rb") as file:  # the writer goes on
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _disk_reads() -> int:
    """Bytes that this process has had fetched from disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _files(directory: Path) -> list[Path]:
    return [Path(folder) / name for folder, _, names in os.walk(directory) for name in names]


# Disk under eviction.


def evict(engine: type[Engine], directory: Path, load: Load) -> Row:
    max_bytes = load.num_pairs * PAIR_BYTES
    writer = engine(directory, max_bytes=max_bytes)
    elapsed_s, peak = 0.0, 0
    for first in range(0, 2 * load.num_pairs, 64):
        pairs = make_pairs(first, 64)
        started_s = time.perf_counter()
        writer.append(pairs)
        elapsed_s += time.perf_counter() - started_s
        peak = max(peak, _disk_bytes(directory))
    writer.close()
    kept = _num_kept(engine, directory)
    after = _disk_bytes(directory)
    writer = engine(directory, max_bytes=max_bytes)
    writer.shrink(max_bytes // 2)
    writer.close()
    return {
        "pairs_per_s": 2 * load.num_pairs / elapsed_s,
        "peak_share": peak / max_bytes,
        "after_share": after / max_bytes,
        "kept_share": kept * PAIR_BYTES / max_bytes,
        "halved_share": _disk_bytes(directory) / max_bytes,
        "halved_kept_share": _num_kept(engine, directory) * PAIR_BYTES / max_bytes,
    }


def _num_kept(engine: type[Engine], directory: Path) -> int:
    reader = engine.read(directory)
    num = len(reader.seqs())
    reader.close()
    return num


def _disk_bytes(directory: Path) -> int:
    """What the files occupy, holes not counted."""
    total = 0
    for path in _files(directory):
        with suppress(FileNotFoundError):  # an engine's own thread removed it
            total += path.stat().st_blocks * 512
    return total


# Recovery.


def recover(engine: type[Engine], directory: Path, load: Load) -> Row:
    _fill(engine, directory, load.num_pairs // 2)
    with _writer(engine, directory, first=load.num_pairs // 2, group_s=0.0) as (process, writing):
        num_durable = writing.recv()
        deadline_s = time.monotonic() + random.uniform(0.1, 0.5)
        while writing.poll(max(0.0, deadline_s - time.monotonic())) and time.monotonic() < deadline_s:
            num_durable = writing.recv()
        process.kill()
        process.join()
        num_durable = _last_report(writing, num_durable)
    started_s = time.perf_counter()
    writer = engine(directory, max_bytes=AMPLE_BYTES)
    opened_s = time.perf_counter()
    writer.close()
    reading_s = time.perf_counter()
    reader = engine.read(directory)
    seqs = reader.seqs()
    with reader.turn():
        reader.radar(seqs[-1])
    done_s = time.perf_counter()
    num_damaged = _count_damaged(reader, seqs)
    reader.close()
    return {
        "open_ms": 1e3 * (opened_s - started_s + done_s - reading_s),
        "num_durable": num_durable,
        "num_lost": len(set(range(num_durable)) - set(seqs)),
        "num_damaged": num_damaged,
    }


def _count_damaged(reader: Reader, seqs: Sequence[int]) -> int:
    """Pairs that are listed and are not, byte for byte, what was appended."""
    num = 0
    for seq in seqs:
        pair = make_pairs(seq, 1)[0]
        with reader.turn():
            heatmap, image = reader.radar(seq), reader.image(seq)
            is_whole = heatmap is not None and np.array_equal(heatmap, pair.radar.heatmap)
            num += not (is_whole and image == pair.camera.image)
    return num
