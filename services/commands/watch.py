"""`echosight watch`: what is seen at each site right now, as a running server says."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import orjson
import typer
from rich import box
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from services.client import Client, ClientError, RefusedError
from services.commands.output import console, fail

_BAR = 12
_REMEMBERED = 200
_STALE_S = 2.0
_PAUSE_S = 1.0


def watch(
    site: Annotated[list[str] | None, typer.Option(help="Site; repeat for several. Default: all.")] = None,
    url: Annotated[str, typer.Option(help="Address of the API.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str,
        typer.Option(
            envvar="ECHOSIGHT_API_KEY", help="Key of the API; better in the environment than on the line."
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print each prediction as a line of JSON.")] = False,
    num: Annotated[int | None, typer.Option(min=1, help="End after so many predictions.")] = None,
) -> None:
    """Follow what the model server sees at each site, as the radars stream. Ctrl-C ends it.

    The label is the vote of the last frames, `?` where the model abstains; the latency is from capture to answer.
    A server that goes away is waited for. Exit status 2 if none answers at the start.

    [bold]Examples[/bold]

      echosight watch                                 a table of all sites

      echosight watch --site demo --json | jq .answer

      echosight watch --json --num 100 > hundred.jsonl
    """
    board = Board()
    try:
        if as_json or not console.is_terminal:
            _follow(board, url, api_key, site or [], num=num, as_json=as_json)
        else:
            with Live(get_renderable=board.table, console=console, refresh_per_second=4):
                _follow(board, url, api_key, site or [], num=num, is_silent=True)
    except KeyboardInterrupt:
        return
    except ClientError as error:
        fail(error)


def _follow(
    board: "Board",
    url: str,
    api_key: str,
    sites: list[str],
    *,
    num: int | None,
    as_json: bool = False,
    is_silent: bool = False,
) -> None:
    """Until `num` have come. Raises ClientError if the server does not answer at the start, or refuses."""
    left = num
    has_begun = False
    while True:
        try:
            with (
                Client(url, retries=0, api_key=api_key) as client,
                client.events(kinds=["prediction"], sites=sites) as events,
            ):
                has_begun, board.trouble = True, ""
                for event in events:
                    board.take_in(event)
                    if not is_silent:
                        _print(event, as_json=as_json)
                    left = None if left is None else left - 1
                    if left == 0:
                        return
        except RefusedError:
            raise
        except ClientError as error:
            if not has_begun:
                raise
            board.trouble = str(error)
            time.sleep(_PAUSE_S)  # the server is away: there is nothing to wait on


def _print(event: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(orjson.dumps(event).decode(), flush=True)
        return
    seen = Seen.of(event)
    console.print(
        f"{escape(seen.site)}  {escape(seen.shown)}  {100 * seen.confidence:.0f} %  {seen.latency_ms:.0f} ms"
        f"  v{seen.version}",
        highlight=False,
    )


@dataclass(frozen=True, slots=True)
class Seen:
    """What one prediction says, for people."""

    site: str
    label: str
    shown: str
    confidence: float
    latency_ms: float
    version: int

    @classmethod
    def of(cls, event: dict[str, Any]) -> "Seen":
        vote = event["smoothed"]
        label = str(vote["label"])
        reason = event["abstained"]
        return cls(
            site=str(event["site"]),
            label=label,
            shown=f"? {reason}" if reason else label,
            confidence=float(vote["probabilities"].get(label, 0.0)),
            latency_ms=float(event["latency_ms"]["captured"]),
            version=int(event["model"]["version"]),
        )


@dataclass(slots=True)
class _Site:
    newest: Seen
    at_s: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    latencies_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))


class Board:
    """The newest of each site, as a table. trouble: why nothing comes."""

    def __init__(self) -> None:
        self.trouble = ""
        self._sites: dict[str, _Site] = {}

    def take_in(self, event: dict[str, Any]) -> None:
        seen = Seen.of(event)
        site = self._sites.setdefault(seen.site, _Site(seen))
        site.newest = seen
        site.at_s.append(time.monotonic())
        site.latencies_ms.append(seen.latency_ms)

    def table(self) -> Table:
        table = Table("site", "seen", "confidence", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("frames/s", "p50 ms", "p99 ms", "model"):
            table.add_column(name, justify="right", no_wrap=True)
        for _, site in sorted(self._sites.items()):
            seen, now_s = site.newest, time.monotonic()
            is_stale = now_s - site.at_s[-1] > _STALE_S
            style = "dim" if is_stale else "yellow" if seen.shown != seen.label else "bold green"
            full = round(_BAR * min(max(seen.confidence, 0.0), 1.0))
            p50, p99 = np.percentile(site.latencies_ms, (50, 99))
            table.add_row(
                escape(seen.site),
                f"[{style}]{escape(seen.shown)}[/{style}]",
                f"{'█' * full}{'░' * (_BAR - full)} {100 * seen.confidence:3.0f} %",
                f"silent {now_s - site.at_s[-1]:.0f} s" if is_stale else f"{_rate(site.at_s):.1f}",
                f"{p50:.0f}",
                f"{p99:.0f}",
                f"v{seen.version}",
            )
        if self.trouble or not self._sites:
            table.caption = escape(self.trouble) or "nothing seen yet"
        return table


def _rate(at_s: deque[float]) -> float:
    """Per second, over what is remembered."""
    return (len(at_s) - 1) / max(at_s[-1] - at_s[0], 1e-3) if len(at_s) > 1 else 0.0
