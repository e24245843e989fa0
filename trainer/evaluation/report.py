"""What a study leaves behind: JSON, its table as CSV, its figure as PNG, and the table on the terminal."""

import csv
import importlib.util
import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from services.core.errors import EchosightError
from services.core.files import write_atomically
from services.core.frames import CLASSES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DETAIL = ("balanced_accuracy", *(f"recall_{name}" for name in CLASSES), "sessions", "seeds")
"""Columns that only the files have."""
_CONFUSIONS_A_LINE = 4
Row = dict[str, Any]
"""One line of the table: plain values; {"mean", "low", "high"} for an interval."""


class EvaluationError(EchosightError):
    """A study cannot be run, or its result cannot be written."""


@dataclass(slots=True)
class Report:
    """name: of the study, and of its files. question: what it answers. protocol: what decides the outcome."""

    name: str
    question: str
    protocol: Row
    table: list[Row] = field(default_factory=list)
    details: Row = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    draw: "Callable[[Figure], None] | None" = None
    pictures: "dict[str, Callable[[Figure], None]]" = field(default_factory=dict)

    def add_confusions(self, cases: Mapping[str, str]) -> None:
        """A picture of the confusion matrices of those cases of `details`. cases: with the title of each."""
        found = {title: self.details[case]["confusion"] for case, title in cases.items() if case in self.details}
        if found:
            self.pictures[f"{self.name}_confusion"] = lambda figure: _draw_confusions(figure, found)

    def as_json(self) -> Row:
        return {
            "study": self.name,
            "question": self.question,
            "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "torch": torch.__version__,
            "protocol": self.protocol,
            "table": self.table,
            "details": self.details,
            "notes": self.notes,
        }

    def write(self, out_dir: Path) -> list[Path]:
        """Write NAME.json, NAME.csv and the figures; return their paths. Raises EvaluationError."""
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY
            files = {f"{self.name}.json": orjson.dumps(self.as_json(), option=options)}
            files[f"{self.name}.csv"] = _csv(self.table)
            drawn = {self.name: self.draw} if self.draw else {}
            for name, draw in (drawn | self.pictures).items():
                files[f"{name}.png"] = as_png(draw)
            for name, content in files.items():
                write_atomically(out_dir / name, content)
        except OSError as error:
            raise EvaluationError(
                f"cannot write to {out_dir}: {error.strerror}", remedy="name another folder: --out DIR"
            ) from None
        return [out_dir / name for name in files]

    def show(self, console: Console) -> None:
        """The table, as people read it."""
        console.print(f"[bold]{escape(self.question)}[/bold]")
        columns = list(dict.fromkeys(name for row in self.table for name in row))
        columns = [name for name in columns if name not in _DETAIL]
        table = Table(*(Column(name.replace("_", " "), no_wrap=True) for name in columns), box=None)
        for row in self.table:
            table.add_row(*(escape(_shown(row.get(name))) for name in columns))
        console.print(table)
        for note in self.notes:
            console.print(f"- {escape(note)}", highlight=False)


def _draw_confusions(figure: "Figure", found: dict[str, Row]) -> None:
    """Rows are truth, in percent of it; the counts are in the JSON."""
    num_columns = min(_CONFUSIONS_A_LINE, len(found))
    num_lines = -(-len(found) // num_columns)
    figure.set_size_inches(3.1 * num_columns, 3.2 * num_lines + 0.3)
    figure.suptitle(
        "percent of the frames of a true class; beside it how many there are, all seeds together", fontsize=8
    )
    for number, (title, confusion) in enumerate(found.items(), 1):
        axes = figure.add_subplot(num_lines, num_columns, number)
        counts = np.array(confusion["counts"], float)
        percent = 100 * counts / np.maximum(1, counts.sum(1, keepdims=True))
        axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
        for row, column in np.argwhere(np.repeat(counts.sum(1, keepdims=True) > 0, len(counts), 1)):
            colour = "white" if percent[row, column] > 60 else "black"
            axes.text(
                column, row, f"{percent[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=8
            )
        names = confusion["classes"]
        axes.set_xticks(range(len(names)), names, fontsize=7, rotation=30)
        asked = [f"{name}\n{num:,.0f}" for name, num in zip(names, counts.sum(1), strict=True)]
        axes.set_yticks(range(len(names)), asked, fontsize=7)
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("answer")
        axes.set_ylabel("truth")


def _shown(value: Any) -> str:
    match value:
        case None:
            return "-"
        case {"mean": mean, "low": low, "high": high}:
            return f"{100 * mean:.1f}" + ("" if low != low else f" ({100 * low:.1f} to {100 * high:.1f})")
        case float():
            return f"{value:.4g}"
        case _:
            return str(value)


def _csv(table: list[Row]) -> bytes:
    """An interval becomes three columns."""
    flat = [_flat(row) for row in table]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue().encode()


def _flat(row: Row) -> Row:
    found: Row = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= {name if key == "mean" else f"{name}_{key}": part for key, part in value.items()}
        else:
            found[name] = value
    return found


def require_libraries() -> None:
    """What is needed at the end is asked for at the start. Raises EvaluationError."""
    for name in ("matplotlib", "sklearn"):
        if importlib.util.find_spec(name) is None:
            raise EvaluationError(f"{name} is not installed", remedy="pip install -r requirements/evaluation.txt")


def as_png(draw: "Callable[[Figure], None]") -> bytes:
    """A PNG of what `draw` puts into a figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", dpi=180)
    FigureCanvasAgg(figure)
    draw(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "echosight"})
    return buffer.getvalue()
