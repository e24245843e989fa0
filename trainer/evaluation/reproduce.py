"""The paper's experiments by the paper's protocol, at a scale: Fig. 4 to 7, with its numbers beside ours.

Its text says: VGG-16 on both sides, 400 epochs of contrast, SGD 0.03; then 1e-4 for 32 epochs of linear layer or
fine-tuning and for 128 or 300 epochs of the supervised baseline; 80/20 by frame. What it leaves open, and what we
chose, is in docs/evaluation.md. At scale s every number of epochs is s times that, and at least one.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from services.core.errors import SettingsError
from trainer.evaluation import efficiency, embedding, ksweep, plots
from trainer.evaluation.bench import Bench, require_labels
from trainer.evaluation.classifier import Look, train_classifier
from trainer.evaluation.efficiency import Budget, paper_recipe
from trainer.evaluation.report import Report
from trainer.evaluation.scores import asked_parts, bootstrap, by_session
from trainer.evaluation.split import draw_share
from trainer.settings import TrainerSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FigureName = Literal["fig4", "fig5", "fig6", "fig7"]
EPOCHS: Mapping[str, float] = MappingProxyType(
    {"contrast": 400, "linear": 32, "finetune": 32, "supervised": 128, "supervised_long": 300}
)
"""The paper's. supervised_long is the second baseline of its Fig. 5."""
VGG_FILE = "vgg16-397923af.pth"

PAPER: dict[FigureName, dict[str, Any]] = {
    "fig4": {
        "says": "linear accuracy increases steadily with K at both batch sizes, but for a blip at batch 64, K 128",
    },
    "fig5": {
        "says": "with all labels both reach 97 %; with 1 % of them self-supervision is ahead by about 3.5 points",
        "accuracy_all_labels": 0.97,
        "gain_at_1_percent": 0.035,
    },
    "fig6": {"says": "fine-tuning for 32 epochs reaches what supervised training reaches in 128"},
    "fig7": {"says": "no structure in a pretrained VGG with a random head; four clusters after fine-tuning"},
}
"""What the paper's text gives of its figures."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A share of the epochs of each stage. full: those of scale 1, the paper's or others."""

    value: float
    full: Mapping[str, float] = field(default_factory=lambda: EPOCHS)

    def epochs(self, stage: str) -> float:
        return max(1.0, self.value * self.full[stage])

    @property
    def by_method(self) -> dict[str, float]:
        """Epochs of the methods that are trained on labels, each named after its own at scale 1."""
        stages = ("finetune", "supervised", "supervised_long")
        return {f"{stage.partition('_')[0]} {self.full[stage]:g}": self.epochs(stage) for stage in stages}


def paper_settings(settings: TrainerSettings, scale: Scale) -> dict[str, Any]:
    """Trainer settings that the protocol adds. Raises SettingsError where there are no weights to start from."""
    changes: dict[str, Any] = {"max_replays": scale.epochs("contrast")}
    if settings.radar_encoder.startswith("vgg16") and not settings.radar_weights:
        hub = Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE
        weights = settings.vision_weights or (str(hub) if hub.is_file() else "")
        if not weights:
            raise SettingsError(
                "the paper starts the radar encoder from ImageNet's VGG-16, whose weights are not here",
                remedy=f"name {VGG_FILE} in ECHOSIGHT_RADAR_WEIGHTS, or try the protocol on other encoders: "
                "--vision-encoder efficientnet_lite0 --set radar_encoder=small",
            )
        changes["radar_weights"] = weights
    return changes


def study(bench: Bench, figure: FigureName, *, scale: Scale) -> Report:
    """One figure of the paper."""
    bench.plan = replace(bench.plan, probe="paper", probe_epochs=round(scale.epochs("linear")))
    epochs = scale.by_method
    match figure:
        case "fig4":
            report = ksweep.study(bench, name="fig4")
        case "fig5":
            report = efficiency.study(
                bench,
                name="fig5",
                question="How does accuracy depend on the share of labels, fine-tuned against supervised?",
                methods=tuple(epochs),
                budget=Budget(epochs=epochs),
            )
            report.draw = lambda drawn: _draw_fig5(drawn, report, epochs)
        case "fig6":
            report = _fig6(bench, epochs)
        case "fig7":
            report = embedding.study(
                bench, name="fig7", budget=Budget(epochs={"finetune": scale.epochs("finetune")})
            )
    report.protocol |= {
        "scale": scale.value,
        "epochs": {stage: scale.epochs(stage) for stage in scale.full},
        "epochs_at_scale_1": dict(scale.full),
    }
    report.details["paper"] = PAPER[figure]
    report.notes.insert(0, f"the paper: {PAPER[figure]['says']}.")
    changed = [f"{stage} {epochs:g}" for stage, epochs in scale.full.items() if epochs != EPOCHS[stage]]
    if changed:
        report.notes.append(f"other epochs at scale 1 than the paper's: {', '.join(changed)}.")
    _extrapolate(bench, report, scale)
    return report


def _fig6(bench: Bench, epochs: dict[str, float]) -> Report:
    """Test loss by epoch, fine-tuning against the shorter supervised training, with all labels."""
    require_labels(bench.dataset)
    dataset, splits = bench.dataset, bench.splits()
    report = Report(
        "fig6", "How fast does the test loss fall, fine-tuned against supervised?", bench.protocol(splits)
    )
    for split in splits:
        part, asked = next(iter(asked_parts(dataset, split).items()))
        curves: dict[tuple[str, int], list[Look]] = defaultdict(list)
        for method in list(epochs)[:2]:
            for seed in bench.plan.seeds:
                rows = draw_share(dataset, split.train, share=1, seed=seed, block_s=bench.plan.label_block_s)
                source = bench.learnt if method.startswith("finetune") else bench.untrained
                recipe = paper_recipe(epochs[method], len(rows))
                a_epoch = max(1, round(len(rows) / min(64, len(rows))))
                found = train_classifier(
                    source(split.train, seed).learner,
                    dataset,
                    rows,
                    recipe,
                    seed=seed,
                    watch=asked,
                    watch_every=max(a_epoch, recipe.steps // 64),
                    on_progress=lambda done, total, what=f"{method}, seed {seed}": bench.bars.advance(  # type: ignore[misc]
                        what, done, total
                    ),
                )
                for point in found.curve:
                    curves[method, point.step].append(point)
                _note_step(report, method, found.cost.seconds / found.cost.steps)
        for (method, step), points in curves.items():
            loss = bootstrap(*by_session(dataset, [(asked, point.loss) for point in points]))
            is_right = by_session(dataset, [(asked, point.is_right) for point in points])
            report.table.append(
                {
                    "split": split.name,
                    "part": part,
                    "method": method,
                    "epoch": round(step * min(64, len(rows)) / len(rows), 2),
                    "test_loss": round(loss.mean, 5),
                    "test_loss_low": round(loss.low, 5),
                    "test_loss_high": round(loss.high, 5),
                    "accuracy": bootstrap(*is_right).report(),
                    "frames": len(asked),
                    "sessions": len(np.unique(dataset.session[asked])),
                    "seeds": len(points),
                }
            )
    report.notes = ["test_loss: cross-entropy in nats of held-out frames; knowing nothing gets 1.39."]
    report.draw = lambda figure: _draw_fig6(figure, report, epochs)
    return report


def _named(method: str, epochs: Mapping[str, float]) -> str:
    """A method with its epochs here, and at scale 1."""
    name, full = method.rsplit(" ", 1)
    whose = "paper" if method in Scale(1.0).by_method else "scale 1"
    return f"{name}, {epochs[method]:g} epochs ({whose}: {full})"


def _note_step(report: Report, what: str, seconds: float) -> None:
    report.details.setdefault("seconds_a_step", {})[what] = round(seconds, 4)


def _extrapolate(bench: Bench, report: Report, scale: Scale) -> None:
    """What all of it would take at scale 1 on this machine, from measured steps."""
    num_pairs = len(bench.splits()[0].train)
    size = bench.settings.batch_size
    learnt = [one.cost for one in bench.known if one.learner.settings.batch_size == size and one.cost.steps]
    if not learnt:
        return
    a_step = float(np.mean([cost.seconds / cost.steps for cost in learnt]))
    a_step_cpu = float(np.mean([cost.cpu_s / cost.steps for cost in learnt]))
    steps = scale.full["contrast"] * num_pairs / bench.settings.batch_size
    report.details["at_scale_1"] = {
        "contrast_steps": round(steps),
        "seconds_a_step": round(a_step, 4),
        "cpu_s_a_step": round(a_step_cpu, 4),
        "contrast_cpu_hours_an_encoder": round(steps * a_step_cpu / 3600, 2),
        "contrast_hours_an_encoder": round(steps * a_step / 3600, 2),
        "paper_hours": 12,
        "is_extrapolated": True,
    }
    hours, cpu_hours = steps * a_step / 3600, steps * a_step_cpu / 3600
    report.notes.append(
        f"scale {scale.value:g} of the paper's epochs. At scale 1 an encoder would take {steps:,.0f} steps, which "
        f"at the {a_step:.2f} s measured here are {_time(hours)}, {_time(cpu_hours)} of CPU (extrapolated); "
        "the paper: about 12 h on 4 GPUs."
    )


def _time(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _draw_fig5(figure: "Figure", report: Report, epochs: Mapping[str, float]) -> None:
    paper = 100 * PAPER["fig5"]["accuracy_all_labels"]
    reference = (f"the paper, all labels: {paper:g} %", paper)
    efficiency.draw_efficiency(figure, report, name=lambda method: _named(method, epochs), reference=reference)


def _draw_fig6(figure: "Figure", report: Report, epochs: Mapping[str, float]) -> None:
    """Test loss against epochs."""
    for axes, rows in plots.by_split(figure, report.table):
        for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            own = [row for row in rows if row["method"] == method]
            at = [row["epoch"] for row in own]
            low, mean, high = (
                [row[name] for row in own] for name in ("test_loss_low", "test_loss", "test_loss_high")
            )
            axes.plot(
                at,
                mean,
                f"{plots.MARKERS[number]}-",
                color=plots.COLOURS[number],
                ms=3,
                label=_named(method, epochs),
            )
            axes.fill_between(at, low, high, color=plots.COLOURS[number], alpha=0.15)
        axes.set_xlabel("epoch of training on labels")
        axes.set_ylabel("test loss, nats")
        axes.grid(alpha=0.3)
    plots.finish(figure, report.protocol)
