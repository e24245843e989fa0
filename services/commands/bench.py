"""`echosight bench`: measure a running server, and what this machine offers it."""

import typer

from services.commands.bench_providers import providers

app = typer.Typer(no_args_is_help=True, help="Measure: what runs a model fastest here (providers).")
app.command()(providers)


@app.callback()
def bench() -> None:
    """A group, also while it has one command."""
