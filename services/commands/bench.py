"""`echosight bench`: measure a running server, and what this machine offers it."""

import typer

from services.commands.bench_providers import providers
from services.commands.bench_serve import serve

app = typer.Typer(
    no_args_is_help=True,
    help="Measure: how a running server does under load (serve), what runs a model fastest here (providers).",
)
app.command()(serve)
app.command()(providers)
