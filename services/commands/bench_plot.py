"""The picture of `echosight bench serve --plot`: latency over percentiles, the rare ones drawn wide."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from services.client.load.run import Result

_TICKS = (0.0, 50.0, 90.0, 99.0, 99.9, 99.99)


def draw_latency(results: Sequence[Result], path: Path) -> None:
    """One line for each number of clients, as far as its requests say anything of so rare ones."""
    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    most = max(len(result.latency_s) for result in results)
    for result in results:
        num = len(result.latency_s)
        if num:
            rarity = num / np.arange(num, 0, -1)  # one in so many is slower
            plan = result.plan
            label = (
                f"{plan.num_clients} client{'s' if plan.num_clients > 1 else ''}, {result.requests_per_s:,.0f}/s"
            )
            axes.plot(rarity, 1e3 * result.latency_s, label=label, drawstyle="steps-post")
    ticks = [tick for tick in _TICKS if 1 / (1 - tick / 100) <= max(most, 10)]
    axes.set_xscale("log")
    axes.set_xticks([1 / (1 - tick / 100) for tick in ticks], [f"{tick:g} %" for tick in ticks])
    axes.minorticks_off()
    axes.set_yscale("log")
    axes.set_xlabel("requests answered within")
    axes.set_ylabel("latency, ms")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
