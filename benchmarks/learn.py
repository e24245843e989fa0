"""How long does edge mode take from nothing to its accuracy? Simulated frames, no label until the last layer.

    python benchmarks/learn.py --out learn.png        9 sites to learn from, 4 unseen ones: some minutes
    python benchmarks/learn.py --scale 0.1            a tenth of the frames and steps

The trainer's own worker is run on a store that nobody has looked at: it encodes each image once, draws batches by
replay, learns, judges itself and saves, in the turns and with the threads that it has in production, up to the
last of `--steps`. `max_replays` is set so that the last step falls when the last image is encoded. On the way,
with the clocks stopped, one linear layer (the product's own head, all labels) is fitted on the frames learnt from,
and asked about the sites' held-out stretches and about sites never seen. What counts in the end is starting,
encoding, learning, and fitting that layer. The stores are made beforehand and kept under `--dir`.

Then, in the same run: what a step of paper mode costs (VGG-16 on both sides), and so what its 400 epochs over the
same pairs would. Nobody ran those: how accurate it would get is not known, so it is taken for 100 %.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch
from torch import Tensor

from services.commands.evaluate import simulated
from services.core.frames import CLASSES
from services.core.registry import InputContract
from services.core.store import StoredPair, StoreReader
from trainer.batches import Batch
from trainer.evaluation.pretrain import Stopwatch
from trainer.evaluation.probe import fit_linear, predict
from trainer.evaluation.report import as_png
from trainer.heldout import is_held_out, may_learn
from trainer.learner import Learner
from trainer.memory import keep_freed_memory
from trainer.queue import Scenes
from trainer.settings import TrainerSettings
from trainer.vision import load_vision_encoder
from trainer.worker import TrainerWorker, num_threads

LEARNT = ("campus", "carpark", "courtyard", "demo", "park", "quay", "street", "suburb", "yard")
UNSEEN = ("eval_depot", "eval_green", "eval_lane", "eval_plaza")
FRAMES, UNSEEN_FRAMES, INTERVAL_S = 900, 500, 0.66
HELD_OUT_SHARE = 0.2
POINTS = (50, 100, 200, 300)
"""Steps after which the layer is fitted."""
SLACK_STEPS = 2
"""A worker waits for new pairs once it has learnt the old ones so often; the last step must come before."""
PAPER_EPOCHS, PAPER_BATCH = 400, 16
NAMES = ("test", "unseen")
_BATCH = 256
HEADER = "".join(f"{name:>9}" for name in ("steps", "s", "CPU s", "layer s", "CPU s", "encoded", "pairs", *NAMES))


@dataclass(slots=True)
class Part:
    """Frames to fit the layer on or to ask about. site: (N,) int64, row of the clutter table."""

    heatmap: np.ndarray
    site: Tensor
    label: Tensor


@dataclass(slots=True)
class Curve:
    """One row a point: steps, seconds and CPU seconds of learning, of the layer, accuracies in %."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def draw(self, figure: Any) -> None:
        figure.set_size_inches(8, 3.6)
        labels = {"s": "seconds from an empty cache", "cpu_s": "CPU seconds of all threads"}
        for axes, (what, label) in zip(figure.subplots(1, 2, sharey=True), labels.items(), strict=True):
            at = [row[what] + row[f"layer_{what}"] for row in self.rows]
            for name, words in (("test", "held-out stretches"), ("unseen", "unseen sites")):
                axes.plot(at, [row[name] for row in self.rows], marker="o", label=words)
            for x, row in zip(at, self.rows, strict=True):
                axes.annotate(f"{row['steps']:.0f} steps", (x, row["test"]), fontsize=7)
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8, loc="lower right")
        figure.axes[0].set_ylabel("accuracy of a linear layer, %")


def settings_of(data_dir: Path, args: argparse.Namespace, num_learnable: int) -> TrainerSettings:
    replays = args.max_replays or (args.steps[-1] + SLACK_STEPS) * 64 / num_learnable
    return TrainerSettings(
        data_dir=data_dir,
        device="cpu",
        threads=args.threads,
        seed=args.seed,
        held_out_share=HELD_OUT_SHARE,
        max_replays=replays,
        min_publish_steps=10**9,  # a version is another benchmark's
    )


def run(stores: dict[str, Path], args: argparse.Namespace) -> tuple[Curve, int]:
    """The worker from nothing, with the layer after each of `args.steps`; and how many pairs it may learn."""
    reader = StoreReader(stores["learnt"])
    reader.refresh()
    learnt = [pair for pair in reader if may_learn(pair.site, pair.id.captured_at_ns, share=HELD_OUT_SHARE)]
    asked = [pair for pair in reader if is_held_out(pair.site, pair.id.captured_at_ns, share=HELD_OUT_SHARE)]
    curve, spent = Curve(), [0.0, 0.0]
    with tempfile.TemporaryDirectory(prefix="echosight-learn-") as folder:
        data_dir = Path(folder)
        _link(stores["learnt"], data_dir / "store")
        settings = settings_of(data_dir, args, len(learnt))
        watch = Stopwatch()
        vision = load_vision_encoder(settings.vision_encoder)
        worker = TrainerWorker(settings, vision=vision, log=structlog.get_logger(), events=None)
        for steps in args.steps:
            while worker.turn(max_steps=steps):
                if not worker.feed.num_pending and worker.learner and not worker._has_news():
                    raise SystemExit(f"waits for new pairs at step {worker.learner.step_num}: give more replays")
            lap = watch.cost()
            spent = [spent[0] + lap.seconds, spent[1] + lap.cpu_s]
            row = accuracies(worker, reader, learnt, asked, stores["unseen"])
            curve.rows.append({"steps": steps, "s": spent[0], "cpu_s": spent[1], **row})
            tell(curve.rows[-1], worker)
            watch = Stopwatch()
        worker._batches.close()
        worker._checkpoints.close()
    reader.close()
    return curve, len(learnt)


def _link(store: Path, into: Path) -> None:
    """The same pairs and labels under another name, without any encoding or profile."""
    for path in store.rglob("*"):
        if path.is_file() and path.parent.name != "encodings" and path.name != "profile.npz":
            target = into / path.relative_to(store)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(path)


def accuracies(
    worker: TrainerWorker, reader: StoreReader, learnt: list[StoredPair], asked: list[StoredPair], unseen_dir: Path
) -> dict[str, float]:
    """Seconds and CPU seconds of the layer (features and fit), and what it answers, in %."""
    learner, sites = worker.learner, worker.feed.sites
    assert learner is not None
    known = [pair for pair in learnt if pair.site in sites]
    fit_on = read(reader, known, [1 + sites.index(pair.site) for pair in known])
    watch = Stopwatch()
    head = fit_linear(features(learner, fit_on), fit_on.label, probe="lbfgs", seed=0)
    cost = watch.cost()
    row = {"layer_s": cost.seconds, "layer_cpu_s": cost.cpu_s, "known": float(len(worker.feed))}
    test = [pair for pair in asked if pair.site in sites]
    row["test"] = share_right(head, learner, read(reader, test, [1 + sites.index(pair.site) for pair in test]))
    # An unseen site's clutter map is the mean of its own heatmaps: neither image nor label goes into it.
    unseen = StoreReader(unseen_dir)
    unseen.refresh()
    pairs, names = list(unseen), unseen.sites
    part = read(unseen, pairs, [names.index(pair.site) for pair in pairs])
    table = worker.feed.clutter_table()
    maps = [part.heatmap[(part.site == i).numpy()].astype(np.float32).mean(0) for i in range(len(names))]
    learner.set_input(np.stack(maps))
    row["unseen"] = share_right(head, learner, part)
    learner.set_input(table)
    unseen.close()
    return row


def read(reader: StoreReader, pairs: Sequence[StoredPair], sites: Sequence[int]) -> Part:
    frames, labels = [pair.radar() for pair in pairs], [reader.label(pair) for pair in pairs]
    heatmap = np.stack([frame.heatmap for frame in frames if frame is not None])
    label = torch.tensor([CLASSES.index(found.label) for found in labels if found is not None])
    assert len(heatmap) == len(label) == len(pairs)
    return Part(heatmap, torch.tensor(sites), label)


def features(learner: Learner, part: Part) -> Tensor:
    starts = range(0, len(part.heatmap), _BATCH)
    heatmaps = (torch.from_numpy(part.heatmap[at : at + _BATCH].astype(np.float32)) for at in starts)
    sites = (part.site[at : at + _BATCH] for at in starts)
    return torch.cat([learner.features(heatmap, site) for heatmap, site in zip(heatmaps, sites, strict=True)])


def share_right(head: Any, learner: Learner, part: Part) -> float:
    return 100 * float((predict(head, features(learner, part)) == part.label).float().mean())


def tell(row: dict[str, float], worker: TrainerWorker) -> None:
    times = "".join(f"{row[name]:9.1f}" for name in ("s", "cpu_s", "layer_s", "layer_cpu_s"))
    shares = "".join(f"{row[name]:9.1f}" for name in NAMES)
    print(f"{row['steps']:9.0f}{times}{worker.feed.num_encoded:9}{row['known']:9.0f}{shares}", flush=True)


def paper_seconds(contract: InputContract) -> tuple[float, float]:
    """CPU seconds of a pair in a step of paper mode, and of an image in its frozen encoder; medians of two."""
    from benchmarks.train import vgg_vision

    settings = TrainerSettings(mode="paper", batch_size=PAPER_BATCH, device="cpu", precision="fp32")
    learner = Learner(settings, contract=contract, key_dim=4096, device=torch.device("cpu"))
    learner.set_input(np.zeros((2, *contract.shape), np.float32), scale=5.0)
    vision = vgg_vision()

    def batch() -> Batch:
        num = torch.arange(PAPER_BATCH)
        return Batch(
            heatmap=torch.randn(PAPER_BATCH, *contract.shape),
            site=torch.ones(PAPER_BATCH, dtype=torch.int64),
            mirrored=torch.zeros(PAPER_BATCH, dtype=torch.bool),
            k=torch.randn(PAPER_BATCH, 4096),
            scenes=Scenes(id=num, site=num * 0, at_ns=num * 10**9),
        )

    def cpu_s(work: Any) -> float:
        watch = time.process_time()
        work()
        return (time.process_time() - watch) / PAPER_BATCH

    images = torch.zeros(PAPER_BATCH, 224, 224, 3, dtype=torch.uint8)
    steps = [cpu_s(lambda: learner.step(batch())) for _ in range(3)][1:]
    passes = [cpu_s(lambda: vision(images)) for _ in range(3)][1:]
    return statistics.median(steps), statistics.median(passes)


def compare(curve: Curve, num_pairs: int, contract: InputContract) -> None:
    """Accuracy per CPU second of both modes."""
    step_s, pass_s = paper_seconds(contract)
    last = curve.rows[-1]
    ours_s = last["cpu_s"] + last["layer_cpu_s"]
    epoch_s, encoding_s = num_pairs * step_s, num_pairs * pass_s
    paper_s = encoding_s + PAPER_EPOCHS * epoch_s
    print(
        f"\npaper mode, extrapolated: {step_s:.3f} s of CPU a pair and step, {pass_s:.3f} an image to encode;"
        f"\n{num_pairs} pairs: {encoding_s:,.0f} s to encode, {epoch_s:,.0f} an epoch, {paper_s:,.0f} in all"
    )
    for name in NAMES:
        ours = last[name] / ours_s
        print(
            f"{name}: edge {last[name]:.1f} % in {ours_s:.0f} s of CPU: {ours:.3f} points a second,"
            f" {ours * paper_s / 100:,.0f} times paper mode's if that ended at 100 %;"
            f" {ours * (encoding_s + epoch_s) / 100:,.0f} times if one epoch were enough for that"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of frames and steps (default: 1)")
    parser.add_argument("--steps", type=int, nargs="+", default=POINTS, help="when the layer is fitted")
    parser.add_argument("--max-replays", type=float, default=None, help="as the setting; default: see above")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads for torch; 0: one less than cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-paper", action="store_true", help="leave out the step of paper mode")
    parser.add_argument("--out", type=Path, default=None, help="a PNG of the curve")
    parser.add_argument(
        "--dir", type=Path, default=Path("var"), help="where the stores are kept (default: %(default)s)"
    )
    args = parser.parse_args()
    args.steps = [max(2, round(steps * args.scale)) for steps in args.steps]
    stores = {}
    for name, sites, frames in (("learnt", LEARNT, FRAMES), ("unseen", UNSEEN, UNSEEN_FRAMES)):
        stores[name], _ = simulated(
            args.dir, list(sites), frames=max(100, round(frames * args.scale)), interval_s=INTERVAL_S, seed=0
        )
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    keep_freed_memory()
    torch.set_num_threads(num_threads(TrainerSettings(threads=args.threads)))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch threads: {torch.get_num_threads()}")
    print(HEADER)
    curve, num_pairs = run(stores, args)
    last = curve.rows[-1]
    print(
        f"\nfrom nothing: {last['s'] + last['layer_s']:.0f} s, {last['cpu_s'] + last['layer_cpu_s']:.0f} s of CPU"
    )
    if args.out is not None:
        args.out.write_bytes(as_png(curve.draw))
    if not args.no_paper:
        compare(curve, num_pairs, InputContract(shape=(2, 128, 64)))


if __name__ == "__main__":
    main()
