"""How a worker becomes a command: its help names what people type, and keeps the lines of its examples apart."""

from collections.abc import Callable

import typer


def run_command(main: Callable[..., object], *, name: str) -> None:
    """Run `main` with the options of this process, as `echosight NAME`. Ends the process."""
    app = typer.Typer(rich_markup_mode="rich", add_completion=False)
    app.command()(main)
    app(prog_name=f"echosight {name}")
