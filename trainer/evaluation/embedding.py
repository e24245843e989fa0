"""What does the representation look like? t-SNE of 128-d penultimate layers: Fig. 7, and the panel it lacks.

A t-SNE of a network that was tuned on labels says nothing about learning without them: between the frozen network
that has not learnt and the fine-tuned one stands the frozen one that has learnt without a label.
"""

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from services.core.frames import CLASSES
from trainer.evaluation import plots
from trainer.evaluation.bench import Bench, require_labels
from trainer.evaluation.classifier import Classifier, Recipe, new_classifier, train_classifier
from trainer.evaluation.dataset import Dataset, Rows
from trainer.evaluation.efficiency import Budget, choose
from trainer.evaluation.report import Report
from trainer.evaluation.scores import Answers, asked_parts, outcome, score
from trainer.evaluation.split import Split, draw_share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = "Do the four classes form clusters, and from which step on?"
_LEARNT = ("contrastive, frozen", "fine-tuned")
_COLOURS = ("#999999", *plots.COLOURS[1:3], plots.COLOURS[0])
_NEIGHBOURS = 10
_UNTUNED = Budget(is_tuned=False)
Points = npt.NDArray[np.float32]
Places = npt.NDArray[np.float64]
Panel = tuple[str, str, str]
"""Split, part, and which network."""


def study(
    bench: Bench,
    *,
    name: str = "tsne",
    max_points: int = 1200,
    perplexity: float = 30.0,
    budget: Budget = _UNTUNED,
) -> Report:
    """Three panels on the held-out frames of each split; drawn of the first seed, measured on all."""
    require_labels(bench.dataset)
    dataset, splits, seeds = bench.dataset, bench.splits(), bench.plan.seeds
    report = Report(name, QUESTION, bench.protocol(splits) | {"perplexity": perplexity, "max_points": max_points})
    drawn: dict[Panel, tuple[Points, Rows]] = {}
    answers: dict[Panel, list[Answers]] = defaultdict(list)
    silhouettes: dict[Panel, list[float]] = defaultdict(list)
    num_drawn = len(panels_of(bench)) * sum(len(asked_parts(dataset, split)) for split in splits)
    for split in splits:
        asked = {part: _some(rows, max_points, seed=0) for part, rows in asked_parts(dataset, split).items()}
        for seed in seeds:
            networks, recipe = _networks(bench, split, seed, budget)
            report.details["finetune_recipe"] = recipe.report()
            for part, rows in asked.items():
                for panel, network in networks.items():
                    x, key = _standardised(network, dataset, rows), (split.name, part, panel)
                    answers[key].append(Answers(seed, rows, _neighbours_say(x, dataset.label[rows])))
                    silhouettes[key].append(_silhouette(x, dataset.label[rows]))
                    if seed == seeds[0]:
                        bench.bars.advance("t-SNE", len(drawn), num_drawn)
                        drawn[key] = (_place(x, perplexity=perplexity, seed=seed), dataset.label[rows])
    bench.bars.advance("t-SNE", num_drawn, num_drawn)
    for key, found in answers.items():
        scored = score(dataset, found)
        columns = outcome(scored)
        columns = {"knn": columns.pop("accuracy")} | {
            "silhouette": round(float(np.mean(silhouettes[key])), 4),
            "silhouette_min": round(min(silhouettes[key]), 4),
            "silhouette_max": round(max(silhouettes[key]), 4),
            **columns,
        }
        report.table.append(dict(zip(("split", "part", "panel"), key, strict=True)) | columns)
        report.details["/".join(key)] = scored
    report.details["points"] = {
        "/".join(key): {"xy": points.round(3).tolist(), "label": labels.tolist()}
        for key, (points, labels) in drawn.items()
    }
    report.notes = [
        "in the first two panels the 128-d layer is a random head's, as in the paper's (a); no label was used.",
        f"knn: share of frames whose {_NEIGHBOURS} nearest others in 128 dimensions mostly have their class; "
        "silhouette: -1 to 1, also there. Distances between clusters of a t-SNE mean nothing.",
        f"the picture is of seed {seeds[0]}; knn and silhouette of all, silhouette with its least and greatest.",
    ]
    report.draw = lambda figure: draw_panels(figure, report, drawn)
    return report


def _networks(bench: Bench, split: Split, seed: int, budget: Budget) -> tuple[dict[str, Classifier], Recipe]:
    """What each panel shows, and how the last one was trained."""
    labels = draw_share(bench.dataset, split.train, share=1, seed=seed, block_s=bench.plan.label_block_s)
    learnt = bench.learnt(split.train, seed, what=split.name).learner
    recipe, _ = choose(bench, split, "finetune", labels, budget)
    tuned = train_classifier(
        learnt,
        bench.dataset,
        labels,
        recipe,
        seed=seed,
        on_progress=lambda done, total: bench.bars.advance(f"fine-tuning, {split.name}, seed {seed}", done, total),
    )
    untrained = bench.untrained(split.train, seed).learner
    shown = (new_classifier(untrained, seed=seed), new_classifier(learnt, seed=seed), tuned)
    return dict(zip(panels_of(bench), shown, strict=True)), recipe


def panels_of(bench: Bench) -> tuple[str, ...]:
    """The first one is only called pretrained where it is."""
    weights = "ImageNet" if bench.settings.radar_weights else "random"
    return (f"{weights} weights, frozen", *_LEARNT)


def _some(rows: Rows, count: int, *, seed: int) -> Rows:
    return np.sort(np.random.default_rng((seed, 13)).permutation(rows)[:count])


def _standardised(network: Classifier, dataset: Dataset, rows: Rows) -> Places:
    """(n, 128), each dimension with mean 0 and spread 1."""
    x = network.penultimate(dataset, rows).numpy().astype(np.float64)
    standardised: Places = (x - x.mean(0)) / np.maximum(x.std(0), 1e-6)
    return standardised


def _place(x: Places, *, perplexity: float, seed: int) -> Points:
    """(n, 2)."""
    from sklearn.manifold import TSNE

    perplexity = min(perplexity, (len(x) - 1) / 3)
    placed = TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=1).fit_transform(x)
    return np.asarray(placed, np.float32)


def _neighbours_say(x: Places, labels: Rows) -> Rows:
    """(n,): the class that most of the nearest others have."""
    from sklearn.neighbors import KNeighborsClassifier

    num = min(_NEIGHBOURS, len(x) - 1)
    nearest = KNeighborsClassifier(n_neighbors=num).fit(x, labels).kneighbors(return_distance=False)
    counts = [np.bincount(found, minlength=len(CLASSES)) for found in labels[nearest]]
    return np.array([count.argmax() for count in counts], np.int64)


def _silhouette(x: Places, labels: Rows) -> float:
    """nan where there is one class only."""
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(x, labels)) if 1 < len(np.unique(labels)) < len(labels) else float("nan")


def draw_panels(figure: "Figure", report: Report, drawn: dict[Panel, tuple[Points, Rows]]) -> None:
    """A line of three panels for each split and part."""
    lines, panels = list(dict.fromkeys(key[:2] for key in drawn)), list(dict.fromkeys(key[2] for key in drawn))
    figure.set_size_inches(3.3 * len(panels), 3.4 * len(lines) + 0.6)
    cells = figure.subplots(len(lines), len(panels), squeeze=False)
    rows = {(row["split"], row["part"], row["panel"]): row for row in report.table}
    for (split, part), line in zip(lines, cells, strict=True):
        line[0].set_ylabel(plots.title(split, part, rows[split, part, panels[0]]), fontsize=8)
        for axes, panel in zip(line, panels, strict=True):
            points, labels = drawn[split, part, panel]
            for number, name in enumerate(CLASSES):
                chosen = labels == number
                style = {"c": _COLOURS[number], "marker": plots.MARKERS[number], "label": name}
                axes.scatter(*points[chosen].T, s=7, linewidths=0, alpha=0.8, **style)
            low, mean, high = (100 * rows[split, part, panel]["knn"][name] for name in ("low", "mean", "high"))
            knn = f"{mean:.0f} % ({low:.0f} to {high:.0f})" if low == low else f"{mean:.0f} %"
            axes.set_title(f"{panel}\n{_NEIGHBOURS} nearest say the class: {knn}", fontsize=8)
            axes.set_xticks([])
            axes.set_yticks([])
    for axes in cells[-1]:
        axes.set_xlabel("t-SNE, no unit", fontsize=7)
    what = f"held-out frames, seed {report.protocol['seeds'][0]}; nearest in 128 dimensions, with 95 % interval"
    plots.finish(figure, report.protocol, what=what, marker_scale=3)
