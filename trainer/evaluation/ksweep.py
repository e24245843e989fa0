"""Do more negatives help? Linear accuracy against K, at two batch sizes: the paper's Fig. 4."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from trainer.evaluation import plots
from trainer.evaluation.bench import Bench, require_labels
from trainer.evaluation.pretrain import Cost, Pretrained
from trainer.evaluation.probe import predict
from trainer.evaluation.report import EvaluationError, Report
from trainer.evaluation.scores import Answers, asked_parts, difference, outcome, score
from trainer.evaluation.split import draw_share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = "Does linear accuracy rise with the number of negatives K?"
SWEEP = ((64, 64), (64, 128), (64, 192), (64, 256), (64, 320), (128, 128), (128, 256))
"""Batch size and K, as the paper swept them."""


def study(
    bench: Bench,
    *,
    name: str = "ksweep",
    sweep: Sequence[tuple[int, int]] | None = None,
    has_in_batch: bool = False,
) -> Report:
    """A learner for each batch size and K of `sweep` (None: SWEEP). has_in_batch: negatives from the batch too."""
    require_labels(bench.dataset)
    sweep = SWEEP if sweep is None else sweep
    splits = bench.splits()
    report = Report(name, QUESTION, bench.protocol(splits) | {"sweep": [list(one) for one in sweep]})
    report.protocol["in_batch_negatives"] = has_in_batch
    largest = max(batch_size for batch_size, _ in sweep)
    for split in splits:
        if largest > len(split.train):
            raise EvaluationError(
                f"a batch of {largest:,} is more than the {len(split.train):,} pairs to learn from",
                remedy="sweep smaller ones, --sweep 16:64,16:320, or give a longer recording",
            )
        parts = asked_parts(bench.dataset, split)
        fewest: dict[tuple[int, str], list[Answers]] = {}
        for batch_size, num_negatives in sweep:
            found: dict[str, list[Answers]] = {part: [] for part in parts}
            cost, losses = Cost(), list[float]()
            for seed in bench.plan.seeds:
                learnt = bench.learnt(
                    split.train,
                    seed,
                    what=f"{split.name}, batch {batch_size}, K {num_negatives}",
                    batch_size=batch_size,
                    queue_size=num_negatives,
                    in_batch_negatives=has_in_batch,
                    symmetric=has_in_batch,
                )
                cost += learnt.cost
                losses.append(_last_loss(learnt))
                rows = draw_share(bench.dataset, split.train, share=1, seed=seed, block_s=bench.plan.label_block_s)
                head = bench.layer(bench.features(learnt.learner, rows), rows, seed=seed)
                for part, asked in parts.items():
                    predicted = predict(head, bench.features(learnt.learner, asked)).numpy()
                    found[part].append(Answers(seed, asked, predicted))
            num = len(bench.plan.seeds)
            for part, answers in found.items():
                scored = score(bench.dataset, answers)
                baseline = fewest.setdefault((batch_size, part), answers)
                gain = None if baseline is answers else difference(bench.dataset, answers, baseline).report()
                report.details[f"{split.name}/{batch_size}/{num_negatives}/{part}"] = scored
                report.table.append(
                    {
                        "split": split.name,
                        "part": part,
                        "batch": batch_size,
                        "K": num_negatives,
                        **outcome(scored),
                        "gain": gain,
                        "loss": round(float(np.mean(losses)), 4),
                        "chance": round(math.log(num_negatives + 1), 4),
                        "steps": cost.steps // num,
                        "seconds": round(cost.seconds / num, 1),
                        "cpu_s": round(cost.cpu_s / num, 1),
                    }
                )
    report.notes = [
        "gain: over the first K of the same batch size, same sessions and seeds; where its interval holds 0, "
        "this data shows no difference.",
        "loss, chance: nats, of the last tenth of the steps and of knowing nothing; they rise with K.",
    ]
    if bench.plan.steps is not None and len({batch_size for batch_size, _ in sweep}) > 1:
        report.notes.append(
            f"all took {bench.plan.steps} steps: a larger batch has seen more pairs; compare K at equal batches."
        )
    report.draw = lambda figure: draw_sweep(figure, report)
    return report


def _last_loss(learnt: Pretrained) -> float:
    """Mean over the last tenth of the learning, in nats: a single batch is noise."""
    last = learnt.curve[-max(1, len(learnt.curve) // 10) :]
    return float(np.mean([point["loss"] for point in last]))


def draw_sweep(figure: "Figure", report: Report) -> None:
    """Accuracy against K, a line for each batch size, as the paper's Fig. 4."""
    for axes, rows in plots.by_split(figure, report.table):
        for number, batch in enumerate(dict.fromkeys(row["batch"] for row in rows)):
            own = [row for row in rows if row["batch"] == batch]
            at = plots.beside([row["K"] for row in own], number=number, among=[row["K"] for row in rows])
            label = f"batch {batch}, {own[0]['steps']:,} steps"
            plots.curve(axes, at, [row["accuracy"] for row in own], label=label, number=number)
        axes.set_xscale("log")
        ticks = sorted({row["K"] for row in rows})
        axes.set_xticks(ticks, [f"{num:,}" for num in ticks])
        axes.minorticks_off()
        axes.set_xlabel("number of negatives K")
        axes.set_ylabel("linear accuracy, %")
        axes.grid(alpha=0.3)
    plots.finish(figure, report.protocol)
