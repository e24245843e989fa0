"""How few labels does it take? Linear, fine-tuned and supervised from scratch on ever fewer labels.

The supervised baseline is tuned on a validation part of its own labels, once for each share of labels, and is
given as many steps as the contrastive learner.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trainer.evaluation import plots
from trainer.evaluation.bench import Bench, require_labels
from trainer.evaluation.classifier import Classifier, Recipe, loss_and_accuracy, train_classifier, tune
from trainer.evaluation.dataset import Rows
from trainer.evaluation.pretrain import Cost, Stopwatch, num_steps
from trainer.evaluation.probe import predict
from trainer.evaluation.report import Report, Row
from trainer.evaluation.scores import Answers, answer, asked_parts, difference, outcome, score
from trainer.evaluation.split import Split, draw_share, hold_out

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = "How few labels does it take, and does learning without labels help?"
METHODS = ("linear", "finetune", "supervised")
SHARES = (0.01, 0.05, 0.10, 0.25, 0.50, 1.0)
_VALIDATION_SHARE = 0.25
_MIN_STEPS = 300
Key = tuple[str, str, float, str]
"""Split, method, share of labels, part."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How long classifiers are trained. max_steps: None: as the contrastive learner.

    epochs: None: recipes of our own, tuned where `is_tuned`. Else the paper's recipe, with so many epochs a
    method.
    """

    is_tuned: bool = True
    max_steps: int | None = None
    epochs: Mapping[str, float] | None = None

    def words(self) -> str:
        """How the recipes came about, to follow what they are of."""
        if self.epochs is not None:
            return ", by the paper's recipe"
        if self.is_tuned:
            return "; its recipe was chosen on a validation part of its labels"
        steps = "" if self.max_steps is None else f" with {self.max_steps} steps"
        return f", by the grid's first recipe{steps}: it was not tuned, and may do better"

    def steps(self, bench: Bench, num_labels: int) -> int:
        """What a classifier gets for so many labels: as many passes as contrast has, and never too few steps."""
        if self.max_steps is not None:
            return self.max_steps
        return max(_MIN_STEPS, num_steps(bench.settings, num_pairs=num_labels))


def study(
    bench: Bench,
    *,
    name: str = "efficiency",
    question: str = QUESTION,
    methods: Sequence[str] = METHODS,
    shares: Sequence[float] | None = None,
    budget: Budget = Budget(),
) -> Report:
    """Every method on every share of labels (None: SHARES); the same drawn labels for all methods of a seed."""
    require_labels(bench.dataset)
    shares = SHARES if shares is None else shares
    splits = bench.splits()
    report = Report(name, question, bench.protocol(splits))
    answers: dict[Key, list[Answers]] = defaultdict(list)
    costs: dict[tuple[str, str, float], Cost] = defaultdict(Cost)
    labels: dict[tuple[str, float], list[int]] = defaultdict(list)
    chosen: dict[tuple[str, str, float], Recipe] = {}
    for split in splits:
        for share in shares:
            for seed in bench.plan.seeds:
                rows = draw_share(
                    bench.dataset, split.train, share=share, seed=seed, block_s=bench.plan.label_block_s
                )
                labels[split.name, share].append(len(rows))
                for method in methods:
                    case = (split.name, method, share)
                    if method != "linear" and case not in chosen:
                        chosen[case], tried = choose(bench, split, method, rows, budget)
                        report.details[f"tuning/{split.name}/{method}/{share:g}"] = tried
                    cost = _run(bench, split, method, rows, chosen.get(case), seed, answers, share)
                    costs[case] += cost
    for key, found in answers.items():
        scored = score(bench.dataset, found)
        case = key[:3]
        report.table.append(_row(key, scored, costs[case], labels[key[0], key[2]]))
        scored["recipe"] = chosen[case].report() if case in chosen else bench.plan.probe
        report.details["/".join(str(part) for part in key)] = scored
    _add_gains(bench, report, answers)
    report.notes = [
        "labels are drawn by whole blocks of time; at 1 % the draw decides much: see the intervals.",
        f"supervised: the same network from scratch{budget.words()}.",
        "gain: accuracy minus that of supervised, on the same sessions, labels and seeds.",
        *_same_draws(report.table),
    ]
    report.draw = lambda figure: draw_efficiency(figure, report)
    report.add_confusions(
        {
            "/".join(map(str, key)): f"{key[0]}: {key[3]}\n{key[1]}, {100 * key[2]:g} % of labels"
            for key in answers
            if key[2] == max(shares)
        }
    )
    return report


def choose(
    bench: Bench, split: Split, method: str, rows: Rows, budget: Budget
) -> tuple[Recipe, list[dict[str, Any]]]:
    """The recipe for a share of labels, and what was tried on the way."""
    if budget.epochs is not None:
        return paper_recipe(budget.epochs[method], len(rows)), []
    steps = budget.steps(bench, len(rows))
    start = Recipe(3e-4, 1e-3, steps) if method.startswith("finetune") else Recipe(1e-3, 1e-3, steps)
    if not budget.is_tuned:
        return start, []
    seed = bench.plan.seeds[0]
    train, validation = hold_out(
        bench.dataset, rows, share=_VALIDATION_SHARE, seed=seed, block_s=bench.plan.label_block_s
    )

    def fit(recipe: Recipe) -> Classifier:
        return _classifier(bench, split, method, train, recipe, seed, what=f"tuning {method}")

    return tune(fit, lambda found: loss_and_accuracy(found, bench.dataset, validation), grid(start, method))


def paper_recipe(epochs: float, num_labels: int) -> Recipe:
    """Rate 1e-4 and so many epochs; the paper names no optimizer: Adam. At least one epoch."""
    steps = max(1, round(max(1.0, epochs) * num_labels / min(64, num_labels)))
    return Recipe(1e-4, 1e-4, steps, weight_decay=0.0, is_augmented=False, optimizer="adam", schedule="constant")


def grid(start: Recipe, method: str) -> list[list[Recipe]]:
    """The start, then an axis at a time: rates, steps, augmentation, weight decay."""
    if method.startswith("finetune"):
        return [[start], [replace(start, encoder_rate=1e-4), replace(start, encoder_rate=1e-3)]]
    return [
        [start],
        [replace(start, encoder_rate=rate, head_rate=rate) for rate in (3e-4, 3e-3)],
        [replace(start, steps=max(1, start.steps // 2)), replace(start, steps=2 * start.steps)],
        [replace(start, is_augmented=False)],
        [replace(start, weight_decay=0.3)],
    ]


def _run(
    bench: Bench,
    split: Split,
    method: str,
    rows: Rows,
    recipe: Recipe | None,
    seed: int,
    answers: dict[Key, list[Answers]],
    share: float,
) -> Cost:
    """Train one and ask it; return what the training on labels took."""
    dataset = bench.dataset
    if recipe is None:
        learner = bench.learnt(split.train, seed, what=split.name).learner
        features = bench.features(learner, rows)
        watch = Stopwatch()
        head = bench.layer(features, rows, seed=seed)
        cost = watch.cost()

        def ask(asked: Rows) -> Rows:
            predicted: Rows = predict(head, bench.features(learner, asked)).numpy()
            return predicted
    else:
        found = _classifier(
            bench, split, method, rows, recipe, seed, what=f"{method}, {100 * share:g} % of labels"
        )
        cost = found.cost

        def ask(asked: Rows) -> Rows:
            return found.predict(dataset, asked)

    for part, asked in asked_parts(dataset, split).items():
        answers[split.name, method, share, part].append(answer(dataset, asked, ask, seed=seed))
    return cost


def _classifier(
    bench: Bench, split: Split, method: str, rows: Rows, recipe: Recipe, seed: int, *, what: str
) -> Classifier:
    source = bench.untrained if method.startswith("supervised") else bench.learnt
    learner = source(split.train, seed).learner
    name = f"{what}, {split.name}, seed {seed}"
    return train_classifier(
        learner,
        bench.dataset,
        rows,
        recipe,
        seed=seed,
        on_progress=lambda done, total: bench.bars.advance(name, done, total),
    )


def _row(key: Key, scored: Row, cost: Cost, num_labels: list[int]) -> Row:
    (split, method, share, part), num_seeds = key, len(num_labels)
    return {
        "split": split,
        "labels_percent": round(100 * share, 3),
        "labels": round(sum(num_labels) / num_seeds),
        "method": method,
        "part": part,
        **outcome(scored),
        "steps": cost.steps // num_seeds,
        "seconds": round(cost.seconds / num_seeds, 1),
        "cpu_s": round(cost.cpu_s / num_seeds, 1),
    }


def _add_gains(bench: Bench, report: Report, answers: dict[Key, list[Answers]]) -> None:
    supervised = [key for key in answers if key[1].startswith("supervised")]
    for row, key in zip(report.table, answers, strict=True):
        baselines = [one for one in supervised if (one[0], *one[2:]) == (key[0], *key[2:])]
        if baselines and not key[1].startswith("supervised"):
            row["gain"] = difference(bench.dataset, answers[key], answers[baselines[-1]]).report()


def _same_draws(table: Sequence[Row]) -> list[str]:
    """What is to be said of shares for which the same labels were drawn."""
    found = []
    for split in dict.fromkeys(row["split"] for row in table):
        for num, percent in _asked_by_drawn([row for row in table if row["split"] == split]).items():
            if "/" in percent:
                found.append(
                    f"{split} split: {percent} % of the labels are the same {num:,}: whole blocks are drawn, of "
                    "each class at least one; label more, or draw shorter blocks (--label-block-s)."
                )
    return found


def draw_efficiency(
    figure: "Figure",
    report: Report,
    *,
    name: Callable[[str], str] = str,
    reference: tuple[str, float] | None = None,
) -> None:
    """Accuracy against how many labels were drawn, a panel for each split and part.

    name: of a method, for the legend. reference: what somebody else reached, in percent, and who.
    """
    for axes, rows in plots.by_split(figure, report.table):
        for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            own = [row for row in rows if row["method"] == method]
            at = plots.beside([row["labels"] for row in own], number=number, among=[row["labels"] for row in rows])
            plots.curve(axes, at, [row["accuracy"] for row in own], label=name(method), number=number)
        if reference is not None:
            axes.axhline(reference[1], color="k", ls=":", lw=1, label=reference[0])
        axes.set_xscale("log")
        asked = _asked_by_drawn(rows)
        axes.set_xticks(list(asked), [f"{num:,}\n{percent} %" for num, percent in asked.items()], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel("labels drawn, for the share that was asked for")
        axes.set_ylabel("accuracy, %")
        axes.grid(alpha=0.3)
    plots.finish(figure, report.protocol, is_x_shared=False)


def _asked_by_drawn(rows: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Numbers of labels, each with the percentages that were asked for: of few labels, several draw the same."""
    asked: dict[int, list[float]] = {}
    for percent, num in sorted({(row["labels_percent"], row["labels"]) for row in rows}):
        asked.setdefault(num, []).append(percent)
    return {num: "/".join(f"{percent:g}" for percent in of_num) for num, of_num in asked.items()}
