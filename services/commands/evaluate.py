"""`echosight evaluate` and `reproduce`: make the store that is asked for, once, and hand it to trainer.evaluation.

    ECHOSIGHT_DATA_DIR/evaluation/stores/KIND-DIGEST/store   made.json stands beside it when it is whole

A simulation is made by `services.sensors simulate --store`, a process a core; a recording goes the whole way,
through an embedded server of its own and ingest. What is interrupted goes on the next time.
"""

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Annotated

import orjson
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

import services
from services.commands.output import fail, read_settings
from services.core.embedded import start_embedded_server
from services.core.errors import EchosightError, SettingsError
from services.core.files import write_atomically
from services.core.settings import CoreSettings
from services.core.store import StoreReader

_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True}
_POLL_S = 0.3
_STOP_S = 60.0
_ALL = 2**50
_SITES_DIR = Path(services.__file__).parent / "sensors" / "simulator" / "sites"
_console = Console(stderr=True)

_Store = Annotated[Path | None, typer.Option()]
_Recordings = Annotated[list[Path] | None, typer.Option()]
_Simulate = Annotated[bool, typer.Option("--simulate")]
_Sites = Annotated[list[str] | None, typer.Option()]
_Frames = Annotated[int, typer.Option(min=16)]
_IntervalS = Annotated[float, typer.Option(min=0.01)]
_Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1)]


def register(app: typer.Typer) -> None:
    """Add the commands; their help is trainer.evaluation's, where the studies are."""
    for name, default, summary in (
        ("evaluate", False, "Judge what was learnt: linear, finetune, efficiency, retrieval, t-SNE and more."),
        ("reproduce", True, "Run the paper's experiments, at a scale that you choose, and draw its figures."),
    ):
        app.command(name, context_settings=_FORWARD, add_help_option=False, help=summary)(_command(name, default))


def _command(name: str, simulates: bool):  # type: ignore[no-untyped-def] # typer reads the inner one
    def command(
        context: typer.Context,
        store: _Store = None,
        recording: _Recordings = None,
        simulate: _Simulate = False,
        site: _Sites = None,
        frames: _Frames = 1000,
        interval_s: _IntervalS = 0.66,
        simulation_seed: _Seed = 0,
    ) -> None:
        study = [sys.executable, "-m", "trainer.evaluation", name, *context.args]
        asks_for_help = not context.args or "--help" in context.args
        if not asks_for_help:
            settings = read_settings(CoreSettings)
            try:
                if (store is not None) + simulate + bool(recording) > 1:
                    raise SettingsError(
                        "several sources of data", remedy="give one of --store, --recording, --simulate"
                    )
                if recording:
                    made = imported(settings.data_dir, recording)
                elif simulate or (simulates and store is None):
                    made = simulated(
                        settings.data_dir, site or [], frames=frames, interval_s=interval_s, seed=simulation_seed
                    )
                else:
                    made = (store or settings.store_dir, "")
            except EchosightError as error:
                fail(error)
            study += ["--store", str(made[0]), "--source", made[1]]
        os.execv(sys.executable, study)  # noqa: S606 - our own module

    return command


def simulated(data_dir: Path, sites: list[str], *, frames: int, interval_s: float, seed: int) -> tuple[Path, str]:
    """The store of a simulation, every frame labelled with the truth, and in words what it is of.

    sites: none: all that are shipped. Raises EchosightError when a site cannot be simulated.
    """
    sites = sites or sorted(path.stem for path in _SITES_DIR.glob("*.yaml"))
    asked = {"sites": sites, "frames": frames, "interval_s": interval_s, "seed": seed}
    words = f"simulation of {len(sites)} sites, {frames} frames each, one every {interval_s:g} s, seed {seed}"
    with _place(data_dir, "simulated", {**asked, "simulator": _digest_of_simulator(sites)}) as (
        directory,
        is_made,
    ):
        if not is_made:
            how = ["--seconds", str(frames * interval_s), "--interval-s", str(interval_s), "--seed", str(seed)]
            how += ["--label-share", "1", "--label-mistakes", "0", "--store", str(directory / "store")]
            commands = [["simulate", "--site", site, *how] for site in sites]
            with _pairs_bar("simulating", directory / "store", total=frames * len(sites)) as look:
                _run_all(commands, log=directory / "simulate.log", look=look)
            _finish(directory, asked)
    return directory / "store", words


def imported(data_dir: Path, recordings: list[Path]) -> tuple[Path, str]:
    """The store of recordings, by way of a server and ingest of their own, and in words what it is of."""
    for path in recordings:
        if not path.exists():
            raise SettingsError(f"recording {path} does not exist", remedy="check the path")
    asked = {"recordings": [{"path": str(path.resolve()), "stamp": _stamp(path)} for path in recordings]}
    with _place(data_dir, "imported", asked) as (directory, is_made):
        if not is_made:
            _import(directory, recordings)
            _finish(directory, asked)
    return directory / "store", "recordings " + ", ".join(path.name for path in recordings)


def _import(directory: Path, recordings: list[Path]) -> None:
    server = start_embedded_server(directory / "redis")
    with ExitStack() as stack:
        stack.callback(server.stop)
        environment = {
            **os.environ,
            "REDIS_URL": server.url,
            "ECHOSIGHT_DATA_DIR": str(directory),
            "ECHOSIGHT_MAX_STORE_BYTES": str(_ALL),
            "ECHOSIGHT_MAX_AGE_S": "3e9",
            "ECHOSIGHT_CURATION": "off",
            "ECHOSIGHT_DROP_IMAGES": "false",
            "ECHOSIGHT_SITES": "",
            "ECHOSIGHT_INGEST_METRICS_PORT": "0",
        }
        log = stack.enter_context((directory / "ingest.log").open("ab"))
        stack.enter_context(_ingest(environment, log))
        look = stack.enter_context(_pairs_bar("importing", directory / "store", total=None))
        for path in recordings:
            _run_all([["import", str(path)]], log=directory / "import.log", look=look, environment=environment)


@contextmanager
def _ingest(environment: dict[str, str], log: IO[bytes]) -> Iterator[None]:
    """Runs meanwhile; what it holds is stored when this ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "services.ingest"], env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _run_all(
    commands: list[list[str]], *, log: Path, look: "_Look", environment: dict[str, str] | None = None
) -> None:
    """Run `services.sensors` with each of the arguments, one a core at once. Raises SettingsError if one fails."""
    waiting, running = list(commands), list[tuple[list[str], subprocess.Popen[bytes]]]()
    with log.open("ab") as file:
        try:
            while waiting or running:
                while waiting and len(running) < max(1, len(os.sched_getaffinity(0))):
                    arguments = waiting.pop(0)
                    command = [sys.executable, "-m", "services.sensors", *arguments]
                    process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
                    running.append((arguments, process))
                time.sleep(_POLL_S)  # several processes: there is no one to wait on
                look()
                for arguments, process in [one for one in running if one[1].poll() is not None]:
                    running.remove((arguments, process))
                    if process.returncode:
                        reason = " ".join(log.read_text(errors="replace").split()[-60:])
                        raise SettingsError(
                            f"echosight {' '.join(arguments)} failed: {reason}", remedy=f"{log} has all of it"
                        )
        finally:
            for _, process in running:
                process.terminate()
            for _, process in running:
                process.wait()


class _Look:
    """Moves the bar to how many pairs the store holds by now."""

    def __init__(self, bars: Progress, what: str, store_dir: Path, total: int | None) -> None:
        self._bars, self._reader = bars, StoreReader(store_dir)
        self._task = bars.add_task(what, total=total)

    def __call__(self) -> None:
        self._bars.update(self._task, completed=self._reader.refresh())


@contextmanager
def _pairs_bar(what: str, store_dir: Path, total: int | None) -> Iterator[_Look]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    if not _console.is_terminal:
        _console.print(f"{what} into {store_dir}, once", highlight=False, soft_wrap=True)
    with Progress(*columns, console=_console, disable=not _console.is_terminal, transient=True) as bars:
        yield _Look(bars, what, store_dir, total)


@contextmanager
def _place(data_dir: Path, kind: str, asked: Mapping[str, object]) -> Iterator[tuple[Path, bool]]:
    """The folder for what was asked, and whether it is whole. Another command that makes it is waited for."""
    digest = hashlib.sha256(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)).hexdigest()[:12]
    directory = data_dir / "evaluation" / "stores" / f"{kind}-{digest}"
    try:
        (directory / "store").mkdir(parents=True, exist_ok=True)
        with (directory / "lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield directory, (directory / "made.json").exists()
    except OSError as error:
        raise SettingsError(
            f"cannot make {directory}: {error.strerror}", remedy="set ECHOSIGHT_DATA_DIR to a folder with room"
        ) from None


def _finish(directory: Path, asked: Mapping[str, object]) -> None:
    write_atomically(directory / "made.json", orjson.dumps(asked, option=orjson.OPT_INDENT_2))


def _digest_of_simulator(sites: list[str]) -> str:
    """Another simulator, or another site file, makes another store."""
    digest = hashlib.sha256()
    for path in sorted(_SITES_DIR.parent.rglob("*")):
        if path.suffix in (".py", ".yaml"):
            digest.update(path.read_bytes())
    for site in sites:
        if Path(site).is_file():
            digest.update(Path(site).read_bytes())
    return digest.hexdigest()[:16]


def _stamp(path: Path) -> list[int]:
    """How large a file or folder is, and when it was last changed."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    stats = [file.stat() for file in files]
    return [len(stats), sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)]
