"""How good are the features? The linear classification protocol, with all labels and with few."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trainer.evaluation import plots
from trainer.evaluation.bench import Bench, require_labels
from trainer.evaluation.dataset import Rows
from trainer.evaluation.pretrain import Cost, features_of, site_means
from trainer.evaluation.probe import predict
from trainer.evaluation.report import Report, Row
from trainer.evaluation.scores import Answers, asked_parts, difference, outcome, score
from trainer.evaluation.split import Split, draw_balanced, draw_share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = "How much of the class can one linear layer read off the frozen features?"
Features = Callable[[Rows], Tensor]
FEW = 40


def study(bench: Bench) -> Report:
    """Untrained, contrastive and, as the ceiling, the camera's own features; all labels, 1 %, and 40 in all."""
    require_labels(bench.dataset)
    splits = bench.splits()
    report = Report("linear", QUESTION, bench.protocol(splits))
    answers: dict[tuple[str, str, str, str], list[Answers]] = defaultdict(list)
    costs: dict[tuple[str, str], Cost] = defaultdict(Cost)
    drawn: dict[tuple[str, str], list[int]] = defaultdict(list)
    for split in splits:
        for seed in bench.plan.seeds:
            labels = label_sets(bench, split, seed=seed)
            for label_set, rows in labels.items():
                drawn[split.name, label_set].append(len(rows))
            learnt = bench.learnt(split.train, seed, what=split.name)
            for encoder, found in (("untrained", bench.untrained(split.train, seed)), ("contrastive", learnt)):
                costs[split.name, encoder] += found.cost

                radar = partial(bench.features, found.learner)
                generic = partial(features_of, found.learner, bench.dataset, site_known=False)
                _ask(bench, split, encoder, labels, radar, answers, seed=seed, generic=generic)

            _ask(bench, split, "camera", labels, camera_features(bench, split), answers, seed=seed)
    for (split_name, encoder, label_set, part), answered in answers.items():
        scored = score(bench.dataset, answered)
        num_labels = round(float(np.mean(drawn[split_name, label_set])))
        report.table.append(
            _row(scored, split_name, encoder, label_set, part, costs[split_name, encoder], num_labels)
        )
        report.details[f"{split_name}/{encoder}/{label_set}/{part}"] = scored
    gains = [(key, (key[0], "untrained", *key[2:])) for key in answers if key[1] == "contrastive"]
    for ours, theirs in gains:
        gain = difference(bench.dataset, answers[ours], answers[theirs]).report()
        report.details[f"{'/'.join(ours)}"]["gain_over_untrained"] = gain
    report.details["curves"] = {
        f"{split.name}/seed {seed}": bench.learnt(split.train, seed).curve
        for split in splits
        for seed in bench.plan.seeds
    }
    report.notes = [
        "test: held-out sessions of sites that were learnt from; unseen: sites that were not; generic: the same, "
        "answered with the mean clutter map instead of the site's own.",
        "camera: the frozen vision encoder's own features, the ceiling of what it can teach.",
    ]
    report.draw = lambda figure: draw_table(figure, report)
    report.add_confusions(
        {
            f"{split.name}/contrastive/all/{part}": f"{split.name}: {part}\nall labels"
            for split in splits
            for part in ("test", "unseen")
        }
    )
    return report


def label_sets(bench: Bench, split: Split, *, seed: int) -> dict[str, Rows]:
    """Labelled training rows: all, about 1 % by blocks of time, and 40 balanced ones."""
    dataset, block_s = bench.dataset, bench.plan.label_block_s
    return {
        "all": draw_share(dataset, split.train, share=1, seed=seed, block_s=block_s),
        "1 %": draw_share(dataset, split.train, share=0.01, seed=seed, block_s=block_s),
        f"{FEW} in all": draw_balanced(dataset, split.train, count=FEW, seed=seed),
    }


def camera_features(bench: Bench, split: Split) -> Features:
    """The frozen encoder's own, centred by site as the contrast sees them."""
    dataset = bench.dataset
    means = site_means(dataset, split.train)
    return lambda rows: torch.from_numpy(dataset.key[rows].astype(np.float32) - means[dataset.site[rows]])


def _ask(
    bench: Bench,
    split: Split,
    encoder: str,
    labels: dict[str, Rows],
    features: Features,
    answers: dict[tuple[str, str, str, str], list[Answers]],
    *,
    seed: int,
    generic: Features | None = None,
) -> None:
    """Fit a layer for each set of labels, and let it answer on each part."""
    parts = asked_parts(bench.dataset, split)
    cached = {part: (rows, features(rows)) for part, rows in parts.items()}
    if generic is not None and "unseen" in parts:
        cached["unseen, generic"] = (parts["unseen"], generic(parts["unseen"]))
    for name, rows in labels.items():
        head = bench.layer(features(rows), rows, seed=seed)
        for part, (part_rows, part_features) in cached.items():
            predicted = predict(head, part_features).numpy()
            answers[split.name, encoder, name, part].append(Answers(seed, part_rows, predicted))


def _row(scored: Row, split: str, encoder: str, labels: str, part: str, cost: Cost, num_labels: int) -> Row:
    num = len(scored["seeds"])
    return {
        "split": split,
        "encoder": encoder,
        "labels": labels,
        "num_labels": num_labels,
        "part": part,
        **outcome(scored),
        "learning_s": round(cost.seconds / num, 1),
        "learning_cpu_s": round(cost.cpu_s / num, 1),
        "steps": cost.steps // num,
    }


def draw_table(figure: "Figure", report: Report) -> None:
    """Accuracies with intervals, a panel for each split and part."""
    for axes, rows in plots.by_split(figure, report.table):
        encoders = list(dict.fromkeys(row["encoder"] for row in rows))
        num_labels = {row["labels"]: row["num_labels"] for row in rows}
        labels = list(num_labels)
        width = 0.8 / len(encoders)
        for i, encoder in enumerate(encoders):
            own = [row for row in rows if row["encoder"] == encoder]
            at = [labels.index(row["labels"]) + width * (i - (len(encoders) - 1) / 2) for row in own]
            mean, reach = plots.percent([row["accuracy"] for row in own])
            axes.bar(at, mean, width, yerr=reach, label=encoder, capsize=2, color=plots.COLOURS[i])
        ticks = [name if name.startswith(f"{num} ") else f"{name}: {num:,}" for name, num in num_labels.items()]
        axes.set_xticks(range(len(labels)), ticks, fontsize=8)
        axes.set_xlabel("labels that the layer was fitted on")
        axes.set_ylabel("accuracy, %")
        axes.set_ylim(0, 100)
    plots.finish(figure, report.protocol, is_x_shared=False)
