"""Does memory stay flat for a week? A site's pairs, one a second, go through the trainer as fast as it takes them.

    python benchmarks/week.py                              three hours of it, in half a minute
    python benchmarks/week.py --days 7 --out week.png      the whole week: ten minutes of CPU, and more

One process writes the store as ingest does: by the product's own writer, bounded by bytes, with labels that come
at once or a day late, and images removed once they are encoded. Another is the trainer's own worker: it looks,
encodes, learns, judges itself, saves, publishes and prunes. The first one also makes each candidate the champion,
as the API does, so that the gate has something to compare with. Only sizes are others, so that the cores can
follow: heatmaps of 2 x 32 x 16, images of 48 x 48, and a frozen image encoder of one layer.

The trainer's clock is the site's: it says when the newest pair that it has seen was captured, however fast pairs
come. So what it does by the clock it does as often as in a week of real time: a release every 20 minutes, gauges
and a checkpoint every 10. Labels age by the same clock. The site waits where the trainer does not follow.

Twice an hour of the site: resident memory, descriptors and threads of both processes, bytes on disk, sizes of what
they hold in memory; of the trainer's memory also what malloc has handed out, and which pages are those of files.
Both have loaded torch, which is most of what the writer takes. A table, and a picture with `--out`. Ends with
status 1 if either process takes more memory at most in the second half than in the first, by `--max-growth`. What
comes before the first day is over (of a shorter run: half of it) counts for neither: until then what is bounded
fills.
"""

import argparse
import ctypes
import heapq
import multiprocessing
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import structlog
import torch
from torch import nn

from services.core import labels
from services.core.disks import tree_bytes
from services.core.frames import CLASSES, CameraFrame, Label, RadarFrame, Seen
from services.core.registry import Registry
from services.core.segments import Pair
from services.core.store import StoreLimits, StoreWriter
from trainer import time_share
from trainer import vision as trainer_vision
from trainer import worker as trainer_worker
from trainer.evaluation.report import as_png
from trainer.memory import keep_freed_memory
from trainer.settings import TrainerSettings
from trainer.vision import VisionEncoder
from trainer.worker import TrainerWorker

SITE = "week"
HOUR_S, DAY_S = 3600, 86_400
SAMPLE_EVERY_S = HOUR_S // 2
START_NS = 1_700_000_000_000_000_000
SHAPE, IMAGE_PX = (2, 32, 16), 48
MAX_AGE_S = DAY_S // 2
"""Labels are kept so long, even where their pair has gone; pairs go before, by bytes."""
PINNED_SHARE = 0.05
"""Small, like the age: what fills slowly by default (labels of a week, labelled pairs) is full within a day."""
PAIR_BYTES = 4800
"""On disk, about."""
MAX_KEPT = 18_000
"""Pairs in the store of a long run: five hours."""
SCENE_S = 20
"""Something else passes by so often."""
GROUP = 64
"""Pairs a durable append."""
MAX_AHEAD = 512
"""Pairs that the trainer may be behind before the site waits for it."""
LABEL_EVERY = 20
LABELS_LATE_S = (0, 60, HOUR_S, DAY_S)
MAX_SILENCE_S = 1800
TIDY_EVERY = 8
"""Appends between looks at what has to go, as ingest has them."""


class Site:
    """Scenes of one object each at a place that both sensors see, made from the second alone."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._noise = rng.normal(20, 4, (256, *SHAPE)).astype(np.float16)
        self._clutter = rng.normal(0, 3, SHAPE).astype(np.float16)
        self._picture = rng.integers(60, 120, (IMAGE_PX, IMAGE_PX, 3)).astype(np.int16)
        self._scene = -1
        self._kind, self._start, self._end = 0, 0.0, 0.0

    def pair(self, second: int) -> Pair:
        rng = np.random.default_rng(second)
        kind, place = self._what(second)
        at_ns = START_NS + second * 1_000_000_000
        heatmap = self._noise[rng.integers(256)] + self._clutter
        image = self._picture + rng.integers(-20, 20, (IMAGE_PX, IMAGE_PX, 1))
        if kind:
            r, a = 2 + int(place * 26), 1 + int(place * 12)
            heatmap[:, r : r + 1 + kind, a : a + kind] += np.float16(6 + 4 * kind)
            x = int(place * (IMAGE_PX - 4 * kind))
            image[20 : 20 + 8 * kind, x : x + 4 * kind] += np.array([[[60, 20, -30]]], np.int16) * kind
        jpeg = simplejpeg.encode_jpeg(np.clip(image, 0, 255).astype(np.uint8), quality=80)
        sure = float(rng.uniform(0.3, 1.0))
        return Pair(
            RadarFrame(
                SITE,
                second,
                at_ns,
                heatmap=heatmap,
                axes=("channel", "range", "azimuth"),
                channels=("all", "moving"),
            ),
            CameraFrame(SITE, second, at_ns + 10_000_000, image=jpeg, shape=(IMAGE_PX, IMAGE_PX, 3)),
            seen=Seen(CLASSES[kind], sure, detector="made up"),
        )

    def label(self, second: int) -> Label:
        kind, _ = self._what(second)
        return Label(SITE, second, START_NS + second * 1_000_000_000, label=CLASSES[kind])

    def _what(self, second: int) -> tuple[int, float]:
        scene, into = divmod(second, SCENE_S)
        if scene != self._scene:
            rng = np.random.default_rng([scene, 1])
            self._scene, self._kind = scene, int(rng.integers(len(CLASSES)))
            self._start, self._end = rng.random(2)
        return self._kind, self._start + (self._end - self._start) * into / SCENE_S


# -- the trainer's process


class _Mallinfo2(ctypes.Structure):
    """Of malloc.h, glibc 2.33 or later: bytes, summed over all arenas."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def heap_mib() -> float:
    """What malloc has handed out and not got back."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return float(info.uordblks + info.hblkhd) / 2**20


class Told:
    """In place of the event log: what the worker reports goes to the writer's process, with its tables' sizes."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.worker: TrainerWorker | None = None
        self._num = {"published": 0, "gauges": 0}

    def stop_if_alone(self) -> None:
        """Nobody writes the store any more."""
        parent = multiprocessing.parent_process()
        if self.worker is not None and parent is not None and not parent.is_alive():
            self.worker.stop()

    def emit(self, kind: str, **values: Any) -> None:
        if kind in self._num:
            self._num[kind] += 1
        if kind == "trainer" and self.worker is not None:
            feed = self.worker.feed
            handled = feed.num_encoded + feed.num_found
            row = {"handled": handled, "step": values["step"], "accuracy": values["accuracy"] or 0.0, **self._num}
            self._pipe.send(row | {"tables": _tables(self.worker), "heap": heap_mib()})


def _tables(worker: TrainerWorker) -> dict[str, int]:
    """Entries of whatever could grow. Private, on purpose: nobody else has to know."""
    feed, releases, judge = worker.feed, worker._releases, worker.judge
    site = feed._sites.get(SITE)
    known = feed.reader._sites.get(SITE)
    found = {
        "pairs": len(feed.reader),
        "samples": len(feed),
        "sessions": feed.pool.num_sessions,
        "pending": max(feed.num_pending, len(feed._pending._heap)),
        "skipped": feed.num_skipped,
        "labels": len(known.labels.labels) if known else 0,
        "segments": len(known.segments) if known else 0,
        "detector's words": len(releases._names._seen),
        "versions": len(releases._versions),
        "features": sum(len(version.features._known) for version in releases._versions.values()),
        "drift": len(judge.drift.num_changes),
        "alarms": len(judge._alarms),
        "Python's blocks": sys.getallocatedblocks(),
    }
    if site is not None:
        cache = site.cache
        found |= {
            "vectors": cache.vectors.num_slots,
            "slots": sum(map(len, cache._slots)),
            "digests": sum(map(len, cache._by_digest)),
            "held out": len(site.held_out),
        }
    return found


def small_vision() -> VisionEncoder:
    """Of one layer: each patch of 12 x 12 gives 8 of its 128 numbers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 12, stride=12), nn.Flatten())
    return VisionEncoder(net, name="patches", dim=8 * 4 * 4, mean=[127.0] * 3, std=[64.0] * 3)


class Clock:
    """In place of the module `time`: seconds of the site, as `now_s` has them; naps are short."""

    def __init__(self, now_s: Callable[[], float], *, nap: Callable[[], None] = lambda: None) -> None:
        """nap: called with each one."""
        self.monotonic = self.time = now_s
        self._nap = nap

    def sleep(self, _: float) -> None:
        self._nap()
        time.sleep(0.005)


def train(data_dir: Path, pipe: Connection) -> None:
    """The trainer's process: as `python -m trainer`, but for the vision encoder, the clock and who is told."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    keep_freed_memory()
    torch.set_num_threads(1)
    told = Told(pipe)
    clock = Clock(lambda: told.worker.feed.came_ns(SITE) / 1e9 if told.worker else 0.0, nap=told.stop_if_alone)
    trainer_worker.time = time_share.time = clock  # type: ignore
    trainer_vision.IMAGE_PX = IMAGE_PX  # nothing is gained by making them larger first
    trainer_worker._LOOK_EVERY_S = 0.0  # each turn: a look is what moves the clock
    settings = TrainerSettings(
        data_dir=data_dir,
        device="cpu",
        precision="fp32",
        max_replays=1.0,
        encode_batch=64,
        encode_share=0.5,
        publish_every_s=1200,
        min_publish_steps=50,
        max_head_frames=192,
        max_gate_frames=96,
        checkpoint_every_s=600,
        gauges_every_s=600,
    )
    log = structlog.get_logger()
    worker = told.worker = TrainerWorker(settings, vision=small_vision(), log=log, events=told)  # type: ignore[arg-type]
    worker.judge._now_s = clock.monotonic
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker.run()


# -- what is measured


@dataclass(slots=True)
class Sample:
    """What is so at one hour. rss (MiB), fds, threads: of (trainer, writer). heap (MiB in use), files (MiB of its
    pages that are those of files): of the trainer. disk: bytes. tables: entries."""

    hour: float
    rss: tuple[float, float]
    files: float
    heap: float
    fds: tuple[int, int]
    threads: tuple[int, int]
    disk: dict[str, int]
    tables: dict[str, int]
    told: dict[str, Any]
    wall_s: float


@dataclass(slots=True)
class Measures:
    data_dir: Path
    trainer_pid: int
    began_s: float = field(default_factory=time.monotonic)
    samples: list[Sample] = field(default_factory=list)

    def take(self, hour: float, writer: StoreWriter, told: dict[str, Any]) -> Sample:
        pids = (self.trainer_pid, multiprocessing.current_process().pid or 0)
        site_dir = self.data_dir / "store" / SITE
        encodings = tree_bytes(site_dir / "encodings")
        disk = {
            "store": tree_bytes(site_dir) - encodings,
            "encodings": encodings,
            "registry": tree_bytes(self.data_dir / "models"),
            "history": _size(self.data_dir / "models" / "radar" / "history.jsonl"),
            "checkpoints": tree_bytes(self.data_dir / "trainer"),
            "labels": writer.labels.num_bytes,
        }
        ours = {"writer: ids": len(writer), "writer: labels": len(writer.labels.labels)}
        sample = Sample(
            hour,
            rss=tuple(_resident_mib(pid) for pid in pids),  # type: ignore[arg-type]
            files=_resident_mib(self.trainer_pid, of=2),
            heap=told["heap"],
            fds=tuple(_entries(pid, "fd") for pid in pids),  # type: ignore[arg-type]
            threads=tuple(_entries(pid, "task") for pid in pids),  # type: ignore[arg-type]
            disk=disk,
            tables=told.get("tables", {}) | ours,
            told={name: value for name, value in told.items() if name not in ("tables", "heap")},
            wall_s=time.monotonic() - self.began_s,
        )
        self.samples.append(sample)
        return sample

    @property
    def warm(self) -> list[Sample]:
        """After the warm-up."""
        last = self.samples[-1].hour
        return [sample for sample in self.samples if sample.hour >= min(24, last / 2)]

    def growth_mib(self, side: int) -> tuple[float, float]:
        """The second half's most over the first half's, and the slope, MiB a day."""
        warm = self.warm
        rss = np.array([sample.rss[side] for sample in warm])
        days = np.array([sample.hour / 24 for sample in warm])
        half = len(rss) // 2
        return float(rss[half:].max() - rss[:half].max()), float(np.polyfit(days, rss, 1)[0])


def _resident_mib(pid: int, *, of: int = 1) -> float:
    """of: the number's place in /proc/PID/statm, by default of all resident pages."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[of]) * 4096 / 2**20


def _entries(pid: int, what: str) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/{what}").iterdir())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def show(sample: Sample) -> None:
    told, disk = sample.told, sample.disk
    print(
        f"{sample.hour / 24:5.2f}{sample.rss[0]:9.1f}{sample.heap:8.1f}{sample.files:8.1f}{sample.rss[1]:8.1f}"
        f"{'/'.join(map(str, sample.fds)):>9}"
        f"{'/'.join(map(str, sample.threads)):>7}"
        + "".join(f"{disk[name] / 2**20:9.1f}" for name in ("store", "encodings", "registry", "checkpoints"))
        + f"{disk['history'] / 2**10:9.0f}{disk['labels'] / 2**10:8.0f}{sample.tables.get('pairs', 0):8}"
        f"{told.get('step', 0):8}{told.get('published', 0):7}{told.get('gauges', 0):7}"
        f"{100 * told.get('accuracy', 0):6.0f}{sample.wall_s / 60:8.1f}",
        flush=True,
    )


HEADER = (
    f"{'day':>5}{'trainer':>9}{'in use':>8}{'files':>8}{'writer':>8}{'fds':>9}{'thr.':>7}"
    f"{'store':>9}{'encod.':>9}{'registry':>9}{'checkp.':>9}"
    f"{'history':>9}{'labels':>8}{'pairs':>8}{'steps':>8}{'vers.':>7}{'gauges':>7}{'acc.':>6}{'minutes':>8}\n"
    f"{'':>5}{'MiB':>9}{'MiB':>8}{'MiB':>8}{'MiB':>8}{'':>9}{'':>7}"
    f"{'MiB':>9}{'MiB':>9}{'MiB':>9}{'MiB':>9}{'KiB':>9}{'KiB':>8}"
)


def draw(figure: Any, samples: list[Sample]) -> None:
    """Memory, disk and tables by day."""
    figure.set_size_inches(8, 9)
    days = [sample.hour / 24 for sample in samples]
    memory, disk, tables = figure.subplots(3, 1, sharex=True)
    for side, name in enumerate(("trainer", "writer")):
        memory.plot(days, [sample.rss[side] for sample in samples], label=name)
    memory.plot(days, [sample.heap for sample in samples], label="trainer: malloc, in use")
    memory.plot(days, [sample.files for sample in samples], label="trainer: pages of files")
    memory.set_ylabel("resident memory, MiB")
    for name in samples[-1].disk:
        disk.plot(days, [max(sample.disk[name], 1) / 2**20 for sample in samples], label=name)
    disk.set_ylabel("on disk, MiB")
    for i, name in enumerate(samples[-1].tables):
        entries = [max(sample.tables.get(name, 0), 0.5) for sample in samples]
        tables.plot(days, entries, label=name, color=f"C{i % 10}", linestyle="-" if i < 10 else "--")
    tables.set_ylabel("entries in memory")
    tables.set_xlabel("days of the site")
    for axes in (disk, tables):
        axes.set_yscale("log")
    for axes in (memory, disk, tables):
        axes.set_ylim(bottom=0 if axes is memory else None)
        axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
        axes.grid(alpha=0.3)


# -- the site's process


class Stream:
    """The site and its writer. seconds: of the site's time so far, and pairs."""

    def __init__(self, data_dir: Path, *, kept: int) -> None:
        limits = StoreLimits(
            max_bytes=kept * PAIR_BYTES,
            min_free_bytes=0,
            segment_bytes=2**20,
            max_age_s=MAX_AGE_S,
            pinned_share=PINNED_SHARE,
        )
        self.seconds = 0
        labels.time = Clock(lambda: START_NS / 1e9 + self.seconds)  # type: ignore
        self.writer = StoreWriter(data_dir / "store", SITE, limits=limits)
        self._site = Site()
        self._registry = Registry(data_dir / "models", "radar")
        self._labels: list[tuple[int, int]] = []  # when they come, of which second
        self._num_groups = 0

    def go_on(self) -> None:
        """One more group, the labels that are due, and now and then what ingest and API do beside."""
        seconds = range(self.seconds, self.seconds + GROUP)
        self.writer.append([self._site.pair(second) for second in seconds])
        for second in seconds:
            if second % LABEL_EVERY == 0:
                late_s = LABELS_LATE_S[second // LABEL_EVERY % len(LABELS_LATE_S)]
                heapq.heappush(self._labels, (second + late_s, second))
        self.seconds += GROUP
        due = []
        while self._labels and self._labels[0][0] < self.seconds:
            due.append(self._site.label(heapq.heappop(self._labels)[1]))
        self.writer.append_labels(due)
        self._num_groups += 1
        if self._num_groups % TIDY_EVERY == 0:
            self.writer.evict()
            self.writer.drop_encoded_images()
            self._promote()

    def _promote(self) -> None:
        aliases = self._registry.aliases()
        if aliases.get("candidate", 0) > aliases.get("champion", 0):
            self._registry.promote(aliases["candidate"], by="week", why="a candidate")


def stream(data_dir: Path, args: argparse.Namespace) -> Measures:
    """The whole run. Raises SystemExit if the trainer ends, or stands still."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    trainer = spawn.Process(target=train, args=(data_dir, theirs))
    trainer.start()
    theirs.close()
    total_s = round(args.days * DAY_S)
    site = Stream(data_dir, kept=min(MAX_KEPT, total_s // 8))
    measures = Measures(data_dir, trainer.pid or 0)
    told: dict[str, Any] = {}
    told_s = time.monotonic()
    print_every_s = max(SAMPLE_EVERY_S, total_s // 28)
    print(HEADER, flush=True)
    try:
        while site.seconds < total_s:
            while ours.poll(0):
                told, told_s = ours.recv(), time.monotonic()
            if not trainer.is_alive() or time.monotonic() - told_s > MAX_SILENCE_S:
                raise SystemExit(f"the trainer ended or stands still: {trainer.exitcode}, {told}")
            if site.seconds - told.get("handled", 0) > MAX_AHEAD:
                time.sleep(0.02)
                continue
            before_s = site.seconds
            site.go_on()
            if site.seconds // SAMPLE_EVERY_S > before_s // SAMPLE_EVERY_S and told:
                sample = measures.take(site.seconds / HOUR_S, site.writer, told)
                if site.seconds // print_every_s > before_s // print_every_s:
                    show(sample)
    finally:
        trainer.terminate()
        trainer.join(60)
        site.writer.close()
    return measures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=float, default=1 / 8, help="of the site's time (default: 3 hours)")
    parser.add_argument(
        "--max-growth", type=float, default=24.0, help="MiB from half to half (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=None, help="a PNG of the course")
    parser.add_argument(
        "--dir", type=Path, default=None, help="where the directory is made, and kept after a failure"
    )
    args = parser.parse_args()

    data_dir = Path(tempfile.mkdtemp(prefix="echosight-week-", dir=args.dir))
    measures = stream(data_dir, args)
    samples = measures.samples
    print("\nentries in memory, after the warm-up and at the end:")
    for name, num in samples[-1].tables.items():
        print(f"  {name:20}{measures.warm[0].tables.get(name, 0):10}{num:10}")
    if args.out is not None:
        args.out.write_bytes(as_png(lambda figure: draw(figure, samples)))
    is_wrong = False
    for side, name in enumerate(("trainer", "writer")):
        grown, slope = measures.growth_mib(side)
        is_wrong |= grown > args.max_growth
        print(
            f"{name}: {grown:+.1f} MiB from the first half to the second (at most {args.max_growth:.0f}),"
            f" {slope:+.2f} a day"
        )
    print(f"{samples[-1].hour / 24:.2f} days in {samples[-1].wall_s / 60:.1f} minutes")
    if is_wrong:
        print(f"kept: {data_dir}")
        return 1
    shutil.rmtree(data_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
