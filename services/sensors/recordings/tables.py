"""Reports and examinations as rich tables on a terminal. Nothing is read or judged here."""

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from services.sensors.recordings.advice import shorten
from services.sensors.recordings.base import RecordingReport
from services.sensors.recordings.doctor import Clockwork, Examination


def show_examination(console: Console, found: Examination, *, advice: list[str], title: str) -> None:
    """The whole examination, then what to do about it."""
    sensors = Table("", "radar", "camera", box=None, header_style="bold", pad_edge=False)
    for name, radar, camera in zip(
        _CLOCK_ROWS, _clock_cells(found.radar), _clock_cells(found.camera), strict=True
    ):
        sensors.add_row(name, radar, camera)
    console.print(
        Panel(Group(sensors, Text(), _facts(found)), title=title, title_align="left", border_style="cyan")
    )
    for sentence in advice:
        console.print(Text.assemble(("• ", "yellow"), sentence))
    if not advice:
        console.print(Text("Nothing to complain about.", style="green"))


def show_report(console: Console, report: RecordingReport) -> None:
    """What was played, and the first files that were not, by name."""
    counts = ", ".join(f"{count} {name}" for name, count in report.counts.items())
    console.print(f"site [bold]{report.site}[/bold]: {counts}")
    for title, names in (
        ("missing", report.missing),
        ("corrupt", tuple(f"{bad.name}: {bad.reason}" for bad in report.corrupt)),
        ("in no index", report.surplus),
    ):
        if names:
            console.print(Text(f"{len(names)} {title}:", style="yellow"))
            for name in names[:_MAX_NAMES]:
                console.print(Text(f"  {name}"))
            if len(names) > _MAX_NAMES:
                console.print(Text(f"  and {len(names) - _MAX_NAMES} more (--json lists all)", style="dim"))
    for note in report.notes:
        console.print(Text(f"note: {note}", style="dim"))


_MAX_NAMES = 5
_CLOCK_ROWS = ("frames", "span", "rate", "step", "jitter", "gaps", "same time")


def _clock_cells(sensor: Clockwork) -> tuple[str, ...]:
    longest = max((gap.seconds for gap in sensor.gaps), default=0.0)
    return (
        str(sensor.num_frames),
        f"{sensor.span_s:.2f} s",
        f"{sensor.rate_hz:.2f} Hz",
        f"{sensor.step_ms:.1f} ms",
        f"{sensor.jitter_ms:.1f} ms",
        f"{len(sensor.gaps)}, longest {longest:.2f} s" if sensor.gaps else "none",
        str(sensor.num_same_time),
    )


def _facts(found: Examination) -> RenderableType:
    pairing, values, report = found.pairing, found.values, found.report
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    unpaired = f"{pairing.num_unpaired_radar} radar and {pairing.num_unpaired_camera} camera alone"
    facts.add_row("pairs", f"{pairing.num_pairs} within {pairing.window_ms:g} ms; {unpaired}")
    facts.add_row(
        "camera - radar",
        f"{pairing.offset_ms:+.1f} ms (spread {pairing.offset_spread_ms:.1f} ms) over {pairing.overlap_s:.2f} s",
    )
    facts.add_row("heatmaps", f"{', '.join(values.shapes) or 'none'} {', '.join(values.dtypes)}")
    facts.add_row(
        f"values ({values.unit})",
        f"{values.least:.4g} … 1 % {values.low:.4g} … mean {values.mean:.4g} … 99 % {values.high:.4g} … "
        f"{values.greatest:.4g}",
    )
    facts.add_row("images", ", ".join(found.image_shapes) or "none")
    facts.add_row(
        "labels", ", ".join(f"{count} {name}" for name, count in found.classes.items() if count) or "none"
    )
    facts.add_row("missing", f"{len(report.missing)} {_names(report.missing)}")
    facts.add_row("corrupt", f"{len(report.corrupt)} {_names(tuple(bad.name for bad in report.corrupt))}")
    facts.add_row("in no index", f"{len(report.surplus)} {_names(report.surplus)}")
    for note in report.notes:
        facts.add_row("note", note)
    return facts


def _names(names: tuple[str, ...]) -> str:
    return f"({shorten(names)})" if names else ""
