"""How commands speak: tables for people, one JSON object for scripts, and an error in one line with its remedy."""

import os
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import orjson
import typer
from rich.console import Console
from rich.markup import escape

from services.core.errors import EchosightError
from services.core.settings import CoreSettings

console = Console()
_Settings = TypeVar("_Settings", bound=CoreSettings)


def read_settings(kind: type[_Settings]) -> _Settings:
    """Settings from the environment, data_dir as an absolute path; a wrong one ends the command."""
    try:
        return kind.read(data_dir=Path(os.environ.get("ECHOSIGHT_DATA_DIR", "var")).resolve())
    except EchosightError as error:
        fail(error)


def print_json(found: dict[str, Any]) -> None:
    print(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())


def fail(error: Exception) -> NoReturn:
    """Say what was wrong and end with status 2."""
    Console(stderr=True).print(f"[red]echosight:[/red] {escape(str(error))}", highlight=False)
    raise typer.Exit(2) from None


def megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
