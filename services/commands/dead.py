"""`echosight dead`: look at frames that were refused, send them again, or drop them."""

import base64
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from services.commands.output import console, fail, print_json, read_settings
from services.core.embedded import resolve_redis_url
from services.core.errors import EchosightError
from services.core.settings import CoreSettings
from services.core.streams import KINDS, DeadLetter, DeadLetters, StreamsLost

app = typer.Typer(
    no_args_is_help=True,
    help="Frames that could not be decoded, with the reason. A site's `dead` stream keeps them, payload and all, "
    "until they are requeued, dropped, or crowded out by newer ones.",
    epilog="Example: `echosight dead list`, then `echosight dead show north 1712000000123-0` for one, and "
    "`echosight dead requeue north --all` once ingest understands them.",
)
_Site = Annotated[str, typer.Argument(help="Site whose letters are meant.", show_default=False)]
_Ids = Annotated[list[str] | None, typer.Argument(help="Ids of letters, as `dead list` shows them.")]
_All = Annotated[bool, typer.Option("--all", help="All letters of the site.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("list")
def list_letters(
    site: Annotated[str | None, typer.Argument(help="Only this site. Default: all.", show_default=False)] = None,
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Most letters of a site.")] = 50,
    as_json: _Json = False,
) -> None:
    """List dead letters, oldest first: id, stream, age, size and reason."""
    with _dead_letters() as dead:
        found = {name: dead.list(name, count=count) for name in ([site] if site else dead.sites())}
    if as_json:
        print_json({name: [_row(letter) for letter in letters] for name, letters in found.items()})
        return
    found = {name: letters for name, letters in found.items() if letters}
    if not found:
        console.print("no dead letters")
        return
    for name, letters in found.items():
        table = Table(title=f"site {escape(name)}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("id", "stream", "age", "bytes"):
            table.add_column(column, justify="left" if column == "id" else "right", no_wrap=True)
        table.add_column("reason", overflow="fold")
        for letter in letters:
            age = _age(time.time() - letter.buried_at_ms / 1e3)
            kind = letter.kind if letter.kind in KINDS else "?"
            table.add_row(letter.id, kind, age, f"{letter.num_bytes:,}", escape(letter.reason))
        console.print(table)
    console.print("[dim]`echosight dead show SITE ID` shows one; requeue sends it again, drop removes it[/dim]")


@app.command()
def show(
    site: _Site,
    letter_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the letter.")],
    as_json: _Json = False,
) -> None:
    """Show one letter: why it was refused, its header, and the beginning of its data."""
    with _dead_letters() as dead:
        letter = dead.show(site, letter_id)
    if as_json:
        fields = {name.decode(errors="replace"): base64.b64encode(v).decode() for name, v in letter.fields.items()}
        print_json(_row(letter) | {"fields_base64": fields})
        return
    table = Table(show_header=False, box=None)
    for name, value in _row(letter).items():
        table.add_row(name, escape(str(value)))
    for field, value in letter.fields.items():
        is_text = field == b"header" and value.isascii()
        shown = value[:2000].decode() if is_text else f"{len(value):,} bytes, starting {value[:32].hex(' ')}"
        table.add_row(escape(field.decode(errors="backslashreplace")), escape(shown))
    console.print(table)


@app.command()
def requeue(site: _Site, ids: _Ids = None, all_letters: _All = False, as_json: _Json = False) -> None:
    """Send letters again, as they were: after an upgrade that understands them. Still bad ones come back."""
    with _dead_letters() as dead:
        num = dead.requeue(site, _chosen(dead, site, ids, all_letters))
    _say(num, "requeued", as_json)


@app.command()
def drop(site: _Site, ids: _Ids = None, all_letters: _All = False, as_json: _Json = False) -> None:
    """Remove letters for good."""
    with _dead_letters() as dead:
        num = dead.drop(site, _chosen(dead, site, ids, all_letters))
    _say(num, "dropped", as_json)


@contextmanager
def _dead_letters() -> Iterator[DeadLetters]:
    """The letters of the server in use; what goes wrong ends the command with a message."""
    try:
        dead = DeadLetters(resolve_redis_url(read_settings(CoreSettings)))
        try:
            yield dead
        finally:
            dead.close()
    except (*StreamsLost, EchosightError) as error:
        fail(error)


def _chosen(dead: DeadLetters, site: str, ids: list[str] | None, all_letters: bool) -> list[str]:
    if bool(ids) == all_letters:
        raise typer.BadParameter("give ids of letters, or --all")
    return ids or [letter.id for letter in dead.list(site, count=100_000)]


def _say(num: int, done: str, as_json: bool) -> None:
    if as_json:
        print_json({done: num})
    else:
        console.print(f"{num} letter{'' if num == 1 else 's'} {done}")


def _row(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "site": letter.site,
        "stream": letter.kind,
        "entry_id": letter.entry_id,
        "reason": letter.reason,
        "bytes": letter.num_bytes,
        "buried_at_s": letter.buried_at_ms / 1e3,
    }


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
