"""`echosight models`: which versions there are, how good they are, what is served, and how to change that."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from services.commands.output import console, fail, print_json, read_settings
from services.core.errors import EchosightError, RegistryError
from services.core.registry import MODEL_FILE, Manifest, Registry
from services.core.settings import CoreSettings

app = typer.Typer(
    no_args_is_help=True,
    help="The model registry under ECHOSIGHT_DATA_DIR: versions, what the gate said of them, which is served. "
    "A running API follows within seconds. docs/releases.md has the rules.",
)
ACTOR = "operator"
_Version = Annotated[int, typer.Argument(help="Number of the version.", show_default=False)]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_Why = Annotated[str, typer.Option(help="Reason, for the history.")]


@app.command("list")
def list_versions(as_json: _Json = False) -> None:
    """List all versions, newest first: recall of each class, the gate's verdict, what is served."""
    with _registry() as registry:
        rows = [_row(registry, version) for version in reversed(registry.versions())]
        aliases = registry.aliases()
    if as_json:
        print_json({"name": registry.name, "aliases": aliases, "versions": rows})
        return
    classes = list(dict.fromkeys(name for row in rows for name in row["recall"]))
    table = Table("version", "is", "age", "accuracy", *classes, "names", "verdict", "why", box=None)
    for row in rows:
        table.add_row(
            f"v{row['version']}",
            escape(", ".join(row["aliases"])),
            _age(row["created_at_s"]),
            _percent(row["accuracy"]),
            *(_percent(row["recall"].get(name)) for name in classes),
            str(row["num_names"]),
            row["verdict"],
            escape(row["why"] or row["problem"]),
        )
    console.print(table if rows else f"model {escape(registry.name)} has no version yet")


@app.command()
def show(version: _Version, as_json: _Json = False) -> None:
    """Show one version: what it expects, what was measured, how it was judged, what it came from."""
    with _registry() as registry:
        manifest = registry.manifest(version)
        row = _row(registry, version)
    if as_json:
        print_json(row | {"manifest": manifest.model_dump(mode="json")})
        return
    table = Table(show_header=False, box=None)
    for name, value in _facts(manifest, row):
        table.add_row(name, escape(value))
    console.print(table, highlight=False)


@app.command()
def history(
    count: Annotated[int, typer.Option(min=1, help="Show the last so many moves.")] = 30, as_json: _Json = False
) -> None:
    """Show who moved what, when and why; oldest first."""
    with _registry() as registry:
        rows = registry.history()[-count:]
    if as_json:
        print_json({"name": registry.name, "history": rows})
        return
    table = Table("when (UTC)", "by", "move", "why", box=None)
    for row in rows:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(row["at_s"]))
        moves = ", ".join(f"{what} v{version}" for what, version in row["moved"].items())
        table.add_row(when, escape(row["by"]), escape(moves), escape(row["why"]))
    console.print(table if rows else "nothing was moved yet")


@app.command()
def promote(
    version: _Version,
    why: _Why = "promoted by hand",
    force: Annotated[bool, typer.Option("--force", help="Promote a version that was refused, too.")] = False,
    as_json: _Json = False,
) -> None:
    """Make a version the champion: one that the gate holds, for instance. The API exports and serves it."""
    with _registry() as registry:
        registry.manifest(version)
        refused = registry.refused().get(version)
        if refused is not None and not force:
            raise RegistryError(
                f"version {version} was refused: {refused}", remedy="give --force if you know better than that"
            )
        before = registry.aliases().get("champion")
        registry.promote(version, by=ACTOR, why=why)
    if refused is not None and before == version and not as_json:
        console.print(f"v{version} is refused no longer")
    _say_champion(version, before, as_json)


@app.command()
def rollback(why: _Why = "rolled back by hand", as_json: _Json = False) -> None:
    """Serve the version before the champion again. What was rolled back is not promoted again by itself."""
    with _registry() as registry:
        before = registry.aliases().get("champion")
        version = registry.rollback(by=ACTOR, why=why)
    _say_champion(version, before, as_json)


@app.command()
def compare(first: _Version, second: _Version, as_json: _Json = False) -> None:
    """Set two versions side by side. Each was tested on what it had then: the gate's line is on equal frames."""
    with _registry() as registry:
        rows = [_row(registry, version) for version in (first, second)]
    if as_json:
        print_json({"versions": rows})
        return
    table = Table("", f"v{first}", f"v{second}", "difference", box=None)
    for name, of in _NUMBERS.items():
        table.add_row(name, *_side_by_side(of(rows[0]), of(rows[1])))
    for name in dict.fromkeys([*rows[0]["recall"], *rows[1]["recall"]]):
        table.add_row(f"recall {escape(name)}", *_side_by_side(*(row["recall"].get(name) for row in rows)))
    for name in ("verdict", "why"):
        table.add_row(name, *(escape(row[name]) for row in rows))
    console.print(table, highlight=False)


_NUMBERS: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "accuracy": lambda row: row["accuracy"],
    "balanced accuracy": lambda row: row["balanced_accuracy"],
    "calibration error": lambda row: row["calibration"].get("ece_after"),
    "noise told apart": lambda row: row["unknown"].get("auroc_noise"),
}


@contextlib.contextmanager
def _registry() -> Iterator[Registry]:
    """The registry in use; what goes wrong ends the command with a message."""
    settings = read_settings(CoreSettings)
    try:
        yield Registry(settings.registry_dir, settings.model_name)
    except (EchosightError, OSError) as error:
        fail(error)


def _row(registry: Registry, version: int) -> dict[str, Any]:
    """One version in plain values. problem: why its manifest cannot be read, "" if it can."""
    try:
        manifest: Manifest | None = registry.manifest(version)
        problem = ""
    except RegistryError as error:
        registry.path(version)  # raises if there is none at all
        manifest, problem = None, error.what
    refused, held = registry.refused(), registry.held()
    verdict = "refuse" if version in refused else "hold" if version in held else "promote" if manifest else ""
    metrics = manifest.metrics if manifest else {}
    probe, names = metrics.get("probe", {}), metrics.get("names", {})
    return {
        "version": version,
        "aliases": [alias for alias, named in registry.aliases().items() if named == version],
        "has_model": (registry.dir / str(version) / MODEL_FILE).is_file(),
        "created_at_s": manifest.created_at_s if manifest else None,
        "accuracy": probe.get("accuracy"),
        "balanced_accuracy": probe.get("balanced_accuracy"),
        "recall": probe.get("recall", {}),
        "num_names": names.get("people", probe.get("num_tested", 0)) + names.get("detector", 0),
        "calibration": metrics.get("calibration", {}),
        "unknown": metrics.get("unknown", {}),
        "verdict": verdict,
        "why": refused.get(version) or held.get(version) or (manifest.verdict_why if manifest else ""),
        "problem": problem,
    }


def _facts(manifest: Manifest, row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and value, line by line."""
    metrics, lineage = manifest.metrics, manifest.lineage
    yield "version", f"{manifest.name} v{manifest.version} {' '.join(row['aliases'])}".strip()
    yield "published", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(manifest.created_at_s))
    yield "takes", f"{manifest.input.shape} {manifest.input.unit} {' '.join(manifest.input.channels)}".strip()
    yield "sites", ", ".join(site for site in manifest.sites if site) or "none"
    yield "verdict", f"{row['verdict']}: {row['why']}"
    for name, part in metrics.get("gate", {}).get("site_points", {}).items():
        low, high = part["interval"]
        yield f"  site {name}", f"{part['points']:+.1f} points [{low:.1f}, {high:.1f}] on {part['frames']} frames"
    head = manifest.architecture.get("head", {})
    yield "head", f"{head.get('kind', 'linear')}, {metrics.get('probe', {}).get('split', '')}"
    yield (
        "accuracy",
        f"{_percent(row['accuracy'])}, with classes weighed alike {_percent(row['balanced_accuracy'])}",
    )
    yield "recall", ", ".join(f"{name} {_percent(value)}" for name, value in row["recall"].items())
    names = metrics.get("names", {})
    yield "names", f"{names.get('people', 0)} by people, {names.get('detector', 0)} by a detector"
    if "ece_after" in row["calibration"]:
        of = row["calibration"]
        change = f"calibration error {of['ece_before']:.3f} to {of['ece_after']:.3f}"
        yield (
            "temperature",
            f"{of['temperature']:.2f}: {change}, NLL {of['nll_before']:.3f} to {of['nll_after']:.3f}",
        )
    if manifest.abstain_below is not None:
        yield "unsure below", f"{manifest.abstain_below:.2f}"
    if manifest.unknown_threshold is not None:
        share = row["unknown"].get("accepted_share", 0)
        yield "unknown from", f"{manifest.unknown_threshold:.3f}, which accepts {_percent(share)} of known frames"
    if manifest.parity:
        yield "ONNX to torch", f"{manifest.parity.max_abs_probability_error:.1e} at most in probability"
    yield "learnt", f"{lineage.get('step', '?')} steps on {lineage.get('num_pairs', '?')} pairs"


def _side_by_side(first: float | None, second: float | None) -> tuple[str, str, str]:
    difference = "" if first is None or second is None else f"{100 * (second - first):+.1f}"
    return _percent(first), _percent(second), difference


def _say_champion(version: int, before: int | None, as_json: bool) -> None:
    if as_json:
        print_json({"champion": version, "before": before})
    elif before == version:
        console.print(f"v{version} was the champion already")
    else:
        console.print(f"v{version} is the champion now" + ("" if before is None else f", before it v{before}"))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _age(created_at_s: float | None) -> str:
    if created_at_s is None:
        return "-"
    seconds = max(time.time() - created_at_s, 0.0)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
