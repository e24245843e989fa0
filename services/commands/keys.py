"""`echosight keys`: who may ask the model server what. Writes the file that ECHOSIGHT_API_KEYS_FILE names."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from services.commands.output import console, fail, print_json
from services.core.errors import EchosightError, SettingsError
from services.core.keys import SCOPES, Key, KeyFile, Scope, read_keys, write_keys

app = typer.Typer(
    no_args_is_help=True,
    help="API keys. A running API whose ECHOSIGHT_API_KEYS_FILE names the file follows within seconds.",
    epilog="Example: `echosight keys add north-radar --scope predict`; clients send the key as "
    "`Authorization: Bearer KEY`, `echosight classify` takes it from ECHOSIGHT_API_KEY.",
)
_Name = Annotated[str, typer.Argument(help="Name of the key, for people and logs.", show_default=False)]
_File = Annotated[
    Path, typer.Option("--file", envvar="ECHOSIGHT_API_KEYS_FILE", help="The file of keys.", show_envvar=True)
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_DEFAULT = Path("keys.json")


@app.command()
def add(
    name: _Name,
    scope: Annotated[
        list[str],
        typer.Option(help="predict: ask and read; label: post labels; admin: everything. Repeat for several."),
    ],
    requests_per_s: Annotated[
        float | None, typer.Option("--rate", min=0, help="Requests a second. Default: the server's; 0: no limit.")
    ] = None,
    file: _File = _DEFAULT,
    as_json: _Json = False,
) -> None:
    """Make a key and print it, once: the file keeps only its hash."""
    with _errors():
        scopes = _scopes(scope)
        with _locked(file):
            keys, text = _read(file).added(name, scopes, requests_per_s=requests_per_s)
            write_keys(file, keys)
    if as_json:
        print_json({"name": name, "key": text, "scopes": scopes, "file": str(file)})
        return
    print(text)
    note = f"This is the only time that it is shown. {file} has its hash; ECHOSIGHT_API_KEYS_FILE must name it."
    console.print(escape(note), style="dim", highlight=False)


@app.command("list")
def list_keys(file: _File = _DEFAULT, as_json: _Json = False) -> None:
    """List the keys: name, id, scopes, age and limit. Keys themselves are nowhere."""
    with _errors():
        keys = read_keys(file).keys
    if as_json:
        print_json({"file": str(file), "keys": [_row(key) for key in keys]})
        return
    table = Table("name", "id", "scopes", "made (UTC)", "requests/s", box=None)
    for key in keys:
        limit = (
            "" if key.requests_per_s is None else f"{key.requests_per_s:g}" if key.requests_per_s else "no limit"
        )
        made = time.strftime("%Y-%m-%d %H:%M", time.gmtime(key.created_at_s))
        table.add_row(escape(key.name), key.id, ", ".join(key.scopes), made, limit)
    console.print(table if keys else f"{escape(str(file))} has no key", highlight=False)


@app.command()
def remove(name: _Name, file: _File = _DEFAULT, as_json: _Json = False) -> None:
    """Take a key away. A running API refuses it within seconds and ends its streams."""
    with _errors(), _locked(file):
        write_keys(file, read_keys(file).removed(name))
    if as_json:
        print_json({"removed": name, "file": str(file)})
    else:
        console.print(f"{escape(name)} is removed", highlight=False)


def _scopes(given: list[str]) -> tuple[Scope, ...]:
    """Each once, in their usual order. Raises SettingsError."""
    unknown = sorted(set(given) - set(SCOPES))
    if unknown:
        raise SettingsError(f"scope is {unknown[0]!r}", remedy=f"use {', '.join(SCOPES)}")
    return tuple(scope for scope in SCOPES if scope in given)


def _row(key: Key) -> dict[str, Any]:
    return key.model_dump(mode="json", exclude={"sha256"})


def _read(file: Path) -> KeyFile:
    return read_keys(file) if file.exists() else KeyFile()


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One writer at a time: two that add a key at once would lose one of them."""
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except (EchosightError, OSError) as error:
        fail(error)
