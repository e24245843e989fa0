"""`echosight status`: what is stored, learnt and served right now."""

import time
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from services.commands.output import console, fail, megabytes, print_json, read_settings
from services.core.embedded import resolve_redis_url
from services.core.errors import EchosightError, StreamsError
from services.core.registry import Registry
from services.core.settings import CoreSettings
from services.core.store import StoreReader
from services.core.streams import EventLog, StreamsLost, masked
from services.learning_status import learning_table
from services.status import Status, number


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what is stored, learnt and served right now, from the disk and from what the workers last said.

    Exit status 2 if REDIS_URL names a server that does not answer.

    [bold]Examples[/bold]

      echosight status                            tables

      watch -n 5 echosight status                 ... again and again

      echosight status --json | jq .ingest        for scripts
    """
    settings = read_settings(CoreSettings)
    registry = Registry(settings.registry_dir, settings.model_name)
    reader = StoreReader(settings.store_dir)
    newest = Status()
    try:
        reader.refresh()
        aliases, versions = registry.aliases(), registry.versions()
    except EchosightError as error:
        fail(error)
    streams = _listen(settings, newest)
    num_labels = len(reader.labelled())
    if as_json:
        found: dict[str, Any] = {
            "streams": streams or "up",
            "store": {
                "pairs": len(reader),
                "bytes": reader.num_bytes,
                "sites": reader.sites,
                "labels": num_labels,
            },
            "registry": {"versions": versions, "aliases": aliases},
            "ingest": None if streams else newest.ingest(),
            "trainer": newest.newest("trainer") or None,
            "gauges": newest.newest("gauges") or None,
            "live": newest.live(),
            "at_s": round(time.time(), 3),
        }
        print_json(found)
    else:
        table = Table(show_header=False, box=None)
        is_refused = bool(streams and settings.redis_url)
        table.add_row("streams", "[red]no answer[/red]" if is_refused else escape(streams) or "up")
        table.add_row("store", f"{len(reader):,} pairs, {megabytes(reader.num_bytes)}, {num_labels} labelled")
        table.add_row("sites", escape(", ".join(reader.sites)) or "none yet")
        of = escape("; ".join([f"{len(versions)} versions", *(f"{k} v{v}" for k, v in aliases.items())]))
        table.add_row("registry", of)
        if not streams:
            _add_news(table, newest, champion=aliases.get("champion"))
        console.print(table)
        if not streams:
            learning = learning_table(newest.newest("trainer"))
            console.print(newest.tables(), *([learning] if learning else []))
    if streams and settings.redis_url:
        fail(StreamsError(f"what runs now is not known: {streams}"))


def _listen(settings: CoreSettings, newest: Status) -> str:
    """Take in what the workers last said; why that is not possible, or ""."""
    try:
        events = EventLog(resolve_redis_url(settings), source="status")
        newest.take_in(events.latest())
        events.close()
    except StreamsLost as error:
        return f"{masked(settings.redis_url)} does not answer: {error}; start the server, or put REDIS_URL right"
    except EchosightError as error:
        return str(error)
    return ""


def _add_news(table: Table, newest: Status, *, champion: int | None) -> None:
    if not newest.events:
        table.add_row("now", "nobody has reported yet; start with `echosight up`")
        return
    table.add_row("now", newest.line(champion=champion))
    trainer = newest.newest("trainer")
    if trainer:
        encoded, pending, skipped = (number(trainer, name) for name in ("pairs", "pending", "skipped"))
        images = f"{encoded:,.0f} encoded, {pending:,.0f} still to encode"
        table.add_row("images", images + (f", {skipped:,.0f} of no use to the model" if skipped else ""))
    for line in newest.live_lines():
        table.add_row("live", escape(line))
    heard_s = max((number(event, "at_s") for event in newest.events.values()), default=0.0)
    if heard_s:
        age_s = time.time() - heard_s
        table.add_row("heard", f"{age_s:.0f} s ago" + ("; is it running?" if age_s > 30 else ""))
