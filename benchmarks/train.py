"""What a step costs beside bare loops, on one machine in one run: python benchmarks/train.py [--quick]

    path   the trainer's own loop (store on disk, cached encodings, batches read ahead, held-out stretches,
           checkpoints) against a bare loop: the same radar encoder, forward, backward and step, on one batch in
           memory
    vgg    our step with VGG-16 and cached encodings against a MoCo-style loop: VGG-16 on both sides, the frozen
           one run on the images of every step
    edge   the trainer's own loop with the edge encoder against the same radar encoder beside a VGG-16 that is run
           on the images of every step

Loops take turns; a round's ratio is of that round, and the median over rounds counts. Images of the reference
loops lie decoded in memory, weights are random: neither changes the time of a step.
"""

import argparse
import copy
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
import structlog
import torch
import torch.nn.functional as F
from torch import nn

from services.core.encodings import digest_of
from services.core.frames import CameraFrame, RadarFrame
from services.core.segments import Pair
from services.core.store import StoreLimits, StoreReader, StoreWriter
from trainer.encodings import Encoded, EncodingCache
from trainer.learner import Learner
from trainer.memory import keep_freed_memory
from trainer.settings import TrainerSettings
from trainer.vgg import vgg16_features
from trainer.vision import IMAGE_PX, VisionEncoder
from trainer.worker import TrainerWorker

SHAPE = (2, 128, 64)
TARGETS = {"path": 0.90, "vgg": 1.3, "edge": 15.0}
SITE = "bench"


class _Stub(nn.Module):
    """Stands for a frozen encoder whose encodings are all there already."""


def stub_vision(dim: int) -> VisionEncoder:
    return VisionEncoder(_Stub(), name=f"stub{dim}", dim=dim, mean=[0.0] * 3, std=[1.0] * 3)


def vgg_vision() -> VisionEncoder:
    net = vgg16_features("", from_hub=False).to(memory_format=torch.channels_last)
    return VisionEncoder(net, name="vgg16", dim=4096, mean=[127.0] * 3, std=[64.0] * 3)


def fill(store_dir: Path, num_pairs: int, *, dims: tuple[int, ...]) -> None:
    """Pairs at 10 a second, and their encodings."""
    rng = np.random.default_rng(0)
    image = simplejpeg.encode_jpeg(np.zeros((64, 64, 3), np.uint8))
    writer = StoreWriter(store_dir, SITE, limits=StoreLimits(min_free_bytes=0))
    start_ns = 1_700_000_000_000_000_000
    for first in range(0, num_pairs, 64):
        group = []
        for i in range(first, min(first + 64, num_pairs)):
            at_ns = start_ns + i * 100_000_000
            heatmap = rng.normal(20, 5, SHAPE).astype(np.float16)
            radar = RadarFrame(SITE, i, at_ns, heatmap=heatmap, axes=("channel", "range", "azimuth"))
            group.append(Pair(radar, CameraFrame(SITE, i, at_ns, image=image, shape=(64, 64, 3))))
        writer.append(group)
    writer.close()
    reader = StoreReader(store_dir)
    reader.refresh()
    for dim in dims:
        cache = EncodingCache(store_dir, site=SITE, encoder_id=stub_vision(dim).id, dim=dim)
        for pair in reader:
            vector = rng.normal(size=dim).astype(np.float16)
            for mirrored in (False, True):
                cache.append([Encoded(pair.id, mirrored, vector, digest_of(image) + pair.id.seq)])
    reader.close()


def worker_of(data_dir: Path, args: argparse.Namespace, *, dim: int, **changes: object) -> TrainerWorker:
    """A trainer that is ready to take steps, for ever."""
    values = {
        "data_dir": data_dir,
        "device": args.device,
        "threads": args.threads,
        "max_replays": 1e9,
        "checkpoint_every_s": args.checkpoint_every_s,
        "min_pairs": 16,
        "precision": "fp32",
    }
    settings = TrainerSettings(**(values | changes))
    worker = TrainerWorker(settings, vision=stub_vision(dim), log=structlog.get_logger(), events=None)
    worker.feed.refresh()
    worker.turn()
    return worker


class Bare:
    """Forward, backward, step: the radar encoder against K keys, nothing else. vision: run each step if given."""

    def __init__(self, learner: Learner, batch_size: int, *, vision: VisionEncoder | None = None) -> None:
        torch.manual_seed(0)
        device = learner.device
        self._learner, self._vision = learner, vision

        self._encoder = copy.deepcopy(learner.encoder)
        dim = vision.dim if vision is not None else learner.queue.keys.shape[1]
        feature_dim = learner.architecture["feature_dim"]
        self._projection = (nn.Identity() if feature_dim == dim else nn.Linear(feature_dim, dim, bias=False)).to(
            device
        )
        weights = [*self._encoder.parameters(), *self._projection.parameters()]
        self._optimizer = torch.optim.AdamW(weights, lr=1e-4)
        self._x = learner.precision.lay_out(torch.randn(batch_size, *SHAPE, device=device))
        self._k = F.normalize(torch.randn(batch_size, dim, device=device), dim=1)
        self._keys = F.normalize(torch.randn(learner.queue.K, dim, device=device), dim=1)
        self._images = torch.randint(0, 255, (batch_size, IMAGE_PX, IMAGE_PX, 3), dtype=torch.uint8, device=device)

    def step(self) -> None:
        self._encoder.train()
        k = self._k if self._vision is None else F.normalize(self._vision(self._images), dim=1)
        with self._learner.precision.autocast(self._x.device):
            q = self._projection(self._encoder(self._x)).float()
        q = F.normalize(q, dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self._keys.T], 1) / 0.2
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))
        if not torch.isfinite(loss):
            raise SystemExit("the reference's loss is not finite")
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()


def num_steps(worker: TrainerWorker) -> int:
    assert worker.learner is not None
    return worker.learner.step_num


def seconds_a_step(run: Callable[[], int], device: str) -> tuple[float, float]:
    """Wall and CPU seconds, of all threads. run: takes some steps and returns how many."""
    began_s, cpu_began_s = time.perf_counter(), time.process_time()
    num = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began_s) / num, (time.process_time() - cpu_began_s) / num


def of_worker(worker: TrainerWorker, steps: int) -> Callable[[], int]:
    def run() -> int:
        before = num_steps(worker)
        while num_steps(worker) < before + steps:
            worker.turn(max_steps=before + steps)
        return steps

    return run


def of_step(step: Callable[[], object], steps: int) -> Callable[[], int]:
    def run() -> int:
        for _ in range(steps):
            step()
        return steps

    return run


def compare(name: str, loops: dict[str, Callable[[], int]], *, rounds: int, device: str) -> float:
    """Loops in turn; the first is ours, the second the reference. Returns the median ratio of step rates."""
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in loops}
    for i in range(1 + rounds):
        for label, run in loops.items():
            taken = seconds_a_step(run, device)
            if i:
                times[label].append(taken)
    for label, rows in times.items():
        wall_s, cpu_s = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"  {label:34} {1e3 * wall_s:9.1f} ms a step, {1e3 * cpu_s:9.1f} ms of CPU")
    ours, reference = (times[label] for label in list(loops)[:2])
    wall, cpu = (sorted(theirs[i] / our[i] for our, theirs in zip(ours, reference, strict=True)) for i in range(2))
    ratio = statistics.median(wall)
    verdict = "reached" if ratio >= TARGETS[name] else "MISSED"
    print(
        f"{name}: {ratio:.2f}x the reference's step rate (rounds {wall[0]:.2f} to {wall[-1]:.2f};"
        f" asked {TARGETS[name]:.2f}: {verdict}); by CPU time, which other work on the cores disturbs less,"
        f" {statistics.median(cpu):.2f}x ({cpu[0]:.2f} to {cpu[-1]:.2f})",
        flush=True,
    )
    return ratio


def bench_path(data_dir: Path, args: argparse.Namespace) -> float:
    worker = worker_of(data_dir / "path", args, dim=1280, batch_size=args.batch)
    assert worker.learner is not None
    bare = Bare(worker.learner, args.batch)
    batch = worker.feed.batch(args.batch).float()
    loops = {
        "trainer": of_worker(worker, args.steps),
        "bare loop": of_step(bare.step, args.steps),
        "our step on one batch in memory": of_step(lambda: learner_step(worker, batch), args.steps),
        "reading one batch, nothing ahead": of_step(lambda: worker.feed.batch(args.batch), args.steps),
    }
    return compare("path", loops, rounds=args.rounds, device=args.device)


def learner_step(worker: TrainerWorker, batch: object) -> None:
    assert worker.learner is not None
    before = worker.learner.step_num, worker.learner.num_learnt
    worker.learner.step(batch)  # type: ignore[arg-type]
    worker.learner.step_num, worker.learner.num_learnt = before


def bench_edge(data_dir: Path, args: argparse.Namespace) -> float:
    worker = worker_of(data_dir / "edge", args, dim=1280, batch_size=args.batch)
    assert worker.learner is not None
    slow = Bare(worker.learner, args.batch, vision=vgg_vision())
    loops = {
        "trainer, edge encoder": of_worker(worker, args.steps),
        "same encoder, VGG-16 every step": of_step(slow.step, max(1, args.steps // 8)),
    }
    return compare("edge", loops, rounds=args.rounds, device=args.device)


def bench_vgg(data_dir: Path, args: argparse.Namespace) -> float:
    worker = worker_of(
        data_dir / "vgg",
        args,
        dim=4096,
        mode="paper",
        batch_size=args.vgg_batch,
        learning_rate=1e-4,
        checkpoint_every_s=1e9,
    )
    assert worker.learner is not None
    slow = Bare(worker.learner, args.vgg_batch, vision=vgg_vision())
    steps = max(1, args.steps // 8)
    loops = {
        "trainer, VGG-16, cached": of_worker(worker, steps),
        "MoCo-style, VGG-16 both sides": of_step(slow.step, steps),
    }
    return compare("vgg", loops, rounds=args.rounds, device=args.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(TARGETS), action="append", help="one comparison; may be repeated")
    parser.add_argument("--pairs", type=int, default=2000, help="pairs in the store")
    parser.add_argument("--batch", type=int, default=64, help="batch of the edge encoder")
    parser.add_argument("--vgg-batch", type=int, default=16, help="batch of VGG-16")
    parser.add_argument("--steps", type=int, default=16, help="steps a round; an eighth for VGG-16")
    parser.add_argument("--rounds", type=int, default=7, help="rounds after the first, which is not counted")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for torch")
    parser.add_argument("--checkpoint-every-s", type=float, default=30.0, help="as by default")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="small and rough: half a minute a comparison")
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.batch, args.vgg_batch, args.steps, args.rounds = 400, 16, 2, 8, 3
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the trainer does
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {args.threads} torch threads, {args.device}")
    with tempfile.TemporaryDirectory(prefix="echosight-train-") as folder:
        for name, bench in (("path", bench_path), ("vgg", bench_vgg), ("edge", bench_edge)):
            if args.only is None or name in args.only:
                fill(Path(folder) / name / "store", args.pairs, dims=(4096,) if name == "vgg" else (1280,))
                bench(Path(folder), args)
                gc.collect()


if __name__ == "__main__":
    main()
