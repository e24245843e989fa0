"""`echosight bench`: measure a running server, and what this machine offers it."""

import typer

from services.commands.bench_serve import serve

app = typer.Typer(
    no_args_is_help=True, help="Measure a running server: its answers a second, and how long each takes."
)
app.command()(serve)


@app.callback()
def bench() -> None:
    """A group, also while it has one command."""
