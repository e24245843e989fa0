"""`python -m trainer.evaluation`: the studies as commands; `echosight evaluate` and `reproduce` forward here."""

import math
from typing import Annotated, Literal

import typer

from trainer.evaluation.options import Asked, study_command

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False
)
evaluate = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Judge what the radar encoder learns, as a researcher would: on held-out sessions and on unseen sites, "
    "with several seeds and intervals. Data is the live store, a store (--store), a recording (--recording) or a "
    "simulation (--simulate). Results are JSON, CSV and PNG. docs/evaluation.md explains all of it.",
)
reproduce = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Run the paper's experiments by its own protocol, at a scale that you choose, and draw its figures with "
    "its numbers beside ours.",
)
app.add_typer(evaluate, name="evaluate")
app.add_typer(reproduce, name="reproduce")

_Untuned = Annotated[
    bool,
    typer.Option("--no-tune", help="Take the start of the grid instead of searching: much faster, less honest."),
]
_Shares = Annotated[
    str, typer.Option("--labels", help="Percentages of labels, comma-separated.", metavar="PERCENT,...")
]
_MaxSteps = Annotated[
    int | None,
    typer.Option(
        min=1, help="Steps on labels, for fine-tuning and the baseline. Default: as many as contrast has."
    ),
]


@study_command(evaluate, "linear")
def linear(asked: Asked) -> None:
    """How much of the class can one linear layer read off the frozen features?

    Learns without labels, freezes the encoder, and fits one layer on all labels, on 1 % and on 40. Look at:
    contrastive against untrained, on unseen sites, with few labels. The random split flatters: neighbouring frames
    show the same object.

    [bold]Examples[/bold]

      echosight evaluate linear --simulate

      echosight evaluate linear --split sessions --set queue_size=128 --out k128
    """
    from trainer.evaluation import linear
    from trainer.evaluation.session import run

    run(asked, linear.study)


@study_command(evaluate, "finetune")
def finetune(asked: Asked, no_tune: _Untuned = False, label_steps: _MaxSteps = None) -> None:
    """How good does it get with all labels, when the encoder learns on from them?

    The encoder that learnt without labels, under a head of 128 hidden units, at two learning rates. Look at: its
    gain over `evaluate supervised`, and the confusion matrix in the JSON.

    [bold]Example[/bold]

      echosight evaluate finetune --simulate --split sessions
    """
    _by_labels(asked, "finetune", ("linear", "finetune"), (1.0,), no_tune, label_steps)


@study_command(evaluate, "supervised")
def supervised(asked: Asked, no_tune: _Untuned = False, label_steps: _MaxSteps = None) -> None:
    """How good is the same network from scratch, on labels alone, tuned as well as we can?

    The honest baseline: same encoder, same augmentation, as many steps; rate, length, augmentation and weight
    decay chosen on a validation part of the labels. Look at: the recipe that won, in the JSON's details.

    [bold]Example[/bold]

      echosight evaluate supervised --simulate
    """
    _by_labels(asked, "supervised", ("supervised",), (1.0,), no_tune, label_steps)


@study_command(evaluate, "efficiency")
def efficiency(
    asked: Asked, labels: _Shares = "1,5,10,25,50,100", no_tune: _Untuned = False, label_steps: _MaxSteps = None
) -> None:
    """How few labels does it take, and does learning without labels help?

    Linear, fine-tuned and supervised on the same labels, drawn by blocks of time. Look at: the gain over
    supervised at 1 %, and its interval; at 100 % all should meet.

    [bold]Examples[/bold]

      echosight evaluate efficiency --simulate --split sessions

      echosight evaluate efficiency --labels 1,100 --seeds 5
    """
    shares = tuple(_share(text) for text in labels.split(","))
    _by_labels(asked, "efficiency", ("linear", "finetune", "supervised"), shares, no_tune, label_steps)


@study_command(evaluate, "ksweep")
def ksweep(
    asked: Asked,
    sweep: Annotated[
        str, typer.Option(help="BATCH:K,... Default: the paper's.", metavar="BATCH:K,...")
    ] = "64:64,64:128,64:192,64:256,64:320,128:128,128:256",
    in_batch: Annotated[
        bool, typer.Option("--in-batch", help="Take negatives from the batch too, as the edge mode does.")
    ] = False,
) -> None:
    """Does linear accuracy rise with the number of negatives K?

    A learner for each batch size and K, with the queue as the only source of negatives. Look at: the gain over
    the first K, with its interval; and the session split beside the random one.

    [bold]Example[/bold]

      echosight evaluate ksweep --simulate --split sessions --sweep 64:64,64:512
    """
    from services.core.errors import SettingsError
    from trainer.evaluation import ksweep
    from trainer.evaluation.session import run

    try:
        asked_pairs = [(int(one.partition(":")[0]), int(one.partition(":")[2])) for one in sweep.split(",")]
    except ValueError:
        raise SettingsError(f"--sweep {sweep!r}", remedy="write BATCH:K,..., for instance 64:64,64:320") from None
    pairs = tuple(dict.fromkeys(asked_pairs))
    run(asked, lambda bench: ksweep.study(bench, sweep=pairs, has_in_batch=in_batch))


@study_command(evaluate, "tsne")
def tsne(
    asked: Asked,
    points: Annotated[int, typer.Option(min=20, help="Most frames a panel.")] = 1200,
    perplexity: Annotated[float, typer.Option(min=2)] = 30.0,
    label_steps: _MaxSteps = None,
) -> None:
    """Do the classes form clusters, and from which step on?

    Three panels of held-out frames: frozen before learning, frozen after learning without labels, fine-tuned. Look
    at: the middle one, which the paper lacks: a network that was tuned on labels always shows clusters.

    [bold]Example[/bold]

      echosight evaluate tsne --simulate --split sessions
    """
    from trainer.evaluation import embedding
    from trainer.evaluation.efficiency import Budget
    from trainer.evaluation.session import run

    budget = Budget(is_tuned=False, max_steps=label_steps)
    run(asked, lambda bench: embedding.study(bench, max_points=points, perplexity=perplexity, budget=budget))


@study_command(evaluate, "retrieval")
def retrieval(
    asked: Asked,
    every_s: Annotated[float, typer.Option(min=0.01, help="Between two instants of a site.")] = 3.0,
) -> None:
    """Does a heatmap find the camera image of its instant, and an image its heatmap?

    Needs no label. Recall at 1, 5 and 10 against chance, among all sites and within one; and a picture of queries
    with what they found. Look at: the gallery `site`, where knowing the site does not help.

    [bold]Example[/bold]

      echosight evaluate retrieval --recording session.mcap --session-s 20
    """
    from trainer.evaluation import retrieval
    from trainer.evaluation.session import run

    run(asked, lambda bench: retrieval.study(bench, every_s=every_s))


@study_command(evaluate, "temporal")
def temporal(
    asked: Asked,
    chunks: Annotated[int, typer.Option(min=2, help="Pieces that the stream is cut into.")] = 8,
    past: Annotated[float, typer.Option(min=0.1, max=0.9, help="Share of the time that counts as past.")] = 0.6,
) -> None:
    """Does a model that learns on stay good, and how fast does one that does not grow old?

    The stream in order: each piece is asked about before it is learnt from. And a model of the past on the future.
    Look at: learning on against frozen, on the next chunk.

    [bold]Example[/bold]

      echosight evaluate temporal --store var/store
    """
    from trainer.evaluation import temporal
    from trainer.evaluation.session import run

    run(asked, lambda bench: temporal.study(bench, num_chunks=chunks, past_share=past))


_Scale = Annotated[
    float, typer.Option(min=0.0001, max=10, help="Share of the paper's epochs; each number is at least one epoch.")
]
_Epochs = Annotated[
    str,
    typer.Option(
        help="Other epochs at scale 1 than the paper's contrast=400, linear=32, finetune=32, supervised=128 and "
        "supervised_long=300.",
        metavar="STAGE=NUMBER,...",
    ),
]
_PAPER = {"mode": "paper", "seeds": 1, "split": "random"}


@study_command(reproduce, "fig4", defaults=_PAPER)
def fig4(asked: Asked, scale: _Scale = 1.0, epochs: _Epochs = "") -> None:
    """Fig. 4: linear accuracy against the number of negatives K, at batch 64 and 128.

    [bold]Examples[/bold]

      echosight reproduce fig4 --recording ROD2021 --scale 0.02

      echosight reproduce fig4 --scale 0.02 --vision-encoder efficientnet_lite0 --set radar_encoder=small
    """
    _reproduce(asked, "fig4", scale, epochs)


@study_command(reproduce, "fig5", defaults=_PAPER)
def fig5(asked: Asked, scale: _Scale = 1.0, epochs: _Epochs = "") -> None:
    """Fig. 5: accuracy against the share of labels, fine-tuned and supervised.

    [bold]Example[/bold]

      echosight reproduce fig5 --scale 0.02 --seeds 3 --split both
    """
    _reproduce(asked, "fig5", scale, epochs)


@study_command(reproduce, "fig6", defaults=_PAPER)
def fig6(asked: Asked, scale: _Scale = 1.0, epochs: _Epochs = "") -> None:
    """Fig. 6: test loss by epoch, fine-tuning against supervised.

    [bold]Examples[/bold]

      echosight reproduce fig6 --scale 0.05

      echosight reproduce fig6 --scale 0.05 --epochs finetune=64,supervised=256
    """
    _reproduce(asked, "fig6", scale, epochs)


@study_command(reproduce, "fig7", defaults=_PAPER)
def fig7(asked: Asked, scale: _Scale = 1.0, epochs: _Epochs = "") -> None:
    """Fig. 7: t-SNE of a pretrained network with a random head, and of the fine-tuned one; with the panel between.

    [bold]Example[/bold]

      echosight reproduce fig7 --scale 0.02
    """
    _reproduce(asked, "fig7", scale, epochs)


def _by_labels(
    asked: Asked,
    name: str,
    methods: tuple[str, ...],
    shares: tuple[float, ...],
    no_tune: bool,
    label_steps: int | None,
) -> None:
    from trainer.evaluation import efficiency
    from trainer.evaluation.session import run

    budget = efficiency.Budget(is_tuned=not no_tune, max_steps=label_steps)
    question = {
        "finetune": "How good does it get with all labels, when the encoder learns on from them?",
        "supervised": "How good is the same network from scratch, on labels alone, tuned?",
    }.get(name, efficiency.QUESTION)
    run(
        asked,
        lambda bench: efficiency.study(
            bench, name=name, question=question, methods=methods, shares=shares, budget=budget
        ),
    )


def _reproduce(asked: Asked, figure: Literal["fig4", "fig5", "fig6", "fig7"], scale: float, epochs: str) -> None:
    from services.core.errors import SettingsError
    from trainer.evaluation import reproduce
    from trainer.evaluation.session import run

    try:
        changes = {stage: float(num) for stage, _, num in (one.partition("=") for one in epochs.split(",") if one)}
    except ValueError:
        changes = {"": 0.0}
    if not all(stage in reproduce.EPOCHS and 0 < num < math.inf for stage, num in changes.items()):
        raise SettingsError(
            f"--epochs {epochs!r}", remedy=f"write STAGE=NUMBER,... with stages of {', '.join(reproduce.EPOCHS)}"
        )
    at = reproduce.Scale(scale, {**reproduce.EPOCHS, **changes})
    run(
        asked,
        lambda bench: reproduce.study(bench, figure, scale=at),
        add=lambda s: reproduce.paper_settings(s, at),
    )


def _share(text: str) -> float:
    from services.core.errors import SettingsError

    try:
        share = float(text) / 100
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise SettingsError(f"--labels has {text!r}", remedy="write percentages: --labels 1,10,100")
    return share


def main() -> None:
    app(prog_name="echosight")


if __name__ == "__main__":
    main()
