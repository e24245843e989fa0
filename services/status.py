"""What Echosight is doing right now, from what its workers last said: one line for `up`, tables for `status`.

Workers say so in events; one that has not spoken for a while is called silent, and its numbers are no news.
It imports none of the workers.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

_SILENT_S = 15.0


def number(event: Mapping[str, Any], name: str) -> float:
    """A number that an event tells; 0 if it does not, or tells something else."""
    value = event.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


@dataclass(slots=True)
class Status:
    """The newest event of each kind and replica, and what of it a person wants to read."""

    events: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    def take_in(self, events: list[dict[str, Any]]) -> None:
        """Anybody may write events: one that is no object is passed over."""
        for event in events:
            if isinstance(event, dict):
                self.events[str(event.get("kind")), str(event.get("replica", ""))] = event

    def newest(self, kind: str) -> dict[str, Any]:
        """The last thing that workers of a kind said; empty for none."""
        return max(self._of(kind).values(), key=lambda event: number(event, "at_s"), default={})

    def silent_s(self, kind: str) -> float | None:
        """For how long nobody of this kind has spoken; None if somebody does."""
        event = self.newest(kind)
        return _age_s(event) if _age_s(event) > _SILENT_S else None

    def ingest(self) -> list[dict[str, Any]]:
        """What each replica that still speaks said last; what the last of them said if none does.

        A site is with one of them, the one with the highest token: what another says of it was before a hand-over.
        """
        live = [event for event in self._of("ingest").values() if _age_s(event) <= _SILENT_S]
        live = live or [event for event in [self.newest("ingest")] if event]
        holders: dict[str, dict[str, Any]] = {}
        for event in sorted(live, key=lambda event: number(event, "at_s")):
            for name, site in _objects(event, "sites").items():
                if name not in holders or number(site, "token") >= number(holders[name], "token"):
                    holders[name] = site
        return [_without_lost_sites(event, holders) for event in live]

    def _of(self, kind: str) -> dict[str, dict[str, Any]]:
        return {replica: event for (name, replica), event in self.events.items() if name == kind}

    def line(self, *, champion: int | None) -> str:
        """One line: pairs/s, stored, step, loss against chance, live model, accuracy."""
        trainer = self.newest("trainer")
        parts = [
            self._storing(),
            self._learning(trainer),
            f"live model v{champion}" if champion is not None else "no model live yet",
        ]
        if trainer.get("accuracy") is not None:
            version, tested = number(trainer, "version"), number(trainer, "tested")
            accuracy = 100 * number(trainer, "accuracy")
            parts.append(f"accuracy {accuracy:.0f} % (v{version:.0f}, {tested:.0f} held-out labels)")
        elif trainer:
            parts.append(f"{number(trainer, 'labels'):.0f} labels")
        return " | ".join(parts)

    def _storing(self) -> str:
        silent_s = self.silent_s("ingest")
        if silent_s is not None:
            return f"ingest silent for {silent_s:.0f} s"
        rate, pairs = (sum(number(one, name) for one in self.ingest()) for name in ("pairs_per_s", "pairs"))
        return f"{rate:.1f} pairs/s | {pairs:,.0f} stored"

    def _learning(self, trainer: Mapping[str, Any]) -> str:
        silent_s = self.silent_s("trainer")
        if silent_s is not None:
            return f"trainer silent for {silent_s:.0f} s"
        if not trainer:
            return "trainer is starting"
        if "loss" not in trainer:
            return f"waiting for pairs: {number(trainer, 'pairs'):.0f} of {number(trainer, 'needed'):.0f}"
        step, loss, chance = (number(trainer, name) for name in ("step", "loss", "chance"))
        return f"step {step:,.0f} | loss {loss:.2f} (chance {chance:.2f})"

    def tables(self) -> RenderableType:
        """Per site: what is stored, the clocks, under which reason its frames left, what curation did."""
        tables = (self._sites(), self._clocks(), self._frames(), self._curation())
        return Group(*(table for table in tables if table is not None))

    def live(self) -> dict[str, dict[str, Any]]:
        """What each API replica that still speaks said of the radars' streams, by its name."""
        told = {name: event.get("live") for name, event in self._of("api").items() if _age_s(event) <= _SILENT_S}
        return {name: said for name, said in sorted(told.items()) if isinstance(said, dict)}

    def live_lines(self) -> list[str]:
        """The same in words, a line for each; whose it is only where there are several."""
        told = self.live()
        return [
            f"{name}: {_classified(said)}" if len(told) > 1 else _classified(said) for name, said in told.items()
        ]

    def _each_site(self) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
        """Name, what is said of it, and who says so."""
        said = [(name, site, event) for event in self.ingest() for name, site in _objects(event, "sites").items()]
        return sorted(said, key=lambda one: one[0])

    def _sites(self) -> Table | None:
        """None where no site is known."""
        table = _table("site", "replica")
        for name in ("pairs", "pairs/s", "MB", "held", "p50 ms", "p99 ms"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, site, event in self._each_site():
            table.add_row(
                escape(name),
                escape(str(event.get("replica", ""))),
                f"{number(site, 'pairs'):,.0f}",
                f"{number(site, 'pairs_per_s'):.1f}",
                f"{number(site, 'bytes') / 1e6:,.1f}",
                f"{number(site, 'held'):,.0f}",
                *(f"{number(site, key):.0f}" if key in site else "-" for key in ("p50_ms", "p99_ms")),
            )
        return table if table.row_count else None

    def _clocks(self) -> Table | None:
        """None as long as no site's clocks are known."""
        table = _table("site")
        for name in ("camera - radar ms", "applied ms", "drift ppm"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, site, _ in self._each_site():
            if "clock_offset_ms" in site:
                table.add_row(
                    escape(name),
                    f"{number(site, 'clock_offset_ms'):+.1f} ± {number(site, 'clock_uncertainty_ms'):.1f}",
                    f"{number(site, 'clock_applied_ms'):+.1f}",
                    f"{number(site, 'clock_drift_ppm'):+.1f}",
                )
        return table if table.row_count else None

    def _frames(self) -> Table | None:
        """A row for each site and stream; None where no frame has left."""
        table = _table("site", "stream", "frames, by why they left ingest")
        for name, site, _ in self._each_site():
            by_kind: dict[str, dict[str, float]] = {}
            for key, num in _numbers(site, "frames").items():
                kind, _, reason = key.partition(".")
                by_kind.setdefault(kind, {})[reason] = num
            for kind, reasons in sorted(by_kind.items()):
                table.add_row(escape(name), escape(kind), _counts(reasons))
        return table if table.row_count else None

    def _curation(self) -> Table | None:
        """None where nothing was curated."""
        table = _table("site", "pairs, by what curation made of them")
        for name, site, _ in self._each_site():
            if counts := _numbers(site, "curation"):
                table.add_row(escape(name), _counts(counts))
        return table if table.row_count else None


def _classified(said: Mapping[str, Any]) -> str:
    """What one replica has made of the radars' streams."""
    skipped, abstained = (sum(_numbers(said, name).values()) for name in ("skipped", "abstained"))
    parts = [f"{number(said, 'predictions'):,.0f} frames of {len(_numbers(said, 'sites'))} sites classified"]
    if "p50_ms" in said:
        parts.append(f"{number(said, 'p50_ms'):.0f} ms from capture (p99 {number(said, 'p99_ms'):.0f})")
    parts.append(f"{abstained:,.0f} without an answer, {skipped:,.0f} skipped")
    return ", ".join(parts)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _counts(counts: Mapping[str, float]) -> str:
    """The largest first, what never happened left out."""
    in_order = sorted((-num, what) for what, num in counts.items() if num)
    return " · ".join(f"{escape(what)} [bold]{-num:,.0f}[/bold]" for num, what in in_order) or "none yet"


def _without_lost_sites(event: dict[str, Any], holders: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The event without sites that another replica has by now, and its sums likewise."""
    told = _objects(event, "sites")
    kept = {name: site for name, site in told.items() if holders[name] is site}
    if len(kept) == len(told):
        return event
    sums = {name: sum(number(site, name) for site in kept.values()) for name in ("pairs", "bytes", "pairs_per_s")}
    return event | {"sites": kept} | sums


def _age_s(event: Mapping[str, Any]) -> float:
    """Seconds since an event; 0 if it does not tell when."""
    return time.time() - number(event, "at_s") if number(event, "at_s") else 0.0


def _objects(event: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """The objects in a member of an event; none if it is something else."""
    members = event.get(name)
    members = members if isinstance(members, dict) else {}
    return {str(key): value for key, value in members.items() if isinstance(value, dict)}


def _numbers(event: Mapping[str, Any], name: str) -> dict[str, float]:
    """The numbers in an object in a member of an event."""
    members = event.get(name)
    members = members if isinstance(members, dict) else {}
    return {str(key): number(members, key) for key in members}
