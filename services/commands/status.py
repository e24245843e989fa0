"""`echosight status`: what is stored, learnt and served right now."""

import time
from typing import Annotated, Any

import typer
from rich.table import Table

from services.commands.output import console, fail, megabytes, print_json, read_settings
from services.core.embedded import resolve_redis_url
from services.core.errors import EchosightError
from services.core.registry import Registry
from services.core.settings import CoreSettings
from services.core.store import StoreReader
from services.core.streams import EventLog, StreamsLost
from services.learning_status import learning_table
from services.status import Status, number


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what is stored, learnt and served right now, from what the workers left on disk and in the streams."""
    settings = read_settings(CoreSettings)
    registry = Registry(settings.registry_dir, settings.model_name)
    reader = StoreReader(settings.store_dir)
    newest = Status()
    try:
        reader.refresh()
        aliases, versions = registry.aliases(), registry.versions()
    except EchosightError as error:
        fail(error)
    streams = "up"
    try:
        events = EventLog(resolve_redis_url(settings), source="status")
        newest.take_in(events.latest())
    except (*StreamsLost, EchosightError) as error:
        streams = str(error)
    num_labels = len(reader.labelled())
    if as_json:
        found: dict[str, Any] = {
            "streams": streams,
            "store": {
                "pairs": len(reader),
                "bytes": reader.num_bytes,
                "sites": reader.sites,
                "labels": num_labels,
            },
            "registry": {"versions": versions, "aliases": aliases},
            "ingest": newest.ingest(),
            "trainer": newest.newest("trainer") or None,
            "gauges": newest.newest("gauges") or None,
            "at_s": round(time.time(), 3),
        }
        print_json(found)
        return
    table = Table(show_header=False, box=None)
    table.add_row("streams", streams)
    table.add_row("store", f"{len(reader):,} pairs, {megabytes(reader.num_bytes)}, {num_labels} labelled")
    table.add_row("sites", ", ".join(reader.sites) or "none yet")
    table.add_row("registry", "; ".join([f"{len(versions)} versions", *(f"{k} v{v}" for k, v in aliases.items())]))
    table.add_row("now", newest.line(champion=aliases.get("champion")))
    heard_s = max((number(event, "at_s") for event in newest.events.values()), default=0.0)
    if heard_s:
        age_s = time.time() - heard_s
        table.add_row("heard", f"{age_s:.0f} s ago" + ("; is it running?" if age_s > 30 else ""))
    console.print(table)
    learning = learning_table(newest.newest("trainer"))
    console.print(newest.tables(), *([learning] if learning else []))
