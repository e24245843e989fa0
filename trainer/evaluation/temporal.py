"""What does time do? A stream is asked about before it is learnt from; and a model of the past meets the future.

Prequential: chunk by chunk, first test, then train: the encoder without labels, the linear layer on all labels so
far. Beside it stands the model of the first chunk, which never learns again. Past and future: learnt from the
first part of each site's time, asked about the rest, by how long ago the learning ended.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from trainer.evaluation import plots
from trainer.evaluation.bench import Bench, require_labels
from trainer.evaluation.dataset import Dataset, Rows, clutter_table
from trainer.evaluation.pretrain import PairBatches, features_of, new_learner, num_steps
from trainer.evaluation.probe import predict
from trainer.evaluation.report import EvaluationError, Report, Row
from trainer.evaluation.scores import Answers, answer, outcome, score
from trainer.evaluation.split import unseen_sites
from trainer.head_nets import Head
from trainer.learner import Learner

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES = (
    ("learning on", "next chunk"),
    ("frozen", "next chunk"),
    ("learning on", "unseen"),
    ("frozen", "unseen"),
    ("past", "future"),
)
"""Model and part, in the order of their colours."""
QUESTION = "Does a model that learns on stay good, and how fast does one that does not grow old?"


@dataclass(slots=True)
class _Model:
    """A learner and the layer on it, as they were at some time."""

    learner: Learner
    head: Head

    def predict(self, dataset: Dataset, rows: Rows) -> Rows:
        predicted: Rows = predict(self.head, features_of(self.learner, dataset, rows)).numpy()
        return predicted


def study(bench: Bench, *, num_chunks: int = 8, past_share: float = 0.6) -> Report:
    """Both curves, on the sites that are learnt from, and, for the stream, on those that are not."""
    require_labels(bench.dataset)
    dataset = bench.dataset
    is_unseen = unseen_sites(dataset, bench.plan.unseen)[dataset.site]
    rows, unseen = np.flatnonzero(~is_unseen), np.flatnonzero(is_unseen)
    if len(rows) < num_chunks:
        raise EvaluationError(
            f"{len(rows)} frames cannot be cut into {num_chunks} chunks", remedy="use fewer: --chunks 4"
        )
    chunk = _chunks(dataset, rows, num_chunks)
    report = Report("temporal", QUESTION, bench.protocol([]))
    report.protocol |= {"chunks": num_chunks, "past_share": past_share, "splits": "by time"}
    report.protocol["steps"] = bench.plan.steps or num_steps(bench.settings, num_pairs=len(rows))
    found: dict[tuple[str, str, int], list[Answers]] = {}
    for seed in bench.plan.seeds:
        _prequential(bench, rows, chunk, unseen, seed, found)
    hours = [_hours(dataset, rows, rows[chunk == number]) for number in range(num_chunks)]
    for (model, part, number), answers in sorted(found.items()):
        scored = score(dataset, answers)
        report.table.append(
            {
                "curve": "prequential",
                "model": model,
                "part": part,
                "chunk": number,
                "hours": round(hours[number], 4),
                **outcome(scored),
            }
        )
        report.details[f"prequential/{model}/{part}/{number}"] = scored
    report.table += _past_and_future(bench, rows, past_share, num_bins=max(2, num_chunks // 2))
    report.notes = [
        "hours: of the stream, from its start (prequential) or from the end of the learning (past and future).",
        "frozen: the model of the first chunk, encoder and layer, which never learns again: with the steps "
        "and labels of one chunk.",
        "a simulation of some minutes shows the growth; ageing needs a recording over days, or the live store.",
    ]
    report.draw = lambda figure: draw_curves(figure, report)
    return report


def _prequential(
    bench: Bench,
    rows: Rows,
    chunk: Rows,
    unseen: Rows,
    seed: int,
    found: dict[tuple[str, str, int], list[Answers]],
) -> None:
    """Chunk 0 is only learnt from; each later one is asked about first."""
    dataset, settings = bench.dataset, bench.settings_of(seed)
    rng = np.random.default_rng((seed, 17))
    num_chunks = int(chunk.max()) + 1
    total = num_steps(settings, num_pairs=len(rows)) if bench.plan.steps is None else bench.plan.steps
    learner: Learner | None = None
    frozen: _Model | None = None
    for number in range(num_chunks):
        known = rows[chunk <= number]
        name = f"stream, seed {seed}"
        bench.bars.advance(name, number, num_chunks)
        if learner is None:
            learner = new_learner(dataset, known, settings)
        learner.set_input(clutter_table(dataset, known))
        _learn(learner, dataset, known, rows[chunk == number], steps=math.ceil(total / num_chunks), rng=rng)
        model = _Model(learner, _layer(bench, learner, known, seed=seed))
        if frozen is None:
            frozen = _Model(_copy(learner, dataset, known), model.head)
        following = _after(dataset, known, rows[chunk == number + 1], guard_s=bench.plan.guard_s)
        for model_name, asked_model in (("learning on", model), ("frozen", frozen)):
            for part, asked in (("next chunk", following), ("unseen", unseen)):
                if (dataset.label[asked] >= 0).any():
                    at = number + 1 if part == "next chunk" else number
                    told = answer(dataset, asked, partial(asked_model.predict, dataset), seed=seed)
                    found.setdefault((model_name, part, at), []).append(told)
    bench.bars.advance(name, num_chunks, num_chunks)


def _after(dataset: Dataset, known: Rows, following: Rows, *, guard_s: float) -> Rows:
    """Those of `following` more than `guard_s` after what is known of their site: no object is asked for twice."""
    is_far = np.ones(len(following), bool)
    for site in np.unique(dataset.site[following]):
        of_site = dataset.site[following] == site
        ends_ns = dataset.at_ns[known[dataset.site[known] == site]].max(initial=0)
        is_far[of_site] = dataset.at_ns[following[of_site]] - ends_ns > guard_s * 1e9
    return following[is_far]


def _learn(
    learner: Learner, dataset: Dataset, known: Rows, newest: Rows, *, steps: int, rng: np.random.Generator
) -> None:
    """As production: a share of each batch from what came last, the rest from all that is known."""
    settings = learner.settings
    source = PairBatches(dataset, known, settings)
    size = min(settings.batch_size, len(known))
    num_fresh = round(settings.fresh_share * size)
    for _ in range(steps):
        fresh = rng.choice(newest, num_fresh)
        rest = rng.choice(known, size - num_fresh, replace=False, shuffle=False)
        learner.step(source.batch(np.concatenate([fresh, rest])))


def _layer(bench: Bench, learner: Learner, known: Rows, *, seed: int) -> Head:
    labelled = known[bench.dataset.label[known] >= 0]
    if not len(labelled):
        raise EvaluationError("the first chunk has no label", remedy="use fewer chunks: --chunks 4")
    features: Tensor = features_of(learner, bench.dataset, labelled)
    return bench.layer(features, labelled, seed=seed)


def _copy(learner: Learner, dataset: Dataset, known: Rows) -> Learner:
    """The same averaged encoder, behind the clutter maps of now."""
    copied = Learner(
        learner.settings.model_copy(update={"precision": "fp32"}),
        contract=learner.contract,
        key_dim=dataset.key.shape[1],
        device=learner.device,
    )
    copied.set_input(clutter_table(dataset, known), scale=float(learner.preprocess.scale))
    copied.average.load_state_dict(learner.average.state_dict())
    return copied


def _past_and_future(bench: Bench, rows: Rows, past_share: float, *, num_bins: int) -> list[dict[str, Any]]:
    """Accuracy by how long after the end of the learning."""
    dataset = bench.dataset
    place = _places(dataset, rows)
    past, future = rows[place < past_share], rows[place >= past_share]
    ends_ns = {
        int(site): int(dataset.at_ns[past[dataset.site[past] == site]].max())
        for site in np.unique(dataset.site[past])
    }
    future = future[np.isin(dataset.site[future], list(ends_ns))]
    since_s = np.array([dataset.at_ns[row] - ends_ns[int(dataset.site[row])] for row in future]) / 1e9
    is_far = since_s > bench.plan.guard_s
    future, since_s = future[is_far], since_s[is_far]
    if not len(future):
        raise EvaluationError("no time is left after the past", remedy="give a longer recording")
    edges = np.quantile(since_s, np.linspace(0, 1, num_bins + 1))
    bin_of = np.clip(np.searchsorted(edges, since_s, side="right") - 1, 0, num_bins - 1)
    answers: dict[int, list[Answers]] = {}
    for seed in bench.plan.seeds:
        learner = bench.learnt(past, seed, what="the past").learner
        model = _Model(learner, _layer(bench, learner, past, seed=seed))
        for number in range(num_bins):
            asked = future[bin_of == number]
            if (dataset.label[asked] >= 0).any():
                told = answer(dataset, asked, partial(model.predict, dataset), seed=seed)
                answers.setdefault(number, []).append(told)
    return [
        {
            "curve": "past and future",
            "model": "past",
            "part": "future",
            "chunk": number,
            "hours": round(float(since_s[bin_of == number].mean()) / 3600, 4),
            **outcome(score(dataset, found)),
        }
        for number, found in sorted(answers.items())
    ]


def _places(dataset: Dataset, rows: Rows) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """(n,) where in its site's time each row stands, from 0 to 1: sites may be of different days."""
    place = np.zeros(len(rows))
    for site in np.unique(dataset.site[rows]):
        of_site = dataset.site[rows] == site
        at_ns = dataset.at_ns[rows[of_site]]
        place[of_site] = (at_ns - at_ns.min()) / max(1, int(at_ns.max() - at_ns.min()))
    return place


def _chunks(dataset: Dataset, rows: Rows, num_chunks: int) -> Rows:
    """(n,) int64: chunks of equally many frames, in order of capture within each site's time."""
    order = np.argsort(_places(dataset, rows), kind="stable")
    chunk = np.empty(len(rows), np.int64)
    chunk[order] = np.arange(len(rows)) * num_chunks // len(rows)
    return chunk


def _hours(dataset: Dataset, rows: Rows, of: Rows) -> float:
    """Mean time of `of` since the start of its site."""
    starts = np.array([dataset.at_ns[rows[dataset.site[rows] == dataset.site[row]]].min() for row in of[:256]])
    return float(np.mean(dataset.at_ns[of[:256]] - starts)) / 3.6e12


def draw_curves(figure: "Figure", report: Report) -> None:
    """Prequential on the left, past and future on the right."""
    longest = max(row["hours"] for row in report.table)
    unit, an_hour = ("minutes", 60) if longest < 2 else ("hours", 1)
    ((left, right),) = plots.panels(figure, 1, 2, width_in=5)
    for axes, name, x in (
        (left, "prequential", f"{unit} of the stream, from its start"),
        (right, "past and future", f"{unit} since the learning ended"),
    ):
        rows = [row for row in report.table if row["curve"] == name]
        lines = sorted({(row["model"], row["part"]) for row in rows}, key=_LINES.index)
        for place, (model, part) in enumerate(lines):
            own = [row for row in rows if (row["model"], row["part"]) == (model, part)]
            number = _LINES.index((model, part))
            apart = 0.008 * an_hour * (max(row["hours"] for row in rows) - min(row["hours"] for row in rows))
            at = [row["hours"] * an_hour + place * apart for row in own]  # equal ones side by side
            plots.curve(axes, at, [row["accuracy"] for row in own], label=f"{model}: {part}", number=number)
        asked = f"{_range(rows, 'frames')} frames a point, of {_range(rows, 'sessions')} sessions"
        axes.set_title(f"{name}\n{asked}", fontsize=9)
        axes.set_xlabel(x)
        axes.set_ylabel("accuracy, %")
        axes.grid(alpha=0.3)
    plots.finish(figure, report.protocol)


def _range(rows: list[Row], name: str) -> str:
    least, most = min(row[name] for row in rows), max(row[name] for row in rows)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
