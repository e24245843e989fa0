"""One run of recording for a person: the connection, the signals, a live table, a summary. It reads no options."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from services.core.embedded import resolve_redis_url
from services.core.streams import connect
from services.core.streams.follower import Follower
from services.sensors.console import stop_on_signals
from services.sensors.record import Recorded, Recorder
from services.sensors.settings import SensorsSettings


async def record_session(
    path: Path,
    settings: SensorsSettings,
    *,
    sites: Sequence[str] = (),
    seconds: float | None = None,
    from_start: bool = False,
    overwrite: bool = False,
    wait: bool = False,
) -> Recorded:
    """Record until a signal comes, or for `seconds`. Raises StreamsError, RecordingError or BadFrameError."""
    stop = stop_on_signals()
    client = connect(resolve_redis_url(settings))
    try:
        follower = Follower(client, sites=sites, from_start=from_start)
        recorder = Recorder(follower, path, overwrite=overwrite, wait=wait)
        console = Console(stderr=True)
        if not console.is_terminal:
            return await recorder.run(stop, seconds=seconds)
        with Live(console=console, get_renderable=lambda: topics_table(recorder.recorded), transient=True):
            return await recorder.run(stop, seconds=seconds)
    finally:
        await client.aclose()


def show_recorded(console: Console, recorded: Recorded) -> None:
    """What is in the file, and what is not."""
    console.print(topics_table(recorded))
    for name, counts in sorted(recorded.topics.items()):
        if counts.num_undecodable:
            console.print(Text(f"first undecodable entry of {name}: {counts.first_undecodable}", style="yellow"))
    console.print(
        Text(
            f"{recorded.path}: {recorded.num_frames} frames, {recorded.file_bytes / 1e6:.1f} MB, "
            f"{recorded.seconds:.1f} s ({recorded.ended})"
            + (f"; the server was away {recorded.num_lost} times" if recorded.num_lost else "")
        ),
        soft_wrap=True,
    )


def topics_table(recorded: Recorded) -> Table:
    """A line for each topic, as it is now: another thread may go on counting."""
    table = Table("topic", box=None, header_style="bold", pad_edge=False)
    for name in ("frames", "MB", "undecodable", "trimmed unread"):
        table.add_column(name, justify="right")
    for name, counts in sorted(recorded.topics.copy().items()):
        table.add_row(
            name,
            f"{counts.num_frames:,}",
            f"{counts.num_bytes / 1e6:,.1f}",
            str(counts.num_undecodable),
            str(counts.num_trimmed),
        )
    return table
