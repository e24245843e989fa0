"""How fast pairs go through Redis into the durable store, against what the same client moves through Redis alone.

    python benchmarks/ingest.py --pairs 3000 --rounds 5

Both sides get the same producer: a process that sends pairs of a 64 KiB float32 heatmap (128x128) and a 60 KiB
JPEG, ready encoded, in pipelines of 50 pairs. Both have one consumer process on redis-py, asyncio and hiredis:

    redis alone   reads a consumer group with COUNT 100 and acknowledges; entries are decoded to nothing
    ingest        the IngestWorker as it runs: checked, paired, appended, fsynced, then acknowledged

Rounds alternate, each on an emptied server. Time runs from the producer's start until the last pair is
acknowledged (redis alone) or stored (ingest). The server is the embedded one without its append-only file (which
favours the reference: it then never touches the disk); --aof keeps that file on.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import redis
import redis.asyncio

from services.core import codec
from services.core.embedded import start_embedded_server
from services.core.frames import CameraFrame, RadarFrame
from services.core.logs import configure_logs
from services.core.store import StoreReader
from services.core.streams import INGEST_GROUP, Consumer, EventLog, Janitor, SiteLeases, connect, stream_key
from services.ingest.settings import IngestSettings
from services.ingest.worker import IngestWorker

SITE = "bench"
HEATMAP_SHAPE = (128, 128)
IMAGE_BYTES = 60 * 1024
FRAME_NS = 33_000_000  # 30 pairs a second of capture time
NUM_TAIL = 64  # pairs beyond the measured ones: the worker holds the newest until their time has passed
PAIRS_PER_PIPELINE = 50
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True)
class Round:
    """What the processes of one round must know."""

    url: str
    data_dir: Path
    num_pairs: int


Role = Callable[[Connection, Round], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3000, help="pairs in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each side (default: %(default)s)")
    parser.add_argument(
        "--dir", type=Path, default=None, help="disk of the store (default: that of temporary files)"
    )
    parser.add_argument("--aof", action="store_true", help="leave the server's append-only file on")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then too
    work_dir = Path(tempfile.mkdtemp(prefix="echosight-bench-", dir=options.dir))
    server = start_embedded_server(work_dir / "redis")
    try:
        with redis.Redis.from_url(server.url) as client:
            if not options.aof:
                client.config_set("appendonly", "no")
            rows: dict[str, list[dict[str, float]]] = {"redis alone": [], "ingest": []}
            for number in range(options.rounds):
                for name, consume in (("redis alone", consume_only), ("ingest", ingest)):
                    client.flushall()
                    _settle(work_dir, num_bytes=3 * options.pairs * 2**17)  # server, worker and page cache
                    this = Round(server.url, work_dir / f"round-{number}", options.pairs)
                    rows[name].append(_play(consume, this))
                    shutil.rmtree(this.data_dir, ignore_errors=True)
    finally:
        server.stop()
        shutil.rmtree(work_dir, ignore_errors=True)
    _print_report(rows, options)


def _settle(directory: Path, *, num_bytes: int) -> None:
    """Let both sides begin alike: nothing left to write back, and memory for the page cache that was used before.

    A virtual machine's first use of a page costs several times its later ones; one that has run for a day has used
    them all.
    """
    os.sync()
    path = directory / "settle"
    with path.open("wb") as file:
        chunk = bytes(2**20)
        for _ in range(num_bytes // len(chunk)):
            file.write(chunk)
    path.unlink()


def _play(consume: Role, this: Round) -> dict[str, float]:
    """One producer and one consumer process, from go to the last pair."""
    consumer, consumer_end = _start(consume, this)
    producer, producer_end = _start(produce, this)
    for end in (consumer_end, producer_end):
        assert end.recv() == "ready"
    started_s = time.monotonic()
    consumer_end.send("go")
    producer_end.send("go")
    done: dict[str, float] = consumer_end.recv()
    produced: dict[str, float] = producer_end.recv()
    for process in (consumer, producer):
        process.join(30)
        assert process.exitcode == 0
    return done | {
        "pairs_per_s": this.num_pairs / (done["at_s"] - started_s),
        "producer_pairs_per_s": (this.num_pairs + NUM_TAIL) / (produced["at_s"] - started_s),
    }


def _start(role: Role, this: Round) -> tuple[SpawnProcess, Connection]:
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=role, args=(theirs, this), daemon=True)
    process.start()
    return process, ours


def produce(end: Connection, this: Round) -> None:
    """Send ready encoded pairs in pipelines: what a sensor could send at best."""
    entries = _entries(this.num_pairs + NUM_TAIL)
    with redis.Redis.from_url(this.url) as client:
        client.ping()
        end.send("ready")
        end.recv()
        for start in range(0, len(entries), PAIRS_PER_PIPELINE):
            pipeline = client.pipeline(transaction=False)
            for radar, camera in entries[start : start + PAIRS_PER_PIPELINE]:
                pipeline.xadd(stream_key(SITE, "radar"), radar)
                pipeline.xadd(stream_key(SITE, "camera"), camera)
            pipeline.execute()
    end.send({"at_s": time.monotonic()})


def _entries(num: int) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    rng = np.random.default_rng(0)
    heatmap = rng.normal(size=HEATMAP_SHAPE).astype(np.float32)
    image = b"\xff\xd8\xff\xe0" + rng.bytes(IMAGE_BYTES - 6) + b"\xff\xd9"
    entries = []
    for seq in range(num):
        at_ns = seq * FRAME_NS
        radar = RadarFrame(SITE, seq, at_ns, heatmap=heatmap)
        camera = CameraFrame(SITE, seq, at_ns + 5_000_000, image=image, shape=(480, 640, 3))
        entries.append((dict(codec.encode(radar)), dict(codec.encode(camera))))
    return entries


def consume_only(end: Connection, this: Round) -> None:
    """The reference: read and acknowledge, nothing else."""
    asyncio.run(_consume_only(end, this))


async def _consume_only(end: Connection, this: Round) -> None:
    client = redis.asyncio.Redis.from_url(this.url)
    keys = [stream_key(SITE, kind) for kind in ("radar", "camera")]
    for key in keys:
        await client.xgroup_create(key, INGEST_GROUP, id="0", mkstream=True)
    streams: dict[Any, Any] = dict.fromkeys(keys, ">")
    end.send("ready")
    end.recv()
    before = os.times()
    num_left = 2 * (this.num_pairs + NUM_TAIL)
    at_s = 0.0
    while num_left > 0:
        reply: Any = await client.xreadgroup(INGEST_GROUP, "bench", streams, count=100, block=1000)
        pipeline = client.pipeline(transaction=False)
        pages = reply.items() if isinstance(reply, dict) else reply
        for key, page in pages:
            entries = [e for part in page for e in part] if isinstance(reply, dict) else page
            pipeline.xack(key, INGEST_GROUP, *[entry_id for entry_id, _ in entries])
            num_left -= len(entries)
        await pipeline.execute()
        if not at_s and num_left <= 2 * NUM_TAIL:
            at_s = time.monotonic()
    await client.aclose()
    end.send({"at_s": at_s, **_cost(before)})


def ingest(end: Connection, this: Round) -> None:
    """The worker as `python -m services.ingest` runs it, until all measured pairs are stored."""
    asyncio.run(_ingest(end, this))


async def _ingest(end: Connection, this: Round) -> None:
    settings = IngestSettings.read(data_dir=this.data_dir, redis_url=this.url, sites=SITE)
    client = connect(this.url)
    consumer = Consumer(client, name="bench", sites=[SITE])
    events = EventLog(this.url, source="bench")
    worker = IngestWorker(
        settings,
        consumer,
        leases=SiteLeases(client, owner="bench", ttl_ms=settings.lease_ms),
        janitor=Janitor(client, max_stream_bytes=2**40, max_dead_bytes=2**20),
        log=configure_logs("bench", level="warning"),
        events=events,
    )
    end.send("ready")
    end.recv()
    before = os.times()
    run = asyncio.create_task(worker.run())
    while worker.counts["stored"] < this.num_pairs and not run.done():  # noqa: ASYNC110 - the worker as it is
        await asyncio.sleep(0.002)
    at_s = time.monotonic()
    cost = _cost(before)
    worker.stop()
    await run
    await consumer.close()
    events.close()
    reader = StoreReader(settings.store_dir)
    num_stored = reader.refresh()
    assert num_stored >= this.num_pairs, f"the store has {num_stored} pairs, expected {this.num_pairs} or more"
    num_mib = reader.num_bytes / 2**20
    reader.close()
    end.send({"at_s": at_s, **cost, "stored_mib": num_mib})


def _cost(before: os.times_result) -> dict[str, float]:
    """CPU seconds that this process has used since."""
    now = os.times()
    return {"user_s": now.user - before.user, "system_s": now.system - before.system}


def _print_report(rows: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    medians = {name: statistics.median(row["pairs_per_s"] for row in found) for name, found in rows.items()}
    paired = zip(rows["ingest"], rows["redis alone"], strict=True)
    ratios = [ours["pairs_per_s"] / alone["pairs_per_s"] for ours, alone in paired]
    ratio = medians["ingest"] / medians["redis alone"]
    if options.json:
        print(
            json.dumps(
                {
                    "pairs": options.pairs,
                    "median_pairs_per_s": medians,
                    "ratio": ratio,
                    "ratios": ratios,
                    "rounds": rows,
                }
            )
        )
        return
    load = os.getloadavg()[0]
    print(f"{options.pairs} pairs of 64 KiB + 60 KiB a round, {options.rounds} rounds of each side, "
          f"{os.cpu_count()} cores, load {load:.1f}\n")  # fmt: skip
    print(
        f"{'':14}{'pairs/s':>10}{'lowest':>10}{'highest':>10}{'consumer CPU, ms a pair: user':>32}{'system':>10}"
    )
    for name, found in rows.items():
        rates = [row["pairs_per_s"] for row in found]
        user_ms, system_ms = (
            1e3 * statistics.median(row[kind] for row in found) / options.pairs for kind in ("user_s", "system_s")
        )
        print(
            f"{name:14}{medians[name]:10.0f}{min(rates):10.0f}{max(rates):10.0f}{user_ms:32.2f}{system_ms:10.2f}"
        )
    print(f"\ningest moves {100 * ratio:.0f} % of what the same client moves through Redis alone "
          f"(rounds: {', '.join(f'{100 * one:.0f} %' for one in ratios)})")  # fmt: skip


if __name__ == "__main__":
    main()
