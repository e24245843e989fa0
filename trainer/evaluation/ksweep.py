"""Do more negatives help? Linear accuracy against K, at two batch sizes: the paper's Fig. 4."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.evaluation.bench import Bench, require_labels
from trainer.evaluation.pretrain import Cost
from trainer.evaluation.probe import predict
from trainer.evaluation.report import Report
from trainer.evaluation.scores import Answers, asked_parts, score
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
    for split in splits:
        parts = asked_parts(bench.dataset, split)
        for batch_size, num_negatives in sweep:
            found: dict[str, list[Answers]] = {part: [] for part in parts}
            cost = Cost()
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
                rows = draw_share(bench.dataset, split.train, share=1, seed=seed, block_s=bench.plan.label_block_s)
                head = bench.layer(bench.features(learnt.learner, rows), rows, seed=seed)
                for part, asked in parts.items():
                    predicted = predict(head, bench.features(learnt.learner, asked)).numpy()
                    found[part].append(Answers(seed, asked, predicted))
            num = len(bench.plan.seeds)
            for part, answers in found.items():
                scored = score(bench.dataset, answers)
                report.details[f"{split.name}/{batch_size}/{num_negatives}/{part}"] = scored
                report.table.append(
                    {
                        "split": split.name,
                        "part": part,
                        "batch": batch_size,
                        "K": num_negatives,
                        "accuracy": scored["accuracy"],
                        "loss": learnt.curve[-1]["loss"] if learnt.curve else None,
                        "steps": cost.steps // num,
                        "seconds": round(cost.seconds / num, 1),
                        "cpu_s": round(cost.cpu_s / num, 1),
                    }
                )
    report.notes = ["intervals that overlap say that K made no difference that this data can show."]
    report.draw = lambda figure: draw_sweep(figure, report)
    return report


def draw_sweep(figure: "Figure", report: Report) -> None:
    """Accuracy against K, a line for each batch size, as the paper's Fig. 4."""
    panels = list(dict.fromkeys((row["split"], row["part"]) for row in report.table))
    figure.set_size_inches(4.6 * len(panels), 3.8)
    for number, (split, part) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        for batch in dict.fromkeys(row["batch"] for row in report.table):
            rows = [r for r in report.table if (r["split"], r["part"], r["batch"]) == (split, part, batch)]
            mean = [100 * row["accuracy"]["mean"] for row in rows]
            low = [max(0.0, m - 100 * row["accuracy"]["low"]) for m, row in zip(mean, rows, strict=True)]
            high = [max(0.0, 100 * row["accuracy"]["high"] - m) for m, row in zip(mean, rows, strict=True)]
            axes.errorbar(
                [row["K"] for row in rows], mean, (low, high), fmt="o-", capsize=3, label=f"batch {batch}"
            )
        axes.set_xticks(sorted({row["K"] for row in report.table}))
        axes.set_xlabel("number of negatives K")
        axes.set_ylabel("linear accuracy, %")
        axes.set_title(f"{split}: {part}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
