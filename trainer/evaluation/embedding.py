"""What does the representation look like? t-SNE of 128-d penultimate layers: Fig. 7, and the panel it lacks.

A t-SNE of a network that was tuned on labels says nothing about learning without them: between the frozen network
that has not learnt and the fine-tuned one stands the frozen one that has learnt without a label.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from services.core.frames import CLASSES
from trainer.evaluation.bench import Bench, require_labels
from trainer.evaluation.classifier import Classifier, new_classifier, train_classifier
from trainer.evaluation.dataset import Rows
from trainer.evaluation.efficiency import Budget, choose
from trainer.evaluation.report import Report
from trainer.evaluation.scores import asked_parts
from trainer.evaluation.split import draw_share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = "Do the four classes form clusters, and from which step on?"
PANELS = ("pretrained, frozen", "contrastive, frozen", "fine-tuned")
_COLOURS = ("#8c8c8c", "#d62728", "#2ca02c", "#1f77b4")
_NEIGHBOURS = 10
_UNTUNED = Budget(is_tuned=False)
Points = npt.NDArray[np.float32]


def study(
    bench: Bench,
    *,
    name: str = "tsne",
    max_points: int = 1200,
    perplexity: float = 30.0,
    budget: Budget = _UNTUNED,
) -> Report:
    """Three panels on held-out frames of one seed."""
    require_labels(bench.dataset)
    dataset, split, seed = bench.dataset, bench.main_split(), bench.plan.seeds[0]
    report = Report(name, QUESTION, bench.protocol([split]) | {"perplexity": perplexity})
    labels = draw_share(dataset, split.train, share=1, seed=seed, block_s=bench.plan.label_block_s)
    learnt = bench.learnt(split.train, seed, what=split.name)
    recipe, _ = choose(bench, split, "finetune", labels, budget)
    tuned = train_classifier(
        learnt.learner,
        dataset,
        labels,
        recipe,
        seed=seed,
        on_progress=lambda done, total: bench.bars.advance("fine-tuning", done, total),
    )
    untrained = bench.untrained(split.train, seed).learner
    networks = dict(
        zip(
            PANELS,
            (new_classifier(untrained, seed=seed), new_classifier(learnt.learner, seed=seed), tuned),
            strict=True,
        )
    )
    drawn: dict[tuple[str, str], tuple[Points, Rows]] = {}
    for part, rows in asked_parts(dataset, split).items():
        asked = _some(rows, max_points, seed=seed)
        for panel, network in networks.items():
            bench.bars.advance("t-SNE", len(drawn), len(networks) * len(split.parts))
            points, facts = _place(network, bench, asked, perplexity=perplexity, seed=seed)
            drawn[part, panel] = (points, dataset.label[asked])
            report.table.append({"part": part, "panel": panel, "frames": len(asked), **facts})
    bench.bars.advance("t-SNE", len(drawn), len(drawn))
    weights = "ImageNet" if bench.settings.radar_weights else "random"
    report.details = {"finetune_recipe": recipe.report(), "points": {
        f"{part}/{panel}": {"xy": points.round(3).tolist(), "label": labels_.tolist()}
        for (part, panel), (points, labels_) in drawn.items()
    }}  # fmt: skip
    report.notes = [
        f"pretrained, frozen: {weights} weights; in the first two panels the 128-d layer is a random head's, as "
        "in the paper's (a), and no label was used.",
        f"knn: share of frames whose {_NEIGHBOURS} nearest others in 128 dimensions mostly have its class; "
        "silhouette: -1 to 1, also there. Distances between clusters of a t-SNE mean nothing.",
    ]
    report.draw = lambda figure: draw_panels(figure, drawn)
    return report


def _some(rows: Rows, count: int, *, seed: int) -> Rows:
    return np.sort(np.random.default_rng((seed, 13)).permutation(rows)[:count])


def _place(
    network: Classifier, bench: Bench, rows: Rows, *, perplexity: float, seed: int
) -> tuple[Points, dict[str, Any]]:
    """(n, 2) points, and how well the classes are apart in the 128 dimensions."""
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import KNeighborsClassifier

    labels = bench.dataset.label[rows]
    x = network.penultimate(bench.dataset, rows).numpy().astype(np.float64)
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-6)
    perplexity = min(perplexity, (len(rows) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=1).fit_transform(x)
    num = min(_NEIGHBOURS, len(rows) - 1)
    nearest = KNeighborsClassifier(n_neighbors=num).fit(x, labels).kneighbors(return_distance=False)
    votes = np.apply_along_axis(
        lambda found: np.bincount(found, minlength=len(CLASSES)).argmax(), 1, labels[nearest]
    )
    facts = {"knn": round(float((votes == labels).mean()), 4)}
    if 1 < len(np.unique(labels)) < len(labels):
        facts["silhouette"] = round(float(silhouette_score(x, labels)), 4)
    return points.astype(np.float32), facts


def draw_panels(figure: "Figure", drawn: dict[tuple[str, str], tuple[Points, Rows]]) -> None:
    """A line of three panels for each part."""
    parts = list(dict.fromkeys(part for part, _ in drawn))
    figure.set_size_inches(4 * len(PANELS), 4 * len(parts))
    cells = figure.subplots(len(parts), len(PANELS), squeeze=False)
    for line, part in zip(cells, parts, strict=True):
        for axes, panel in zip(line, PANELS, strict=True):
            points, labels = drawn[part, panel]
            for number, name in enumerate(CLASSES):
                chosen = labels == number
                axes.scatter(*points[chosen].T, s=6, c=_COLOURS[number], label=name, linewidths=0)
            axes.set_title(f"{panel} ({part})", fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
    cells[0][0].legend(fontsize=8, markerscale=2)
