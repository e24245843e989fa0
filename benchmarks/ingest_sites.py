"""Many sites for minutes: does ingest keep up, in how much memory, and how soon is a frame stored?

Three processes on this machine: a Redis-compatible server, a producer that publishes a radar heatmap (64 KiB) and
a camera image (60 KiB) of every site at a fixed rate, and the ingest worker as `python -m services.ingest`. The
reference is the rate that was asked for. What it prints was measured while it ran:

    stored        new pairs a second on disk, from the worker's own counters, after a warm-up
    latency       from a frame's arrival in its stream to its pair being durable and acknowledged
    cpu           of one core, after the warm-up: ingest, server, producer
    memory        resident, of ingest and of the server: at the end of the warm-up, highest, at the end
    behind        entries that waited for ingest at the end

    python benchmarks/ingest_sites.py --sites 30 --fps 30 --seconds 180
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import redis.asyncio
from rich.progress import Progress

from services.core import codec
from services.core.embedded import EmbeddedServer, start_embedded_server
from services.core.frames import CameraFrame, RadarFrame
from services.core.streams import INGEST_GROUP, EventLog, stream_key

HEATMAP_SHAPE = (128, 128)
IMAGE_BYTES = 60 * 1024
WARM_UP_S = 15.0
MAX_ENTRIES = 500  # of each stream: the producers' safety net


@dataclass(slots=True)
class Measured:
    """One row of each a second."""

    stored: list[tuple[float, int]] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    ingest_mib: list[float] = field(default_factory=list)
    server_mib: list[float] = field(default_factory=list)
    cpu_s: list[tuple[float, ...]] = field(default_factory=list)  # monotonic, ingest, server, producer
    num_late_ticks: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    num_behind: int = 0
    num_trimmed: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=30, help="sites (default: %(default)s)")
    parser.add_argument("--fps", type=float, default=30.0, help="pairs a second of each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="after the warm-up (default: %(default)s)")
    parser.add_argument(
        "--dir", type=Path, default=None, help="disk of the store (default: that of temporary files)"
    )
    parser.add_argument(
        "--store-bytes", type=int, default=4 * 1024**3, help="size of the store (default: %(default)s)"
    )
    parser.add_argument("--aof", action="store_true", help="leave the server's append-only file on")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the others are stopped then too
    work_dir = Path(tempfile.mkdtemp(prefix="echosight-bench-", dir=options.dir))
    server = start_embedded_server(work_dir / "redis")
    worker = subprocess.Popen(
        [sys.executable, "-m", "services.ingest"],
        env={
            **os.environ,
            "REDIS_URL": server.url,
            "ECHOSIGHT_DATA_DIR": str(work_dir / "data"),
            "ECHOSIGHT_MAX_STORE_BYTES": str(options.store_bytes),
            "ECHOSIGHT_LOG_LEVEL": "warning",
        },
    )
    try:
        measured = asyncio.run(_measure(server, worker.pid, options))
    finally:
        worker.terminate()
        worker.wait(30)
        server.stop()
        shutil.rmtree(work_dir, ignore_errors=True)
    _print_report(measured, options)


async def _measure(server: EmbeddedServer, worker_pid: int, options: argparse.Namespace) -> Measured:
    client = redis.asyncio.Redis.from_url(server.url)
    if not options.aof:
        await client.config_set("appendonly", "no")
    measured = Measured()
    produce = asyncio.create_task(_produce(client, measured, options))
    events = EventLog(server.url, source="bench")
    last_id = "0-0"
    with Progress(transient=True, disable=options.json) as progress:
        task = progress.add_task("publishing", total=WARM_UP_S + options.seconds)
        while not produce.done():
            await asyncio.sleep(1.0)
            progress.advance(task)
            last_id, news = await asyncio.to_thread(events.since, last_id)
            for event in news:
                _take_in(event, measured)
            measured.ingest_mib.append(_resident_mib(worker_pid))
            if not measured.ingest_mib[-1]:
                sys.exit("ingest has ended; its message is above")
            measured.server_mib.append(_resident_mib(server.process.pid))
            used_s = (_cpu_s(pid) for pid in (worker_pid, server.process.pid, os.getpid()))
            measured.cpu_s.append((time.monotonic(), *used_s))
    await produce
    measured.num_behind = await _backlog(client, options)
    events.close()
    await client.aclose()
    return measured


async def _produce(client: "redis.asyncio.Redis", measured: Measured, options: argparse.Namespace) -> None:
    """Every site's pair at its own moment within the period, as unrelated sensors would send them."""
    rng = np.random.default_rng(0)
    heatmap = rng.normal(size=HEATMAP_SHAPE).astype(np.float32)
    image = b"\xff\xd8\xff\xe0" + rng.bytes(IMAGE_BYTES - 6) + b"\xff\xd9"
    started_s, period_s = time.monotonic(), 1 / options.fps
    epoch_ns = time.time_ns()
    num_groups = min(options.sites, 10)
    for tick in range(int((WARM_UP_S + options.seconds) * options.fps)):
        for group in range(num_groups):
            due_s = started_s + (tick + group / num_groups) * period_s
            wait_s = due_s - time.monotonic()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            elif wait_s < -1.0:
                measured.num_late_ticks += 1
            at_ns = epoch_ns + int((due_s - started_s) * 1e9)
            pipeline = client.pipeline(transaction=False)
            for number in range(group, options.sites, num_groups):
                site = f"site-{number:02d}"
                radar = RadarFrame(site, tick, at_ns, heatmap=heatmap)
                camera = CameraFrame(site, tick, at_ns + 3_000_000, image=image, shape=(480, 640, 3))
                for kind, frame in (("radar", radar), ("camera", camera)):
                    entry: dict[Any, Any] = dict(codec.encode(frame))
                    pipeline.xadd(stream_key(site, kind), entry, maxlen=MAX_ENTRIES, approximate=True)
            await pipeline.execute()


def _take_in(event: dict[str, Any], measured: Measured) -> None:
    if event.get("kind") != "ingest":
        return
    measured.counts = event["counts"]
    measured.num_trimmed = event["trimmed"]
    measured.stored.append((event["at_s"], event["counts"].get("stored", 0)))
    latencies = [site for site in event["sites"].values() if "p50_ms" in site]
    if latencies:
        measured.p50_ms.append(statistics.median(site["p50_ms"] for site in latencies))
        measured.p99_ms.append(max(site["p99_ms"] for site in latencies))


def _resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _backlog(client: "redis.asyncio.Redis", options: argparse.Namespace) -> int:
    num = 0
    for number in range(options.sites):
        for kind in ("radar", "camera"):
            for group in await client.xinfo_groups(stream_key(f"site-{number:02d}", kind)):
                if group["name"] == INGEST_GROUP.encode():
                    num += int(group["pending"]) + int(group.get("lag") or 0)
    return num


def _print_report(measured: Measured, options: argparse.Namespace) -> None:
    first_s = measured.stored[0][0] + WARM_UP_S
    counted = [row for row in measured.stored if row[0] >= first_s]
    (from_s, from_num), (to_s, to_num) = counted[0], counted[-1]
    rate, asked = (to_num - from_num) / (to_s - from_s), options.sites * options.fps
    skip = len(measured.stored) - len(counted)
    found = {
        "asked_pairs_per_s": asked,
        "stored_pairs_per_s": round(rate, 1),
        "ratio": round(rate / asked, 3),
        "p50_ms": round(statistics.median(measured.p50_ms[skip:]), 1),
        "p99_ms": round(statistics.median(measured.p99_ms[skip:]), 1),
        "worst_p99_ms": round(max(measured.p99_ms[skip:]), 1),
        "cpu": _cores(measured.cpu_s),
        "ingest_mib": _memory(measured.ingest_mib),
        "server_mib": _memory(measured.server_mib),
        "behind": measured.num_behind,
        "trimmed": measured.num_trimmed,
        "late_ticks": measured.num_late_ticks,
        "counts": measured.counts,
    }
    if options.json:
        print(json.dumps(found))
        return
    print(f"{options.sites} sites at {options.fps:g} pairs/s, {options.seconds:g} s measured, "
          f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")  # fmt: skip
    print(f"stored    {rate:8.0f} pairs/s of {asked:.0f} asked for ({100 * rate / asked:.0f} %)")
    print(f"latency   p50 {found['p50_ms']} ms, p99 {found['p99_ms']} ms (slowest site, median over time; "
          f"worst {found['worst_p99_ms']} ms)")  # fmt: skip
    cores = [f"{100 * share:.0f} %" for share in found["cpu"]]
    print(f"cpu       ingest {cores[0]}, server {cores[1]}, producer {cores[2]} of one core")
    for name in ("ingest", "server"):
        warm_mib, peak_mib, end_mib = found[f"{name}_mib"]
        print(f"{name:9} {warm_mib} MiB after the warm-up, {peak_mib} at most, {end_mib} at the end")
    print(f"behind    {found['behind']} entries wait; {found['trimmed']} trimmed unread; "
          f"the producer was more than 1 s late {found['late_ticks']} times")  # fmt: skip
    print(f"reasons   {', '.join(f'{name} {num}' for name, num in sorted(measured.counts.items()))}")


def _cores(rows: list[tuple[float, ...]]) -> list[float]:
    """CPU seconds a second of each process after the warm-up."""
    first, last = rows[int(WARM_UP_S)], rows[-1]
    seconds = last[0] - first[0]
    return [round((end - start) / seconds, 3) for start, end in zip(first[1:], last[1:], strict=True)]


def _memory(mib: list[float]) -> tuple[int, int, int]:
    """After the warm-up, at most since then, at the end."""
    later = mib[int(WARM_UP_S) :]
    return round(later[0]), round(max(later)), round(later[-1])


if __name__ == "__main__":
    main()
