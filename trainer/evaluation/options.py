"""Options that every study takes, and how a study becomes a command.

Which store is evaluated is decided before: `echosight evaluate` makes it where asked to, and hands over its place.
"""

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from services.core.errors import EchosightError, SettingsError
from trainer.settings import TrainerSettings

_DATA, _PROTOCOL, _LEARNING, _RESULT = "Data", "Protocol", "Learning", "Result"
DEFAULT_FRAMES = 1000
MAX_SEED = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says, of what is common to all studies."""

    store: Path | None
    recording: list[Path] | None
    simulate: bool
    site: list[str] | None
    frames: int
    interval_s: float
    simulation_seed: int
    source: str
    split: Literal["sessions", "random", "both"]
    unseen: list[str] | None
    seeds: int
    session_s: float
    guard_s: float
    label_block_s: float
    split_seed: int
    probe: Literal["lbfgs", "paper"]
    mode: Literal["edge", "paper"] | None
    vision_encoder: str
    steps: int | None
    order: Literal["shuffled", "replay", "stream"]
    changes: list[str] | None
    fresh: bool
    out: Path | None
    as_json: bool


def _shared(
    store: Annotated[
        Path | None, typer.Option(rich_help_panel=_DATA, help="A rolling store. Default: the live one.")
    ] = None,
    recording: Annotated[
        list[Path] | None,
        typer.Option(rich_help_panel=_DATA, help="Import this recording into a store first; repeat for several."),
    ] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", rich_help_panel=_DATA, help="Simulate a store first; it is kept.")
    ] = False,
    site: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=_DATA, help="Site to simulate; repeat. Default: all that are shipped."),
    ] = None,
    frames: Annotated[
        int, typer.Option(min=16, rich_help_panel=_DATA, help="Frames to simulate a site.")
    ] = DEFAULT_FRAMES,
    interval_s: Annotated[
        float, typer.Option(min=0.01, rich_help_panel=_DATA, help="Simulated time between two frames.")
    ] = 0.66,
    simulation_seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, rich_help_panel=_DATA, help="Of the simulation.")
    ] = 0,
    source: Annotated[str, typer.Option(hidden=True)] = "",
    split: Annotated[
        Literal["sessions", "random", "both"],
        typer.Option(
            rich_help_panel=_PROTOCOL, help="Whole sessions held out, the paper's random frames, or both."
        ),
    ] = "both",
    unseen: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=_PROTOCOL, help="Site never to learn from; repeat. Default: all eval_*."),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, rich_help_panel=_PROTOCOL, help="How often all is done, with seeds 0, 1, ...")
    ] = 3,
    session_s: Annotated[
        float, typer.Option(min=1, rich_help_panel=_PROTOCOL, help="Length of a session: what is held out whole.")
    ] = 60.0,
    guard_s: Annotated[
        float, typer.Option(min=0, rich_help_panel=_PROTOCOL, help="Nothing so near to a test session is learnt.")
    ] = 5.0,
    label_block_s: Annotated[
        float, typer.Option(min=0.1, rich_help_panel=_PROTOCOL, help="Labels are drawn by blocks of this length.")
    ] = 10.0,
    split_seed: Annotated[
        int,
        typer.Option(min=0, max=MAX_SEED, rich_help_panel=_PROTOCOL, help="Which sessions are held out."),
    ] = 0,
    probe: Annotated[
        Literal["lbfgs", "paper"],
        typer.Option(rich_help_panel=_PROTOCOL, help="Linear layer: to convergence, or 32 epochs at 1e-4."),
    ] = "lbfgs",
    mode: Annotated[
        Literal["edge", "paper"] | None,
        typer.Option(rich_help_panel=_LEARNING, help="As ECHOSIGHT_MODE, which it overrules."),
    ] = None,
    vision_encoder: Annotated[
        str, typer.Option(rich_help_panel=_LEARNING, help="As ECHOSIGHT_VISION_ENCODER. Default: the mode's.")
    ] = "",
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=_LEARNING, help="Steps of learning. Default: max_replays times each pair."
        ),
    ] = None,
    order: Annotated[
        Literal["shuffled", "replay", "stream"],
        typer.Option(
            rich_help_panel=_LEARNING,
            help="Pairs in random order, as the store grew with replay, or as they came.",
        ),
    ] = "shuffled",
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            rich_help_panel=_LEARNING,
            help="Any trainer setting: queue_size=320, temperature=0.1; repeat.",
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", rich_help_panel=_LEARNING, help="Learn again what was learnt before.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(rich_help_panel=_RESULT, help="Folder of results. Default: evaluation/NAME.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", rich_help_panel=_RESULT, help="Print one JSON object.")
    ] = False,
) -> None:
    """The signature is what counts."""


def study_command(
    app: typer.Typer, name: str, *, defaults: Mapping[str, Any] = MappingProxyType({})
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make `run(asked, *, own options)` a command that takes the shared options too; its docstring is the help.

    defaults: of shared options, where they are others than usual.
    """

    def register(run: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(run, eval_str=True).parameters.values())[1:]
        shared = inspect.signature(_shared, eval_str=True).parameters
        assert list(shared) == [field.name for field in fields(Asked)]

        def command(**given: Any) -> None:
            asked = Asked(**{option: given.pop(option) for option in shared})
            with known_errors():
                run(asked, **given)

        parameters = [
            p.replace(kind=inspect.Parameter.KEYWORD_ONLY, default=defaults.get(p.name, p.default))
            for p in [*own, *shared.values()]
        ]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        command.__doc__ = run.__doc__
        app.command(name)(command)
        return run

    return register


def settings_of(asked: Asked, **overrides: Any) -> TrainerSettings:
    """Settings from the environment, the options, and --set. Raises SettingsError naming what is wrong."""
    given: dict[str, Any] = {"data_dir": data_dir()}
    if asked.mode:
        given["mode"] = asked.mode
    if asked.vision_encoder:
        given["vision_encoder"] = asked.vision_encoder
    for change in asked.changes or []:
        name, equals, value = change.partition("=")
        if not equals or name not in TrainerSettings.model_fields:
            names = ", ".join(sorted(TrainerSettings.model_fields))
            raise SettingsError(f"--set {change!r}", remedy=f"write NAME=VALUE with one of {names}")
        given[name] = value
    return TrainerSettings.read(**(given | overrides))


def data_dir() -> Path:
    return Path(os.environ.get("ECHOSIGHT_DATA_DIR", "var")).resolve()


@contextlib.contextmanager
def known_errors() -> Iterator[None]:
    """A known error becomes one line with its remedy, and exit status 2."""
    try:
        yield
    except EchosightError as error:
        Console(stderr=True).print(f"[red]echosight:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print("echosight: stopped; what was encoded and learnt is kept", file=sys.stderr)
        raise typer.Exit(130) from None
