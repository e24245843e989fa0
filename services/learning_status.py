"""How the learning stands, as a table for `status`: what was reached, beside what knowing nothing gets.

From the trainer's last event, which anybody may have written. docs/gauges.md says what to do about a bad value.
"""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from services.status import number

_BAR = 20


def learning_table(event: Mapping[str, Any]) -> Table | None:
    """event: the trainer's newest. None until it has read its gauges."""
    read = event.get("gauges")
    if not isinstance(read, dict) or not read:
        return None
    table = Table("learning", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("now", "knows nothing"):
        table.add_column(name, justify="right")
    table.add_column("")
    if number(event, "chance") > 0:
        loss, chance = number(event, "loss"), number(event, "chance")
        table.add_row("loss, nats", f"{loss:.2f}", f"{chance:.2f}", _bar(loss / chance))
    for key, name in (("mi_nats", "radar tells of image, nats"), ("held_out_mi_nats", "... of what is held out")):
        if key in read:
            table.add_row(name, f"{number(read, key):.2f}", "0.00", "at least")
    if "r5" in read:
        r5, chance = number(read, "r5"), number(read, "r5_chance")
        table.add_row("image found in 5 tries", f"{100 * r5:.0f} %", f"{100 * chance:.0f} %", _bar(r5))
    if "rank" in read:
        table.add_row(
            "directions in use", f"{number(read, 'rank'):.1f}", "1.0", f"spread {number(read, 'std'):.2f}"
        )
    if "probe" in read:
        probe = number(read, "probe")
        table.add_row("held-out labels right", f"{100 * probe:.0f} %", "", _bar(probe))
    if number(event, "rollbacks") > 0:
        times = f"{number(event, 'rollbacks'):.0f}"
        table.add_row("[red]loss no number: went back[/red]", times, "0", "see docs/gauges.md")
    lags = read.get("lags")
    for site, lag in sorted(lags.items()) if isinstance(lags, dict) else ():
        if isinstance(lag, list) and len(lag) == 3 and all(isinstance(value, int | float) for value in lag):
            low_high = f"{lag[1]:+.0f} to {lag[2]:+.0f}"
            table.add_row(f"camera's lag at {escape(str(site))}, ms", f"{lag[0]:+.0f}", "", low_high)
    alarms = read.get("alarms")
    for alarm in alarms if isinstance(alarms, list) else ():
        table.add_row(f"[red]{escape(str(alarm))}[/red]", "", "", "see docs/gauges.md")
    return table


def _bar(share: float) -> str:
    full = round(_BAR * min(max(share, 0.0), 1.0))
    return "█" * full + "░" * (_BAR - full)
