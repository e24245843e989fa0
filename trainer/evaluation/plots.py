"""What the figures of all studies share: panels on one scale, means with intervals, one legend, what it rests on.

Colours are those of Okabe and Ito (2008), which nobody confuses; markers tell lines apart in print without colour.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"
_INCHES_A_LETTER = 0.065
_SPLITS = {"sessions": "sessions held out", "random": "random frames, as the paper"}
Interval = Mapping[str, float]
"""mean, low, high: shares from 0 to 1."""


def panels(
    figure: "Figure", num_lines: int, num_columns: int, *, width_in: float = 3.8, height_in: float = 3.2
) -> "list[list[Axes]]":
    """A grid on one vertical scale, so that splits and parts can be compared by eye."""
    figure.set_size_inches(width_in * num_columns, height_in * num_lines + 0.8)
    cells = figure.subplots(num_lines, num_columns, squeeze=False, sharey=True)
    return [list(line) for line in cells]


def by_split(figure: "Figure", table: Sequence[Mapping[str, Any]]) -> "list[tuple[Axes, list[Mapping[str, Any]]]]":
    """A line of panels for each split, one for each part, titled, with its rows of the table.

    Of one part only, the splits stand side by side.
    """
    splits = list(dict.fromkeys(row["split"] for row in table))
    parts = list(dict.fromkeys(row["part"] for row in table))
    cells = panels(figure, len(splits), len(parts)) if len(parts) > 1 else panels(figure, 1, len(splits))
    if len(parts) == 1:
        cells = [[cell] for cell in cells[0]]
    found = []
    for split, line in zip(splits, cells, strict=True):
        for part, axes in zip(parts, line, strict=True):
            rows = [row for row in table if (row["split"], row["part"]) == (split, part)]
            if rows:
                axes.set_title(title(split, part, rows[0]), fontsize=9)
                found.append((axes, rows))
            else:
                axes.set_axis_off()
    return found


def title(split: str, part: str, row: Mapping[str, Any]) -> str:
    """Split and part in words, and how many frames were asked."""
    num = row["sessions"]
    sessions = "one session: no interval" if num == 1 else f"{num} sessions"
    return f"{_SPLITS.get(split, split)}: {part}\n{row['frames']:,} frames of {sessions}"


def beside(x: Sequence[float], *, number: int, among: Sequence[float]) -> list[float]:
    """Places on a log scale, each line's a little to the right of the one before: equal ones hide nothing.

    number: of the line. among: all x of the panel.
    """
    apart = (max(among) / min(among)) ** 0.015
    return [value * apart**number for value in x]


def curve(axes: "Axes", x: Sequence[float], values: Sequence[Interval], *, label: str, number: int) -> None:
    """Means in percent, joined, each with its interval. number: of the line, for colour and marker."""
    mean, reach = percent(values)
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    axes.errorbar(
        x, mean, reach, fmt=f"{marker}-", color=colour, label=label, ms=4, lw=1.2, elinewidth=0.9, capsize=2
    )


def percent(values: Sequence[Interval]) -> tuple[list[float], "np.ndarray[Any, np.dtype[np.float64]]"]:
    """Means, and (2, n) how far the interval reaches below and above; nan, not drawn, if there is none."""
    mean = [100 * value["mean"] for value in values]
    reach = [[100 * (v["mean"] - v["low"]), 100 * (v["high"] - v["mean"])] for v in values]
    return mean, np.maximum(0.0, np.array(reach, float).T)


def finish(
    figure: "Figure",
    report_protocol: Mapping[str, Any],
    *,
    what: str = "mean and 95 % interval",
    marker_scale: float = 1.0,
    is_x_shared: bool = True,
) -> None:
    """One legend for all panels below them, and above them what means and intervals rest on.

    is_x_shared: the panels of a column have the same ticks, which the lowest one shows for all.
    """
    handles = dict[str, Any]()
    for axes in figure.axes:
        axes.label_outer()
        if not is_x_shared:
            axes.tick_params(labelbottom=True)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        longest = max(map(len, handles))
        num_columns = int(figure.get_figwidth() / (0.6 + _INCHES_A_LETTER * longest))
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=max(1, min(num_columns, len(handles))),
            fontsize=8,
            markerscale=marker_scale,
        )
    figure.suptitle(f"{what}, {rests_on(report_protocol)}", fontsize=8)


def rests_on(report_protocol: Mapping[str, Any]) -> str:
    """Seeds, in words."""
    num_seeds = len(report_protocol["seeds"])
    return "sessions drawn anew, one seed" if num_seeds == 1 else f"sessions and {num_seeds} seeds drawn anew"
