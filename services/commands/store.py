"""`echosight store`: what lies in the rolling store, whether it is whole, how to repair and how to export it."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from services.commands.output import console, fail, print_json, read_settings
from services.core import inspection
from services.core.errors import EchosightError
from services.core.settings import CoreSettings
from services.core.shares import stored_sites

app = typer.Typer(
    no_args_is_help=True,
    help="The rolling store under ECHOSIGHT_DATA_DIR: what is in it, is it whole, and how to take data out.",
    epilog="Example: `echosight store info`; after a crash of the machine `echosight store verify`, and with "
    "ingest stopped `echosight store repair north`; `echosight store export north north.mcap` takes a copy.",
)
_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True}
_Sites = Annotated[list[str] | None, typer.Argument(help="Sites. Default: all.", show_default=False)]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def info(as_json: _Json = False) -> None:
    """Show each site: pairs, size, time span, labels, who writes it."""
    store_dir = read_settings(CoreSettings).store_dir
    with _errors():
        sites = inspection.describe(store_dir)
    if as_json:
        print_json({"store": str(store_dir), "sites": [asdict(site) for site in sites]})
        return
    if not sites:
        console.print(f"no site has a store under {escape(str(store_dir))} yet")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("site", "pairs", "MB", "segments", "labels", "from (UTC)", "to (UTC)"):
        is_number = name in ("pairs", "MB", "segments", "labels")
        table.add_column(name, justify="right" if is_number else "left", overflow="fold", no_wrap=is_number)
    for site in sites:
        table.add_row(
            escape(site.site),
            f"{site.num_pairs:,}",
            f"{site.num_bytes / 1e6:,.1f}",
            f"{site.num_segments:,}",
            f"{site.num_labels:,}",
            _moment(site.oldest_at_ns),
            _moment(site.newest_at_ns),
        )
    console.print(table)
    for site in sites:
        versions = ", ".join(str(version) for version in site.versions)
        said = f"{site.site}: written by {site.owner or 'nobody known'} (token {site.token})"
        said += f", format {versions}" if versions else ""
        said += f", {site.num_images_dropped:,} images dropped" if site.num_images_dropped else ""
        console.print(escape(said), highlight=False, style="dim")


@app.command()
def verify(sites: _Sites = None, as_json: _Json = False) -> None:
    """Read every byte, and say what does not hold. Nothing is changed. Exit status 1 if there is damage."""
    found: dict[str, list[inspection.Finding]] = {}
    store_dir = read_settings(CoreSettings).store_dir
    with _errors():
        for site in sites or stored_sites(store_dir):
            with _bar(f"reading {site}") as advance_to:
                found[site] = list(inspection.verify(store_dir, site, progress=advance_to))
    num_findings = sum(len(findings) for findings in found.values())
    if as_json:
        print_json({site: [asdict(finding) for finding in findings] for site, findings in found.items()})
    else:
        for site, findings in found.items():
            console.print(f"{escape(site)}: " + (f"[red]{len(findings)} findings[/red]" if findings else "whole"))
            for finding in findings:
                row = "" if finding.row is None else f", row {finding.row}"
                console.print(f"  {escape(finding.file)}{row}: {escape(finding.what)}", highlight=False)
        if num_findings:
            console.print("`echosight store repair SITE` puts right what can be; damaged pairs are never served")
    if num_findings:
        raise typer.Exit(1)


@app.command()
def repair(
    site: Annotated[str, typer.Argument(help="Site to repair.", show_default=False)], as_json: _Json = False
) -> None:
    """Make indexes anew from the data, void damaged rows, remove leftovers. No whole pair is lost.

    Stop ingest first: it would take the site back in the middle.
    """
    with _errors():
        done = inspection.repair(read_settings(CoreSettings).store_dir, site)
    if as_json:
        print_json({"site": site, "done": done})
        return
    for line in done or ["nothing to repair"]:
        console.print(escape(line), highlight=False)


@app.command(context_settings=_FORWARD, add_help_option=False)
def export(context: typer.Context) -> None:
    """Write a site's pairs and labels to an MCAP file or a folder: SITE PATH."""
    os.execv(  # noqa: S606 - our own module
        sys.executable, [sys.executable, "-m", "services.sensors", "export", *context.args]
    )


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except (EchosightError, OSError) as error:
        fail(error)


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere. Yields what to call with (done, of how many)."""
    errors = Console(stderr=True)
    with Progress(console=errors, disable=not errors.is_terminal, transient=True) as bars:
        task = bars.add_task(escape(what), total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _moment(at_ns: int | None) -> Any:
    return "-" if at_ns is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at_ns / 1e9))
